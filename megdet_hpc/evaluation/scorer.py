"""The comparison of detections with the ground truth, by hotcoco, whose arrays are those of pycocotools bit for bit.

t: 10 IoU thresholds 0.50, 0.55, ... 0.95, r: 101 recalls 0, 0.01, ... 1, c: classes, a: area ranges (all, small,
medium, large), m: limits of detections. Where hotcoco is not installed, pycocotools does the same (`reference.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megdet_hpc.evaluation.columns import Columns, Truth

# Recall is also given for so few detections.
_FEWER = (1, 10)
AT_ONCE = 4_000_000
"""Boxes and detections that are compared at the same time, if they are of several classes."""


@dataclass(frozen=True)
class Measured:
    """What COCO's comparison measures; -1 where there is no box to find.

    Attributes:
        precision: (t, r, c, a, m).
        recall: (t, c, a, m).
        scores: (t, r, c, a, m), the score at which each recall is reached.
        limits: numbers of detections of an image and class that count, best first; m of them, rising.
    """

    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    scores: NDArray[np.float64]
    limits: tuple[int, ...]

    @classmethod
    def of(cls, scorer: Any, limits: Sequence[int]) -> Measured:
        """The arrays of hotcoco's or pycocotools' COCOeval after its work."""
        return cls(scorer.eval["precision"], scorer.eval["recall"], scorer.eval["scores"], tuple(limits))


def limits_of(max_detections: int) -> list[int]:
    """The limits of detections that are measured, rising."""
    return sorted({*(few for few in _FEWER if few < max_detections), max_detections})


def compare(truth: Truth, found: Columns, kind: str, max_detections: int) -> Measured:
    """Compare what was found with the ground truth.

    Classes are compared apart from each other. So where there are many boxes, a few classes at a time are, which bounds
    the memory (some 450 bytes a box).

    Args:
        truth: the ground truth.
        found: what `truth.found` gave for the same kind.
        kind: what is compared, bbox or segm.
        max_detections: the best so many of an image and class count.
    """
    boxes = truth.masks if kind == "segm" else truth.boxes
    every = np.bincount(np.concatenate([boxes.classes, found.classes]), minlength=len(truth.names))
    parts = [_measure(truth, boxes, found, part, max_detections) for part in _parts(every)]
    if len(parts) == 1:
        return parts[0]
    precision, recall, scores = (
        np.concatenate([getattr(part, name) for part in parts], axis=axis)
        for name, axis in (("precision", 2), ("recall", 1), ("scores", 2))
    )
    return Measured(precision, recall, scores, parts[0].limits)


def _parts(boxes: NDArray[np.int64]) -> list[range]:
    """Classes that follow each other, of `AT_ONCE` boxes together; a class of more is a part of its own.

    Args:
        boxes: boxes and detections of each class.
    """
    found, first, held = [], 0, 0
    for place, number in enumerate(boxes.tolist()):
        if held and held + number > AT_ONCE:
            found.append(range(first, place))
            first, held = place, 0
        held += number
    return [*found, range(first, len(boxes))]


def _measure(truth: Truth, boxes: Columns, found: Columns, classes: range, max_detections: int) -> Measured:
    """The comparison of some classes."""
    sizes, names = truth.sizes, truth.names
    if len(classes) < len(names):
        boxes, found = (_of_classes(columns, classes) for columns in (boxes, found))
        # other images would be looked at in vain; the order of those that are left is the same
        held = np.zeros(len(sizes), np.bool_)
        held[boxes.images] = held[found.images] = True
        places = np.cumsum(held) - 1
        boxes, found = (replace(columns, images=places[columns.images]) for columns in (boxes, found))
        sizes, names = sizes[held], names[classes.start : classes.stop]
    scorer = _evaluator(sizes, names, boxes, found, max_detections)
    scorer.evaluate()
    scorer.accumulate()
    return Measured.of(scorer, limits_of(max_detections))


def _of_classes(columns: Columns, classes: range) -> Columns:
    """The boxes of some classes, which are counted from the first of them."""
    chosen = (columns.classes >= classes.start) & (columns.classes < classes.stop)
    masks = columns.masks and [columns.masks[place] for place in np.flatnonzero(chosen)]
    own = columns.rows(chosen)
    return replace(own, classes=own.classes - classes.start, masks=masks)


def evaluator(truth: Truth, boxes: Columns, found: Columns, max_detections: int) -> Any:
    """hotcoco's COCOeval before its work. Box i and detection i have the id i + 1, image and class i too.

    Args:
        truth: the set, for its images and classes.
        boxes, found: what is compared; masks where both have them.
        max_detections: the best so many of an image and class count.
    """
    return _evaluator(truth.sizes, truth.names, boxes, found, max_detections)


def _evaluator(
    sizes: NDArray[np.int32], names: Sequence[str], boxes: Columns, found: Columns, max_detections: int
) -> Any:
    import hotcoco

    images = [{"id": number, "height": h, "width": w} for number, (h, w) in enumerate(sizes.tolist(), start=1)]
    categories = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
    with_masks = boxes.masks is not None and found.masks is not None
    known = hotcoco.COCO.from_arrays(
        images,
        categories,
        boxes.images + 1,
        boxes.classes + 1,
        boxes.boxes_xywh,
        area=boxes.areas,
        iscrowd=boxes.crowd,
        segmentation=boxes.masks if with_masks else None,
    )
    # (n, 7) image, x, y, width, height, score, class: loadRes' array
    columns = (found.images + 1, *found.boxes_xywh.T, found.scores, found.classes + 1)
    rows = np.stack([np.asarray(column, np.float64) for column in columns], axis=1)
    detected = known.load_res(rows, segmentation=found.masks if with_masks else None)
    if len(found):
        detected.update_anns(ids=np.arange(1, len(found) + 1), area=found.areas)
    scorer = hotcoco.COCOeval(known, detected, "segm" if with_masks else "bbox")
    scorer.params.max_dets = limits_of(max_detections)
    return scorer
