"""data_prep/pack_coco.py: round trips, bad input, resuming, workers and ranks."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # data_prep of this checkout

from data_prep.image_files import BadImageError, ImageRules, check_image
from data_prep.make_shapes import make_shapes
from data_prep.pack_coco import main
from data_prep.pack_plan import MIB, split_into_shards
from megdet_hpc.data.coco_json import rebuild_coco
from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
REAL_DATA = ROOT.parent / "shared" / "data"
REAL_SETS = {
    "tiny_coco_train": ("tiny_coco/annotations/instances_train2017.json", "tiny_coco/train2017"),
    "tiny_coco_val": ("tiny_coco/annotations/instances_val2017.json", "tiny_coco/val2017"),
    "bccd_val": ("bccd/annotations/instances_val.json", "bccd/images"),
}
SCRIPT = str(ROOT / "data_prep" / "pack_coco.py")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated set whose train split makes several shards of 0.05 MiB."""
    folder = tmp_path_factory.mktemp("generated") / "shapes"
    make_shapes(folder, num_train=60, num_val=2, seed=3, size=96)
    return folder


def arguments(annotations: Path, images: Path, output: Path, *more: str) -> list[str]:
    return ["--annotations", str(annotations), "--images", str(images), "--output", str(output), *more]


def shapes_arguments(shapes: Path, output: Path, *more: str) -> list[str]:
    annotations = shapes / "annotations" / "instances_train.json"
    return arguments(annotations, shapes / "train", output, "--shard-mib", "0.05", *more)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def jpeg(width: int = 32, height: int = 24, **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **options)
    return file.getvalue()


def png(width: int = 32, height: int = 24) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


class SmallSet:
    """Three good images with one annotation each, to be spoilt by a test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images = folder / "images"
        self.images.mkdir()
        for image_id in (5, 6, 7):
            (self.images / f"{image_id}.jpg").write_bytes(jpeg())
        self.coco: dict[str, Any] = {
            "images": [{"id": i, "file_name": f"{i}.jpg", "width": 32, "height": 24} for i in (5, 6, 7)],
            "annotations": [
                {"id": 10 * i, "image_id": i, "category_id": 3, "bbox": [1, 2, 8.5, 4], "iscrowd": 0} for i in (5, 6, 7)
            ],
            "categories": [{"id": 3, "name": "thing"}],
        }

    def arguments(self, *more: str) -> list[str]:
        path = self.folder / "instances.json"
        if not path.exists():
            path.write_text(json.dumps(self.coco))
        return arguments(path, self.images, self.folder / "out", *more)

    def rebuilt(self) -> dict[str, Any]:
        return rebuild_coco(PackedCoco(self.folder / "out"))


@pytest.fixture
def small(tmp_path: Path) -> SmallSet:
    return SmallSet(tmp_path)


@pytest.mark.parametrize("name", REAL_SETS)
def test_real_sets_come_back_equal(name: str, tmp_path: Path) -> None:
    annotations, images = (REAL_DATA / part for part in REAL_SETS[name])
    if not annotations.is_file():
        pytest.skip(f"real data not found at {annotations}")
    assert main(arguments(annotations, images, tmp_path / "out", "--shard-mib", "1")) == 0
    source = json.loads(annotations.read_bytes())
    pack = PackedCoco(tmp_path / "out")
    assert len(pack.shard_paths) > 1
    assert rebuild_coco(pack) == source
    assert [pack.file_name(i) for i in range(len(pack))] == [image["file_name"] for image in source["images"]]
    for index in range(len(pack)):
        assert pack.read_image_bytes(index) == (images / pack.file_name(index)).read_bytes()


def test_generated_set_comes_back_equal(shapes: Path, tmp_path: Path) -> None:
    assert main(shapes_arguments(shapes, tmp_path / "out")) == 0
    source = json.loads((shapes / "annotations" / "instances_train.json").read_bytes())
    assert rebuild_coco(PackedCoco(tmp_path / "out")) == source
    without = rebuild_coco(PackedCoco(tmp_path / "out"), with_segmentations=False)
    assert without["annotations"] == [
        {key: value for key, value in record.items() if key != "segmentation"} for record in source["annotations"]
    ]


def test_unusual_records_come_back_equal(small: SmallSet) -> None:
    """Absent and null keys, keys of other data sets, odd numbers, annotations not in the images' order."""
    first, second, third = small.coco["annotations"]
    first.update(area=0.1 + 0.2, segmentation=None, keypoints=[1, 2, 2], note="\u00fc \U0001f600 \ud800")
    second.update(segmentation={"counts": "abc\\`", "size": [24, 32]}, area=2**53, bbox=[0, 0, 0, 24])
    del third["iscrowd"]
    third.update(segmentation=[], bbox=[-1e-9, 1e300 - 1e300, 33, 2.675])
    small.coco["annotations"] = [third, first, second]
    small.coco["images"][1].update(license=4, nested={"a": [None, True, 1e-300]})
    small.coco["info"] = {"year": 2017, "mixed": [1, "two", 3.5]}
    path = small.images / "\u00e9t\u00e9.jpg"
    (small.images / "6.jpg").rename(path)
    small.coco["images"][1]["file_name"] = path.name
    assert main(small.arguments()) == 0
    assert small.rebuilt() == small.coco


