"""Photographs with an EXIF orientation: boxes of the stored pixels by default, of the upright picture where asked."""

from __future__ import annotations

import shutil
import struct
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from data_prep.image_sizes import image_size
from data_prep.show_pack import draw_images
from data_prep.verify_pack import main as verify
from megdet_hpc.config import DataConfig
from megdet_hpc.data.coco_json import rebuild_coco
from megdet_hpc.data.dataset import DetectionDataset
from megdet_hpc.data.decode import decode_rgb
from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.data.shard_format import PackError
from megdet_hpc.evaluation.detections import DetectionTable
from megdet_hpc.report.pictures import _draw
from tests.cases.sets import SCENE_BOXES, encoded, pack, scene, summary, write_set
from tests.conftest import run

# How an upright picture is stored so that a viewer that applies the orientation shows it upright: Pillow's names.
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
NAMES = {orientation: f"{orientation}.jpg" for orientation in range(1, 9)}


def photograph(orientation: int, kind: str = "JPEG", height: int = 90) -> bytes:
    image = Image.fromarray(scene(height))
    if orientation in STORED:
        image = image.transpose(STORED[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(np.array(image), kind, exif=exif, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}))


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """All orientations of the scene, with the boxes of the upright picture; the last is a PNG."""
    files = {NAMES[orientation]: photograph(orientation) for orientation in range(1, 9)}
    files["6.png"] = photograph(6, "PNG")
    return write_set(tmp_path_factory.mktemp("exif") / "set", files, dict.fromkeys(files, (120, 90)))


