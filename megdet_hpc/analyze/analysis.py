"""All figures of an analysis, as tables: one list of rows each, which CSV, JSON, charts and page share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megdet_hpc.analyze.scoring import (
    Subject,
    calibration,
    confusion,
    error_rows,
    rows_by_range,
    scorer_of,
)
from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.evaluation.coco import mean_of, metrics_of
from megdet_hpc.evaluation.detections import DetectionTable
from megdet_hpc.evaluation.scorer import Measured, limits_of

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Threshold:
    """A score from which on detections are shown and counted, and what comes of it over all classes."""

    score: float
    precision: float
    recall: float
    f1: float
    chosen: bool
    """Whether it is that of the highest F1; else a user gave it."""


@dataclass(frozen=True)
class MatchedBoxes:
    """What became of every detection and of every box at IoU 0.5, without regard to scores."""

    right: NDArray[np.bool_]  # [k] the detection has a box of its class
    counted: NDArray[np.bool_]  # [k] neither in a crowd region nor beyond max_detections
    best: NDArray[np.float64]  # [boxes] score of the detection that has the box; -1 for none

    @classmethod
    def of(cls, subject: Subject, scorer: Any) -> MatchedBoxes:
        """The outcome that hotcoco's diagnostics hold."""
        found = scorer.image_diagnostics(iou_thr=0.5)
        right, counted = np.zeros((2, len(subject.found.scores)), np.bool_)
        for number, status in found["dt_status"].items():
            counted[number - 1], right[number - 1] = True, status == "tp"
        best = np.full(len(subject.truth.boxes.crowd), -1.0)
        for number, detection in found["gt_match"].items():
            best[number - 1] = subject.found.scores[detection - 1]
        return cls(right, counted, best)


@dataclass(frozen=True)
class Analysis:
    """What is right and wrong in a set's detections. NaN is a number that does not exist."""

    subject: Subject
    outcome: MatchedBoxes
    metrics: dict[str, float]
    threshold: Threshold
    classes: Rows
    curves: dict[str, NDArray[np.float64]]
    """`recall` [101], `precision50`, `precision75`, `precision`, `score50` [c, 101]; NaN for a class without boxes."""
    confusion: NDArray[np.int64]
    errors: Rows
    ranges: Rows
    calibration: dict[str, float]
    bins: Rows
    images: Rows
    """All images, the worst first."""

    @property
    def num_boxes(self) -> int:
        """Boxes to find."""
        return int((~self.subject.truth.boxes.crowd).sum())

    @property
    def unfound(self) -> list[str]:
        """The classes with boxes of which not one was found."""
        subject, hit = self.subject, self.outcome.best >= 0
        have = np.bincount(subject.truth.boxes.classes[hit], minlength=len(subject.truth.names))
        return [
            name for name, boxes, found in zip(subject.truth.names, subject.truth.boxes_of_classes, have, strict=True)
            if boxes and not found
        ]  # fmt: skip


def analyze(
    pack: PackedCoco, table: DetectionTable, *, num_images: int, max_detections: int, score: float | None
) -> Analysis:
    """Score detections and find out what is wrong with them.

    Args:
        pack: the ground truth.
        table: detections in it.
        num_images: score only the first so many images.
        max_detections: the best so many of an image and class count.
        score: the score from which on detections count in the confusion matrix and the images; None: that of the
            highest F1.
    """
    subject = Subject.of(pack, table, num_images, max_detections)
    scorer = scorer_of(subject)
    scorer.evaluate()
    scorer.accumulate()
    outcome = MatchedBoxes.of(subject, scorer)
    threshold = _threshold(subject.found.scores, outcome, int((~subject.truth.boxes.crowd).sum()), score)
    summary, bins, expected = calibration(scorer)
    curves = _curves(scorer)
    return Analysis(
        subject,
        outcome,
        metrics_of(Measured.of(scorer, limits_of(max_detections))),
        threshold,
        _class_rows(subject, scorer, outcome, expected),
        curves,
        confusion(subject, outcome.counted & (subject.found.scores >= threshold.score)),
        error_rows(scorer, bool(outcome.counted.any())),
        rows_by_range(subject, "size") + rows_by_range(subject, "aspect"),
        summary,
        bins,
        _image_rows(subject, outcome, threshold.score),
    )


