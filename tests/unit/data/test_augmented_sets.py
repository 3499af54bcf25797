"""Augmented samples of a packed set: equal for ranks, workers and resumed runs; which images are mixed; the sheet."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megdet_hpc.augmented import main
from megdet_hpc.config import AugmentationConfig, DataConfig
from megdet_hpc.data.dataset import DetectionDataset
from megdet_hpc.data.loader import make_loader
from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.data.sample import Sample
from megdet_hpc.data.sampler import EpochPlan, RankSampler
from megdet_hpc.errors import UserError

EVERYTHING = AugmentationConfig(photometric=0.5, expand=0.5, iou_crop=True, mosaic=0.5, copy_paste=0.5)
CONFIG = DataConfig(short_sides=(48, 64), max_side=96, val_short_side=64, augmentation=EVERYTHING)


def opened(shapes: Path, config: DataConfig = CONFIG, *, seed: int = 0, masks: bool = False) -> DetectionDataset:
    return DetectionDataset(PackedCoco(shapes / "train"), config, training=True, seed=seed, masks=masks)


def samples(data: DetectionDataset, plan: EpochPlan, first: int, workers: int) -> dict[tuple[int, int], Sample]:
    """The samples of all ranks of a plan from update `first` to the end of the second epoch, by epoch and image."""
    found = {}
    for rank in range(plan.num_ranks):
        sampler = RankSampler(plan, [rank], first, 2 * plan.steps_per_epoch)
        batches = make_loader(data, sampler, num_workers=workers, pin_memory=False)  # type: ignore[arg-type]
        for keys, batch in zip(sampler, batches, strict=True):
            for number, ((epoch, _), size) in enumerate(zip(keys, batch.sizes, strict=True)):
                image = batch.images[number, :, : size[0], : size[1]]
                scale, image_id, target = batch.scales[number], batch.image_ids[number], batch.targets[number]
                found[epoch, image_id] = Sample(image, scale, image_id, target)
    return found


def test_ranks_workers_and_resumed_runs_see_the_same_pictures(shapes: Path) -> None:
    data = opened(shapes, masks=True)
    portrait = np.zeros(len(data.pack), np.bool_)
    whole = samples(data, EpochPlan(portrait, 4, 1, 1, seed=0), 0, 0)
    others = {
        "two ranks, a worker": samples(opened(shapes, masks=True), EpochPlan(portrait, 2, 2, 1, seed=0), 0, 1),
        "resumed in the second epoch": samples(opened(shapes, masks=True), EpochPlan(portrait, 4, 1, 1, seed=0), 8, 0),
    }
    assert len(whole) == 2 * len(data.pack)
    for name, found in others.items():
        assert len(found) >= 16, name
        for key, sample in found.items():
            own = whole[key]
            assert torch.equal(sample.image, own.image), (name, key)
            assert torch.equal(sample.target.boxes, own.target.boxes) and sample.scale == own.scale
            assert sample.target.masks is not None and own.target.masks is not None
            assert torch.equal(sample.target.masks, own.target.masks)


def test_other_seeds_and_epochs_give_other_pictures(shapes: Path) -> None:
    data, other = opened(shapes), opened(shapes, seed=1)
    pictures = [data[0, 3].image, data[1, 3].image, other[0, 3].image]
    assert len({tuple(picture.flatten()[:2000].tolist()) for picture in pictures}) == 3


@pytest.mark.parametrize("key", ["mosaic", "copy_paste"])
def test_mixed_pictures_have_objects_of_other_images(shapes: Path, key: str) -> None:
    data = opened(shapes, replace(CONFIG, augmentation=AugmentationConfig(**{key: 1.0})))
    plain = opened(shapes, replace(CONFIG, augmentation=AugmentationConfig()))
    counts = [len(data[0, index].target) - len(plain[0, index].target) for index in range(len(data))]
    assert sum(count > 0 for count in counts) > len(data) / 3
    sample = data[0, 0]
    assert sample.target.masks is None, "the detector asked for none"
    assert sample.image.shape == plain[0, 0].image.shape


def test_shard_local_sampling_mixes_images_of_one_shard(shapes: Path) -> None:
    data = opened(shapes, replace(CONFIG, sampling="shard_local"))
    assert [opened(shapes)._others(index) for index in (0, 23)] == [(0, 24), (0, 24)]
    data.pack._first_image = np.array([0, 10, 24])  # as if the set had two shards
    assert [data._others(index) for index in (0, 9, 10, 23)] == [(0, 10), (0, 10), (10, 14), (10, 14)]


def test_pasting_without_masks_is_refused(shapes: Path) -> None:
    data = opened(shapes)
    data.check_targets("data.train")
    flags = data.pack.index.flags
    flags["segmented"] = np.zeros_like(flags["segmented"])
    with pytest.raises(
        UserError, match=r"copy_paste needs masks, and \d+ of \d+ objects have no segmentation"
    ) as found:
        data.check_targets("data.train")
    assert "\n" not in str(found.value)


def test_the_sheet(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "sheet.png"
    command = ["--config", "tiny", "--data.train", str(shapes / "train"), "--picture", str(picture)]
    command += ["--images", "2", "--epochs", "1", "--data.augmentation.mosaic", "1"]
    main(command)
    assert capsys.readouterr().out == f"{picture}\n"
    with Image.open(picture) as image:
        assert image.width > 600 and len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 200
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as lacking:
        patch.setitem(sys.modules, "matplotlib", None)
        main([*command, "--overwrite"])
    assert lacking.value.code == 2
    assert f"--picture {picture} is drawn by matplotlib, which" in capsys.readouterr().err
    refusals = [
        (["--epochs", "0"], "--epochs 0: accepted are 1 to 50"),
        ([], "exists already"),
        (["--output=sheets"], "--output sheets is the folder of a training; --picture FILE names the sheet"),
    ]
    for more, message in refusals:
        with pytest.raises(SystemExit) as exit_:
            main(command + more)
        assert exit_.value.code == 2 and message in capsys.readouterr().err
