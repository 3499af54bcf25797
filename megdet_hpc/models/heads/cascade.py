"""The box heads of Cascade R-CNN (Cai and Vasconcelos, CVPR 2018), each a RegionHeads.

Shapes: K labels, background included; r regions of an image in a stage, R of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import maskrcnn_inference
from torchvision.ops.boxes import clip_boxes_to_image

from megdet_hpc.models.heads.boxes import RegionHeads, box_losses, mask_logits, mask_loss
from megdet_hpc.models.heads.hard_examples import rate_regions
from megdet_hpc.models.heads.regions import TrainingRegions, matched_regions

Sizes = list[tuple[int, int]]
Targets = list[dict[str, Tensor]]


class CascadeHeads(nn.Module):
    """Stages of box heads, each on the boxes that the stage before has moved; they stand for torchvision's RoIHeads.

    In training each stage adds the objects' own boxes, matches at its own IoU and draws a sample anew; boxes that were
    added go no further. Boxes do not depend on the class. In evaluation the scores are the mean of all stages, each on
    its own boxes, and the boxes are those of the last (both as in MMDetection and, for the scores, detectron2).

    One mask branch, if there is one (`heads.masks`), trains on the first stage's regions with an object and is used on
    the boxes that are found, as in detectron2.

    Args:
        stages: two or more; their predictors give 4 differences of a box.
        loss_weights: weight of each stage's losses.
    """

    def __init__(self, stages: Sequence[RegionHeads], loss_weights: Sequence[float]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.loss_weights = tuple(loss_weights)
        self.mask_head: nn.Module | None = None

    @property
    def each(self) -> list[RegionHeads]:
        """The stages, first to last."""
        return [stage for stage in self.stages if isinstance(stage, RegionHeads)]

    def forward(
        self, features: dict[str, Tensor], proposals: list[Tensor], sizes: Sizes, targets: Targets | None = None
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections in evaluation, losses in training, as torchvision's RoIHeads gives them.

        Args:
            features: levels of the pyramid by name.
            proposals: (r, 4) boxes of each image.
            sizes: (height, width) of each image [pixels].
            targets: targets in torchvision's form; None in evaluation.
        """
        if targets is None:
            found = self._detect(features, proposals, sizes)
            if self.mask_head is not None:
                logits = mask_logits(self, features, [image["boxes"] for image in found], sizes)
                for image, masks in zip(
                    found, maskrcnn_inference(logits, [image["labels"] for image in found]), strict=True
                ):
                    image["masks"] = masks
            return found, {}
        losses: dict[str, Tensor] = {}
        first: TrainingRegions | None = None
        for number, (stage, weight) in enumerate(zip(self.each, self.loss_weights, strict=True), start=1):
            rate_regions(stage, features, proposals, sizes, targets, stage.box_beta)
            sample = matched_regions(stage, proposals, targets, sample=True)
            first = first or sample
            logits, moves = _predict(stage, features, sample.boxes, sizes)
            of_classes = _of_every_class(moves, logits)
            classes, boxes = box_losses(logits, of_classes, sample.labels, sample.wanted, stage.box_beta)
            losses[f"loss_classifier_{number}"] = weight * classes
            losses[f"loss_box_reg_{number}"] = weight * boxes
            moved = _moved(stage, moves, sample.boxes, sizes)
            proposals = [own[~given] for own, given in zip(moved, sample.given, strict=True)]
        if first is not None and self.mask_head is not None:
            losses["loss_mask"] = mask_loss(self, features, first, sizes, targets)
        return [], losses

    def _detect(self, features: dict[str, Tensor], proposals: list[Tensor], sizes: Sizes) -> list[dict[str, Tensor]]:
        scores, last = [], self.each[-1]
        for stage in self.each:
            logits, moves = _predict(stage, features, proposals, sizes)
            scores.append(logits.softmax(-1))
            if stage is not last:
                proposals = _moved(stage, moves, proposals, sizes)
        # torchvision takes the softmax of what it gets, which gives these probabilities back
        mean = torch.stack(scores).mean(0).log()
        found = last.postprocess_detections(mean, _of_every_class(moves, mean), proposals, sizes)
        return [{"boxes": b, "scores": s, "labels": k} for b, s, k in zip(*found, strict=True)]


def _predict(
    stage: RegionHeads, features: dict[str, Tensor], boxes: list[Tensor], sizes: Sizes
) -> tuple[Tensor, Tensor]:
    """Class logits (R, K) and differences of the boxes (R, 4)."""
    logits, moves = stage.box_predictor(stage.box_head(stage.box_roi_pool(features, boxes, sizes)))
    return logits, moves


def _of_every_class(moves: Tensor, logits: Tensor) -> Tensor:
    """(R, 4) -> (R, 4 K), the same for each class, as torchvision's functions take them."""
    return moves.repeat(1, logits.shape[1])


def _moved(stage: RegionHeads, moves: Tensor, boxes: list[Tensor], sizes: Sizes) -> list[Tensor]:
    """The boxes of each image after a stage, cut at the image's edge; no gradient goes through them."""
    every = stage.box_coder.decode(moves.detach(), boxes).reshape(-1, 4)  # (R, 1, 4), or (0, 4) without any boxes
    each = every.split([len(own) for own in boxes])
    return [clip_boxes_to_image(own, size) for own, size in zip(each, sizes, strict=True)]
