"""Both formats of a pack: one of format 1, written by version 0.1.0, and what format 2 adds to it."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT))  # data_prep of this checkout

from data_prep import pack_coco, stage_pack, verify_pack
from megdet_hpc.config import DataConfig
from megdet_hpc.data.batch import collate
from megdet_hpc.data.coco_json import rebuild_coco
from megdet_hpc.data.dataset import DetectionDataset
from megdet_hpc.data.masks import mask_areas
from megdet_hpc.data.pack_masks import lacking_masks, masks_of
from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.errors import UserError

OLD = ROOT / "tests" / "files" / "pack_format_1"
ANNOTATIONS = OLD / "annotations.json"  # a polygon, two polygons, a crowd region in plain RLE, an object in compressed
SIZE = (32, 24)


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("format") / "old"
    folder.mkdir()
    (folder / "manifest.json").write_bytes((OLD / "manifest.json").read_bytes())
    (folder / "shard-00000.h5").write_bytes(gzip.decompress((OLD / "shard-00000.h5.gz").read_bytes()))
    return folder


def pack(source: dict[str, Any], folder: Path, *more: str) -> int:
    """Pack a set whose images are one grey; the exit status."""
    (folder / "images").mkdir(parents=True)
    for image in source["images"]:
        Image.new("RGB", SIZE, (90, 90, 90)).save(folder / "images" / image["file_name"])
    (folder / "set.json").write_text(json.dumps(source))
    files = ["--annotations", str(folder / "set.json"), "--images", str(folder / "images")]
    return pack_coco.main([*files, "--output", str(folder / "pack"), *more])


def source() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(ANNOTATIONS.read_text())
    return loaded


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("format_2")
    assert pack(source(), folder) == 0
    return folder / "pack"


def test_a_pack_of_format_1_is_read_verified_staged_and_rebuilt(
    old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = PackedCoco(old)
    assert packed.shard_format == 1 and len(packed) == 3
    assert rebuild_coco(packed) == source()
    assert verify_pack.main([str(old), "--decode", "--annotations", str(ANNOTATIONS)]) == 0
    assert capsys.readouterr().out.startswith("verified: 3 images, 4 annotations, 1 shards, decoded, equal to the ")
    assert stage_pack.main([str(old), str(tmp_path / "copy")]) == 0
    copy = PackedCoco(tmp_path / "copy")
    assert [copy.segmentations(k) for k in range(3)] == [packed.segmentations(k) for k in range(3)]


def test_format_2_holds_the_same_and_more(old: Path, new: Path) -> None:
    before, now = PackedCoco(old), PackedCoco(new)
    assert now.shard_format == 2 and now.manifest["version"] == 2
    assert rebuild_coco(now) == rebuild_coco(before)
    for index in range(3):
        a, b = before.annotations(index), now.annotations(index)
        for field in ("ids", "boxes_xywh", "iscrowd", "segmented", "areas"):
            assert np.array_equal(getattr(a, field), getattr(b, field)), field
        assert masks_of(before, index) == masks_of(now, index)
        assert not a.difficult.any()  # format 1 keeps it among the further keys
    assert now.annotations(0).difficult.tolist() == [False, True]


def test_a_flag_that_is_none_stays_a_further_key(tmp_path: Path) -> None:
    given = source()
    for record, value in zip(given["annotations"], (True, "1", 0, 2), strict=True):
        record["difficult"] = value
    assert pack(given, tmp_path) == 0
    packed = PackedCoco(tmp_path / "pack")
    again = [record["difficult"] for record in rebuild_coco(packed)["annotations"]]
    assert again == [True, "1", 0, 2] and [type(value) for value in again] == [bool, str, int, int]
    assert not packed.annotations(0).difficult.any() and not packed.annotations(1).difficult.any()


@pytest.mark.parametrize(("orientation", "version"), [("stored", 2), ("upright", 3)])
def test_a_reader_of_format_1_refuses_the_manifest(orientation: str, version: int, tmp_path: Path) -> None:
    """It knows version 1, and 2 with orientation upright."""
    assert pack(source(), tmp_path, "--orientation", orientation) == 0
    manifest = json.loads((tmp_path / "pack" / "manifest.json").read_text())
    assert (manifest["version"], manifest["orientation"]) == (version, orientation)
    assert manifest["version"] != (2 if orientation == "upright" else 1)
    assert PackedCoco(tmp_path / "pack").shard_format == 2


def test_a_pack_begun_in_format_1_is_not_finished_in_format_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = tmp_path / "pack.partial" / "resume" / "plan.json"
    begun.parent.mkdir(parents=True)
    begun.write_text("{}")
    (tmp_path / "pack.partial" / "shard-00000.h5").touch()
    assert pack(source(), tmp_path) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "pack.partial: an unfinished pack was begun with other inputs" in line and "format was 1, is 2" in line


def test_a_pack_that_was_begun_with_other_options_and_has_no_shard_begins_anew(tmp_path: Path) -> None:
    begun = tmp_path / "pack.partial" / "resume" / "plan.json"
    begun.parent.mkdir(parents=True)
    begun.write_text('{"orientation": "stored"}')
    assert pack(source(), tmp_path, "--orientation", "upright") == 0
    assert PackedCoco(tmp_path / "pack").upright


CONFIG = DataConfig(short_sides=(48,), max_side=96, val_short_side=24, flip_probability=1.0)


def test_masks_come_to_the_batch_where_they_are_asked_for(new: Path) -> None:
    """Polygons, both kinds of RLE and a crowd region, at the pack's own size and after resize and flip."""
    plain = DetectionDataset.open(new, CONFIG, training=False, seed=0, masks=True)
    areas = []
    for index in range(3):
        target = plain[(0, index)].target
        assert target.masks is not None and target.masks.shape == (len(target), 24, 32)
        assert target.masks.dtype == torch.bool
        areas += target.masks.sum(dim=(1, 2)).tolist()
    rles = [rle for index in range(3) for rle in masks_of(plain.pack, index) if rle]
    assert areas == mask_areas(rles).tolist() == [48, 52, 96, 48]
    moved = DetectionDataset.open(new, CONFIG, training=True, seed=0, masks=True)
    batch = collate([moved[(0, index)] for index in range(3)])
    for index, target in enumerate(batch.targets):
        assert target.masks is not None and target.masks.shape == (len(target), *batch.sizes[index])
        before = plain[(0, index)].target.masks
        assert before is not None
        twice = before.repeat_interleave(2, 1).repeat_interleave(2, 2).flip(2)  # the short side is 24 and becomes 48
        assert torch.equal(target.masks, twice)
    assert batch.targets[0].difficult.tolist() == [False, True] and batch.targets[1].crowd.tolist() == [True, False]
    without = DetectionDataset.open(new, CONFIG, training=True, seed=0)[(0, 0)].target
    assert without.masks is None


