"""COCO average precision by pycocotools.

A metric that does not exist, since there is no box to find, is NaN here, `none` where it is printed and null in
metrics.jsonl. pycocotools gives it as -1.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from megdet_hpc.data.categories import Categories
from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.evaluation.detections import DetectionTable

# COCO counts so many detections of an image and class, best first; also the default of evaluation.max_detections.
COCO_MAX_DETECTIONS = 100
# Recall is also given for so few detections.
_FEWER = (1, 10)
# COCOeval's area ranges: all boxes, then those of an area below 32^2, between, above 96^2 square pixels.
_AREAS = {"": 0, "s": 1, "m": 2, "l": 3}
_IOU_50, _IOU_75 = 0, 5  # in COCOeval's ten thresholds 0.50, 0.55, ... 0.95


@dataclass(frozen=True)
class ClassScore:
    """What was found of one category."""

    name: str
    boxes: int
    """Boxes to find; crowd regions do not count."""
    ap: float
    ap50: float
    """0 to 1; NaN without a box to find."""


@dataclass(frozen=True)
class Scores:
    """Box metrics over a packed set."""

    metrics: dict[str, float]
    """COCO's twelve by their names, 0 to 1; NaN where there is no box of that size to find."""
    classes: list[ClassScore]
    """In the order of the category ids."""

    @property
    def boxes(self) -> int:
        """Boxes to find in all."""
        return sum(category.boxes for category in self.classes)

    def logged(self) -> dict[str, float]:
        """The metrics, and those of each class as AP/NAME and AP50/NAME."""
        own = {f"AP/{c.name}": c.ap for c in self.classes} | {f"AP50/{c.name}": c.ap50 for c in self.classes}
        return self.metrics | own


def score(
    pack: PackedCoco,
    detections: DetectionTable | NDArray[np.float64],
    num_images: int | None = None,
    *,
    max_detections: int = COCO_MAX_DETECTIONS,
) -> Scores:
    """Box metrics of COCO over a packed set, and those of each class.

    Args:
        pack: the ground truth.
        detections: see DetectionTable.of; there may be none.
        num_images: score only the first so many images.
        max_detections: the best so many of an image and class count; COCO's own number is 100.
    """
    images = [int(image_id) for image_id in pack.image_ids[:num_images]]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = _indexed(pack, images, _truth(pack, len(images)))
        found = _indexed(pack, images, _found(DetectionTable.of(detections)))
        scorer = COCOeval(truth, found, "bbox")
        scorer.params.maxDets = sorted({*(few for few in _FEWER if few < max_detections), max_detections})
        scorer.evaluate()
        scorer.accumulate()
    return Scores(_metrics(scorer), _classes(scorer, pack, truth.dataset["annotations"]))


def average_precision(
    pack: PackedCoco,
    detections: DetectionTable | NDArray[np.float64],
    num_images: int | None = None,
    *,
    max_detections: int = COCO_MAX_DETECTIONS,
) -> dict[str, float]:
    """The metrics of `score` alone: AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl.

    The third recall is named after max_detections: AR300 where 300 count.
    """
    return score(pack, detections, num_images, max_detections=max_detections).metrics


def _indexed(pack: PackedCoco, images: list[int], annotations: list[dict[str, Any]]) -> COCO:
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image_id} for image_id in images],
        "categories": pack.categories,
        "annotations": annotations,
    }
    coco.createIndex()
    return coco


def _truth(pack: PackedCoco, num_images: int) -> list[dict[str, Any]]:
    """The boxes of the first images, numbered anew from 1.

    pycocotools takes a match with annotation id 0 for none, and of annotations with one id it keeps the last.
    """
    records: list[dict[str, Any]] = []
    for index in range(num_images):
        own, image_id = pack.annotations(index), int(pack.image_ids[index])
        columns = (own.boxes_xywh.tolist(), own.category_ids.tolist(), own.iscrowd.tolist(), own.areas.tolist())
        for box, category, crowd, area in zip(*columns, strict=True):
            record = {"id": len(records) + 1, "image_id": image_id, "category_id": category}
            records.append({**record, "bbox": box, "iscrowd": int(crowd), "area": area})
    return records


def _found(detections: DetectionTable) -> list[dict[str, Any]]:
    boxes, scores = detections.boxes_xywh.tolist(), detections.scores.tolist()
    columns = (detections.image_ids.tolist(), boxes, scores, detections.category_ids.tolist())
    return [
        {"id": number, "image_id": image_id, "category_id": category, "bbox": box, "score": value}
        | {"area": box[2] * box[3], "iscrowd": 0}
        for number, (image_id, box, value, category) in enumerate(zip(*columns, strict=True), start=1)
    ]


