"""megdet_hpc/data/transforms.py against the transforms of torchvision that it is made of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from megdet_hpc.config import DataConfig
from megdet_hpc.data.transforms import Augmentation

CONFIG = DataConfig(short_sides=(40, 64, 100), max_side=128, val_short_side=50)


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
    boxes = torch.tensor([[0.0, 0.0, size[1], size[0]]])
    resized, found = Augmentation(CONFIG, training=False)(torch.zeros((3, *size), dtype=torch.uint8), boxes, 0)
    height, width = resized.shape[1:]
    assert min(height, width) >= 1 and max(height, width) <= CONFIG.max_side
    assert found.tolist() == [[0, 0, width, height]]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [(60, 90), (90, 60), (33, 200)])
def test_equals_torchvisions_transforms(size: tuple[int, int], training: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8).permute(2, 0, 1)
    corners = torch.rand(7, 2, 2, generator=generator).sort(dim=1).values * torch.tensor([size[1] * 1.1, size[0] * 1.1])
    boxes = corners.flatten(1)  # (7, 4), some beyond the right and the bottom edge
    augment = Augmentation(CONFIG, training=training)
    shapes = set()
    for seed in range(12):
        found, expected = augment(image, boxes, seed), by_torchvision(image, boxes, seed, training)
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1], atol=1e-4, rtol=1e-6)
        assert torch.equal(found[1], augment(image, boxes, seed)[1])
        shapes.add(found[0].shape)
    assert len(shapes) > 1 if training and size != (33, 200) else shapes


def test_no_boxes() -> None:
    _, boxes = Augmentation(CONFIG, training=True)(torch.zeros(3, 20, 30, dtype=torch.uint8), torch.zeros(0, 4), 0)
    assert boxes.shape == (0, 4) and boxes.dtype == torch.float32


def test_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    Augmentation(CONFIG, training=True)(torch.zeros(3, 20, 30, dtype=torch.uint8), torch.zeros(0, 4), 5)
    assert torch.equal(torch.get_rng_state(), state)