def test_png_and_rotated_jpeg_are_accepted(small: SmallSet) -> None:
    """EXIF orientation is ignored: the sizes in the annotations are those of the stored pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6
    (small.images / "5.jpg").write_bytes(jpeg(exif=exif))
    Image.new("RGB", (32, 24)).save(small.images / "6.jpg", "PNG")
    assert main(small.arguments()) == 0
    pack = PackedCoco(small.folder / "out")
    assert pack.read_image_bytes(0) == (small.images / "5.jpg").read_bytes()
    assert pack.read_image_bytes(1).startswith(b"\x89PNG")


def test_degenerate_boxes_are_kept_and_counted(small: SmallSet, capsys: pytest.CaptureFixture[str]) -> None:
    small.coco["annotations"][0]["bbox"] = [4, 4, 0, 5]
    small.coco["annotations"][1]["bbox"] = [30, 4, 6, 5]
    small.coco["annotations"][2]["iscrowd"] = 1
    assert main(small.arguments()) == 0
    summary = json.loads((small.folder / "out" / "manifest.json").read_bytes())["summary"]
    counted = {key: summary[key] for key in ("zero_size_boxes", "boxes_partly_outside", "crowd", "annotations")}
    assert counted == {"zero_size_boxes": 1, "boxes_partly_outside": 1, "crowd": 1, "annotations": 3}
    assert small.rebuilt() == small.coco
    assert "boxes of zero size                          1" in capsys.readouterr().out


def _image(small: SmallSet, **values: Any) -> None:
    small.coco["images"][1].update(values)


def _annotation(small: SmallSet, **values: Any) -> None:
    small.coco["annotations"][1].update(values)


def _file(small: SmallSet, data: bytes) -> None:
    (small.images / "6.jpg").write_bytes(data)


def _gif() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 24)).save(file, "GIF")
    return file.getvalue()


# name: how to spoil image 6 or its annotation, a part of the message, and the reason it is counted under
IMAGE_FAULTS: dict[str, tuple[Callable[[SmallSet], object], str, str]] = {
    "missing": (lambda s: (s.images / "6.jpg").unlink(), "6.jpg: image id 6: no such file", "missing_image"),
    "truncated": (
        lambda s: _file(s, jpeg()[:-200]),
        "6.jpg: image id 6: ",
        "unreadable_image",
    ),
    "no end": (lambda s: _file(s, jpeg()[:-2]), "6.jpg: image id 6: ", "unreadable_image"),
    "zeroed tail": (lambda s: _file(s, jpeg()[:-99] + bytes(99)), "6.jpg: image id 6: ", "unreadable_image"),
    "garbage": (lambda s: _file(s, b"\xff\xd8" + bytes(999)), "6.jpg: image id 6: ", "unsupported_image"),
    "empty": (lambda s: _file(s, b""), "6.jpg: image id 6: is empty (0 bytes)", "unreadable_image"),
    "gif": (lambda s: _file(s, _gif()), "6.jpg: image id 6: not a JPEG or PNG file but GIF", "unsupported_image"),
    "size": (
        lambda s: _image(s, width=24, height=32),
        "6.jpg: image id 6: is 32 x 24 pixels, the annotations say 24 x 32",
        "wrong_image_size",
    ),
    "no name": (
        lambda s: s.coco["images"][1].pop("file_name"),
        "images[1] (image id 6, file None): has no 'file_name'",
        "bad_image_record",
    ),
    "string id": (
        lambda s: _image(s, id="six"),
        "images[1] (image id 'six', file '6.jpg'): id is 'six', expected a 64-bit integer",
        "bad_image_record",
    ),
    "zero width": (
        lambda s: _image(s, width=0),
        "width is 0, expected an integer from 1",
        "bad_image_record",
    ),
    "same id": (
        lambda s: (_image(s, id=5, file_name="5.jpg", license=1), s.coco["annotations"].pop(1)),
        "images[1] (image id 5, file '5.jpg'): an image with this id occurs before it",
        "duplicate_image_id",
    ),
    "no object": (lambda s: s.coco["images"].__setitem__(1, 6), "images[1]", "bad_image_record"),
}
ANNOTATION_FAULTS: dict[str, tuple[Callable[[SmallSet], object], str, str]] = {
    "category": (
        lambda s: _annotation(s, category_id=4),
        "(annotation id 60, image id 6, file '6.jpg'): category id 4 is not in the category list",
        "unknown_category_id",
    ),
    "image": (
        lambda s: _annotation(s, image_id=8),
        "(annotation id 60, image id 8, file None): no image has this id",
        "unknown_image_id",
    ),
    "3 numbers": (
        lambda s: _annotation(s, bbox=[1, 2, 3]),
        "bbox is [1, 2, 3], expected 4 finite",
        "bad_box",
    ),
    "nan": (lambda s: _annotation(s, bbox=[1, 2, float("nan"), 3]), "bbox is [1, 2, nan, 3]", "bad_box"),
    "infinite": (lambda s: _annotation(s, bbox=[1, 2, float("inf"), 3]), "bbox is [1, 2, inf, 3]", "bad_box"),
    "negative": (lambda s: _annotation(s, bbox=[1, 2, -3, 4]), "bbox is [1, 2, -3, 4]", "bad_box"),
    "text": (lambda s: _annotation(s, bbox=["left", 2, 3, 4]), "bbox is ['left', 2, 3, 4]", "bad_box"),
    "no box": (lambda s: s.coco["annotations"][1].pop("bbox"), "bbox is None, expected", "bad_box"),
    "no category": (
        lambda s: s.coco["annotations"][1].pop("category_id"),
        "category_id is None",
        "bad_annotation_record",
    ),
    "area": (lambda s: _annotation(s, area="big"), "area is 'big'", "bad_annotation_record"),
    "iscrowd": (
        lambda s: _annotation(s, iscrowd=2),
        "iscrowd is 2, expected 0 or 1",
        "bad_annotation_record",
    ),
}


def _expect_one_error(capsys: pytest.CaptureFixture[str], text: str, faults: int = 1) -> None:
    """One line; or a line that counts several faults, and one for each."""
    lines = [line for line in capsys.readouterr().err.splitlines() if "packing:" not in line and line]
    assert len(lines) == (1 if faults == 1 else faults + 1)
    assert lines[0].startswith("pack_coco: error: ")
    assert faults == 1 or f" {faults} faults (" in lines[0]
    assert text in lines[min(faults - 1, 1)]


@pytest.mark.parametrize("decode", [[], ["--decode"]])
@pytest.mark.parametrize("name", IMAGE_FAULTS)
def test_bad_image(name: str, decode: list[str], small: SmallSet, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, text, reason = IMAGE_FAULTS[name]
    spoil(small)
    assert main(small.arguments(*decode)) == 1
    # an annotation of an image whose id is gone is a fault of its own
    _expect_one_error(capsys, text, 2 if name in ("string id", "no object") else 1)
    assert not (small.folder / "out").exists()

    assert main(small.arguments(*decode, "--on-error", "skip")) == 0
    assert [record["id"] for record in small.rebuilt()["images"]] == [5, 7]
    # The annotation goes with its image, unless the image's id was taken from it.
    assert [record["id"] for record in small.rebuilt()["annotations"]] == [50, 70]
    manifest = json.loads((small.folder / "out" / "manifest.json").read_bytes())
    assert manifest["summary"]["skipped"]["images"] == {reason: 1}
    assert sum(manifest["summary"]["skipped"]["annotations"].values()) == (name != "same id")
    assert text.split(": ")[-1] in manifest["skipped"][0]["message"]
    assert "skipped images" in capsys.readouterr().out


@pytest.mark.parametrize("name", ANNOTATION_FAULTS)
def test_bad_annotation(name: str, small: SmallSet, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, text, reason = ANNOTATION_FAULTS[name]
    spoil(small)
    assert main(small.arguments()) == 1
    _expect_one_error(capsys, text)
    assert main(small.arguments("--on-error", "skip")) == 0
    assert len(small.rebuilt()["images"]) == 3
    assert [record["id"] for record in small.rebuilt()["annotations"]] == [50, 70]
    manifest = json.loads((small.folder / "out" / "manifest.json").read_bytes())
    assert manifest["summary"]["skipped"] == {"images": {}, "annotations": {reason: 1}}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b'{"images": [', "not valid JSON"),
        (b"\xff\xfe\xff", "not valid JSON"),
        (b"[]", "holds a list, expected an object"),
        (b'{"images": [], "annotations": []}', "no list 'categories'"),
        (b'{"images": [], "annotations": {}, "categories": []}', "no list 'annotations'"),
        (b'{"images": [], "annotations": [], "categories": []}', "no image to pack"),
        (b'{"images": [], "annotations": [], "categories": [{"id": "1"}]}', "categories[0] is {'id': '1'}"),
        (
            b'{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": ""}]}',
            "category id 1 occurs twice",
        ),
    ],
)
@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_bad_annotation_file(
    content: bytes, text: str, on_error: str, small: SmallSet, capsys: pytest.CaptureFixture[str]
) -> None:
    (small.folder / "instances.json").write_bytes(content)
    assert main(small.arguments("--on-error", on_error)) == 1
    _expect_one_error(capsys, text)


def test_bad_options(small: SmallSet, capsys: pytest.CaptureFixture[str]) -> None:
    for more, text in (
        (["--shard-mib", "0"], "--shard-mib 0: accepted are more than 0"),
        (["--shard-mib", "nan"], "--shard-mib nan: accepted are more than 0"),
        (["--workers", "0"], "--workers 0: accepted are 1 or more"),
        (["--images", str(small.folder / "none")], "none: no such image folder"),
        (["--annotations", str(small.folder / "none.json")], "none.json: cannot be read"),
    ):
        assert main(small.arguments(*more)) == 1
        _expect_one_error(capsys, text)
    assert main(["--shard-mib"]) == 2
    assert main(["--help"]) == 0
    assert "example" in capsys.readouterr().out


def test_without_names_packs_coco_in_its_own_layout(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([]) == 1
    _expect_one_error(capsys, f"{tmp_path / 'coco'}: no such folder; bash {ROOT}/data_prep/fetch_coco.sh gets it")
    assert main(["--images", "somewhere"]) == 1
    _expect_one_error(capsys, "--annotations and --output missing")
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        source = shapes / "annotations" / f"instances_{split}.json"
        shutil.copy(source, tmp_path / "coco" / "annotations" / f"instances_{split}2017.json")
        shutil.copytree(shapes / split, tmp_path / "coco" / f"{split}2017")
    assert main([]) == 0
    assert (len(PackedCoco("packed/train")), len(PackedCoco("packed/val"))) == (60, 2)
    before = files_of(tmp_path / "packed")
    assert main([]) == 0
    assert "packed/train: packed already" in capsys.readouterr().out
    assert files_of(tmp_path / "packed") == before


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("encoding", [0, 1])
def test_check_image_finds_every_truncation(encoding: int, decode: bool) -> None:
    whole = png(64, 48) if encoding else jpeg(64, 48)
    rules = ImageRules(decode)
    assert check_image(whole, 64, 48, rules) == encoding
    assert check_image(whole + b"appended by a camera", 64, 48, rules) == encoding
    for length in range(0, len(whole), 7):
        with pytest.raises(BadImageError):
            check_image(whole[:length], 64, 48, rules)


def test_damage_inside_an_image_is_found_by_decoding_alone(small: SmallSet, capsys: pytest.CaptureFixture[str]) -> None:
    """A JPEG without its quantization tables, their marker turned into that of a comment."""
    (small.images / "6.jpg").write_bytes(jpeg().replace(b"\xff\xdb", b"\xff\xfe"))
    assert main(small.arguments("--decode")) == 1
    _expect_one_error(capsys, "6.jpg: image id 6: does not decode")
    assert main(small.arguments()) == 0


def test_several_bad_images_in_a_shard(small: SmallSet) -> None:
    (small.images / "5.jpg").write_bytes(b"")
    (small.images / "7.jpg").unlink()
    assert main(small.arguments("--on-error", "skip")) == 0
    manifest = json.loads((small.folder / "out" / "manifest.json").read_bytes())
    assert [(entry["reason"], entry["image_id"]) for entry in manifest["skipped"]] == [
        ("unreadable_image", 5),
        ("missing_image", 7),
    ]
    assert [record["id"] for record in small.rebuilt()["images"]] == [6]
    assert PackedCoco(small.folder / "out").read_image_bytes(0) == jpeg()


def test_checksums_are_those_of_the_files(shapes: Path, tmp_path: Path) -> None:
    """They are computed while writing; here from the finished files."""
    assert main(shapes_arguments(shapes, tmp_path / "out")) == 0
    shards = json.loads((tmp_path / "out" / "manifest.json").read_bytes())["shards"]
    assert len(shards) > 3
    for shard in shards:
        data = (tmp_path / "out" / shard["file"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])


def test_split_balances_bytes() -> None:
    sizes = np.random.default_rng(0).integers(50_000, 300_000, 1000).tolist()
    first = split_into_shards(sizes, 8)
    loads = [sum(sizes[begin:end]) for begin, end in pairwise(first)]
    assert first[0] == 0 and first[-1] == 1000
    assert len(loads) == -(-sum(sizes) // (8 * MIB))
    assert max(loads) - min(loads) < 2 * max(sizes)
    assert split_into_shards([10 * MIB] * 3, 1) == [0, 1, 2, 3]
    assert split_into_shards([0, 0, 0], 1) == [0, 3]
    assert split_into_shards([10 * MIB] * 3 + [0, 0], 15) == [0, 1, 5]  # the second's middle byte is the cut's
    assert split_into_shards([5, 0, 10**12], 1e-7) == [0, 1, 2, 3]  # of a byte, as the least
    with pytest.raises(UserError, match="--shard-mib 20 or more"):
        split_into_shards([MIB] * 10_000, 1)


def test_output_folder_is_guarded(small: SmallSet, capsys: pytest.CaptureFixture[str]) -> None:
    out = small.folder / "out"
    out.mkdir()
    assert main(small.arguments()) == 0  # an empty folder is no obstacle
    before = files_of(out)
    assert main(small.arguments()) == 1
    _expect_one_error(capsys, "holds a finished pack; use --overwrite")
    assert files_of(out) == before
    (out / "thesis.txt").write_text("mine")
    assert main(small.arguments("--overwrite")) == 1
    _expect_one_error(capsys, "holds files that are no pack")
    assert (out / "thesis.txt").exists()


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_overwriting_deletes_nothing_but_packs(kind: str, small: SmallSet, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder of the name that the old pack has for a moment may be anybody's."""
    assert main(small.arguments()) == 0
    old = files_of(small.folder / "out")
    replaced, mine = small.folder / "out.replaced", small.folder / "mine"
    if kind == "file":
        replaced.write_text("mine")
    else:
        folder = replaced if kind == "folder" else mine
        folder.mkdir()
        (folder / "my_thesis.txt").write_text("mine")
        if kind == "link":
            replaced.symlink_to(mine)
    before = files_of(small.folder)
    assert main(small.arguments("--overwrite")) == 1
    _expect_one_error(capsys, f"{replaced}: is no pack")
    assert files_of(small.folder) == before and not (small.folder / "out.partial").exists()
    shutil.move(replaced, small.folder / "elsewhere")
    shutil.copytree(small.folder / "out", replaced)  # what a crash between the two renames left
    assert main(small.arguments("--overwrite")) == 0
    assert files_of(small.folder / "out") == old and not replaced.exists()


