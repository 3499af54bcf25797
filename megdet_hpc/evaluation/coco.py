"""COCO average precision of boxes and masks.

If there is no box to find, a metric does not exist. It is NaN here, `none` where it is printed and null in
metrics.jsonl. The scorers give -1.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megdet_hpc.config.outcome import EMA_PREFIX
from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.errors import UserError
from megdet_hpc.evaluation.columns import Truth
from megdet_hpc.evaluation.detections import DetectionTable
from megdet_hpc.evaluation.reference import compare_by_pycocotools, compare_on_all_ranks
from megdet_hpc.evaluation.scorer import Measured, compare
from megdet_hpc.evaluation.voc import VOC_METRICS, voc_average_precisions
from megdet_hpc.parallel.communicator import Communicator

# COCO counts so many detections of an image and class, best first; also the default of evaluation.max_detections.
COCO_MAX_DETECTIONS = 100
# COCOeval's area ranges: all boxes, then those of an area below 32^2, between, above 96^2 square pixels.
_AREAS = {"": 0, "s": 1, "m": 2, "l": 3}
# pycocotools' names of what is compared: boxes, or masks; the metrics of masks are named segm_AP and so on.
IOU_TYPES = ("bbox", "segm")
_PREFIX = {"bbox": "", "segm": "segm_"}
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
    segm_ap: float | None = None
    segm_ap50: float | None = None
    """The same of masks; None where they are not scored."""
    voc: float | None = None
    """VOC's AP of boxes; None where evaluation.metric is coco."""


@dataclass(frozen=True)
class Scores:
    """Metrics over a packed set."""

    metrics: dict[str, float]
    """COCO's twelve by their names, those of masks as segm_AP and so on, VOC's as in VOC_METRICS; 0 to 1, NaN where
    there is no box to find."""
    classes: list[ClassScore]
    """Scores of each class, in the order of the category ids."""
    masks_unscored: str = ""
    """Why the masks that were found are not scored."""
    metric: str = "coco"
    """evaluation.metric."""

    @property
    def boxes(self) -> int:
        """Boxes to find in all."""
        return sum(category.boxes for category in self.classes)

    def logged(self) -> dict[str, float]:
        """The metrics, and those of each class as AP/NAME and AP50/NAME, of masks as segm_AP/NAME."""
        own = {f"AP/{c.name}": c.ap for c in self.classes} | {f"AP50/{c.name}": c.ap50 for c in self.classes}
        for c in self.classes:
            if c.segm_ap is not None and c.segm_ap50 is not None:
                own |= {f"segm_AP/{c.name}": c.segm_ap, f"segm_AP50/{c.name}": c.segm_ap50}
            if c.voc is not None:
                own[f"{VOC_METRICS[self.metric]}/{c.name}"] = c.voc
        return self.metrics | own


def score(
    truth: Truth | PackedCoco,
    detections: DetectionTable | NDArray[np.float64],
    num_images: int | None = None,
    *,
    max_detections: int = COCO_MAX_DETECTIONS,
    iou_types: Sequence[str] | None = None,
    measured: dict[str, Measured] | None = None,
    metric: str = "coco",
) -> Scores:
    """COCO's metrics over a packed set, and those of each class.

    Args:
        truth: the ground truth, or the pack that holds it.
        detections: see DetectionTable.of; there may be none.
        num_images: score only the first so many images of a pack.
        max_detections: the best so many of an image and class count; COCO's own number is 100.
        iou_types: ("bbox",) or IOU_TYPES; None: with segm where the detections have masks and the set too.
        measured: what `measure_together` gave for the same detections; None to measure here.
        metric: coco; voc07 or voc12 adds that AP of VOC to COCO's metrics.

    Raises:
        UserError: segm is asked for by name, and there are no masks.
        PackError: the set's segmentations are damaged.
    """
    truth = truth if isinstance(truth, Truth) else Truth(truth, num_images)
    table = DetectionTable.of(detections)
    iou_types = _kinds(truth, table, iou_types)
    if measured is None:
        measure = compare if has_fast_scorer() else compare_by_pycocotools
        measured = {kind: measure(truth, truth.found(table, kind), kind, max_detections) for kind in iou_types}
    metrics = {_PREFIX[kind] + key: value for kind, own in measured.items() for key, value in metrics_of(own).items()}
    classes = _classes(measured["bbox"], truth)
    if "segm" in measured:
        masks = _classes(measured["segm"], truth)
        classes = [replace(c, segm_ap=m.ap, segm_ap50=m.ap50) for c, m in zip(classes, masks, strict=True)]
    if metric != "coco":
        values = voc_average_precisions(truth, truth.found(table), metric)
        metrics[VOC_METRICS[metric]] = voc_mean(values)
        classes = [replace(c, voc=value) for c, value in zip(classes, values.tolist(), strict=True)]
    unscored = "" if table.masks is None or "segm" in measured else _missing_masks(truth, table)
    return Scores(metrics, classes, unscored, metric)


