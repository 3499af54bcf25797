"""A mini-batch of one rank, as the loader hands it to the model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megdet_hpc.config import DataConfig, Geometry, jitter_side
from megdet_hpc.data.sample import Sample, Target
from megdet_hpc.devices import is_gpu

_USUAL = Geometry()


@dataclass(frozen=True)
class Batch:
    """Images padded at the right and the bottom to one size, with what belongs to each.

    Attributes:
        images: (N, 3, H, W) uint8 RGB; H and W are multiples of 32.
        sizes: (height, width) of each image before padding [pixels].
        scales: (x, y) factors from the image as the pack has it to the resized one.
        image_ids: COCO image ids.
        targets: target of each image, in pixels of the resized one; masks have its size before padding.
    """

    images: Tensor
    sizes: list[tuple[int, int]]
    scales: list[tuple[float, float]]
    image_ids: list[int]
    targets: list[Target]

    @property
    def own_sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each image as the pack has it [pixels]."""
        return [(round(h / y), round(w / x)) for (h, w), (x, y) in zip(self.sizes, self.scales, strict=True)]

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; pinned memory is copied without blocking."""
        targets = [target.to(device) for target in self.targets]
        return replace(self, images=self.images.to(device, non_blocking=True), targets=targets)

    def record_stream(self, stream: Any) -> None:
        """Tell torch's memory pool that a stream of the GPU uses the tensors there, which another stream made."""
        own = [self.images]
        for target in self.targets:
            own += [target.boxes, target.labels, *([] if target.masks is None else [target.masks])]
        for tensor in own:
            if is_gpu(tensor.device):
                tensor.record_stream(stream)

    def pin_memory(self) -> Batch:
        """The batch in pinned memory; torch's DataLoader calls it."""
        targets = [target.pin_memory() for target in self.targets]
        return replace(self, images=self.images.pin_memory(), targets=targets)


def fixed_side(config: DataConfig, geometry: Geometry) -> int | None:
    """The side to which every batch is padded [pixels]; None where data.padding leaves that to the batch."""
    if config.padding != "fixed":
        return None
    if config.augmentation.large_scale_jitter:
        return jitter_side(config, square=geometry.square)
    return max(config.short_sides) if geometry.square else config.max_side


def collate(samples: list[Sample], side: int | None = None, geometry: Geometry = _USUAL) -> Batch:
    """Pad the samples to one size that the strides divide.

    Args:
        samples: one or more.
        side: pad to a square of at least this side [pixels]; none: to the largest sample.
        geometry: sizes of the detector's batches.
    """
    sizes = [(int(s.image.shape[1]), int(s.image.shape[2])) for s in samples]
    largest = (side, side) if side else map(max, zip(*sizes, strict=True))
    height, width = map(geometry.padded, largest)
    images = torch.zeros((len(samples), 3, height, width), dtype=torch.uint8, device=samples[0].image.device)
    for padded, sample, (h, w) in zip(images, samples, sizes, strict=True):
        if is_gpu(padded.device):
            padded[:, :h, :w] = sample.image
        else:
            padded[:, :h, :w].numpy()[:] = sample.image.numpy()  # numpy reorders the pixels' bytes twice as fast
    return Batch(images, sizes, [s.scale for s in samples], [s.image_id for s in samples], [s.target for s in samples])
