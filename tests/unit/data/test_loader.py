"""Sampler and loader together: the same batches whatever the number of workers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megdet_hpc.config import DataConfig
from megdet_hpc.data.batch import Batch
from megdet_hpc.data.continuation import continue_plan, plan_state
from megdet_hpc.data.dataset import DetectionDataset
from megdet_hpc.data.loader import make_loader
from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.data.sampler import EpochPlan, RankSampler
from megdet_hpc.data.shard_local import ShardLocal
from megdet_hpc.errors import UserError

CONFIG = DataConfig(short_sides=(64,), max_side=128, val_short_side=64)


def batches(data: DetectionDataset, sampler: RankSampler, workers: int) -> list[Batch]:
    return list(make_loader(data, sampler, num_workers=workers, pin_memory=False))  # type: ignore[arg-type]


@pytest.mark.parametrize("sampling", ["uniform", "shard_local"])
def test_batches_do_not_depend_on_the_number_of_workers(shapes: Path, sampling: str) -> None:
    data = DetectionDataset(PackedCoco(shapes / "train"), CONFIG, training=True, seed=0)
    pack = data.pack
    local = ShardLocal((0, 1), pack.images_per_shard, 4) if sampling == "shard_local" else None
    plan = EpochPlan(pack.heights > pack.widths, 2, 2, 1, seed=0, local=local)
    # from the middle of an epoch that another split began, into the next one
    plan = continue_plan(plan, plan_state(replace(plan, num_ranks=1, local=None), 3), 3)
    last = 3 + plan.steps_per_epoch - plan.position(3) + 1
    sampler = RankSampler(plan, [1], 3, last)
    alone = batches(data, sampler, 0)
    assert [batch.image_ids for batch in alone] == [
        pack.image_ids[[index for _, index in keys]].tolist() for keys in sampler
    ]
    for workers in (1, 2):
        for a, b in zip(alone, batches(data, sampler, workers), strict=True):
            assert a.image_ids == b.image_ids and torch.equal(a.images, b.images)


@pytest.mark.parametrize("workers", [0, 1])
def test_decoding_in_the_training_process_gives_the_same_batches(shapes: Path, workers: int) -> None:
    """On a CPU, where the decoder is the same; nvJPEG's place in it is taken on GPUs only."""
    data = DetectionDataset(PackedCoco(shapes / "train"), CONFIG, training=True, seed=0)
    sampler = RankSampler(EpochPlan(data.pack.heights > data.pack.widths, 2, 2, 1, seed=0), [0], 0, 4)
    there = list(
        make_loader(data, sampler, num_workers=workers, pin_memory=False, decode_on=torch.device("cpu"))  # type: ignore[arg-type]
    )
    for a, b in zip(batches(data, sampler, 0), there, strict=True):
        assert a.image_ids == b.image_ids and torch.equal(a.images, b.images) and a.sizes == b.sizes
        for one, other in zip(a.targets, b.targets, strict=True):
            assert torch.equal(one.boxes, other.boxes) and torch.equal(one.labels, other.labels)


def test_a_file_that_does_not_decode_is_named_there_too(shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = DetectionDataset(PackedCoco(shapes / "train"), CONFIG, training=True, seed=0)
    read = data.pack.read_image_bytes
    monkeypatch.setattr(data.pack, "read_image_bytes", lambda index: read(index)[:40])
    loader = make_loader(data, [[(0, 1)]], num_workers=0, pin_memory=False, decode_on=torch.device("cpu"))
    with pytest.raises(UserError, match=f"image id {data.pack.image_ids[1]} .* does not decode"):
        list(loader)


@pytest.mark.parametrize("damaged", [b"no image", b"\xff\xd8 no more"])
def test_a_file_that_is_no_image_is_named_by_id_and_file(shapes: Path, damaged: bytes) -> None:
    """Not as the memory that it was read into, which is all that Pillow knows."""
    data = DetectionDataset(PackedCoco(shapes / "val"), CONFIG, training=False, seed=0)
    with pytest.raises(UserError) as caught:
        data.sample((0, 1), damaged)
    name = f"{shapes / 'val'}: image id {data.pack.image_ids[1]} ({data.pack.file_name(1)})"
    assert str(caught.value) == f"{name} does not decode: no image, or of a format that Pillow does not read"