def voc_mean(values: NDArray[np.float64]) -> float:
    """The mean over the classes that have an object to find; NaN where none has."""
    there = values[~np.isnan(values)]
    return float(there.mean()) if there.size else math.nan


def has_fast_scorer() -> bool:
    """Whether hotcoco is installed."""
    return importlib.util.find_spec("hotcoco") is not None


def measure_together(
    truth: Truth, table: DetectionTable | None, max_detections: int, world: Communicator
) -> dict[str, Measured] | None:
    """The work of `score` shared out over the ranks, where it would take long. Collective of the world; blocks.

    Messages `scorer`, and `matches` for boxes and for masks. Rank 0's hotcoco is quicker alone than the messages are.

    Args:
        truth: the ground truth, the same on every rank.
        table: all detections, on rank 0.
        max_detections: the best so many of an image and class count.
        world: all ranks.

    Returns:
        What `score` takes, on rank 0; None on the others, and where rank 0 has hotcoco.
    """
    shared = None if table is None or has_fast_scorer() else (_kinds(truth, table, None), table)
    shared = world.broadcast_object(shared, name="scorer")
    if shared is None:
        return None
    kinds, table = shared
    parts = {kind: compare_on_all_ranks(truth, truth.found(table, kind), kind, max_detections, world) for kind in kinds}
    return {kind: part for kind, part in parts.items() if part is not None} or None


def _kinds(truth: Truth, table: DetectionTable, asked: Sequence[str] | None) -> Sequence[str]:
    """What is compared.

    Raises:
        UserError: masks are asked for, and there are none.
    """
    missing = _missing_masks(truth, table) if asked is None or "segm" in asked else ""
    if asked is None:
        return IOU_TYPES[:1] if missing else IOU_TYPES
    if missing:
        raise UserError(f"segm: {missing}")
    return asked


def average_precision(
    pack: PackedCoco,
    detections: DetectionTable | NDArray[np.float64],
    num_images: int | None = None,
    *,
    max_detections: int = COCO_MAX_DETECTIONS,
    iou_types: Sequence[str] | None = None,
) -> dict[str, float]:
    """The metrics of `score` alone: AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl, and segm_AP ... of masks.

    The third recall is named after max_detections: AR300 where 300 count.
    """
    return score(pack, detections, num_images, max_detections=max_detections, iou_types=iou_types).metrics


def _missing_masks(truth: Truth, table: DetectionTable) -> str:
    """Why masks cannot be scored; "" where they can."""
    if table.masks is None:
        return "the detections have no masks"
    return f"of {truth.pack.directory}, {truth.lacking_masks}" if truth.lacking_masks else ""


def mean_of(values: NDArray[np.float64]) -> float:
    """The mean of what COCOeval could measure; NaN of nothing."""
    measured = values[values > -1]
    return float(measured.mean()) if measured.size else math.nan


