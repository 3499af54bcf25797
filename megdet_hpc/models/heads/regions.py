"""The regions on which a stage of box heads trains: proposals and the objects' own boxes, matched and sampled.

Shapes: r regions of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import RoIHeads

from megdet_hpc.models.heads.crowds import ignore_crowds


@dataclass(frozen=True)
class TrainingRegions:
    """Regions of a batch; each list has an item for each image.

    Attributes:
        boxes: (r, 4) xyxy.
        labels: (r,) int64, 0 for the background; less for a region that is in no loss.
        objects: (r,) int64, the object with which each region overlaps most.
        wanted: (r, 4) differences to that object, as the stage's box coder has them.
        given: (r,) bool; the region is an object's own box, which was added.
    """

    boxes: list[Tensor]
    labels: list[Tensor]
    objects: list[Tensor]
    wanted: list[Tensor]
    given: list[Tensor]


@torch.no_grad()
def matched_regions(
    stage: RoIHeads, proposals: Sequence[Tensor], targets: Sequence[dict[str, Tensor]], *, sample: bool = False
) -> TrainingRegions:
    """The proposals and the objects' own boxes, matched as torchvision's RoIHeads does it.

    Args:
        stage: matcher, sampler and box coder.
        proposals: (r, 4) boxes of each image.
        targets: targets in torchvision's form; those with `crowds` keep background within them out of the loss.
        sample: only the regions that the stage's sampler takes, without those of a label below 0.
    """
    truth = [target["boxes"].to(own.dtype) for target, own in zip(targets, proposals, strict=True)]
    boxes = stage.add_gt_proposals(list(proposals), truth)
    objects, labels = stage.assign_targets_to_proposals(boxes, truth, [target["labels"] for target in targets])
    labels = ignore_crowds(labels, boxes, targets)
    given = [
        torch.arange(len(every), device=every.device) >= len(own) for every, own in zip(boxes, proposals, strict=True)
    ]
    if sample:
        taken = stage.subsample(labels)
        boxes, labels, objects, given = (
            [own[index] for own, index in zip(column, taken, strict=True)] for column in (boxes, labels, objects, given)
        )
    # an image without objects has regions of the background alone, whose differences no loss reads
    wanted = [
        own[index] if len(own) else torch.zeros_like(region)
        for own, index, region in zip(truth, objects, boxes, strict=True)
    ]
    return TrainingRegions(boxes, labels, objects, list(stage.box_coder.encode(wanted, boxes)), given)
