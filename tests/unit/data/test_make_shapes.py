"""data_prep/make_shapes.py: what the generated set promises."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # data_prep of this checkout

from data_prep.make_shapes import CATEGORIES, LEAST_VISIBLE, main, make_shapes, outline, run_lengths

NUM_TRAIN = 120


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generated") / "shapes"
    make_shapes(folder, num_train=NUM_TRAIN, num_val=3, seed=0, size=96)
    return folder


@pytest.fixture(scope="module")
def coco(shapes: Path) -> dict[str, Any]:
    source: dict[str, Any] = json.loads((shapes / "annotations" / "instances_train.json").read_bytes())
    return source


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("one", 4), ("two", 4), ("other", 5)):
        make_shapes(tmp_path / name, num_train=4, num_val=2, seed=seed, size=64)
    one, two, other = (files_of(tmp_path / name) for name in ("one", "two", "other"))
    assert len(one) == 8
    assert one == two
    assert one.keys() == other.keys()
    assert not any(one[name] == other[name] for name in one)
    assert len({one[name] for name in one if name.endswith(".jpg")}) == 6


def test_files_and_sizes(shapes: Path, coco: dict[str, Any]) -> None:
    assert sorted(path.name for path in shapes.iterdir()) == ["annotations", "train", "val"]
    orientations = set()
    for image in coco["images"]:
        with Image.open(shapes / "train" / image["file_name"]) as file:
            assert file.format == "JPEG"
            assert file.size == (image["width"], image["height"])
        long_side, short_side = max(file.size), min(file.size)
        assert 96 <= long_side <= 120
        assert 72 <= short_side <= 96
        orientations.add(image["width"] > image["height"])
    assert orientations == {True, False}


def test_every_kind_of_annotation_occurs(coco: dict[str, Any]) -> None:
    annotations = coco["annotations"]
    per_image = {image["id"]: 0 for image in coco["images"]}
    for record in annotations:
        per_image[record["image_id"]] += 1
    assert 0 in per_image.values()
    assert max(per_image.values()) >= 5
    assert sum(record["iscrowd"] for record in annotations) >= 2
    by_category = [sum(r["category_id"] == i for r in annotations) for i in CATEGORIES.values()]
    assert min(by_category) > 0.1 * len(annotations)
    assert len({record["id"] for record in annotations}) == len(annotations)


def test_boxes_are_the_drawn_extent(coco: dict[str, Any]) -> None:
    images = {image["id"]: image for image in coco["images"]}
    sides = []
    for record in coco["annotations"]:
        image = images[record["image_id"]]
        x, y, width, height = record["bbox"]
        assert x >= 0 and y >= 0 and x + width <= image["width"] and y + height <= image["height"]
        if record["iscrowd"]:
            rle = coco_mask.frPyObjects(record["segmentation"], image["height"], image["width"])
            assert coco_mask.toBbox(rle).tolist() == record["bbox"]
            assert coco_mask.area(rle) == record["area"]
            continue
        points = np.reshape(record["segmentation"][0], (-1, 2))
        np.testing.assert_allclose([*points.min(axis=0), *np.ptp(points, axis=0)], record["bbox"], atol=0.011)
        sides.append(max(width, height) / min(image["width"], image["height"]))
        assert max(width, height) >= 13.9
    assert max(sides) <= 0.61
    assert max(sides) > 0.5


def test_masks_agree_with_the_polygons(shapes: Path) -> None:
    """pycocotools rasterises each polygon, the ring's hole too, to about the annotated area."""
    ground_truth = COCO(shapes / "annotations" / "instances_val.json")
    records = list(ground_truth.anns.values())
    assert records
    for record in records:
        assert ground_truth.annToMask(record).sum() == pytest.approx(record["area"], rel=0.15)


def test_no_object_is_hidden(shapes: Path) -> None:
    ground_truth = COCO(shapes / "annotations" / "instances_train.json")
    for image_id in ground_truth.getImgIds():
        records = ground_truth.loadAnns(ground_truth.getAnnIds([image_id], iscrowd=0))
        masks = [ground_truth.annToMask(record).astype(bool) for record in records]
        for index, mask in enumerate(masks):  # later objects are drawn over earlier ones
            above = np.any(masks[index + 1 :], axis=0) if index + 1 < len(masks) else np.zeros_like(mask)
            assert (mask & ~above).sum() >= (LEAST_VISIBLE - 0.1) * mask.sum()


@pytest.mark.parametrize("name", CATEGORIES)
def test_outline_has_the_extent(name: str) -> None:
    points = outline(name, 20.0, 0.2)
    assert np.ptp(points, axis=0).max() == pytest.approx(20.0)
    np.testing.assert_allclose(points.min(axis=0), -points.max(axis=0))


def test_outline_of_an_unknown_shape() -> None:
    with pytest.raises(ValueError, match="shape 'heptagon': accepted are circle"):
        outline("heptagon", 20.0, 0.0)


@pytest.mark.parametrize("seed", range(4))
def test_run_lengths_decode_to_the_mask(seed: int) -> None:
    mask = np.random.default_rng(seed).random((5, 7)) < (0.0, 0.3, 0.7, 1.0)[seed]
    rle = run_lengths(mask)
    decoded = coco_mask.decode(coco_mask.frPyObjects(rle, 5, 7))
    np.testing.assert_array_equal(decoded.astype(bool), mask)
    assert sum(rle["counts"]) == mask.size


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "set"
    command = ["--output", str(output), "--train", "2", "--val", "1", "--size", "64"]
    assert main(command) == 0
    assert "instances_train.json: 2 images" in capsys.readouterr().out
    for arguments, text in (
        (command, "exists and is not an empty folder"),
        (["--output", str(tmp_path / "a"), "--train", "0"], "--train 0 --val 80: accepted are 1 or more"),
        (["--output", str(tmp_path / "a"), "--size", "9"], "--size 9: accepted are 64 to 2048 pixels"),
        (["--output", str(tmp_path / "a"), "--seed", "-1"], "--seed -1: accepted are 0 or more"),
    ):
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("make_shapes: error: ") and text in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]
