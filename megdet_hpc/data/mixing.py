"""Pictures made of several images: mosaic and copy-paste.

Which other images a picture takes depends on its seed alone, as all draws do.

Shape legend: image (3, H, W) uint8; a target's boxes are xyxy in its pixels, its masks are (k, H, W).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from megdet_hpc.config import AugmentationConfig
from megdet_hpc.data.crops import cut, without_slivers
from megdet_hpc.data.sample import Target
from megdet_hpc.data.transforms import HorizontalFlip, resized
from megdet_hpc.seeds import derived_seed

Load = Callable[[int], tuple[Tensor, Target]]
"""Gives an image of the set by its index, with its target."""

_NEAREST_EDGE = 0.25  # of a side: the point where the four pictures of a mosaic meet is at least this far from the edge
_PASTED = 0.5  # probability of each object of the other image
# Range of the pasted objects' scale; at 1 the other image just fits this one.
_PASTED_SCALES = (0.8, 1.25)


class Mixing:
    """Mosaic, then copy-paste, each with its probability.

    Args:
        config: keys of the augmentation.
        load: source of the other images.
        others: first index and number of the images among which an image may choose, by its index.
    """

    def __init__(self, config: AugmentationConfig, load: Load, others: Callable[[int], tuple[int, int]]) -> None:
        self.config, self._load, self._others = config, load, others

    def __call__(self, image: Tensor, target: Target, index: int, seed: int) -> tuple[Tensor, Target]:
        """The picture that takes the place of an image, and its target.

        Args:
            image: image `index` of the set.
            target: its annotations, with masks for copy-paste.
            index: its place in the set.
            seed: seed of the draws.
        """
        for name, probability, mix, number in (
            ("mosaic", self.config.mosaic, mosaic, 3),
            ("copy_paste", self.config.copy_paste, copy_paste, 1),
        ):
            generator = torch.Generator().manual_seed(derived_seed(name, seed))
            if float(torch.rand(1, generator=generator)) >= probability:
                continue
            first, count = self._others(index)
            chosen = (first + torch.randint(count, (number,), generator=generator)).tolist()
            others = [self._load(other) for other in chosen]
            image, target = mix(image, target, others, generator, self.config.min_visible)
        return image, target


def _joined(targets: Sequence[Target]) -> Target:
    """The annotations of several targets of one picture."""
    masks = [target.masks for target in targets if target.masks is not None]
    return Target(
        torch.cat([target.boxes for target in targets]),
        torch.cat([target.labels for target in targets]),
        torch.cat([target.crowd for target in targets]),
        torch.cat([target.difficult for target in targets]),
        torch.cat(masks) if masks else None,
    )


def _shifted(target: Target, top: int, left: int, height: int, width: int) -> Target:
    """A target of a part of a picture, in pixels of the picture.

    Args:
        target: annotations of the part.
        top, left: place of the part's first pixel [pixels].
        height, width: size of the picture [pixels].
    """
    masks = None
    if target.masks is not None:
        own = target.masks
        masks = own.new_zeros(len(own), height, width)
        masks[:, top : top + own.shape[1], left : left + own.shape[2]] = own
    return replace(target, boxes=target.boxes + target.boxes.new_tensor([left, top] * 2), masks=masks)


def mosaic(
    image: Tensor,
    target: Target,
    others: Sequence[tuple[Tensor, Target]],
    generator: torch.Generator,
    least: float,
) -> tuple[Tensor, Target]:
    """A picture of the image's own size from parts of it and of three others, which meet in a drawn point.

    Each part is filled: the scale lies between the least at which an image covers its part and the one at which it
    fits the whole picture. The picture has the size of the image, so that it fits the batch that the image was put in.

    Args:
        image, target: the image.
        others: three images with their targets.
        generator: source of the draws.
        least: share of an object's box that must be left [0 to 1].
    """
    height, width = image.shape[1:]
    if min(height, width) < 2:
        return image, target
    draws = torch.rand(2 + 4 * 3, generator=generator).tolist()
    middle = [_meeting_point(draw, side) for draw, side in zip(draws[:2], (height, width), strict=True)]
    order = torch.randperm(4, generator=generator).tolist()
    images = [(image, target), *others]
    canvas = torch.empty_like(image)
    targets = []
    for place in range(4):
        own, annotations = images[order[place]]
        scale, down, right = draws[2 + 3 * place : 5 + 3 * place]
        top, bottom = (0, middle[0]) if place < 2 else (middle[0], height)
        left, end = (0, middle[1]) if place % 2 == 0 else (middle[1], width)
        size = (bottom - top, end - left)
        covers = max(size[0] / own.shape[1], size[1] / own.shape[2])
        fits = min(height / own.shape[1], width / own.shape[2])
        factor = covers + (max(covers, fits) - covers) * scale
        seen = tuple(min(old, max(1, round(new / factor))) for old, new in zip(own.shape[1:], size, strict=True))
        window = (int(down * (own.shape[1] - seen[0] + 1)), int(right * (own.shape[2] - seen[1] + 1)))
        part, found = cut(own, annotations, *window, seen[0], seen[1])
        found = without_slivers(found, seen[0], seen[1], least)
        canvas[:, top:bottom, left:end] = F.resize_image(part, list(size), antialias=True)
        targets.append(_shifted(resized(found, (seen[0], seen[1]), size), top, left, height, width))
    return canvas, _joined(targets)


def _meeting_point(draw: float, side: int) -> int:
    return min(max(1, round(side * (_NEAREST_EDGE + (1 - 2 * _NEAREST_EDGE) * draw))), side - 1)


def copy_paste(
    image: Tensor,
    target: Target,
    others: Sequence[tuple[Tensor, Target]],
    generator: torch.Generator,
    least: float,
) -> tuple[Tensor, Target]:
    """The image with some objects of another one on it, flipped or not and at a drawn scale and place.

    What they cover is taken from the masks below, whose boxes are then the boxes around what is left.

    Args:
        image: the image.
        target: its annotations with masks.
        others: one image with its target, which has masks.
        generator: source of the draws.
        least: share of an object's box, or of a covered object's mask, that must be left [0 to 1].
    """
    height, width = image.shape[1:]
    draws = torch.rand(3, generator=generator).tolist()
    pasted, found = HorizontalFlip(0.5)(*others[0], generator)
    found = found.rows(~found.crowd & (torch.rand(len(found), generator=generator) < _PASTED))
    old = pasted.shape[1:]
    low, high = _PASTED_SCALES
    scale = min(height / old[0], width / old[1]) * (low + (high - low) * draws[0])
    top, window_top, seen_high, high_now = _on_canvas(old[0], height, scale, draws[1])
    left, window_left, seen_wide, wide_now = _on_canvas(old[1], width, scale, draws[2])
    pasted, found = cut(pasted, found, window_top, window_left, seen_high, seen_wide)
    found = without_slivers(found, seen_high, seen_wide, least)
    if not len(found):
        return image, target
    found = resized(found, (seen_high, seen_wide), (high_now, wide_now))
    pasted = F.resize_image(pasted, [high_now, wide_now], antialias=True)
    assert found.masks is not None and target.masks is not None
    covered = found.masks.any(dim=0)
    rows, columns = slice(top, top + high_now), slice(left, left + wide_now)
    image = image.clone()
    image[:, rows, columns] = torch.where(covered, pasted, image[:, rows, columns])
    below = target.masks.clone()
    below[:, rows, columns] &= ~covered
    return image, _joined([_uncovered(target, below, least), _shifted(found, top, left, height, width)])


def _on_canvas(old: int, canvas: int, scale: float, draw: float) -> tuple[int, int, int, int]:
    """One side of a scaled image on a canvas.

    Args:
        old: the side [pixels].
        canvas: the canvas's side [pixels].
        scale: factor of the resize.
        draw: draw that decides the place [0 to 1].

    Returns:
        Begin on the canvas, begin and length of the window of the image that is seen, the window's length once scaled
        [pixels].
    """
    new = max(1, round(old * scale))
    if new <= canvas:
        return int(draw * (canvas - new + 1)), 0, old, new
    seen = min(old, max(1, round(canvas / scale)))
    return 0, int(draw * (old - seen + 1)), seen, canvas


def _uncovered(target: Target, masks: Tensor, least: float) -> Target:
    """The annotations of which enough is seen, with the masks of what is seen and boxes around those that changed.

    Args:
        target: annotations with masks.
        masks: (k, H, W) their masks without what was covered.
        least: share of an object's mask that must be left [0 to 1].
    """
    assert target.masks is not None
    before, after = (own.flatten(1).sum(dim=1) for own in (target.masks, masks))
    keep = (after > 0) & (target.crowd | (after >= least * before)) | (after == before)
    boxes = target.boxes.clone()
    for row in ((after < before) & keep).nonzero().flatten().tolist():
        down, right = masks[row].any(dim=1).nonzero(), masks[row].any(dim=0).nonzero()
        boxes[row] = boxes.new_tensor([right[0, 0], down[0, 0], right[-1, 0] + 1, down[-1, 0] + 1])
    return replace(target, boxes=boxes, masks=masks).rows(keep)