def best_f1(
    scores: NDArray[np.float64], right: NDArray[np.bool_], boxes: int
) -> tuple[float, float, float, float]:  # fmt: skip
    """The score from which on detections have the highest F1, with that precision, recall and F1; NaN of nothing."""
    if not boxes or not len(scores):
        return math.nan, math.nan, math.nan, math.nan
    order = np.argsort(-scores, kind="stable")
    hits, ordered = np.cumsum(right[order]), scores[order]
    last = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))  # equal scores come together
    f1 = 2 * hits[last] / (last + 1 + boxes)
    place = int(np.argmax(f1))
    number = int(last[place])
    return float(ordered[number]), hits[number] / (number + 1), hits[number] / boxes, float(f1[place])


def _threshold(scores: NDArray[np.float64], outcome: MatchedBoxes, boxes: int, given: float | None) -> Threshold:
    if given is None:
        best = best_f1(scores[outcome.counted], outcome.right[outcome.counted], boxes)
        return Threshold(0.5 if math.isnan(best[0]) else best[0], *best[1:], chosen=not math.isnan(best[0]))
    shown = outcome.counted & (scores >= given)
    hits, number = int((outcome.right & shown).sum()), int(shown.sum())
    precision = hits / number if number else math.nan
    recall = hits / boxes if boxes else math.nan
    return Threshold(given, precision, recall, 2 * hits / (number + boxes) if boxes else math.nan, chosen=False)


def _curves(scorer: Any) -> dict[str, NDArray[np.float64]]:
    precision, scores = scorer.eval["precision"][:, :, :, 0, -1], scorer.eval["scores"][0, :, :, 0, -1]
    precision = np.where(precision < 0, np.nan, precision)
    # past the highest recall that was reached there is no detection, and so no score
    reached = (precision[0] > 0) & (scores > 0)
    return {
        "recall": np.linspace(0, 1, 101),
        "precision50": precision[0].T,
        "precision75": precision[5].T,
        "precision": precision.mean(axis=0).T,
        "score50": np.where(reached, scores, np.nan).T,
    }


def _class_rows(subject: Subject, scorer: Any, outcome: MatchedBoxes, expected: dict[str, float]) -> Rows:
    """A row for each class, in the order of the category ids."""
    precision, recall = scorer.eval["precision"], scorer.eval["recall"]
    boxes, rows = subject.truth.boxes_of_classes, []
    for place, name in enumerate(subject.truth.names):
        own = outcome.counted & (subject.found.classes == place)
        best = best_f1(subject.found.scores[own], outcome.right[own], int(boxes[place]))
        row = {"class": name, "boxes": int(boxes[place]), "detections": int(own.sum())}
        row |= {"AP": mean_of(precision[:, :, place, 0, -1])}
        row |= {"AP50": mean_of(precision[0, :, place, 0, -1]), "AP75": mean_of(precision[5, :, place, 0, -1])}
        row |= {f"AP{size}": mean_of(precision[:, :, place, area, -1]) for area, size in enumerate("sml", start=1)}
        row |= {"AR": mean_of(recall[:, place, 0, -1]), "best_F1": best[3], "score_of_best_F1": best[0]}
        rows.append(row | {"calibration_error": expected.get(name, math.nan) if own.any() else math.nan})
    return rows


def _image_rows(subject: Subject, outcome: MatchedBoxes, score: float) -> Rows:
    """A row for each image: boxes found and missed and wrong detections from a score on; the lowest F1 first."""
    shown = outcome.counted & (subject.found.scores >= score)
    count = subject.truth.num_images
    right = np.bincount(subject.found.images[shown & outcome.right], minlength=count)
    wrong = np.bincount(subject.found.images[shown & ~outcome.right], minlength=count)
    boxes = np.bincount(subject.truth.boxes.images[~subject.truth.boxes.crowd], minlength=count)
    missed = boxes - right
    with np.errstate(invalid="ignore"):  # an image with neither boxes nor detections has no F1
        f1 = 2 * right / (2 * right + wrong + missed)
    order = np.lexsort((np.arange(count), -(wrong + missed), np.where(np.isnan(f1), 2.0, f1)))
    pack = subject.truth.pack
    return [
        {"image_id": int(pack.image_ids[i]), "file_name": pack.file_name(i), "boxes": int(boxes[i])}
        | {"found": int(right[i]), "missed": int(missed[i]), "wrong": int(wrong[i]), "F1": float(f1[i])}
        for i in order.tolist()
    ]
