"""`megdet_hpc.load` in Python: pixels of every kind of file, and what is given back."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import megdet_hpc
from megdet_hpc.data.pixels import rgb_pixels
from megdet_hpc.errors import UserError
from megdet_hpc.predict.detector import TrainedDetector
from tests.cases.sets import encoded, scene
from tests.conftest import run


@pytest.fixture(scope="module")
def detector(trained: Path) -> TrainedDetector:
    found: TrainedDetector = megdet_hpc.load(trained, device="cpu", score=0.05)
    return found


def test_three_lines(trained: Path, tmp_path: Path) -> None:
    picture = tmp_path / "a.jpg"
    picture.write_bytes(encoded(scene(), "JPEG"))
    detector = megdet_hpc.load(str(trained), device="cpu", score=0.05, max_detections=5)
    found = detector(str(picture))
    drawn = found.plot(tmp_path / "drawn.png")
    assert len(found) == len(found.boxes) == len(found.scores) == len(found.names) == 5
    assert found.boxes.shape == (5, 4) and (found.boxes[:, 2:] >= found.boxes[:, :2]).all()
    assert (np.diff(found.scores) <= 0).all() and set(found.names) <= set(detector.category_names.values())
    assert found.masks is None
    assert [row["image_id"] for row in found.to_coco(9)] == [9] * 5
    assert repr(found).startswith(f"{picture}: ")
    assert Image.open(tmp_path / "drawn.png").size == drawn.size == (120, 90)
    assert not np.array_equal(np.asarray(drawn), found.pixels)


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, megdet_hpc; print([name for name in sys.modules if name in ('torch', 'numpy')])"
    assert run([sys.executable, "-c", code]).stdout == "[]\n"


def _kinds() -> dict[str, bytes]:
    picture = Image.fromarray(scene())
    turned = Image.Exif()
    turned[0x0112] = 6
    deep = (scene()[..., 0].astype(np.uint16)) * 200
    alpha = picture.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(picture.size))

    def saved(image: Image.Image, kind: str, **options: object) -> bytes:
        file = io.BytesIO()
        image.save(file, kind, **options)  # type: ignore[arg-type]
        return file.getvalue()

    return {
        "turned.jpg": saved(picture, "JPEG", exif=turned),
        "grey.jpg": saved(picture.convert("L"), "JPEG"),
        "palette.png": saved(picture.quantize(16), "PNG"),
        "cmyk.jpg": saved(picture.convert("CMYK"), "JPEG"),
        "deep.png": saved(Image.fromarray(deep), "PNG"),
        "alpha.png": saved(alpha, "PNG"),
    }


@pytest.mark.parametrize("name", _kinds())
def test_pixels_follow_the_rule_of_the_packer(name: str, detector: TrainedDetector, tmp_path: Path) -> None:
    """Of a file, and of the same file opened by Pillow."""
    data = _kinds()[name]
    (tmp_path / name).write_bytes(data)
    expected = rgb_pixels(data, upright=True)
    found = detector(tmp_path / name)
    assert np.array_equal(found.pixels, expected)
    assert expected.shape == ((120, 90, 3) if name == "turned.jpg" else (90, 120, 3))
    opened = detector(Image.open(tmp_path / name))
    assert np.array_equal(opened.pixels, expected)
    assert np.array_equal(opened.boxes, found.boxes)
    assert np.array_equal(detector(expected).boxes, found.boxes)


def test_bad_pictures(detector: TrainedDetector, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.jpg: no such file or directory"):
        detector("nowhere.jpg")
    (tmp_path / "text.jpg").write_text("text")
    with pytest.raises(UserError, match=r"text\.jpg: no picture, or of a format that Pillow does not read"):
        detector(tmp_path / "text.jpg")
    for wrong in (np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(UserError, match=r"accepted: uint8 \(H, W, 3\)"):
            detector(wrong)
    with pytest.raises(UserError, match="mode F"):
        detector(Image.new("F", (8, 8)))


def test_bad_limits(trained: Path) -> None:
    with pytest.raises(UserError, match=r"score_threshold is 1\.5"):
        megdet_hpc.load(trained, score=1.5)
    with pytest.raises(UserError, match="max_detections is 0"):
        megdet_hpc.load(trained, max_detections=0)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = megdet_hpc.lod


def test_a_masks_pixels_are_tinted() -> None:
    """Detectors with masks draw them; a box alone leaves its inside as it is."""
    from megdet_hpc.predict.drawing import colour_of, drawn

    pixels = np.full((90, 120, 3), 100, np.uint8)
    mask = np.zeros((1, 90, 120), np.bool_)
    mask[0, 40:60, 50:70] = True
    box = np.array([[50.0, 40, 70, 60]])
    plain = drawn(pixels, box, ["a 0.90"], [0])
    tinted = drawn(pixels, box, ["a 0.90"], [0], mask)
    assert tuple(plain[50, 60]) == (100, 100, 100)
    assert tuple(plain[40, 60]) == colour_of(0)
    assert np.abs(tinted[50, 60].astype(int) - (0.6 * 100 + 0.4 * np.array(colour_of(0)))).max() <= 1