def metrics_of(measured: Measured) -> dict[str, float]:
    """COCO's twelve metrics by their names; NaN where there is no box of that size to find."""
    # COCOeval's own summary looks for the AP at 100 detections, and finds none where the limit is another
    precision, recall = measured.precision, measured.recall
    metrics = {
        "AP": mean_of(precision[:, :, :, 0, -1]),
        "AP50": mean_of(precision[_IOU_50, :, :, 0, -1]),
        "AP75": mean_of(precision[_IOU_75, :, :, 0, -1]),
    }
    metrics |= {f"AP{size}": mean_of(precision[:, :, :, area, -1]) for size, area in _AREAS.items() if size}
    for place, limit in enumerate(measured.limits):
        metrics[f"AR{limit}"] = mean_of(recall[:, :, 0, place])
    return metrics | {f"AR{size}": mean_of(recall[:, :, area, -1]) for size, area in _AREAS.items() if size}


def _classes(measured: Measured, truth: Truth) -> list[ClassScore]:
    precision = measured.precision[:, :, :, 0, -1]
    return [
        ClassScore(name, int(boxes), mean_of(precision[:, :, place]), mean_of(precision[_IOU_50, :, place]))
        for place, (name, boxes) in enumerate(zip(truth.names, truth.boxes_of_classes, strict=True))
    ]


def metric_text(value: float | None, digits: int = 3) -> str:
    """A metric as it is printed everywhere: its digits, or `none` where there is no box to find."""
    return "none" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def score_text(metrics: dict[str, float]) -> str:
    """`AP=0.xxx AP50=0.xxx`, with segm_AP and segm_AP50 of masks; `nothing to score` where there is no box to find.

    VOC's AP comes first where evaluation.metric asks for it.

    Scores of averaged weights follow as ema_AP and so on.
    """
    if math.isnan(metrics["AP"]):
        return "nothing to score"
    main = (*VOC_METRICS.values(), "AP", "AP50", "segm_AP", "segm_AP50")
    shown = [key for key in (*main, *(EMA_PREFIX + key for key in main)) if key in metrics]
    return " ".join(f"{key}={metric_text(metrics[key])}" for key in shown)


def result_line(metrics: dict[str, float], **further: object) -> str:
    """The last line that a program prints: `result: AP=0.xxx AP50=0.xxx key=value ...`, see score_text."""
    return " ".join([f"result: {score_text(metrics)}", *[f"{key}={value}" for key, value in further.items()]])


def metric_lines(metrics: dict[str, float]) -> list[str]:
    """All metrics with four digits: a line of boxes, and one of masks where they are scored."""
    texts = {key: f"{key}={metric_text(value, 4)}" for key, value in metrics.items()}
    masks = [text for key, text in texts.items() if key.startswith(_PREFIX["segm"])]
    return [" ".join(texts[key] for key in texts if texts[key] not in masks), *([" ".join(masks)] if masks else [])]


def class_table(classes: Sequence[ClassScore]) -> str:
    """A line for each class: name, boxes to find, AP, AP50, and those of masks and VOC where they are scored."""
    voc = any(c.voc is not None for c in classes)
    masks = any(c.segm_ap is not None for c in classes)
    width = max(map(len, ["class", *(c.name for c in classes)]))
    lines = [
        f"{'class':{width}}  {'boxes':>9}  {'AP':>6}  {'AP50':>6}" + "  segm_AP  segm_AP50" * masks + "  AP50_voc" * voc
    ]
    for c in classes:
        line = f"{c.name:{width}}  {c.boxes:>9,}  {metric_text(c.ap):>6}  {metric_text(c.ap50):>6}"
        lines.append(line + f"  {metric_text(c.segm_ap):>7}  {metric_text(c.segm_ap50):>9}" * masks)
        lines[-1] += f"  {metric_text(c.voc):>8}" * voc
    return "\n".join(lines)


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
    """Why a metric is `none` or masks have none; a sentence each, or nothing where all exist."""
    if not scores.boxes:
        crowds = sum(int(pack.annotations(index).iscrowd.sum()) for index in range(num_images))
        why = f"all {crowds} annotations are crowd regions (iscrowd 1)" if crowds else "they have no annotation"
        return [f"nothing to score in the {num_images} images of {pack.directory}: {why}"]
    absent = [key for key, value in scores.metrics.items() if math.isnan(value)]
    said = [f"none: there is no box of that size to find ({', '.join(absent)})"] if absent else []
    return said + ([f"masks are not scored: {scores.masks_unscored}"] if scores.masks_unscored else [])
