"""SSD's default boxes: which object each of them takes, and which of the others train as background.

Shapes: A default boxes of an image, m objects of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from megdet_hpc.models.heads.crowds import within_crowds

BACKGROUND = -1
"""Object of a box that has none."""
NOT_IN_LOSS = -2
"""Object of a box that is in no loss."""
# Liu et al., SSD (ECCV 2016), section 2.2: a box also takes an object that it overlaps by an IoU of 0.5.
_LEAST_IOU = 0.5


def boxes_of(generator: DefaultBoxGenerator, pixels: Tensor, levels: Sequence[Tensor]) -> Tensor:
    """The default boxes of every image of a batch, (A, 4) xyxy in the type of the pixels, finest level first.

    Args:
        generator: sizes, proportions and distances of the boxes.
        pixels: (N, 3, H, W).
        levels: maps of the heads. Their sizes count, not their type, which may be half precision.
    """
    grids = [pixels.new_empty(level.shape[-2:]) for level in levels]
    height, width = pixels.shape[-2:]
    boxes: Tensor = generator(ImageList(pixels[:1], [(height, width)]), grids)[0]
    return boxes.to(pixels.dtype)


def match(boxes: Tensor, objects: Tensor) -> Tensor:
    """The object of each default box, (A,) int64; -1 where it has none.

    First the pair of the largest IoU is taken, then that of the largest among the boxes and objects which are left, and
    so on: each object has one box of its own, even one that no box overlaps. Then every box that is left takes the
    object that it overlaps most, if their IoU is 0.5 or more. So does SSD's Caffe code. In torchvision's SSDMatcher two
    objects with the same best box leave one of them without.

    Args:
        boxes: (A, 4) xyxy.
        objects: (m, 4) xyxy.
    """
    if not len(objects):
        return torch.full((len(boxes),), BACKGROUND, dtype=torch.int64, device=boxes.device)
    iou = box_iou(objects.to(boxes.dtype), boxes)
    best, matched = iou.max(dim=0)
    matched = matched.masked_fill(best < _LEAST_IOU, BACKGROUND)
    for _ in range(min(iou.shape)):
        pair = iou.argmax().view(1)
        row, column = pair // len(boxes), pair % len(boxes)
        matched = matched.index_copy(0, column, row)
        iou = iou.index_fill(0, row, -1).index_fill(1, column, -1)
    return matched


def without_crowds(matched: Tensor, boxes: Tensor, crowds: Tensor) -> Tensor:
    """The objects of default boxes, with -2 for the background within a crowd region; (A,) int64."""
    return matched.masked_fill((matched == BACKGROUND) & within_crowds(boxes, crowds), NOT_IN_LOSS)


def hardest(losses: Tensor, candidates: Tensor, number: Tensor) -> Tensor:
    """Whether a box is among the candidates of largest loss, (A,) bool.

    A box that is no candidate is never chosen, however many are asked for. torchvision's SSD then takes boxes with an
    object a second time.

    Args:
        losses: (A,), without gradient.
        candidates: (A,) bool.
        number: scalar int64, how many to choose at most.
    """
    order = losses.masked_fill(~candidates, -torch.inf).argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return candidates & (rank < number)
