"""Detections of several detectors in the same images, merged image by image and class by class.

ensemble-boxes does weighted boxes fusion (Solovyev et al., 2021) and NMW. Its nms is torchvision's with another loop,
and its soft_nms gives back the scores before they were lowered, so those two are those of `evaluation/merging.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megdet_hpc.ensemble.method import BY_LIBRARY, SOFT_LEAST_SCORE, Fusion
from megdet_hpc.evaluation.detections import DetectionTable
from megdet_hpc.evaluation.merging import hard_nms, soft_nms
from megdet_hpc.log import progress_bar

_SHORT = 2  # seconds before a bar appears


def fuse(
    tables: Sequence[DetectionTable], fusion: Fusion, sizes: Mapping[int, tuple[int, int]] | None
) -> tuple[DetectionTable, int]:
    """The detections of several files as one table, images in the order of their ids, best first.

    Args:
        tables: detections of each file; scores are 0 to 1.
        fusion: how.
        sizes: (height, width) by image id, to which boxes are cut; None: they are not known, and nothing is cut.

    Returns:
        The table, and how many detections were left out since they have no area or the score 0.
    """
    with_masks = fusion.method not in BY_LIBRARY and all(table.masks is not None for table in tables)
    every = DetectionTable.joined(tables)
    source = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
    classes, labels = np.unique(every.category_ids, return_inverse=True)
    order = np.argsort(every.image_ids, kind="stable")
    ids, starts = np.unique(every.image_ids[order], return_index=True)
    parts, left_out = [], 0
    merge = _METHODS[fusion.method]
    for image_id, rows in progress_bar(
        zip(ids.tolist(), np.split(order, starts[1:]) if len(ids) else [], strict=True),
        total=len(ids),
        desc=fusion.method,
        unit="image",
        leave=False,
        delay=_SHORT,
    ):
        boxes = every.boxes_xywh[rows].copy()
        boxes[:, 2:] += boxes[:, :2]
        if sizes is not None:
            height, width = sizes[image_id]
            boxes = boxes.clip(0, [width, height, width, height])
        usable = (boxes[:, 2:] > boxes[:, :2]).all(axis=1) & (every.scores[rows] > 0)
        left_out += int((~usable).sum())
        rows, boxes = rows[usable], boxes[usable]
        if not len(rows):
            continue
        # to 0 ... 1, which the library wants; IoU and means are the same in any unit
        low = np.zeros(2) if sizes is not None else boxes[:, :2].min(axis=0)
        high = np.array([width, height]) if sizes is not None else boxes[:, 2:].max(axis=0)
        low, span = np.tile(low, 2), np.tile(high - low, 2)
        found, scores, own, kept = merge((boxes - low) / span, every.scores[rows], labels[rows], source[rows], fusion)
        best = np.argsort(-scores, kind="stable")[: fusion.max_detections]
        xyxy = found[best] * span + low
        xyxy[:, 2:] -= xyxy[:, :2]
        masks = every.masks[rows[kept[best]]] if with_masks and every.masks is not None and kept is not None else None
        image_ids = np.full(len(best), image_id, np.int64)
        parts.append(DetectionTable(image_ids, xyxy, scores[best], classes[own[best]], masks))
    return DetectionTable.joined(parts), left_out


_Columns = NDArray[np.float64]
_Whole = NDArray[np.int64]
_Merged = tuple[_Columns, _Columns, _Whole, _Whole | None]
"""Boxes, scores, classes, and the positions of the detections that were kept as they are; None: boxes are new."""


def _weighted(scores: _Columns, source: _Whole, fusion: Fusion) -> _Columns:
    """Scores times their file's share of the largest weight."""
    weights = np.array(fusion.weights)
    return np.asarray(scores * (weights / weights.max())[source])


def _nms(boxes: _Columns, scores: _Columns, labels: _Whole, source: _Whole, fusion: Fusion) -> _Merged:
    scores = _weighted(scores, source, fusion)
    kept = hard_nms(boxes, scores, labels, fusion.iou)
    return boxes[kept], scores[kept], labels[kept], kept


def _soft_nms(boxes: _Columns, scores: _Columns, labels: _Whole, source: _Whole, fusion: Fusion) -> _Merged:
    kept, lowered = soft_nms(
        boxes,
        _weighted(scores, source, fusion),
        labels,
        kind="gaussian",
        iou=fusion.iou,
        sigma=fusion.sigma,
        least_score=SOFT_LEAST_SCORE,
    )
    return boxes[kept], lowered, labels[kept], kept


def _by_library(boxes: _Columns, scores: _Columns, labels: _Whole, source: _Whole, fusion: Fusion) -> _Merged:
    import ensemble_boxes

    files = [source == number for number in range(len(fusion.weights))]
    columns = [[column[rows] for rows in files] for column in (boxes, scores, labels)]
    further: dict[str, Any] = {"weights": list(fusion.weights), "iou_thr": fusion.iou}
    if fusion.method == "wbf":
        # its default, `avg`, gives scores above 1 where a file with a large weight has two boxes of an object
        found = ensemble_boxes.weighted_boxes_fusion(*columns, **further, conf_type="box_and_model_avg")
    else:
        found = ensemble_boxes.non_maximum_weighted(*columns, **further)
    return found[0].astype(np.float64), found[1].astype(np.float64), found[2].astype(np.int64), None


_METHODS: dict[str, Callable[[_Columns, _Columns, _Whole, _Whole, Fusion], _Merged]] = {
    "wbf": _by_library,
    "nms": _nms,
    "soft_nms": _soft_nms,
    "nmw": _by_library,
}
