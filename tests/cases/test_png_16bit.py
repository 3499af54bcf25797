"""16-bit images and other formats whose values change: seen as they were labelled, everywhere, and counted."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megdet_hpc.config import DataConfig
from megdet_hpc.data.dataset import DetectionDataset
from megdet_hpc.data.decode import decode_rgb
from megdet_hpc.data.packed_coco import PackedCoco
from tests.cases.sets import encoded, pack, scene, summary, write_set
from tests.conftest import run


def deep_scene(background: int = 12000, red: int = 42000, blue: int = 60000) -> bytes:
    pixels = np.full((90, 120), background, np.uint16)
    pixels[10:37, 8:44], pixels[42:68, 60:92] = red, blue
    return encoded(pixels)


def test_values_are_the_same_in_packing_training_and_evaluation(tmp_path: Path) -> None:
    options = write_set(tmp_path / "set", {"xray.png": deep_scene()}, {"xray.png": (120, 90)})
    command = [sys.executable, "data_prep/pack_coco.py", *options, "--output", str(tmp_path / "pack"), "--decode"]
    done = run(command)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("images of 16 bits"))
    assert line.split()[4] == "1" and line.endswith("reduced to 8, 65535 becomes 255")
    assert "nearly black" not in done.stdout
    found = PackedCoco(tmp_path / "pack")
    pixels = decode_rgb(bytes(found.read_image_bytes(0)))
    assert [pixels[0, y, x].item() for y, x in ((80, 50), (20, 20), (50, 70))] == [47, 164, 234]
    config = DataConfig(train="", short_sides=(90,), val_short_side=90, max_side=120, flip_probability=0.0)
    for training in (True, False):
        image = DetectionDataset(found, config, training=training, seed=0)[0, 0].image
        assert (image == pixels).all()


def test_what_changes_values_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cmyk, transparent = io.BytesIO(), Image.fromarray(scene()).convert("RGBA")
    Image.fromarray(scene()).convert("CMYK").save(cmyk, "JPEG")
    transparent.putpixel((0, 0), (1, 2, 3, 0))
    palette = io.BytesIO()
    Image.fromarray(scene()).convert("P").save(palette, "PNG", transparency=0)
    files = {
        "deep.png": deep_scene(),
        "dark.png": deep_scene(1000, 2000, 4095),  # of a camera of 12 bits
        "transparent.png": encoded(np.array(transparent)),
        "palette.png": palette.getvalue(),
        "cmyk.jpg": cmyk.getvalue(),
        "grey.jpg": encoded(scene()[..., 0], "JPEG"),
        "plain.jpg": encoded(scene(), "JPEG"),
        "one_bit.png": encoded(scene()[..., 0] > 128),
    }
    options = write_set(tmp_path / "set", files, dict.fromkeys(files, (120, 90)))
    assert pack(options, tmp_path / "pack") == 0
    keys = ("sixteen_bits", "sixteen_bits_dark", "transparency", "cmyk", "exif_orientation")
    assert [summary(tmp_path / "pack")[key] for key in keys] == [2, 1, 2, 1, 0]
    out = capsys.readouterr().out
    assert "no value reaches 16384: scale them first" in out
    assert "transparent pixels are seen on white" in out
    found = PackedCoco(tmp_path / "pack")
    assert decode_rgb(found.read_image_bytes(2))[:, 0, 0].tolist() == [255, 255, 255]
