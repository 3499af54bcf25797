"""The list of transforms that a configuration asks for, as a function of a seed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megdet_hpc.config import DataConfig, jitter_side
from megdet_hpc.data.crops import LargeScaleJitter
from megdet_hpc.data.photometric import PhotometricDistort
from megdet_hpc.data.sample import Target
from megdet_hpc.data.ssd_crops import Expand, IouCrop
from megdet_hpc.data.transforms import CutBoxes, HorizontalFlip, Resize, ResizeToSquare, Transform
from megdet_hpc.seeds import derived_seed


def _resize(sides: Sequence[int], max_side: int, square: bool) -> Transform:
    return ResizeToSquare(sides) if square else Resize(sides, max_side)


class Augmentation:
    """A list of transforms, as a function of a seed.

    Args:
        transforms: transforms in the order in which they are made.
    """

    def __init__(self, transforms: Sequence[Transform]) -> None:
        self.transforms = tuple(transforms)

    @classmethod
    def of(cls, config: DataConfig, *, training: bool, square: bool = False) -> Augmentation:
        """The augmentation of a configuration in training; only a resize in evaluation.

        Args:
            config: sides in pixels, the probability of the flip, and what else is made.
            training: whether to draw; evaluation takes val_short_side.
            square: whether the detector takes squares (Geometry.square), of these short sides.
        """
        if not training:
            return cls([_resize((config.val_short_side,), config.max_side, square), CutBoxes()])
        wanted = config.augmentation
        steps: list[Transform] = []
        if wanted.photometric:
            steps.append(PhotometricDistort(wanted))
        if wanted.expand:
            steps.append(Expand(wanted.expand, wanted.expand_ratio))
        if wanted.iou_crop:
            steps.append(IouCrop(wanted.crop_ious, (wanted.crop_scale, 1.0)))
        if wanted.large_scale_jitter:
            side = jitter_side(config, square=square)
            steps.append(LargeScaleJitter(wanted.large_scale_jitter, side, wanted.min_visible, square=square))
        else:
            steps.append(_resize(config.short_sides, config.max_side, square))
        return cls([*steps, HorizontalFlip(config.flip_probability), CutBoxes()])

    def largest_scale(self, height: int, width: int) -> float:
        """The most that a side of an object in an image of this size is enlarged by all transforms together."""
        scale = 1.0
        for transform in self.transforms:
            scale *= transform.largest_scale(height, width)
        return scale

    def size_after(self, height: int, width: int) -> tuple[int, int]:
        """The height and width of an image of this size after all transforms, in an evaluation, which draws none."""
        for transform in self.transforms:
            height, width = transform.size_after(height, width)
        return height, width

    def begin(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        """The result of the first transform, which has to be constant; a cache may keep it."""
        return self.transforms[0](image, target, torch.Generator())

    def __call__(self, image: Tensor, target: Target, seed: int, *, begun: bool = False) -> tuple[Tensor, Target]:
        """The augmented image and its target.

        Args:
            image: the image as the pack has it, or as `begin` left it.
            target: its annotations, in its pixels.
            seed: seed of the draws; the global generator is not used.
            begun: whether `begin` made image and target.
        """
        shared = torch.Generator().manual_seed(seed)
        if begun:
            self.transforms[0].skip(shared)
        for transform in self.transforms[1:] if begun else self.transforms:
            own = torch.Generator().manual_seed(derived_seed(transform.stream, seed)) if transform.stream else shared
            image, target = transform(image, target, own)
        return image, target
