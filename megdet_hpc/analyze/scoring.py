"""hotcoco's measures of what is wrong with detections: an error's cost, sizes and shapes, confidence.

k: detections, c: classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.evaluation.coco import mean_of
from megdet_hpc.evaluation.columns import Columns, Truth
from megdet_hpc.evaluation.detections import DetectionTable
from megdet_hpc.evaluation.scorer import evaluator

MATCH_IOU = 0.5  # a detection is right from this IoU with a box of its class on
_EVERY = 10**9  # no limit of hotcoco's own

# Width by height of a box. 3 to 1 and more is what anchors of 1:2, 1:1 and 2:1 fit badly.
ASPECTS = {
    "very tall (below 1:3)": (0.0, 1 / 3),
    "tall (1:3 to 2:3)": (1 / 3, 2 / 3),
    "square (2:3 to 3:2)": (2 / 3, 3 / 2),
    "wide (3:2 to 3:1)": (3 / 2, 3.0),
    "very wide (above 3:1)": (3.0, 1e10),
}
# Square pixels: COCO's sizes.
SIZES = {
    "small (below 32 x 32)": (0.0, 32.0**2),
    "medium (32 x 32 to 96 x 96)": (32.0**2, 96.0**2),
    "large (above 96 x 96)": (96.0**2, 1e10),
}


@dataclass(frozen=True)
class Subject:
    """The set and the detections that are compared, as columns; crowd regions are among the boxes."""

    truth: Truth
    found: Columns
    max_detections: int
    """Detections of an image and class that count, best first."""

    @classmethod
    def of(cls, pack: PackedCoco, table: DetectionTable, num_images: int, max_detections: int) -> Subject:
        """The first images of a pack, and what was found in them."""
        truth = Truth(pack, num_images)
        return cls(truth, truth.found(table), max_detections)


def aspects_of(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Width by height, [k]; of a box without height the largest that counts."""
    return np.minimum(boxes[:, 2] / np.maximum(boxes[:, 3], 1e-9), 1e9)


def scorer_of(subject: Subject, truth: Columns | None = None, found: Columns | None = None) -> Any:
    """hotcoco's COCOeval over a set, before its work. Detection i and box i have the id i + 1.

    Args:
        subject: what is compared.
        truth, found: columns in place of the subject's own.
    """
    boxes = subject.truth.boxes if truth is None else truth  # either may be without a box, which is false
    return evaluator(subject.truth, boxes, subject.found if found is None else found, subject.max_detections)


def rows_by_range(subject: Subject, kind: str) -> list[dict[str, Any]]:
    """AP, AP50 and recall of the boxes in each range of `size` or `aspect`.

    hotcoco and COCO leave boxes outside an area's range out of the score, and so they do with any number in the place
    of the area: here the aspect.
    """
    truth, found, ranges = subject.truth.boxes, subject.found, SIZES
    if kind == "aspect":
        truth, found = (replace(boxes, areas=aspects_of(boxes.boxes_xywh)) for boxes in (truth, found))
        ranges = ASPECTS
    scorer = scorer_of(subject, truth, found)
    scorer.params.area_rng = [[0.0, 1e10], *map(list, ranges.values())]
    scorer.params.area_rng_lbl = ["all", *ranges]
    scorer.evaluate()
    scorer.accumulate()
    precision, recall = scorer.eval["precision"], scorer.eval["recall"]
    rows = []
    for place, (name, (low, high)) in enumerate(ranges.items(), start=1):
        boxes = int(((truth.areas >= low) & (truth.areas <= high) & ~truth.crowd).sum())
        ap, ap50 = mean_of(precision[:, :, :, place, -1]), mean_of(precision[0, :, :, place, -1])
        rows.append({"by": kind, "range": name, "boxes": boxes, "AP": ap, "AP50": ap50})
        rows[-1]["AR"] = mean_of(recall[:, :, place, -1])
    return rows


ERRORS = {
    "Cls": "right place, wrong class",
    "Loc": "right class, box off",
    "Both": "wrong class and box off",
    "Dupe": "second detection of a box",
    "Bkg": "nothing there",
    "Miss": "box that nothing points to",
}


def error_rows(scorer: Any, found_any: bool) -> list[dict[str, Any]]:
    """Each of TIDE's error types with its number and what it costs: AP50 once it is mended, less AP50."""
    tide = scorer.tide_errors(pos_thr=MATCH_IOU, bg_thr=0.1)
    measured = tide["ap_base"] >= 0 and found_any
    return [
        {"error": name, "meaning": text, "count": int(tide["counts"][name])}
        | {"cost_AP50": float(tide["delta_ap"][name]) if measured else math.nan}
        for name, text in ERRORS.items()
    ]


def confusion(subject: Subject, counted: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Boxes of each class (rows) by the class they were found as (columns), [c + 1, c + 1]; the last is background.

    Args:
        subject: what is compared.
        counted: mask of the detections, [k], without those in crowd regions, which hotcoco would call wrong here.
    """
    scorer = scorer_of(subject, found=subject.found.rows(counted))
    matrix: NDArray[np.int64] = scorer.confusion_matrix(iou_thr=MATCH_IOU, max_det=_EVERY)["matrix"].astype(np.int64)
    return matrix


def calibration(scorer: Any) -> tuple[dict[str, float], list[dict[str, Any]], dict[str, float]]:
    """How far scores are from the share of detections that are right.

    Returns:
        Expected and largest error with the number of detections; a row for each bin; the expected error by class.
    """
    found = scorer.calibration(n_bins=10, iou_threshold=MATCH_IOU)
    number = found["num_detections"]
    rows = [
        {"score_from": b["bin_lower"], "score_to": b["bin_upper"], "detections": b["count"]}
        | {"mean_score": b["avg_confidence"] if b["count"] else math.nan}
        | {"share_right": b["avg_accuracy"] if b["count"] else math.nan}
        for b in found["bins"]
    ]
    summary = {"ECE": found["ece"] if number else math.nan, "MCE": found["mce"] if number else math.nan}
    return {**summary, "detections": number}, rows, dict(found["per_category"])
