"""Steps of the augmentation over (image, target, generator), with the kernels of torchvision.transforms.v2.

The kernels are called directly. The transforms of v2 draw from the global generator, whose saving and seeding for
each image, with the wrapping of image and boxes, take as long as the resize.

Shape legend: image (3, H, W) uint8; a target's boxes are xyxy in its pixels, its masks are (k, H, W).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import functional as F

from megdet_hpc.data.sample import Target


class Transform:
    """One step of the augmentation, which knows of no other."""

    stream = ""
    """Name of the step's own draws, which change no other step's. Steps without a name share one generator."""

    def __call__(self, image: Tensor, target: Target, generator: torch.Generator) -> tuple[Tensor, Target]:
        """The changed image and its target.

        Args:
            image: an image of any size.
            target: its annotations, in its pixels.
            generator: source of every draw. A step without a stream draws equally often for every image, so that a
                later step's draws do not depend on what is in the image.
        """
        raise NotImplementedError

    def skip(self, generator: torch.Generator) -> None:
        """Make the draws of the step and nothing else, so that later steps draw what they would have."""
        raise NotImplementedError

    def largest_scale(self, height: int, width: int) -> float:
        """The most that a side of an object in an image of this size is enlarged."""
        return 1.0

    def size_after(self, height: int, width: int) -> tuple[int, int]:
        """The height and width of an image of this size after the step, where nothing is drawn."""
        return height, width


class Resize(Transform):
    """Resizes the short side to one of several lengths, as far as the long side allows.

    Args:
        short_sides: one is drawn [pixels].
        max_side: upper bound of the long side [pixels].
    """

    def __init__(self, short_sides: Sequence[int], max_side: int) -> None:
        self.short_sides, self.max_side = tuple(short_sides), max_side

    def _scale(self, side: int, height: int, width: int) -> float:
        return min(side / min(height, width), self.max_side / max(height, width))

    def largest_scale(self, height: int, width: int) -> float:
        return self._scale(max(self.short_sides), height, width)

    def _size(self, side: int, height: int, width: int) -> tuple[int, int]:
        scale = self._scale(side, height, width)
        # A line of 3 x 5000 pixels would lose its short side altogether.
        return max(1, int(height * scale)), max(1, int(width * scale))

    def size_after(self, height: int, width: int) -> tuple[int, int]:
        (side,) = self.short_sides
        return self._size(side, height, width)

    def skip(self, generator: torch.Generator) -> None:
        torch.randint(len(self.short_sides), (), generator=generator)

    def __call__(self, image: Tensor, target: Target, generator: torch.Generator) -> tuple[Tensor, Target]:
        side = self.short_sides[int(torch.randint(len(self.short_sides), (), generator=generator))]
        height, width = image.shape[1:]
        size = self._size(side, height, width)
        return F.resize_image(image, list(size), antialias=True), resized(target, (height, width), size)


def resized(target: Target, old: tuple[int, int], new: tuple[int, int]) -> Target:
    """A target after its image was resized.

    Args:
        target: a target in pixels of the image before.
        old, new: (height, width) of the image before and after.
    """
    boxes = target.boxes * target.boxes.new_tensor([new[1] / old[1], new[0] / old[0]]).repeat(2)
    masks = target.masks
    if masks is not None:
        # the pixel whose centre is nearest: `nearest` would move every mask by up to half a pixel
        whole = interpolate(masks[None].to(torch.uint8), size=new, mode="nearest-exact") if len(masks) else None
        masks = masks.new_zeros((0, *new)) if whole is None else whole[0].to(torch.bool)
    return replace(target, boxes=boxes, masks=masks)


class ResizeToSquare(Transform):
    """Resizes the image to a square of one of several sides, whatever its proportions.

    Args:
        sides: one is drawn [pixels].
    """

    def __init__(self, sides: Sequence[int]) -> None:
        self.sides = tuple(sides)

    def largest_scale(self, height: int, width: int) -> float:
        return max(self.sides) / min(height, width)

    def size_after(self, height: int, width: int) -> tuple[int, int]:
        (side,) = self.sides
        return side, side

    def skip(self, generator: torch.Generator) -> None:
        torch.randint(len(self.sides), (), generator=generator)

    def __call__(self, image: Tensor, target: Target, generator: torch.Generator) -> tuple[Tensor, Target]:
        side = self.sides[int(torch.randint(len(self.sides), (), generator=generator))]
        size = (side, side)
        height, width = image.shape[1:]
        return F.resize_image(image, list(size), antialias=True), resized(target, (height, width), size)


class HorizontalFlip(Transform):
    """Flips image, boxes and masks with some probability [0 to 1]."""

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def __call__(self, image: Tensor, target: Target, generator: torch.Generator) -> tuple[Tensor, Target]:
        if float(torch.rand(1, generator=generator)) >= self.probability:
            return image, target
        width, boxes = image.shape[2], target.boxes
        boxes = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)
        masks = None if target.masks is None else target.masks.flip(2)
        return F.horizontal_flip_image(image), replace(target, boxes=boxes, masks=masks)


class CutBoxes(Transform):
    """Cuts boxes at the image's edge."""

    def __call__(self, image: Tensor, target: Target, generator: torch.Generator) -> tuple[Tensor, Target]:
        height, width = image.shape[1:]
        boxes = target.boxes.clamp(target.boxes.new_zeros(4), target.boxes.new_tensor([width, height] * 2))
        return image, replace(target, boxes=boxes)
