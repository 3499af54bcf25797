"""Pascal VOC's average precision of boxes at IoU 0.5, over 11 recalls (VOC 2007) or the whole curve (2010 and later).

Each detection takes the object of its class and image with the highest IoU. At IoU 0.5 or more the first detection of
an object, best score first, is right, and each further one is wrong. A detection of a difficult object is neither,
however many there are. Difficult objects are not looked for. A crowd region counts as a difficult object here.

d: detections, C: classes.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from megdet_hpc.config.outcome import SCORE_NAMES
from megdet_hpc.errors import UserError
from megdet_hpc.evaluation.columns import Columns, Truth

VOC_METRICS = {metric: name for metric, name in SCORE_NAMES.items() if metric != "coco"}
"""The names under which evaluation.metric's two of VOC are printed and logged."""
_IOU = 0.5


def voc_average_precisions(truth: Truth, found: Columns, metric: str) -> NDArray[np.float64]:
    """The AP of each class, (C,) float64; NaN for a class without an object to find.

    Args:
        truth: the ground truth.
        found: the detections, see Truth.found; all of them count.
        metric: voc07 or voc12.

    Raises:
        UserError: metric is neither.
    """
    if metric not in VOC_METRICS:
        raise UserError(f"evaluation.metric {metric!r}; accepted: coco, {', '.join(VOC_METRICS)}")
    ignored = truth.boxes.crowd | truth.difficult
    to_find = np.bincount(truth.boxes.classes[~ignored], minlength=len(truth.names))
    best = _best_objects(truth, found)
    order = np.argsort(-found.scores, kind="stable")  # equal scores: in the order of the detections
    best, classes = best[order], found.classes[order]
    hit = best >= 0
    counted = ~np.append(ignored, False)[best]  # -1, no object, is the last
    first = np.zeros(len(best), np.bool_)
    first[np.unique(best, return_index=True)[1]] = True
    right = hit & first
    values = [
        _area_of(right[counted & (classes == place)], int(number), metric) if number else math.nan
        for place, number in enumerate(to_find)
    ]
    return np.array(values, np.float64)


def _best_objects(truth: Truth, found: Columns) -> NDArray[np.int64]:
    """Row of the object of the highest IoU of each detection, (d,); -1 where that IoU is below 0.5."""
    boxes, number = truth.boxes, len(truth.names)
    keys, own = boxes.images * number + boxes.classes, found.images * number + found.classes
    rows, members = np.argsort(keys, kind="stable"), np.argsort(own, kind="stable")
    best = np.full(len(found), -1, np.int64)
    shared = np.intersect1d(keys, own)
    spans = [np.searchsorted(keys[rows], shared, side) for side in ("left", "right")]
    spans += [np.searchsorted(own[members], shared, side) for side in ("left", "right")]
    for first_row, end_row, first, end in zip(*spans, strict=True):
        objects, detections = rows[first_row:end_row], members[first:end]
        iou = _iou(found.boxes_xywh[detections], boxes.boxes_xywh[objects])
        place = iou.argmax(axis=1)
        enough = iou[np.arange(len(detections)), place] >= _IOU
        best[detections[enough]] = objects[place[enough]]
    return best


def _iou(boxes: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """IoU of each box with each of the others, from x, y, width, height; 0 where both are empty."""
    a, b = boxes[:, None], others[None]
    ends = np.minimum(a[..., :2] + a[..., 2:], b[..., :2] + b[..., 2:])
    both = (ends - np.maximum(a[..., :2], b[..., :2])).clip(min=0).prod(axis=-1)
    either = a[..., 2:].prod(axis=-1) + b[..., 2:].prod(axis=-1) - both
    return np.divide(both, either, out=np.zeros_like(both), where=either > 0)


def _area_of(right: NDArray[np.bool_], to_find: int, metric: str) -> float:
    """The AP of one class.

    Args:
        right: whether each detection is right, best score first.
        to_find: number of objects to find, 1 or more.
        metric: voc07 or voc12.
    """
    if not len(right):
        return 0.0
    hits = np.cumsum(right)
    precision = hits / np.arange(1, len(right) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    if metric == "voc07":  # whole numbers, since 3 of 10 is no recall of 3 * 0.1 in floating point
        places = np.searchsorted(hits * 10, np.arange(11) * to_find)
        return float(np.append(envelope, 0.0)[places].sum() / 11)
    return float((envelope * np.diff(hits, prepend=0)).sum() / to_find)
