"""Augmentation with the kernels of torchvision.transforms.v2, as a function of a seed."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from megdet_hpc.config import DataConfig


class Augmentation:
    """Multi-scale resize and horizontal flip of an image and its boxes; only a resize in evaluation.

    The kernels are called directly: the transforms of v2 draw from the global generator, whose saving and seeding
    for each image, with the wrapping of image and boxes, take as long as the resize.

    Args:
        config: sides in pixels and the flip probability.
        training: whether to draw; evaluation uses val_short_side and no flip.
    """

    def __init__(self, config: DataConfig, *, training: bool) -> None:
        self._sides = config.short_sides if training else (config.val_short_side,)
        self._max_side = config.max_side
        self._flip_probability = config.flip_probability if training else 0.0

    def _scale(self, side: int, height: int, width: int) -> float:
        return min(side / min(height, width), self._max_side / max(height, width))

    def largest_scale(self, height: int, width: int) -> float:
        """The most that an image of this size is enlarged."""
        return self._scale(max(self._sides), height, width)

    def __call__(self, image: Tensor, boxes: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Args:
            image: (3, H, W) uint8.
            boxes: (m, 4) float32 xyxy in its pixels.
            seed: of the draws; the global generator is not used.

        Returns:
            The resized image and its boxes, clamped to it.
        """
        generator = torch.Generator().manual_seed(seed)
        side = self._sides[int(torch.randint(len(self._sides), (), generator=generator))]
        flip = float(torch.rand(1, generator=generator)) < self._flip_probability
        height, width = image.shape[1:]
        scale = self._scale(side, height, width)
        # A line of 3 x 5000 pixels would lose its short side altogether.
        new_height, new_width = max(1, int(height * scale)), max(1, int(width * scale))
        image = F.resize_image(image, [new_height, new_width], antialias=True)
        boxes = boxes * boxes.new_tensor([new_width / width, new_height / height]).repeat(2)
        if flip:
            image = F.horizontal_flip_image(image)
            boxes = torch.stack([new_width - boxes[:, 2], boxes[:, 1], new_width - boxes[:, 0], boxes[:, 3]], dim=1)
        return image, boxes.clamp(boxes.new_zeros(4), boxes.new_tensor([new_width, new_height] * 2))
