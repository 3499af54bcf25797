"""hotcoco's evaluation of a packed set, with ids that suit it, and its measures of an error's cost and of confidence.

Its arrays are those of pycocotools. n: images, k: detections, c: classes, 101: recalls 0, 0.01, ... 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import hotcoco
import numpy as np
from numpy.typing import NDArray

from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.evaluation.coco import class_names, mean_of
from megdet_hpc.evaluation.detections import DetectionTable

MATCH_IOU = 0.5  # a detection is right from this IoU with a box of its class on
_FEWER = (1, 10)
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

    pack: PackedCoco
    names: list[str]
    """Names of the classes, [c]."""
    truth_images: NDArray[np.int64]
    """Index of each box's image."""
    truth_boxes: NDArray[np.float64]
    truth_classes: NDArray[np.int64]
    """0 to c - 1."""
    truth_areas: NDArray[np.float64]
    crowd: NDArray[np.bool_]
    found_images: NDArray[np.int64]
    found_boxes: NDArray[np.float64]
    found_classes: NDArray[np.int64]
    scores: NDArray[np.float64]
    num_images: int
    max_detections: int
    """Detections of an image and class that count, best first."""

    @classmethod
    def of(cls, pack: PackedCoco, table: DetectionTable, num_images: int, max_detections: int) -> Subject:
        """The first images of a pack, and what was found in them."""
        own = [pack.annotations(index) for index in range(num_images)]
        names = class_names(pack)
        ids = np.array(list(names), np.int64)
        place = {image_id: index for index, image_id in enumerate(pack.image_ids[:num_images].tolist())}
        images = np.array([place.get(image_id, -1) for image_id in table.image_ids.tolist()], np.int64)
        table, images = table.rows(images >= 0), images[images >= 0]
        return cls(
            pack,
            list(names.values()),
            np.repeat(np.arange(num_images), [len(a.ids) for a in own]),
            np.concatenate([np.zeros((0, 4)), *(a.boxes_xywh for a in own)]),
            np.searchsorted(ids, np.concatenate([np.zeros(0, np.int64), *(a.category_ids for a in own)])),
            np.concatenate([np.zeros(0), *(a.areas for a in own)]),
            np.concatenate([np.zeros(0, np.bool_), *(a.iscrowd for a in own)]),
            images,
            table.boxes_xywh,
            np.searchsorted(ids, table.category_ids),
            table.scores,
            num_images,
            max_detections,
        )

    def boxes_of_classes(self) -> NDArray[np.int64]:
        """Boxes to find of each class, [c]; crowd regions do not count."""
        return np.bincount(self.truth_classes[~self.crowd], minlength=len(self.names))


def aspects_of(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Width by height, [k]; of a box without height the largest that counts."""
    return np.minimum(boxes[:, 2] / np.maximum(boxes[:, 3], 1e-9), 1e9)


def evaluator(subject: Subject, chosen: NDArray[np.bool_] | None = None) -> Any:
    """hotcoco's COCOeval over a set, before its work. Detection i and box i have the id i + 1.

    Args:
        subject: what is compared.
        chosen: mask of the detections that take part, [k]; None for all.
    """
    areas = subject.found_boxes[:, 2] * subject.found_boxes[:, 3]
    return _evaluator(subject, subject.truth_areas, areas, chosen)


def _evaluator(
    subject: Subject,
    truth_areas: NDArray[np.float64],
    found_areas: NDArray[np.float64],
    chosen: NDArray[np.bool_] | None = None,
) -> Any:
    width, height = subject.pack.widths.tolist(), subject.pack.heights.tolist()
    images = [{"id": i + 1, "width": width[i], "height": height[i]} for i in range(subject.num_images)]
    categories = [{"id": place, "name": name} for place, name in enumerate(subject.names, start=1)]
    truth = _records(subject.truth_images, subject.truth_boxes, subject.truth_classes, truth_areas)
    for record, crowd in zip(truth, subject.crowd.tolist(), strict=True):
        record["iscrowd"] = int(crowd)
    found = _records(subject.found_images, subject.found_boxes, subject.found_classes, found_areas)
    for record, score in zip(found, subject.scores.tolist(), strict=True):
        record["score"] = score
    if chosen is not None:
        found = [found[place] for place in np.flatnonzero(chosen).tolist()]
    common = {"images": images, "categories": categories}
    known, detected = (hotcoco.COCO({**common, "annotations": records}) for records in (truth, found))
    scorer = hotcoco.COCOeval(known, detected, "bbox")
    limit = subject.max_detections
    scorer.params.max_dets = sorted({*(few for few in _FEWER if few < limit), limit})
    return scorer


def _records(
    images: NDArray[np.int64], boxes: NDArray[np.float64], classes: NDArray[np.int64], areas: NDArray[np.float64]
) -> list[dict[str, Any]]:
    columns = zip(images.tolist(), boxes.tolist(), classes.tolist(), areas.tolist(), strict=True)
    return [
        {"id": number, "image_id": image + 1, "category_id": label + 1, "bbox": box, "area": area, "iscrowd": 0}
        for number, (image, box, label, area) in enumerate(columns, start=1)
    ]


def rows_by_range(subject: Subject, kind: str) -> list[dict[str, Any]]:
    """AP, AP50 and recall of the boxes in each range of `size` or `aspect`.

    hotcoco and COCO leave boxes outside an area's range out of the score, and so they do with any number in the place
    of the area: here the aspect.
    """
    if kind == "size":
        ranges, truth = SIZES, subject.truth_areas
        found = subject.found_boxes[:, 2] * subject.found_boxes[:, 3]
    else:
        ranges, truth, found = ASPECTS, aspects_of(subject.truth_boxes), aspects_of(subject.found_boxes)
    scorer = _evaluator(subject, truth, found)
    scorer.params.area_rng = [[0.0, 1e10], *map(list, ranges.values())]
    scorer.params.area_rng_lbl = ["all", *ranges]
    scorer.evaluate()
    scorer.accumulate()
    precision, recall = scorer.eval["precision"], scorer.eval["recall"]
    rows = []
    for place, (name, (low, high)) in enumerate(ranges.items(), start=1):
        boxes = int(((truth >= low) & (truth <= high) & ~subject.crowd).sum())
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
    scorer = evaluator(subject, counted)
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
