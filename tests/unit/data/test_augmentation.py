"""Each augmentation: boxes and masks follow the pixels, draws depend on the seed alone, and off means as before."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from megdet_hpc.config import AugmentationConfig, Config, DataConfig, Geometry, jitter_side
from megdet_hpc.data.augmentation import Augmentation
from megdet_hpc.data.batch import fixed_side
from megdet_hpc.data.crops import FILL, LargeScaleJitter, without_slivers
from megdet_hpc.data.mixing import copy_paste, mosaic
from megdet_hpc.data.photometric import PhotometricDistort
from megdet_hpc.data.sample import Target
from megdet_hpc.data.ssd_crops import Expand, IouCrop
from megdet_hpc.errors import UserError
from megdet_hpc.plan.model_size import largest_input

CONFIG = DataConfig(short_sides=(96,), max_side=160, val_short_side=96)


def config_with(**keys: Any) -> DataConfig:
    return replace(CONFIG, augmentation=AugmentationConfig(**keys))


def rendered(size: tuple[int, int], seed: int) -> tuple[Tensor, Target]:
    """Three filled rectangles, each bright in a channel of its own, with boxes and masks; the third is a crowd."""
    generator = torch.Generator().manual_seed(seed)
    image, masks, boxes = torch.zeros(3, *size, dtype=torch.uint8), torch.zeros(3, *size, dtype=torch.bool), []
    for channel in range(3):
        (top, bottom), (left, right) = (
            sorted(torch.randperm(length - 8, generator=generator)[:2].tolist()) for length in size
        )
        rows, columns = slice(top, bottom + 8), slice(left, right + 8)
        image[channel, rows, columns] = 255
        masks[channel, rows, columns] = True
        boxes.append([left, top, right + 8, bottom + 8])
    flags = torch.tensor([False, False, True]), torch.tensor([False, True, False])
    return image, Target(torch.tensor(boxes, dtype=torch.float32), torch.tensor([1, 2, 3]), *flags, masks)


def box_around(pixels: Tensor) -> list[float]:
    rows, columns = pixels.any(dim=1).nonzero(), pixels.any(dim=0).nonzero()
    return [float(columns.min()), float(rows.min()), float(columns.max()) + 1, float(rows.max()) + 1]


@pytest.mark.parametrize(
    ("keys", "square"),
    [
        ({"large_scale_jitter": (0.3, 2.0)}, False),
        ({"large_scale_jitter": (0.1, 2.0), "jitter_side": 120}, False),
        ({"large_scale_jitter": (0.3, 2.0)}, True),
        ({"expand": 0.7}, False),
        ({"iou_crop": True}, False),
        ({"expand": 0.5, "expand_ratio": 2.0, "iou_crop": True}, True),
    ],
)
def test_boxes_and_masks_are_those_of_the_pixels(keys: dict[str, Any], square: bool) -> None:
    augment = Augmentation.of(config_with(**keys), training=True, square=square)
    kept = 0
    for seed in range(60):
        size = [(100, 140), (140, 90), (64, 64)][seed % 3]
        image, target = rendered(size, seed)
        pixels, found = augment(image, target, seed)
        assert found.masks is not None and found.masks.shape[1:] == pixels.shape[1:]
        for box, label, mask in zip(found.boxes, found.labels.tolist(), found.masks, strict=True):
            shown = pixels[label - 1] > 127
            if (box[2:] - box[:2]).min() < 3:
                continue  # its edges are a mixture of pixels
            kept += 1
            # within a pixel, since a resized edge is a mixture of both sides
            assert np.abs(np.subtract(box_around(shown), box.tolist())).max() <= 1
            assert np.abs(np.subtract(box_around(mask), box.tolist())).max() <= 1
    assert kept > 60


def test_jitter_keeps_to_its_side_and_uses_its_range() -> None:
    image, target = rendered((100, 140), 1)
    config = config_with(large_scale_jitter=(0.1, 2.0), jitter_side=128)
    sides = [Augmentation.of(config, training=True)(image, target, seed)[0].shape[1:] for seed in range(200)]
    assert max(map(max, sides)) == 128 and min(map(max, sides)) < 0.2 * 128
    assert sum(height == 128 for height, _ in sides) > 40  # factors above 1.4, a third of the range
    squares = [Augmentation.of(config, training=True, square=True)(image, target, seed)[0] for seed in range(20)]
    assert {tuple(pixels.shape) for pixels in squares} == {(3, 128, 128)}
    assert any(pixels[:, -1, -1].tolist() == list(FILL) for pixels in squares)


def test_jitter_of_one_size_only_resizes() -> None:
    image, target = rendered((100, 140), 2)
    pixels, found = LargeScaleJitter((0.5, 0.5), 140, 0.1)(image, target, torch.Generator())
    assert pixels.shape == (3, 50, 70)
    torch.testing.assert_close(found.boxes, target.boxes / 2)


def test_batches_and_plan_know_the_side_of_the_jitter() -> None:
    config = replace(config_with(large_scale_jitter=(0.1, 2.0), jitter_side=128), padding="fixed")
    assert fixed_side(config, Geometry()) == jitter_side(config, square=False) == 128
    assert largest_input(Config(data=config)) == (128, 128)
    assert fixed_side(replace(config, augmentation=AugmentationConfig()), Geometry()) == 160


def test_slivers_are_dropped_and_crowds_are_not() -> None:
    boxes = torch.tensor([[-90.0, 0, 10, 10], [-89, 0, 11, 10], [-99, 0, 1, 10], [30, 0, 40, 10]])
    target = Target(boxes, torch.arange(1, 5), torch.tensor([False, False, True, False]), torch.zeros(4).bool())
    assert without_slivers(target, 20, 20, 0.11).labels.tolist() == [2, 3]
    found = without_slivers(target, 20, 20, 0.0)
    assert found.labels.tolist() == [1, 2, 3]
    assert found.boxes.tolist() == [[0, 0, 10, 10], [0, 0, 11, 10], [0, 0, 1, 10]]
    masks = torch.zeros(4, 20, 20, dtype=torch.bool)
    masks[0, 5, 5] = True
    assert without_slivers(replace(target, masks=masks), 20, 20, 0.0).labels.tolist() == [1]


@pytest.mark.parametrize("key", ["brightness", "contrast", "saturation", "hue"])
def test_each_change_of_colour_is_what_its_key_says(key: str) -> None:
    strengths = dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 0.0)
    most = {"brightness": 32.0, "contrast": 0.5, "saturation": 0.5, "hue": 18.0}[key]
    change = PhotometricDistort(AugmentationConfig(photometric=1.0, **{**strengths, key: most}))
    image = torch.tensor([[120, 100, 60], [90, 90, 90]], dtype=torch.uint8).T.reshape(3, 1, 2)
    before = image.float()[:, 0]
    changed = set()
    for seed in range(30):
        pixels, target = change(image, None, torch.Generator().manual_seed(seed))  # type: ignore[arg-type]
        assert target is None and pixels.dtype == torch.uint8 and pixels.shape == image.shape
        after = pixels.float()[:, 0]
        changed.add(tuple(pixels.flatten().tolist()))
        if key == "brightness":
            assert float((after - before).abs().max()) <= 32 and len((after - before).unique()) == 1
        elif key == "contrast":
            factor = after / before
            assert factor.min() >= 0.49 and factor.max() <= 1.51 and factor.max() - factor.min() < 0.02
        else:
            # grey has neither saturation nor hue; torchvision rounds down
            assert after[:, 1].min() >= 89 and after[:, 1].max() <= 90
    assert len(changed) > 8


def test_colours_are_held_to_their_range_and_nothing_happens_at_probability_0() -> None:
    image = torch.tensor([0, 128, 255], dtype=torch.uint8).reshape(3, 1, 1).expand(3, 4, 4)
    for seed in range(20):
        pixels, _ = PhotometricDistort(AugmentationConfig(photometric=1.0))(
            image, None, torch.Generator().manual_seed(seed)  # type: ignore[arg-type]
        )  # fmt: skip
        low, middle, high = pixels[:, 0, 0].tolist()
        assert low <= middle <= high, "a value has gone round"
        assert PhotometricDistort(AugmentationConfig())(image, None, torch.Generator())[0] is image  # type: ignore[arg-type]


def test_further_steps_leave_the_draws_of_resize_and_flip() -> None:
    image, target = rendered((100, 140), 3)
    plain = replace(CONFIG, short_sides=(64, 80, 96))
    more = replace(plain, augmentation=AugmentationConfig(photometric=0.5, expand=1e-9))
    for seed in range(10):
        one, other = (Augmentation.of(config, training=True)(image, target, seed) for config in (plain, more))
        assert torch.equal(one[1].boxes, other[1].boxes) and one[0].shape == other[0].shape


def test_evaluation_is_never_augmented() -> None:
    image, target = rendered((100, 140), 3)
    strong = config_with(photometric=1.0, expand=1.0, iou_crop=True)
    one, other = (Augmentation.of(config, training=False)(image, target, 7) for config in (CONFIG, strong))
    assert torch.equal(one[0], other[0]) and torch.equal(one[1].boxes, other[1].boxes)


def test_off_means_the_bits_of_the_first_version() -> None:
    """The sum was taken before the further augmentations were written."""
    digest = hashlib.sha256()
    augment = Augmentation.of(DataConfig(short_sides=(40, 64, 100), max_side=128), training=True)
    for seed in range(20):
        image, target = rendered((60, 90), seed)
        pixels, found = augment(image, target, seed)
        assert found.masks is not None
        for part in (pixels, found.boxes, found.masks):
            digest.update(part.contiguous().numpy().tobytes())
    assert digest.hexdigest()[:16] == "37b281e427eedf88"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"jitter_side": 100}, "null without data.augmentation.large_scale_jitter"),
        ({"large_scale_jitter": (0.1, 2.0), "jitter_side": 200}, "1 to data.max_side = 160"),
        (
            {"large_scale_jitter": (0.1, 2.0), "expand": 0.5},
            "expand is 0.5; accepted: off with data.augmentation.large",
        ),
        ({"large_scale_jitter": (0.1, 2.0), "iou_crop": True}, "iou_crop is True; accepted: off with"),
        ({"crop_ious": (0.5, 1.0)}, "0 to 1, less than 1 each"),
        ({"expand": 0.5, "expand_ratio": 0.5}, "expand_ratio is 0.5; accepted: 1 or more"),
        ({"large_scale_jitter": (2.0, 0.1)}, "two factors above 0 in rising order, or null"),
        ({"photometric": 1.5}, "data.augmentation.photometric is 1.5; accepted: 0 to 1"),
        ({"brightness": 256.0}, "accepted: 0 to 255"),
    ],
)
def test_contradictions_are_refused_in_one_line(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as found:
        Config(data=replace(CONFIG, augmentation=AugmentationConfig(**keys)))
    assert "\n" not in str(found.value)


def test_jitter_draws_the_scale_alone() -> None:
    jitter = AugmentationConfig(large_scale_jitter=(0.1, 2.0))
    with pytest.raises(UserError, match=r"one size with data\.augmentation\.large_scale_jitter"):
        Config(data=replace(CONFIG, short_sides=(64, 96), augmentation=jitter))


def test_the_mixing_steps_are_refused_where_one_image_is_read_at_a_time() -> None:
    with pytest.raises(UserError, match=r"mosaic is 0\.5; accepted: 0 with data\.decode_on_gpu"):
        Config(data=replace(CONFIG, decode_on_gpu=True, augmentation=AugmentationConfig(mosaic=0.5)))


def crops_of(target: Target, ious: tuple[float, ...], seeds: int = 200) -> list[tuple[Tensor, Target]]:
    """Crops of a picture whose red and green are the column and the row of each pixel."""
    rows, columns = torch.meshgrid(torch.arange(100), torch.arange(140), indexing="ij")
    image = torch.stack([columns, rows, rows * 0]).to(torch.uint8)
    crop = IouCrop(ious, (0.3, 1.0))
    return [crop(image, target, torch.Generator().manual_seed(seed)) for seed in range(seeds)]


def window(image: Tensor) -> Tensor:
    """(1, 4) the place of a crop of `crops_of` in its picture."""
    (left, top), (right, bottom) = image[:2, 0, 0].tolist(), image[:2, -1, -1].tolist()
    return torch.tensor([[left, top, right + 1, bottom + 1]], dtype=torch.float32)


def test_a_crop_holds_what_was_asked_and_keeps_what_has_its_centre_there() -> None:
    boxes = torch.tensor([[20.0, 30, 60, 80], [100, 10, 130, 40], [0, 0, 140, 100]])
    target = Target(
        boxes, torch.tensor([1, 2, 3]), torch.tensor([False, False, True]), torch.tensor([True, False, False])
    )
    whole = 0
    for image, found in crops_of(target, (0.5,)):
        crop = window(image)
        sides = crop[0, 2:] - crop[0, :2]
        if sides.tolist() == [140, 100]:
            whole += 1
            continue
        shares = sides / torch.tensor([140.0, 100])
        assert 0.29**2 < shares.prod() <= 1 and 0.45 < shares[0] / shares[1] < 2.2  # sides are whole pixels
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        inside = ((centres >= crop[0, :2]) & (centres < crop[0, 2:])).all(dim=1)
        assert found.labels.tolist() == [label for label in (1, 2) if inside[label - 1]] + [3]
        assert len(found) > 1 and found.difficult.tolist() == [label == 1 for label in found.labels.tolist()]
        expected = (boxes[found.labels - 1].clamp(crop[0, :2].repeat(2), crop[0, 2:].repeat(2))) - crop[0, :2].repeat(2)
        assert torch.equal(found.boxes, expected)
    assert 40 < whole < 100  # a third of 200; more where an IoU of 0.5 was not found


def test_a_least_iou_is_kept() -> None:
    """With IoUs alone to choose from, each crop that is no whole image has one."""
    boxes = torch.tensor([[20.0, 30, 110, 90]])
    crop = IouCrop((0.7,), (0.3, 1.0))
    crop.least = (0.7,)
    rows, columns = torch.meshgrid(torch.arange(100), torch.arange(140), indexing="ij")
    image = torch.stack([columns, rows, rows * 0]).to(torch.uint8)
    target = Target.ordinary(boxes, torch.ones(1, dtype=torch.int64))
    found = [window(crop(image, target, torch.Generator().manual_seed(seed))[0]) for seed in range(40)]
    made = torch.cat([place for place in found if place.tolist() != [[0, 0, 140, 100]]])
    assert len(made) > 20 and float(box_iou(made, boxes).min()) >= 0.7


def test_an_image_without_objects_is_not_cropped() -> None:
    crowd = Target(torch.tensor([[0.0, 0, 50, 50]]), torch.ones(1).long(), torch.ones(1).bool(), torch.zeros(1).bool())
    for target in (crowd, crowd.without_crowds()):
        assert all(image.shape == (3, 100, 140) for image, _ in crops_of(target, (0.1,), seeds=10))


def test_expansion_is_filled_with_the_mean_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    image, target = rendered((100, 140), 4)
    sizes = []
    for seed in range(40):
        pixels, _ = Expand(1.0, 4.0)(image, target, torch.Generator().manual_seed(seed))
        sizes.append(pixels.shape[1] / 100)
        assert int((pixels == torch.tensor(FILL).reshape(3, 1, 1)).all(dim=0).sum()) == pixels[0].numel() - 14000
    assert min(sizes) < 1.5 and 3.5 < max(sizes) <= 4
    monkeypatch.setattr("megdet_hpc.data.ssd_crops._MOST_VALUES", 6 * 14000)
    pixels, found = Expand(1.0, 4.0)(image, target, torch.Generator().manual_seed(1))
    assert found.masks is not None and 0.9 * 14000 < found.masks[0].numel() == pixels[0].numel() <= 14000


def test_a_mosaic_has_the_size_of_its_image_and_boxes_of_its_pixels() -> None:
    kept = 0
    for seed in range(60):
        images = [
            rendered(size, 10 * seed + number)
            for number, size in enumerate([(90, 120), (140, 60), (50, 50), (200, 300)])
        ]
        generator = torch.Generator().manual_seed(seed)
        pixels, found = mosaic(*images[0], images[1:], generator, 0.1)
        assert pixels.shape == (3, 90, 120) and found.masks is not None and found.masks.shape == (len(found), 90, 120)
        for box, label, mask in zip(found.boxes, found.labels.tolist(), found.masks, strict=True):
            if (box[2:] - box[:2]).min() < 3 or not mask.any():
                continue
            kept += 1
            assert np.abs(np.subtract(box_around(mask), box.tolist())).max() <= 1
            left, top, right, bottom = (int(value) for value in box.round())
            inside = pixels[label - 1, top + 1 : bottom - 1, left + 1 : right - 1]
            assert inside.numel() == 0 or int(inside.min()) > 127
        assert len(found) <= 12
    assert kept > 100


def test_what_is_pasted_covers_what_is_below() -> None:
    below = torch.zeros(2, 60, 80, dtype=torch.bool)
    below[0, 10:50, 10:70] = True
    below[1, 28:32, 38:42] = True
    boxes = torch.tensor([[10.0, 10, 70, 50], [38, 28, 42, 32]])
    target = Target.ordinary(boxes, torch.tensor([1, 2]), below)
    mask = torch.zeros(1, 60, 80, dtype=torch.bool)
    mask[0, 5:55, 5:75] = True
    other = Target.ordinary(torch.tensor([[5.0, 5, 75, 55]]), torch.tensor([3]), mask)
    image, bright = torch.zeros(3, 60, 80, dtype=torch.uint8), torch.full((3, 60, 80), 200, dtype=torch.uint8)
    outcomes = set()
    for seed in range(40):
        pixels, found = copy_paste(image, target, [(bright, other)], torch.Generator().manual_seed(seed), 0.1)
        assert int(image.max()) == 0, "the image itself is changed"
        outcomes.add(tuple(found.labels.tolist()))
        assert found.masks is not None
        pasted = pixels[0] > 100
        for box, label, own in zip(found.boxes, found.labels.tolist(), found.masks, strict=True):
            if label == 3:
                assert torch.equal(own, pasted)
            else:
                assert not (own & pasted).any() and own.sum() >= 0.1 * below[label - 1].sum()
            assert np.abs(np.subtract(box_around(own), box.tolist())).max() <= 1
    assert (1, 2) in outcomes and (1, 3) in outcomes
