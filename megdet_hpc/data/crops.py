"""Cutting and enlarging an image with its target, and large-scale jitter, which does both.

Shape legend: image (3, H, W) uint8; a target's boxes are xyxy in its pixels, its masks are (k, H, W).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from megdet_hpc.data.sample import Target
from megdet_hpc.data.transforms import Transform, resized

FILL = (124, 116, 104)
"""Mean RGB of ImageNet, which detectors take out of the pixels, so that filled places are about 0 to them."""

_TINY = 1e-6  # square pixels, in place of the area of a box that has none


def within(boxes: Tensor, height: int, width: int) -> Tensor:
    """Boxes cut at the edge of an image."""
    return boxes.clamp(boxes.new_zeros(4), boxes.new_tensor([width, height] * 2))


def areas(boxes: Tensor) -> Tensor:
    """(k,) areas of boxes xyxy [square pixels]."""
    sides = boxes[:, 2:] - boxes[:, :2]
    return sides[:, 0] * sides[:, 1]


def cut(image: Tensor, target: Target, top: int, left: int, height: int, width: int) -> tuple[Tensor, Target]:
    """A window of the image, as a view, and all annotations in its pixels; boxes may leave it.

    Args:
        image: an image.
        target: its annotations. What of a box lies outside the image is cut off first.
        top, left, height, width: window within the image [pixels].
    """
    boxes = within(target.boxes, *image.shape[1:]) - target.boxes.new_tensor([left, top] * 2)
    rows, columns = slice(top, top + height), slice(left, left + width)
    masks = None if target.masks is None else target.masks[:, rows, columns]
    return image[:, rows, columns], replace(target, boxes=boxes, masks=masks)


def without_slivers(target: Target, height: int, width: int, least: float) -> Target:
    """The annotations of which enough lies in an image, with their boxes cut at its edge.

    Crowd regions stay as long as anything of them is left, since they mark where detections do not count. With masks,
    an annotation needs a pixel of its mask.

    Args:
        target: annotations whose boxes may leave the image.
        height, width: size of the image [pixels].
        least: share of an object's box that must be left [0 to 1].
    """
    boxes = within(target.boxes, height, width)
    left = areas(boxes)
    enough = (left > 0) & (target.crowd.to(left.device) | (left >= least * areas(target.boxes).clamp(min=_TINY)))
    if target.masks is not None:
        enough &= target.masks.flatten(1).any(dim=1)
    return replace(target, boxes=boxes).rows(enough.cpu())


def placed(image: Tensor, target: Target, top: int, left: int, height: int, width: int) -> tuple[Tensor, Target]:
    """The image on a larger one that is filled with the mean, and its annotations there.

    Args:
        image: an image.
        target: its annotations.
        top, left: place of its first pixel [pixels].
        height, width: size of the larger image [pixels].
    """
    canvas = image.new_tensor(FILL).expand(height, width, 3).clone().permute(2, 0, 1)
    rows, columns = slice(top, top + image.shape[1]), slice(left, left + image.shape[2])
    canvas[:, rows, columns] = image
    masks = None
    if target.masks is not None:
        masks = target.masks.new_zeros(len(target), height, width)
        masks[:, rows, columns] = target.masks
    boxes = target.boxes + target.boxes.new_tensor([left, top] * 2)
    return canvas, replace(target, boxes=boxes, masks=masks)


class LargeScaleJitter(Transform):
    """Scales an image by a drawn factor, and cuts a drawn window out of what is larger than a square.

    Ghiasi et al., Simple Copy-Paste (CVPR 2021), with factors from 0.1 to 2. Images that are smaller than the square
    are padded with their batch, or here for a detector that takes squares. The window is cut before it is resized, so
    that no pixel is made in vain.

    Args:
        factors: range of the factor; at 1 the image just fits the square.
        side: side of the square [pixels].
        least: share of an object's box that must be left [0 to 1].
        square: fill the image up to the square.
    """

    stream = "large_scale_jitter"

    def __init__(self, factors: tuple[float, float], side: int, least: float, *, square: bool = False) -> None:
        self.factors, self.side, self.least, self.square = factors, side, least, square

    def largest_scale(self, height: int, width: int) -> float:
        return self.factors[1] * self.side / max(height, width)

    def __call__(self, image: Tensor, target: Target, generator: torch.Generator) -> tuple[Tensor, Target]:
        factor, *places = torch.rand(3, generator=generator).tolist()
        low, high = self.factors
        old = image.shape[1:]
        scale = (low + (high - low) * factor) * self.side / max(old)
        rows, columns = (self._window(length, scale, place) for length, place in zip(old, places, strict=True))
        window, size = (rows[1], columns[1]), (rows[2], columns[2])
        image, target = cut(image, target, rows[0], columns[0], *window)
        target = without_slivers(target, *window, self.least)
        image, target = F.resize_image(image, list(size), antialias=True), resized(target, window, size)
        return placed(image, target, 0, 0, self.side, self.side) if self.square else (image, target)

    def _window(self, length: int, scale: float, place: float) -> tuple[int, int, int]:
        """What is seen of a side: where it begins, its length before the resize and after it [pixels].

        Args:
            length: the image's side [pixels].
            scale: factor of the resize.
            place: draw that decides where the window lies [0 to 1].
        """
        new = max(1, round(length * scale))
        seen = length if new <= self.side else min(length, max(1, round(self.side / scale)))
        return int(place * (length - seen + 1)), seen, min(new, self.side)
