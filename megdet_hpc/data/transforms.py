"""Augmentation with torchvision.transforms.v2, as a function of a seed."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from megdet_hpc.config import DataConfig


class Augmentation:
    """Multi-scale resize and horizontal flip of an image and its boxes; only a resize in evaluation.

    Args:
        config: sides in pixels and the flip probability.
        training: whether to draw; evaluation uses val_short_side and no flip.
    """

    def __init__(self, config: DataConfig, *, training: bool) -> None:
        sides = list(config.short_sides) if training else [config.val_short_side]
        self._resize = v2.RandomShortestSize(min_size=sides, max_size=config.max_side)
        self._flip = v2.RandomHorizontalFlip(config.flip_probability if training else 0.0)
        self._clamp = v2.ClampBoundingBoxes()

    def __call__(self, image: Tensor, boxes: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Args:
            image: (3, H, W) uint8.
            boxes: (m, 4) float32 xyxy in its pixels.
            seed: of the draws; the global generator is left as it was.

        Returns:
            The resized image and its boxes, clamped to it.
        """
        size = (int(image.shape[1]), int(image.shape[2]))
        box_type = tv_tensors.BoundingBoxFormat.XYXY
        pair = (tv_tensors.Image(image), tv_tensors.BoundingBoxes(boxes, format=box_type, canvas_size=size))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            image, boxes = self._clamp(*self._flip(*self._resize(*pair)))
        return image.as_subclass(Tensor), boxes.as_subclass(Tensor).float()
