"""Boxes in crowd regions, which are neither objects nor background.

Shapes: A anchors or proposals of an image, c crowd regions of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Share of a box that lies in a crowd region from which on it counts as within; Detectron's TRAIN.CROWD_FILTER_THRESH.
_WITHIN = 0.7


def within_crowds(boxes: Tensor, crowds: Tensor) -> Tensor:
    """Whether a crowd region holds more than 0.7 of a box's area, (A,) bool.

    Args:
        boxes: (A, 4) xyxy.
        crowds: (c, 4) xyxy.
    """
    within = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for crowd in crowds.to(boxes.dtype):  # one at a time: an image has few, and 200,000 anchors
        sides = (torch.minimum(boxes[:, 2:], crowd[2:]) - torch.maximum(boxes[:, :2], crowd[:2])).clamp(min=0)
        within |= sides.prod(dim=1) > _WITHIN * areas
    return within


def ignore_crowds(
    labels: Sequence[Tensor],
    boxes: Sequence[Tensor],
    targets: Sequence[dict[str, Tensor]],
    *,
    background: int = 0,
    ignored: int = -1,
) -> list[Tensor]:
    """The labels of each image, with another where a box of the background is within a crowd region.

    Args:
        labels: (A,) for each image.
        boxes: (A, 4) xyxy for each image.
        targets: targets with `crowds`, (c, 4) xyxy; without them nothing is changed.
        background: label of the background.
        ignored: label of what is not in the loss; torchvision's samplers leave -1 out.
    """
    each = zip(labels, boxes, targets, strict=True)
    return [
        own.masked_fill((own == background) & within_crowds(some, target["crowds"]), ignored)
        if len(target.get("crowds", ()))
        else own
        for own, some, target in each
    ]
