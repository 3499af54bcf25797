"""Faster R-CNN + FPN from torchvision's parts, over batches that the loader has already resized and padded.

Shape legend: N images, H x W the padded batch size, m boxes of an image; boxes are xyxy in pixels of the
resized image; label 0 is background.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork

from megdet_hpc.models.sampling import SeededSampler
from megdet_hpc.parallel.communicator import Communicator

# ImageNet's channel means and deviations, with which torchvision's backbones were trained.
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)


class FasterRcnn(nn.Module):
    """The two-stage detector; its state dict has the keys of torchvision's FasterRCNN.

    Args:
        backbone, rpn, roi_heads: torchvision's parts; both samplers are `SeededSampler`.
        world: all ranks, over which the losses are normalized.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self, backbone: nn.Module, rpn: RegionProposalNetwork, roi_heads: RoIHeads, *, world: Communicator
    ) -> None:
        super().__init__()
        self.backbone, self.rpn, self.roi_heads, self.world = backbone, rpn, roi_heads, world
        # not persistent, so that the state dict stays torchvision's
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD).view(1, 3, 1, 1) * 255, persistent=False)

    def prepare_sampling(self, seed: int, step: int, image_ids: list[int]) -> None:
        """Tie the next training forward's box sampling to (seed, step, image)."""
        for sampler in self._samplers():
            sampler.prepare(seed, step, image_ids)

    def _samplers(self) -> tuple[SeededSampler, SeededSampler]:
        return self.rpn.fg_bg_sampler, self.roi_heads.fg_bg_sampler

    def _normalize_over_world(self, rpn: dict[str, Tensor], roi: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn means over this rank's samples into shares of the mean over all ranks' samples.

        torchvision divides each loss by the number of boxes that its own process sampled. With that count
        times size / (count of all ranks) the average over ranks, which the gradient allreduce takes, is the
        loss of the concatenated batch. Collective of the world: one message, `loss_counts`.
        """
        counts = torch.tensor([float(sampler.num_sampled) for sampler in self._samplers()], dtype=torch.float64)
        own = counts.clone()
        self.world.allreduce_sum_(counts, name="loss_counts")
        factors = (own * self.world.size / counts.clamp(min=1)).tolist()
        pairs = zip((rpn, roi), factors, strict=True)
        return {key: loss * factor for losses, factor in pairs for key, loss in losses.items()}

    def forward(self, images: Tensor, sizes: list[tuple[int, int]], targets: list[dict[str, Tensor]] | None) -> Any:
        """Losses in training mode, detections in evaluation mode. In training mode a collective of the world.

        Args:
            images: (N, 3, H, W) uint8 RGB; pixels beyond an image's size are 0.
            sizes: (height, width) of each image before padding.
            targets: per image `boxes` (m, 4) float32 and `labels` (m,) int64; None in evaluation mode.

        Returns:
            dict of scalar losses, or per image a dict of `boxes` (m, 4), `scores` (m,), `labels` (m,).
        """
        pixels = (images.to(self.pixel_mean.dtype) - self.pixel_mean) / self.pixel_std
        for pixel, (height, width) in zip(pixels, sizes, strict=True):  # padding stays 0 after normalization
            pixel[:, height:, :] = 0
            pixel[:, :, width:] = 0
        batch = ImageList(pixels, sizes)
        features = self.backbone(pixels)
        proposals, rpn_losses = self.rpn(batch, features, targets)
        detections, roi_losses = self.roi_heads(features, proposals, sizes, targets)
        return self._normalize_over_world(rpn_losses, roi_losses) if self.training else detections