def _mean(values: NDArray[np.float64]) -> float:
    """The mean of what COCOeval could measure; NaN of nothing."""
    measured = values[values > -1]
    return float(measured.mean()) if measured.size else math.nan


def _metrics(scorer: COCOeval) -> dict[str, float]:
    # precision [threshold, recall, class, area, limit], recall [threshold, class, area, limit]. COCOeval's own summary
    # looks for the AP at 100 detections, and finds none where the limit is another
    precision, recall = scorer.eval["precision"], scorer.eval["recall"]
    metrics = {
        "AP": _mean(precision[:, :, :, 0, -1]),
        "AP50": _mean(precision[_IOU_50, :, :, 0, -1]),
        "AP75": _mean(precision[_IOU_75, :, :, 0, -1]),
    }
    metrics |= {f"AP{size}": _mean(precision[:, :, :, area, -1]) for size, area in _AREAS.items() if size}
    for place, limit in enumerate(scorer.params.maxDets):
        metrics[f"AR{limit}"] = _mean(recall[:, :, 0, place])
    return metrics | {f"AR{size}": _mean(recall[:, :, area, -1]) for size, area in _AREAS.items() if size}


def _classes(scorer: COCOeval, pack: PackedCoco, truth: list[dict[str, Any]]) -> list[ClassScore]:
    precision = scorer.eval["precision"][:, :, :, 0, -1]
    own = Categories(pack.categories)
    names = dict(zip(own.ids, own.names, strict=True))
    boxes = Counter(record["category_id"] for record in truth if not record["iscrowd"])
    several = {name for name, count in Counter(own.names).items() if count > 1}
    return [
        ClassScore(
            f"{names[key]} (id {key})" if names[key] in several else names[key],
            boxes[key],
            _mean(precision[:, :, place]),
            _mean(precision[_IOU_50, :, place]),
        )
        for place, key in enumerate(map(int, scorer.params.catIds))
    ]


def metric_text(value: float | None, digits: int = 3) -> str:
    """A metric as it is printed everywhere: its digits, or `none` where there is no box to find."""
    return "none" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def score_text(metrics: dict[str, float]) -> str:
    """`AP=0.xxx AP50=0.xxx`, or `nothing to score` where the set has no box to find."""
    if math.isnan(metrics["AP"]):
        return "nothing to score"
    return " ".join(f"{key}={metric_text(metrics[key])}" for key in ("AP", "AP50"))


def result_line(metrics: dict[str, float], **further: object) -> str:
    """The last line that a program prints: `result: AP=0.xxx AP50=0.xxx key=value ...`, see score_text."""
    return " ".join([f"result: {score_text(metrics)}", *[f"{key}={value}" for key, value in further.items()]])


def class_table(classes: Iterable[ClassScore]) -> str:
    """A line for each class: name, boxes to find, AP, AP50."""
    rows = [("class", "boxes", "AP", "AP50")]
    rows += [(c.name, f"{c.boxes:,}", metric_text(c.ap), metric_text(c.ap50)) for c in classes]
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"{name:{width}}  {boxes:>9}  {ap:>6}  {ap50:>6}" for name, boxes, ap, ap50 in rows)


def what_is_scored(pack: PackedCoco, num_images: int, max_detections: int) -> list[str]:
    """What a reader of the numbers should know where they are not COCO's plain ones; one sentence each."""
    said = []
    skipped = pack.manifest["summary"].get("skipped", {})
    left_out = {kind: sum(skipped.get(kind, {}).values()) for kind in ("images", "annotations")}
    if num_images < len(pack):
        said.append(f"only the first {num_images} of {len(pack)} images are scored")
    if any(left_out.values()):
        counts = " and ".join(f"{number} {kind}" for kind, number in left_out.items() if number)
        said.append(f"{counts} were left out when {pack.directory} was packed; they are not scored")
    if max_detections != COCO_MAX_DETECTIONS:
        said.append(
            f"evaluation.max_detections is {max_detections}: AP and AR{max_detections} count so many boxes of an image "
            f"and class, COCO's own {COCO_MAX_DETECTIONS}"
        )
    return said


def what_is_missing(scores: Scores, pack: PackedCoco, num_images: int) -> list[str]:
    """Why a metric is `none`; one sentence, or nothing where each exists."""
    if not scores.boxes:
        crowds = sum(int(pack.annotations(index).iscrowd.sum()) for index in range(num_images))
        why = f"all {crowds} annotations are crowd regions (iscrowd 1)" if crowds else "they have no annotation"
        return [f"nothing to score in the {num_images} images of {pack.directory}: {why}"]
    absent = [key for key, value in scores.metrics.items() if math.isnan(value)]
    return [f"none: there is no box of that size to find ({', '.join(absent)})"] if absent else []