def test_overwrite_keeps_the_old_pack_until_the_new_one_is_done(small: SmallSet) -> None:
    assert main(small.arguments()) == 0
    old = small.rebuilt()
    (small.folder / "instances.json").unlink()
    small.coco["annotations"][0]["bbox"] = [3, 3, 3, 3]
    good = (small.images / "7.jpg").read_bytes()
    (small.images / "7.jpg").write_bytes(good[:100])
    assert main(small.arguments("--overwrite")) == 1
    assert small.rebuilt() == old
    (small.images / "7.jpg").write_bytes(good)
    assert main(small.arguments("--overwrite")) == 0
    assert small.rebuilt() == small.coco
    assert sorted(path.name for path in small.folder.iterdir()) == ["images", "instances.json", "out"]


def test_same_input_gives_the_same_bytes_with_workers(shapes: Path, tmp_path: Path) -> None:
    assert main(shapes_arguments(shapes, tmp_path / "one")) == 0
    time.sleep(1.1)  # HDF5 can store times, in seconds
    command = [sys.executable, SCRIPT, *shapes_arguments(shapes, tmp_path / "two", "--workers", "2")]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    assert len(files_of(tmp_path / "one")) > 5
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_pack_resumes_to_the_same_bytes(workers: int, shapes: Path, tmp_path: Path) -> None:
    assert main(shapes_arguments(shapes, tmp_path / "whole")) == 0
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    images = tmp_path / "train"
    shutil.copytree(shapes / "train", images)
    command = shapes_arguments(shapes, out, "--workers", str(workers), "--images", str(images))
    first, blocked = (images / f"{1000 + 7 * index:012d}.jpg" for index in (0, 40))
    first_data, blocked_data = first.read_bytes(), blocked.read_bytes()
    first.write_bytes(bytes(len(first_data)))
    assert main(command) == 1  # the plan is stored, with the sizes of whole files
    first.write_bytes(first_data)
    # A pipe without a writer in the place of an image: the packer waits there until it is killed.
    blocked.unlink()
    os.mkfifo(blocked)
    process = subprocess.Popen([sys.executable, SCRIPT, *command], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (partial / "resume" / "shard-00001.json").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not out.exists()
    blocked.unlink()
    blocked.write_bytes(blocked_data)
    time_written = (partial / "shard-00001.h5").stat().st_mtime_ns
    (partial / "shard-00000.h5").write_bytes(b"damaged")
    assert main(command) == 0
    assert (out / "shard-00001.h5").stat().st_mtime_ns == time_written
    assert files_of(out) == files_of(tmp_path / "whole")


def test_resume_after_a_bad_image_was_mended(shapes: Path, tmp_path: Path) -> None:
    assert main(shapes_arguments(shapes, tmp_path / "whole")) == 0
    images = tmp_path / "train"
    shutil.copytree(shapes / "train", images)
    bad = images / f"{1000 + 7 * 50:012d}.jpg"
    data = bad.read_bytes()
    bad.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    command = shapes_arguments(shapes, tmp_path / "out", "--images", str(images))
    assert main(command) == 1
    kept = tmp_path / "out.partial" / "shard-00000.h5"
    time_written = kept.stat().st_mtime_ns
    bad.write_bytes(data)
    assert main(command) == 0
    assert (tmp_path / "out" / "shard-00000.h5").stat().st_mtime_ns == time_written
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("before", "after", "images", "kept"),
    [("0.001", "179", [5, 6, 7], 1), ("179", "0.001", [5, 7], 0), ("0.1", "179", [5, 6, 7], 2)],
)
def test_an_unfinished_pack_takes_another_limit_of_pixels(
    before: str, after: str, images: list[int], kept: int, small: SmallSet, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of three shards the last cannot be written at first; the second is of a larger image."""
    (small.images / "6.jpg").write_bytes(jpeg(64, 48))
    small.coco["images"][1].update(width=64, height=48)
    command = small.arguments("--shard-mib", "0.0001")
    assert main([*command, "--max-megapixels", "0.0001"]) == 1  # plans, and writes nothing
    command += ["--on-error", "skip"]
    blocked = small.folder / "out.partial" / "shard-00002.h5.tmp"
    blocked.mkdir()
    assert main([*command, "--max-megapixels", before]) == 1
    assert (small.folder / "out.partial" / "shard-00001.h5").is_file()
    blocked.rmdir()
    capsys.readouterr()
    assert main([*command, "--max-megapixels", after]) == 0
    assert [image["id"] for image in small.rebuilt()["images"]] == images
    assert f"{kept} kept from an earlier run" in capsys.readouterr().out


def test_resume_with_other_inputs_is_refused(small: SmallSet, capsys: pytest.CaptureFixture[str]) -> None:
    (small.images / "7.jpg").write_bytes(b"")
    assert main(small.arguments()) == 1
    capsys.readouterr()
    (small.folder / "out.partial" / "shard-00000.h5").touch()  # of another image, which is kept
    assert main(small.arguments("--shard-mib", "8")) == 1
    _expect_one_error(capsys, "shard_mib was 256.0, is 8.0")
    (small.folder / "instances.json").unlink()
    small.coco["info"] = "changed"
    assert main(small.arguments()) == 1
    _expect_one_error(capsys, "annotations_sha256 was ")


def test_packing_imports_no_torch() -> None:
    """Nor does --workers or a rank: 128 of them on a node would hold it 128 times."""
    code = "import sys, data_prep.pack_coco; print(sorted({'torch', 'torchvision'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_launch_without_mpi_is_an_error(small: SmallSet) -> None:
    """A launcher's environment around a world of one rank: four processes would write the same files."""
    pytest.importorskip("mpi4py", reason="mpi4py not installed")
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMIX_", "PMI_", "SLURM_"))}
    environ |= {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}
    command = [sys.executable, SCRIPT, *small.arguments()]
    result = subprocess.run(command, env=environ, timeout=60, capture_output=True, text=True)
    assert result.returncode != 0
    assert "pack_coco: error: srun started 4 ranks, but mpi4py" in result.stderr
    assert not (small.folder / "out").exists()
