"""Detections of one image that overlap: which are kept, by NMS or soft-NMS (Bodla et al., ICCV 2017).

Shapes: k detections of an image. Boxes are xyxy, in any unit.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.ops import batched_nms, box_iou

Kept = tuple[NDArray[np.int64], NDArray[np.float64]]
"""Positions of the detections that are kept, best first, and their scores."""


def hard_nms(
    boxes: NDArray[np.float64], scores: NDArray[np.float64], labels: NDArray[np.int64], iou: float
) -> NDArray[np.int64]:
    """The detections that NMS keeps of each class, best first.

    Args:
        boxes: (k, 4).
        scores: (k,).
        labels: (k,), classes.
        iou: IoU above which the weaker of two detections of a class is dropped.
    """
    kept = batched_nms(*(torch.from_numpy(np.ascontiguousarray(column)) for column in (boxes, scores, labels)), iou)
    return np.asarray(kept.numpy(), np.int64)


def soft_nms(
    boxes: NDArray[np.float64],
    scores: NDArray[np.float64],
    labels: NDArray[np.int64],
    *,
    kind: Literal["linear", "gaussian"],
    iou: float,
    sigma: float,
    least_score: float,
) -> Kept:
    """The detections of soft-NMS, which lowers scores where NMS drops boxes.

    In each class the best detection is taken, and every other one's score is multiplied by a factor that falls with
    its IoU with that box; then the best of the rest is taken, and so on (the paper, figure 2).

    Args:
        boxes: (k, 4).
        scores: (k,).
        labels: (k,), classes.
        kind: factor. linear: 1 - IoU where the IoU is `iou` or more, else 1. gaussian: exp(-IoU^2 / sigma).
        iou: see kind.
        sigma: see kind.
        least_score: detections are dropped once their score falls below it.
    """
    kept: list[NDArray[np.int64]] = []
    lowered = scores.astype(np.float64)
    for label in np.unique(labels):
        rest = np.flatnonzero((labels == label) & (lowered >= least_score))
        own = torch.from_numpy(np.ascontiguousarray(boxes[rest], np.float64))
        overlaps = np.nan_to_num(box_iou(own, own).numpy())  # of boxes without area: 0 / 0
        factors = np.exp(-(overlaps**2) / sigma) if kind == "gaussian" else np.where(overlaps < iou, 1.0, 1 - overlaps)
        places = np.arange(len(rest))
        while len(places):
            best = places[np.argmax(lowered[rest[places]])]
            kept.append(rest[best : best + 1])
            places = places[places != best]
            lowered[rest[places]] *= factors[best, places]
            places = places[lowered[rest[places]] >= least_score]
    chosen = np.concatenate([np.zeros(0, np.int64), *kept])
    chosen = chosen[np.argsort(-lowered[chosen], kind="stable")]
    return chosen, lowered[chosen]
