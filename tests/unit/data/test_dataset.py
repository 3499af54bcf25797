from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from megdet_hpc.config import DataConfig, Geometry
from megdet_hpc.data.batch import Batch, collate
from megdet_hpc.data.dataset import Categories, DetectionDataset
from megdet_hpc.data.loader import make_loader
from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.data.sample import Sample, Target
from megdet_hpc.data.shard_format import PackError
from megdet_hpc.errors import UserError

CONFIG = DataConfig(short_sides=(64, 96), max_side=128, val_short_side=80)


NOTHING = Target.ordinary(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))


def dataset(folder: Path, training: bool, seed: int = 0) -> DetectionDataset:
    return DetectionDataset(PackedCoco(folder), CONFIG, training=training, seed=seed)


def test_evaluation_only_resizes(shapes: Path) -> None:
    data = dataset(shapes / "val", training=False)
    for index in range(len(data)):
        sample = data[(0, index)]
        height, width = sample.image.shape[1:]
        assert min(height, width) == 80 or max(height, width) == 128
        stored = data.target(index)
        scale = torch.tensor([*sample.scale, *sample.scale])
        torch.testing.assert_close(sample.target.boxes, stored.boxes * scale, atol=1e-3, rtol=1e-4)
        assert torch.equal(sample.target.labels, stored.labels) and torch.equal(sample.target.crowd, stored.crowd)


def test_augmentation_is_a_function_of_seed_epoch_and_image(shapes: Path) -> None:
    first, second = dataset(shapes / "train", True), dataset(shapes / "train", True)
    state = torch.get_rng_state()
    a, b = first[(2, 5)], second[(2, 5)]
    assert torch.equal(a.image, b.image) and torch.equal(a.target.boxes, b.target.boxes)
    assert torch.equal(torch.get_rng_state(), state)
    variants = {(s.image.shape, float(s.image.float().mean(0)[0, 0])) for s in (first[(e, 5)] for e in range(8))}
    assert len(variants) > 2


def test_targets_mark_crowds_and_leave_out_boxes_without_area(shapes: Path, tmp_path: Path) -> None:
    data = dataset(shapes / "train", True)
    index = int(np.argmax([len(data.pack.annotations(i).ids) for i in range(len(data))]))
    found = data.pack.annotations(index)
    boxes, crowd = found.boxes_xywh.copy(), found.iscrowd.copy()
    crowd[0] = True
    boxes[1, 3] = 0
    replaced = found._replace(boxes_xywh=boxes, iscrowd=crowd)
    data.pack.annotations = lambda i: replaced  # type: ignore[method-assign]
    target = data[(0, index)].target
    assert target.crowd.tolist() == crowd[boxes[:, 3] > 0].tolist()
    assert ((target.boxes[:, 2:] - target.boxes[:, :2]) >= 1).all()
    objects = target.without_crowds()
    assert len(objects) == (~crowd & (boxes[:, 3] > 0)).sum() and not objects.crowd.any()
    assert torch.equal(objects.boxes, target.boxes[~target.crowd])


def test_category_ids_with_gaps_become_consecutive_labels() -> None:
    categories = Categories([{"id": 90, "name": "brush"}, {"id": 1, "name": "person"}, {"id": 13, "name": "sign"}])
    assert [categories.label(i) for i in (1, 13, 90)] == [1, 2, 3]
    assert categories.names == ["person", "sign", "brush"]
    with pytest.raises(UserError, match="val has 1 categories"):
        Categories([{"id": 1}]).check_same(categories, "val", "train")