@pytest.fixture(scope="module")
def upright(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("exif") / "upright"
    done = run(
        [sys.executable, "data_prep/pack_coco.py", *options, "--output", str(output), "--orientation", "upright"]
    )
    assert done.returncode == 0, done.stderr
    assert "boxes are taken as those of the upright pictures; decoding turns the pixels" in done.stdout
    return output


def colours_in_boxes(pixels: np.ndarray) -> tuple[list[int], list[int]]:
    """The mean colours of the two boxes, inside their edges."""
    return pixels[14:33, 12:40].mean(axis=(0, 1)).round().tolist(), pixels[46:64, 64:88].mean(axis=(0, 1)).tolist()


def assert_in_place(pixels: np.ndarray) -> None:
    red, blue = colours_in_boxes(pixels)
    assert np.allclose(red, (220, 30, 30), atol=4) and np.allclose(blue, (30, 30, 220), atol=4)


def test_stored_sizes_that_do_not_fit_name_the_option(options: list[str], tmp_path: Path) -> None:
    done = run([sys.executable, "data_prep/pack_coco.py", *options, "--output", str(tmp_path / "pack")])
    assert done.returncode != 0
    error = done.stderr[done.stderr.index("pack_coco: error: ") :]
    assert "5 faults (wrong_image_size 5)" in error
    assert (
        "5.jpg: image id 5: is 90 x 120 pixels, the annotations say 120 x 90: its size once its EXIF orientation 5"
        in (error)
    )
    assert "pack with --orientation upright" in error


def test_images_of_the_same_size_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Orientations 2 to 4, and any of a square photograph."""
    files = {NAMES[k]: photograph(k) for k in (1, 2, 3, 4)} | {"square.jpg": photograph(7, height=120)}
    options = write_set(tmp_path / "set", files, {**dict.fromkeys(files, (120, 90)), "square.jpg": (120, 120)})
    assert pack(options, tmp_path / "stored") == 0
    assert summary(tmp_path / "stored")["exif_orientation"] == 4
    assert "boxes are taken as those of the stored pixels" in capsys.readouterr().out
    found = PackedCoco(tmp_path / "stored")
    assert not found.upright
    for index in range(1, 5):
        with pytest.raises(AssertionError):
            assert_in_place(decode_rgb(found.read_image_bytes(index)).permute(1, 2, 0).numpy())
    assert pack(options, tmp_path / "upright", "--orientation", "upright") == 0
    found = PackedCoco(tmp_path / "upright")
    for index in range(5):
        assert_in_place(decode_rgb(found.read_image_bytes(index), found.upright).permute(1, 2, 0).numpy())


def test_training_and_evaluation_see_the_boxes_on_their_objects(upright: Path) -> None:
    """Sizes of the index, of the sample and the boxes agree."""
    config = DataConfig(train="", short_sides=(90,), val_short_side=90, max_side=120, flip_probability=0.0)
    for training in (True, False):
        data = DetectionDataset.open(upright, config, training=training, seed=0)
        assert len(data) == 9 and summary(upright)["exif_orientation"] == 8
        for index in range(len(data)):
            sample = data[0, index]
            assert_in_place(sample.image.permute(1, 2, 0).numpy())
            assert sample.target.boxes.tolist() == [[8, 10, 44, 37], [60, 42, 92, 68]] and sample.scale == (1, 1)


def test_pictures_show_the_boxes_on_their_objects(upright: Path) -> None:
    """show_pack.py, and the picture of predictions that training and evaluation write."""
    found = PackedCoco(upright)
    shown = [axes for axes in draw_images(found, range(9), "all").axes if axes.images]
    config = DataConfig(train="", short_sides=(90,), val_short_side=90, max_side=120, flip_probability=0.0)
    dataset = DetectionDataset(found, config, training=False, seed=0)
    for index in range(9):
        axes = plt.figure().add_subplot()
        _draw(axes, dataset, index, DetectionTable.joined([]))
        shown.append(axes)
    assert len(shown) == 18
    for axes in shown:
        assert_in_place(np.asarray(axes.images[0].get_array()))
        assert [list(box.get_bbox().bounds) for box in axes.patches] == list(map(list, SCENE_BOXES))
    plt.close("all")


def test_checks_agree(upright: Path, options: list[str]) -> None:
    assert verify([str(upright), "--decode", "--annotations", options[1]]) == 0
    assert {record["width"] for record in rebuild_coco(PackedCoco(upright))["images"]} == {120}


def test_two_packs_are_each_decoded_as_they_say(options: list[str], upright: Path, tmp_path: Path) -> None:
    stored = write_set(tmp_path / "set", {"6.jpg": photograph(6)}, {"6.jpg": (90, 120)})
    assert pack(stored, tmp_path / "stored") == 0
    config = DataConfig(train="", short_sides=(90,), val_short_side=90, max_side=120, flip_probability=0.0)
    train = DetectionDataset.open(tmp_path / "stored", config, training=True, seed=0)
    val = DetectionDataset.open(upright, config, training=False, seed=0)
    assert train[0, 0].image.shape == (3, 120, 90)
    assert val[0, 5].image.shape == (3, 90, 120)


def test_a_pack_begun_with_another_orientation_is_not_continued(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"1.jpg": photograph(2), "2.jpg": b""}
    options = write_set(tmp_path / "set", files, dict.fromkeys(files, (120, 90)))
    assert pack(options, tmp_path / "pack") == 1
    capsys.readouterr()
    assert pack(options, tmp_path / "pack", "--orientation", "upright") == 1  # no shard was written: it begins anew
    assert "2.jpg: image id 2: is empty" in capsys.readouterr().err
    (tmp_path / "pack.partial" / "shard-00000.h5").touch()
    assert pack(options, tmp_path / "pack") == 1
    assert "orientation was 'upright', is 'stored'" in capsys.readouterr().err


def test_a_reader_that_turns_no_image_refuses_an_upright_pack(upright: Path, tmp_path: Path) -> None:
    """It compares the version; one without the key is read as stored."""
    copy = tmp_path / "copy"
    shutil.copytree(upright, copy)
    text = (copy / "manifest.json").read_text()
    assert '"version": 3' in text
    (copy / "manifest.json").write_text(text.replace('"orientation": "upright"', '"unknown": 0'))
    with pytest.raises(PackError, match="format version 3"):
        PackedCoco(copy)
    (copy / "manifest.json").write_text(
        text.replace('"orientation": "upright"', '"unknown": 0').replace('"version": 3', '"version": 2')
    )
    assert not PackedCoco(copy).upright


def test_broken_exif_data_are_no_obstacle(tmp_path: Path) -> None:
    plain = encoded(scene(), "JPEG")
    broken = plain[:2] + b"\xff\xe1" + struct.pack(">H", 30) + b"Exif\0\0II*\0" + b"\xff" * 18 + plain[2:]
    options = write_set(tmp_path / "set", {"1.jpg": broken}, {"1.jpg": (120, 90)})
    command = [sys.executable, "data_prep/pack_coco.py", *options, "--orientation", "upright", "--decode"]
    done = run([*command, "--output", str(tmp_path / "pack")])
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    assert summary(tmp_path / "pack")["exif_orientation"] == 0
    assert (decode_rgb(broken, upright=True) == decode_rgb(plain)).all()


def test_sizes_missing_from_the_annotations_are_those_asked_for(tmp_path: Path) -> None:
    (tmp_path / "6.jpg").write_bytes(photograph(6))
    assert image_size(tmp_path / "6.jpg", "stored") == (90, 120)
    assert image_size(tmp_path / "6.jpg", "upright") == (120, 90)
