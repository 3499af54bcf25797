"""Images of any shape and size, file names from any system: a right result, or all that is wrong at once."""

from __future__ import annotations

import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megdet_hpc import train
from megdet_hpc.data.packed_coco import PackedCoco
from tests.cases.sets import encoded, pack, scene, summary, write_set
from tests.conftest import Here, run
from tests.parallel.test_training import arguments

SIZE = (120, 90)


def line(width: int, height: int) -> bytes:
    return encoded(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def test_the_limit_is_ours_and_can_be_set(tmp_path: Path) -> None:
    """180 megapixels, where Pillow speaks of an attack; below it, at 90, it would warn."""
    scan, half = (encoded(np.zeros(shape, np.bool_)) for shape in ((12000, 15000), (9000, 10000)))
    sizes = {"scan.png": (15000, 12000), "half.png": (10000, 9000)}
    options = write_set(tmp_path / "set", {"scan.png": scan, "half.png": half}, sizes)
    command = [sys.executable, "data_prep/pack_coco.py", *options, "--output", str(tmp_path / "pack")]
    done = run(command)
    assert done.returncode != 0 and not (tmp_path / "pack").exists()
    error = done.stderr.splitlines()[-1]
    assert error.startswith(f"pack_coco: error: {tmp_path}/set/images/scan.png: image id 1: is 15000 x 12000 pixels")
    for text in ("180.0 megapixels", "at most 179.0 are accepted", "cut it into tiles", "--max-megapixels 180"):
        assert text in error
    assert "attack" not in done.stderr and "Warning" not in done.stderr
    done = run([*command, "--max-megapixels", "180"])
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    done = run([sys.executable, "data_prep/verify_pack.py", str(tmp_path / "pack")])
    assert done.returncode == 0, done.stderr


def test_lines_and_points_are_trained_on_and_evaluated(tmp_path: Path, here: Here) -> None:
    shapes = [(1, 1), (1, 40), (40, 1), (3, 5000), (5000, 3), (2, 2), (700, 20)]
    sizes = {f"{width}x{height}.png": (width, height) for width, height in shapes}
    options = write_set(tmp_path / "set", {name: line(*size) for name, size in sizes.items()}, sizes)
    for split in ("train", "val"):
        assert pack(options, tmp_path / split) == 0
    done = here(train.main, arguments(tmp_path, tmp_path / "run", "--max_steps", "4")[2:])
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("result: AP=")
    pictures = ["data_prep/show_pack.py", str(tmp_path / "val"), "--output", str(tmp_path / "pictures")]
    assert run([sys.executable, *pictures]).returncode == 0
    for picture in (tmp_path / "run" / "predictions.png", tmp_path / "pictures" / "images.png"):
        with Image.open(picture) as image:
            assert len(image.getcolors(2**20) or ()) > 99, "something is drawn"


BAD = {
    "empty.jpg": (b"", "unreadable_image", "is empty (0 bytes)"),
    "zeros.jpg": (bytes(1000), "unreadable_image", "holds nothing but 1,000 zero bytes"),
    "cut.jpg": (encoded(scene(), "JPEG")[:700], "unreadable_image", "is truncated (no end-of-image marker)"),
    "cut.png": (encoded(scene())[:-30], "unreadable_image", ""),
    "head.jpg": (encoded(scene(), "JPEG")[:30], "unreadable_image", "does not decode"),
    "page.jpg": (b"<!DOCTYPE html><html>404</html>", "unsupported_image", "is no image but an HTML page"),
    "pointer.jpg": (b"version https://git-lfs.github.com/spec/v1\n", "unsupported_image", "Git LFS pointer"),
    **{
        f"{kind.lower()}.jpg": (encoded(scene(), kind), "unsupported_image", f"not a JPEG or PNG file but {kind}")
        for kind in ("GIF", "BMP", "TIFF", "WEBP")
    },
    "small.jpg": (encoded(scene()[:, :60], "JPEG"), "wrong_image_size", "is 60 x 90 pixels, the annotations say"),
}


def test_all_bad_images_are_named_at_once(tmp_path: Path) -> None:
    """By reason, in a list of all, with the way to go on; the good shard is kept."""
    files = {name: data for name, (data, _, _) in BAD.items()} | {"good.jpg": encoded(scene(), "JPEG")}
    options = write_set(tmp_path / "set", files, dict.fromkeys(files, SIZE))
    command = [sys.executable, "data_prep/pack_coco.py", *options, "--output", str(tmp_path / "pack")]
    done = run(command)
    assert done.returncode != 0
    error = done.stderr[done.stderr.index("pack_coco: error: ") :]
    assert "12 faults (unsupported_image 6, unreadable_image 5, wrong_image_size 1)" in error.splitlines()[0]
    assert "--on-error skip packs the set without" in error.splitlines()[0]
    listed = tmp_path / "pack.partial" / "resume" / "faults.txt"
    assert f"all of them: {listed}" in error
    lines = listed.read_text().splitlines()
    assert len(lines) == len(BAD)
    for image_id, (name, (_, reason, text)) in enumerate(BAD.items(), start=1):
        (found,) = (line for line in lines if f"/{name}: " in line)
        assert found.startswith(f"{reason}: ") and f"image id {image_id}: " in found and text in found
    done = run([*command, "--on-error", "skip"])
    assert done.returncode == 0, done.stderr
    counted = {"unsupported_image": 6, "unreadable_image": 5, "wrong_image_size": 1}
    assert summary(tmp_path / "pack")["skipped"]["images"] == counted
    assert len(PackedCoco(tmp_path / "pack")) == 1


SPELT = {
    "plain.jpg": "plain.jpg",
    "here.jpg": "./here.jpg",
    "sub/folder/blank name.jpg": "sub\\folder\\blank name.jpg",
    "with%20 sign.jpg": "with%20 sign.jpg",
    "other blank.jpg": "other%20blank.jpg",
    "UPPER.JPG": "upper.jpg",
    unicodedata.normalize("NFD", "m\u00fchle.jpg"): unicodedata.normalize("NFC", "m\u00fchle.jpg"),
    unicodedata.normalize("NFC", "gr\u00fcn.jpg"): unicodedata.normalize("NFD", "gr\u00fcn.jpg"),
    "inside.jpg": "images/inside.jpg",  # the image folder is .../images
    "linux.jpg": "/home/other/set/images/linux.jpg",
    "new\nline.jpg": "new\nline.jpg",
    "a" * 250 + ".jpg": "a" * 250 + ".jpg",
}


def test_names_from_other_systems_are_found(tmp_path: Path) -> None:
    files = {path: line(8, 8 + number) for number, path in enumerate(SPELT)}
    sizes = {path: (8, 8 + number) for number, path in enumerate(SPELT)}
    options = write_set(tmp_path / "set", files, sizes, SPELT)
    assert pack(options, tmp_path / "pack") == 0
    assert summary(tmp_path / "pack")["repaired"] == {"images": {"name_respelt": 7}}
    found = PackedCoco(tmp_path / "pack")
    assert [found.file_name(k) for k in range(len(found))] == list(SPELT.values()), "as the annotations have them"
    assert [bytes(found.read_image_bytes(k)) for k in range(len(found))] == list(files.values())


@pytest.mark.parametrize("root", ["/home/other/set/images/", "C:\\\\data\\\\images\\\\"])
def test_absolute_names_of_another_machine(root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Found where all begin alike, up to the image folder's name; else the same name may be another image."""
    files = {f"{name}.jpg": encoded(scene(), "JPEG") for name in "abc"}
    names = {name: f"{root}{name}" for name in files}
    options = write_set(tmp_path / "set", files, dict.fromkeys(files, SIZE), names)
    assert pack(options, tmp_path / "pack") == 0
    assert summary(tmp_path / "pack")["repaired"] == {"images": {"name_respelt": 3}}
    names["c.jpg"] = "/home/other/second/images/c.jpg"
    options = write_set(tmp_path / "two", files, dict.fromkeys(files, SIZE), names)
    assert pack(options, tmp_path / "refused") == 1
    capsys.readouterr()
    folder = tmp_path / "two" / "images"
    folder.rename(tmp_path / "two" / "photographs")
    options = [option.replace("two/images", "two/photographs") for option in options]
    assert pack(options, tmp_path / "refused") == 1
    assert "by a link whose path ends in 'images'" in capsys.readouterr().err


def test_names_that_fit_two_files_or_leave_the_folder_are_not_guessed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = encoded(scene(), "JPEG")
    names = {
        "two/a.jpg": "Two/A.JPG",  # two/a.jpg or two/A.jpg?
        "b.jpg": "b.jpg",
        "c": "B.jpg",  # b.jpg is that of another record
        "d": "../outside.jpg",
        "e": "two",
        "f": "a" * 300 + ".jpg",
        "g": "gone\nfor ever.jpg",
        "h": "SHARED.JPG",
        "i": "SHARED.JPG",
    }
    files = {"two/a.jpg": good, "two/A.jpg": good, "b.jpg": good, "shared.jpg": good, "../outside.jpg": good}
    options = write_set(tmp_path / "set", files, dict.fromkeys(names, SIZE), names)
    assert pack(options, tmp_path / "pack") == 1
    listed = (tmp_path / "pack.partial" / "resume" / "faults.txt").read_text().splitlines()
    assert len(listed) == 6
    assert [entry.split(":")[0] for entry in listed].count("missing_image") == 5
    assert any("../outside.jpg: image id 4: its file_name leaves the image folder" in entry for entry in listed)
    assert any("two: image id 5: is a folder, expected a file" in entry for entry in listed)
    assert any("gone\\nfor ever.jpg: image id 7: no such file" in entry for entry in listed)
    assert "outside_folder 1" in capsys.readouterr().err
    assert pack(options, tmp_path / "pack", "--on-error", "skip") == 0
    assert len(PackedCoco(tmp_path / "pack")) == 3


def test_missing_images_name_the_likely_cause(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {f"train/{name}.jpg": encoded(scene(), "JPEG") for name in "abcdef"}
    options = write_set(tmp_path / "set", files, dict.fromkeys(files, SIZE), {name: name[6:] for name in files})
    images = tmp_path / "set" / "images"

    def message() -> str:
        assert pack(options, tmp_path / "pack") == 1
        return capsys.readouterr().err

    assert f"6 of 6 images are missing; they are in {images / 'train'}: give it as --images" in message()
    for path in (images / "train").iterdir():
        path.rename(images / f"{path.stem}.png")
    assert "files that differ from their names in the end alone, as 'a.png'" in message()
    for path in images.glob("*.png"):
        path.rename(images / f"frame{path.name}")
    assert "holds other files, as 'frame" in message()
    for path in images.glob("*.png"):
        path.unlink()
    assert f"{images} holds no file" in message()


def test_a_missing_and_a_cut_image_are_named_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In shards of their own; what is good is packed already when they are mended."""
    good = encoded(scene(), "JPEG")
    files = {f"{name}.jpg": good for name in "abcdef"}
    options = [*write_set(tmp_path / "set", files, dict.fromkeys(files, SIZE)), "--shard-mib", "0.001"]
    images = tmp_path / "set" / "images"
    (images / "b.jpg").unlink()
    (images / "e.jpg").write_bytes(good[:900])
    assert pack(options, tmp_path / "pack") == 1
    error = capsys.readouterr().err
    error = error[error.index("pack_coco: error: ") :]
    assert "2 faults (missing_image 1, unreadable_image 1) (good shards are kept for another run; --on-error" in error
    assert "b.jpg: image id 2: no such file" in error
    assert "e.jpg: image id 5: is truncated (no end-of-image marker)" in error
    for name in ("b.jpg", "e.jpg"):
        (images / name).write_bytes(good)
    assert pack(options, tmp_path / "pack") == 0
    assert "kept from an earlier run" in capsys.readouterr().out
    assert len(PackedCoco(tmp_path / "pack")) == 6
