"""Faster R-CNN (Ren et al., NeurIPS 2015) with an FPN, from torchvision's parts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork

from megdet_hpc.data.batch import Batch
from megdet_hpc.models.detector import Detector, Draws, ImageDetections, parts_by_name
from megdet_hpc.models.losses import Loss, Losses
from megdet_hpc.models.sampling import SeededSampler


def part_of(name: str) -> str:
    """The part that a parameter belongs to, by its path: backbone, fpn, rpn or heads."""
    if name.startswith("backbone.fpn."):
        return "fpn"
    first = name.split(".")[0]
    return first if first in ("backbone", "rpn") else "heads"


class FasterRcnn(Detector):
    """The two-stage detector; its state dict has the keys of torchvision's FasterRCNN.

    torchvision divides each loss by the number of boxes that its own process sampled: that number is the loss's count.

    Args:
        backbone, rpn, roi_heads: torchvision's parts; both samplers are `SeededSampler`.
    """

    def __init__(self, backbone: nn.Module, rpn: RegionProposalNetwork, roi_heads: RoIHeads) -> None:
        super().__init__()
        self.backbone, self.rpn, self.roi_heads = backbone, rpn, roi_heads

    def losses(self, batch: Batch, draws: Draws) -> Losses:
        anchors, proposals = self._samplers()
        for sampler in (anchors, proposals):
            sampler.prepare(draws, batch.image_ids)
        found, rpn_losses, roi_losses = self._run(batch, batch.targets)
        del found
        rpn = {key: Loss.mean(value, anchors.num_sampled) for key, value in rpn_losses.items()}
        return rpn | {key: Loss.mean(value, proposals.num_sampled) for key, value in roi_losses.items()}

    def detect(self, batch: Batch) -> list[ImageDetections]:
        found, _, _ = self._run(batch, None)
        return [ImageDetections.of(image) for image in found]

    def _run(
        self, batch: Batch, targets: list[dict[str, Tensor]] | None
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor], dict[str, Tensor]]:
        """ImageDetections, which training leaves empty, and the losses of RPN and box head, which evaluation does."""
        pixels = self.normalized(batch)
        features = self.backbone(pixels)
        proposals, rpn_losses = self.rpn(ImageList(pixels, batch.sizes), features, targets)
        found, roi_losses = self.roi_heads(features, proposals, batch.sizes, targets)
        return found, rpn_losses, roi_losses

    def _samplers(self) -> tuple[SeededSampler, SeededSampler]:
        return self.rpn.fg_bg_sampler, self.roi_heads.fg_bg_sampler

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """backbone, fpn, rpn and heads."""
        return parts_by_name(self, part_of)

    def coordinate_modules(self) -> list[nn.Module]:
        return [self.backbone, self.rpn.head, self.roi_heads.box_predictor]

    def dense(self, images: Tensor) -> list[Tensor]:
        levels = list(self.backbone(images).values())
        scores, boxes = self.rpn.head(levels)
        side = self.roi_heads.box_roi_pool.output_size[0]
        rois = len(images) * self.roi_heads.fg_bg_sampler.batch_size_per_image
        features = torch.empty(rois, levels[0].shape[1], side, side, device=images.device).requires_grad_()
        return [*levels, *scores, *boxes, *self.roi_heads.box_predictor(self.roi_heads.box_head(features))]
