"""megdet_hpc/data/transforms.py against the transforms of torchvision and the mask functions of pycocotools."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from megdet_hpc.config import DataConfig
from megdet_hpc.data.augmentation import Augmentation
from megdet_hpc.data.sample import Target
from megdet_hpc.data.transforms import HorizontalFlip, Resize, Transform

CONFIG = DataConfig(short_sides=(40, 64, 100), max_side=128, val_short_side=50)


def target_of(boxes: Tensor, masks: Tensor | None = None) -> Target:
    return Target.ordinary(boxes, torch.ones(len(boxes), dtype=torch.int64), masks)


NOTHING = target_of(torch.zeros(0, 4))


def by_torchvision(image: Tensor, boxes: Tensor, seed: int, training: bool) -> tuple[Tensor, Tensor]:
    """The same draws from the global generator."""
    sides = list(CONFIG.short_sides) if training else [CONFIG.val_short_side]
    chain = v2.Compose(
        [
            v2.RandomShortestSize(min_size=sides, max_size=CONFIG.max_side),
            v2.RandomHorizontalFlip(CONFIG.flip_probability if training else 0.0),
            v2.ClampBoundingBoxes(),
        ]
    )
    size = (int(image.shape[1]), int(image.shape[2]))
    form = tv_tensors.BoundingBoxFormat.XYXY
    torch.manual_seed(seed)
    image, boxes = chain(tv_tensors.Image(image), tv_tensors.BoundingBoxes(boxes, format=form, canvas_size=size))
    return image.as_subclass(Tensor), boxes.as_subclass(Tensor)


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 2), (3, 5000)])
def test_the_short_side_of_a_line_stays(size: tuple[int, int]) -> None:
    target = target_of(torch.tensor([[0.0, 0.0, size[1], size[0]]]), torch.ones(1, *size, dtype=torch.bool))
    image = torch.zeros((3, *size), dtype=torch.uint8)
    resized, found = Augmentation.of(CONFIG, training=False)(image, target, 0)
    height, width = resized.shape[1:]
    assert min(height, width) >= 1 and max(height, width) <= CONFIG.max_side
    assert found.boxes.tolist() == [[0, 0, width, height]]
    assert found.masks is not None and found.masks.shape == (1, height, width) and found.masks.all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [(60, 90), (90, 60), (33, 200)])
def test_equals_torchvisions_transforms(size: tuple[int, int], training: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8).permute(2, 0, 1)
    corners = torch.rand(7, 2, 2, generator=generator).sort(dim=1).values * torch.tensor([size[1] * 1.1, size[0] * 1.1])
    boxes = corners.flatten(1)  # (7, 4), some beyond the right and the bottom edge
    augment = Augmentation.of(CONFIG, training=training)
    shapes = set()
    for seed in range(12):
        (pixels, found), expected = augment(image, target_of(boxes), seed), by_torchvision(image, boxes, seed, training)
        assert torch.equal(pixels, expected[0])
        torch.testing.assert_close(found.boxes, expected[1], atol=1e-4, rtol=1e-6)
        assert torch.equal(found.boxes, augment(image, target_of(boxes), seed)[1].boxes)
        shapes.add(pixels.shape)
    assert len(shapes) > 1 if training and size != (33, 200) else shapes


def test_a_square_is_resized_without_its_proportions() -> None:
    image, corners = torch.zeros(3, 60, 90, dtype=torch.uint8), torch.tensor([[9.0, 6.0, 45.0, 60.0]])
    sides = set()
    for seed in range(8):
        pixels, found = Augmentation.of(replace(CONFIG, flip_probability=0.0), training=True, square=True)(
            image, target_of(corners), seed
        )
        side = pixels.shape[1]
        sides.add(side)
        assert pixels.shape == (3, side, side)
        torch.testing.assert_close(found.boxes, torch.tensor([[0.1, 0.1, 0.5, 1.0]]) * side)
    assert sides <= set(CONFIG.short_sides) and len(sides) > 1
    pixels, _ = Augmentation.of(CONFIG, training=False, square=True)(image, target_of(corners), 0)
    assert pixels.shape == (3, 50, 50)


def outlines(centre: tuple[float, float], radius: float, points: int) -> list[float]:
    """A regular polygon, [x0, y0, x1, y1, ...]."""
    angles = 2 * math.pi * np.arange(points) / points + 0.3
    return (np.stack([np.cos(angles), np.sin(angles)], axis=1) * radius + centre).ravel().tolist()


@pytest.mark.parametrize("side", [60, 100, 237])
def test_masks_follow_their_polygons(side: int) -> None:
    """A resized and flipped mask against the polygon resized, flipped and drawn anew by pycocotools.

    Tolerance: each is off the true outline by at most half a pixel of the grid that it was drawn on. So they differ in
    a band along the outline, half a new pixel and half an old one wide, which is (1 + scale) / 2 new pixels. Areas
    differ by half of that at most, since what one has too much at some places it has too little at others.
    """
    height, width = 100, 140
    polygons = [outlines((40, 50), 30, 40), outlines((100, 45), 25, 3), outlines((70.3, 60.8), 9, 4)]
    masks = coco_mask.decode(coco_mask.frPyObjects(polygons, height, width)).transpose(2, 0, 1).astype(bool)
    target = target_of(torch.zeros(3, 4), torch.from_numpy(masks))
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image, found = Augmentation([Resize([side], 1000), HorizontalFlip(1.0)])(image, target, 0)
    new_height, new_width = image.shape[1:]
    assert found.masks is not None and found.masks.dtype == torch.bool
    factors = np.array([new_width / width, new_height / height])
    for polygon, mask in zip(polygons, found.masks.numpy(), strict=True):
        points = np.reshape(polygon, (-1, 2)) * factors
        points[:, 0] = new_width - points[:, 0]
        rle = coco_mask.frPyObjects([points.ravel().tolist()], new_height, new_width)
        drawn = coco_mask.decode(rle)[:, :, 0].astype(bool)
        perimeter = np.linalg.norm(points - np.roll(points, 1, axis=0), axis=1).sum()
        assert (drawn != mask).sum() <= perimeter * (1 + factors.max()) / 2
        assert abs(float(coco_mask.area(rle)[0]) - mask.sum()) <= perimeter * (1 + factors.max()) / 4


def test_one_more_transform_touches_no_other() -> None:
    """Appended, it leaves the draws of those before it as they were."""

    class Darken(Transform):
        def __call__(self, image: Tensor, target: Target, generator: torch.Generator) -> tuple[Tensor, Target]:
            factor = float(torch.rand(1, generator=generator))
            return (image * factor).to(torch.uint8), replace(target, labels=target.labels + 1)

    plain = Augmentation.of(CONFIG, training=True)
    longer = Augmentation([*plain.transforms, Darken()])
    image = torch.full((3, 60, 90), 200, dtype=torch.uint8)
    target = target_of(torch.tensor([[3.0, 4.0, 50.0, 40.0]]))
    for seed in range(6):
        (bright, one), (dark, other) = plain(image, target, seed), longer(image, target, seed)
        assert torch.equal(one.boxes, other.boxes) and bright.shape == dark.shape and int(dark.max()) < 200
        assert other.labels.tolist() == [2]
    assert longer.largest_scale(60, 90) == plain.largest_scale(60, 90) == pytest.approx(128 / 90)


def test_no_boxes() -> None:
    target = replace(NOTHING, masks=torch.zeros(0, 20, 30, dtype=torch.bool))
    image, found = Augmentation.of(CONFIG, training=True)(torch.zeros(3, 20, 30, dtype=torch.uint8), target, 0)
    assert found.boxes.shape == (0, 4) and found.boxes.dtype == torch.float32
    assert found.masks is not None and found.masks.shape == (0, *image.shape[1:])


def test_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    Augmentation.of(CONFIG, training=True)(torch.zeros(3, 20, 30, dtype=torch.uint8), NOTHING, 5)
    assert torch.equal(torch.get_rng_state(), state)