def test_collate_pads_to_a_multiple_of_32() -> None:
    samples = [
        Sample(torch.full((3, h, w), 7, dtype=torch.uint8), (w / 7, h / 9), i, NOTHING)
        for i, (h, w) in enumerate([(33, 64), (20, 70)])
    ]
    batch = collate(samples)
    assert batch.images.shape == (2, 3, 64, 96)
    assert batch.sizes == [(33, 64), (20, 70)] and batch.own_sizes == [(9, 7), (9, 7)]
    assert collate(samples, side=100).images.shape == (2, 3, 128, 128)
    assert collate(samples, geometry=Geometry(divisible=5)).images.shape == (2, 3, 35, 70)
    assert batch.images[0, :, :33, :64].eq(7).all()
    assert int(batch.images.sum()) == 7 * 3 * (33 * 64 + 20 * 70)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_give_the_same_batches_in_order(shapes: Path, workers: int) -> None:
    data = dataset(shapes / "train", True)
    keys = [[(0, 3), (0, 1)], [(1, 3)], [(0, 7), (0, 8), (0, 9)]]
    alone = list(make_loader(data, keys, num_workers=0, pin_memory=False))
    together = list(make_loader(data, keys, num_workers=workers, pin_memory=False))
    for a, b in zip(alone, together, strict=True):
        assert isinstance(a, Batch) and isinstance(b, Batch)
        assert torch.equal(a.images, b.images) and a.image_ids == b.image_ids


def test_a_flipped_byte_is_found_at_the_read(shapes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in (shapes / "val").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    data = dataset(folder, training=False)
    shard = next(folder.glob("*.h5"))
    position = shard.read_bytes().find(data.pack.read_image_bytes(2)) + 40
    with open(shard, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))
        os.fsync(file.fileno())
    with pytest.raises(ValueError, match=rf"{shard.name}.*{data.pack.image_ids[2]}"):
        data[(0, 2)]
    assert data.pack.read_image_bytes(2, check=False)[40] == byte ^ 1
    for workers in (0, 2):
        batches = iter(make_loader(data, [[(0, 1)], [(0, 0), (0, 2)]], num_workers=workers, pin_memory=False))
        assert next(batches).image_ids == [int(data.pack.image_ids[1])]
        with pytest.raises(PackError) as found:
            next(batches)
        assert re.fullmatch(rf".*{shard.name}: image id {data.pack.image_ids[2]}: .*CRC-32.*", str(found.value))


def test_shapes_fixture_is_what_the_tests_assume(shapes: Path) -> None:
    source = json.loads((shapes / "coco" / "annotations" / "instances_train.json").read_text())
    assert len(source["images"]) == 24
    assert len(PackedCoco(shapes / "train")) == 24


@pytest.mark.parametrize("cache", ["decoded", "resized"])
def test_cached_pictures_give_the_same_samples(shapes: Path, cache: str) -> None:
    config = dataclasses.replace(CONFIG, short_sides=(64,))
    kept = dataclasses.replace(config, cache=cache)  # type: ignore[arg-type]
    for training in (True, False):
        plain, cached = (
            DetectionDataset.open(shapes / "train", own, training=training, seed=3) for own in (config, kept)
        )
        for epoch in range(3):  # the first fills the cache, the others read it
            for index in range(8):
                a, b = plain[(epoch, index)], cached[(epoch, index)]
                assert torch.equal(a.image, b.image) and a.scale == b.scale and a.image_id == b.image_id
                assert torch.equal(a.target.boxes, b.target.boxes) and torch.equal(a.target.labels, b.target.labels)
                assert torch.equal(a.target.crowd, b.target.crowd)
        assert len(cached._images) == (8 if cache == "decoded" else 0) and not plain._images
        assert len(cached._resized) == (8 if cache == "resized" else 0)


def test_a_cache_needs_pictures_that_stay_the_same() -> None:
    with pytest.raises(UserError, match=r"data\.cache is 'resized'; accepted: none or decoded with"):
        dataclasses.replace(CONFIG, cache="resized").check()
    with pytest.raises(UserError, match=r"data\.cache is 'decoded'; accepted: none with data.decode_on_gpu"):
        dataclasses.replace(CONFIG, cache="decoded", decode_on_gpu=True).check()