def test_a_detector_of_masks_gets_no_set_of_boxes(tmp_path: Path) -> None:
    given = source()
    del given["annotations"][1]["segmentation"]
    given["annotations"][2]["segmentation"] = []  # a crowd region, for which its box will do
    assert pack(given, tmp_path) == 0
    data = DetectionDataset.open(tmp_path / "pack", CONFIG, training=True, seed=0, masks=True)
    text = "1 of 3 objects have no segmentation, the first is annotation id 12 of image id 1"
    assert lacking_masks(data.pack) == text and lacking_masks(data.pack, 0) == ""
    with pytest.raises(UserError, match=rf"data.train .*pack: the detector trains on masks, and {text}"):
        data.check_targets("data.train")
    with pytest.raises(UserError, match=r"image id 1, annotation id 12: has no segmentation"):
        data[(0, 0)]
    crowd = data[(0, 1)].target.masks
    assert crowd is not None and int(crowd[0].sum()) == 4 * 24 * 4
    DetectionDataset.open(tmp_path / "pack", CONFIG, training=True, seed=0).check_targets("data.train")


def test_a_segmentation_that_is_none_names_image_and_annotation(tmp_path: Path) -> None:
    given = source()
    given["annotations"][3]["segmentation"] = {"size": [24, 33], "counts": "5"}
    assert pack(given, tmp_path) == 0
    packed = PackedCoco(tmp_path / "pack")
    with pytest.raises(UserError, match=r"image id 2, annotation id 14: its segmentation has the size \[24, 33\]"):
        masks_of(packed, 1)
