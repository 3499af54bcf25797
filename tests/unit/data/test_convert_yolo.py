"""YOLO's text labels to COCO, and packs to YOLO and back."""

from __future__ import annotations

import json
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hotcoco import COCO

from tests.conftest import REAL_DATA, ROOT
from tests.unit.data.formats import HEIGHT, WIDTH, Source, boxes

sys.path.insert(0, str(ROOT))  # data_prep of this checkout

from data_prep.convert import main
from data_prep.pack_coco import main as pack_main
from megdet_hpc.data.packed_coco import PackedCoco

HALF = "0 0.5 0.5 0.25 0.2\n"
HALF_BOX = [45, 36, 30, 18]


@pytest.fixture
def source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Source:
    return Source(tmp_path, capsys)


def ultralytics(source: Source, yaml: str = "train: images/train\nval: images/val\nnames: {0: cat, 1: dog}\n") -> None:
    """Two parts; b.jpg has an empty label file, c.jpg none."""
    for path in ("train/a b.jpg", "train/b.jpg", "train/c.jpg", "val/a b.jpg", "val/sub/ü.png"):
        source.image(f"images/{path}")
    source.write("labels/train/a b.txt", HALF + "1 0.1 0.1 0.5 0.1 0.5 0.6\n\n")
    source.write("labels/train/b.txt", "")
    source.write("labels/val/a b.txt", "\ufeff1 0.5 0.5 0.25 0.2\n")
    source.write("labels/val/sub/ü.txt", "1 0,5 0,5 0,25 0,2\n")
    source.write("data.yaml", yaml)


def test_parts_agree_in_ids_and_images_without_objects_stay(source: Source) -> None:
    ultralytics(source)
    assert source.convert(output="i_{split}.json") == 0, source.err
    assert "format: yolo (data.yaml)" in source.out
    train, val = source.coco("i_train.json"), source.coco("i_val.json")
    assert boxes(train) == [("a b.jpg", "cat", HALF_BOX), ("a b.jpg", "dog", [12, 9, 48, 45])]
    assert boxes(val) == [("a b.jpg", "dog", HALF_BOX), ("sub/ü.png", "dog", HALF_BOX)]
    assert train["annotations"][1]["segmentation"] == [[12, 9, 60, 9, 60, 54]]
    assert train["annotations"][0]["segmentation"] == []
    assert train["categories"] == val["categories"]
    assert [image["file_name"] for image in train["images"]] == ["a b.jpg", "b.jpg", "c.jpg"]
    assert not {image["id"] for image in train["images"]} & {image["id"] for image in val["images"]}
    assert "3 images (2 without objects), 2 objects (0 to ignore, 1 with outlines)" in source.out
    assert "1 images without labels are kept as background" in source.out
    assert "1 lines with decimal commas" in source.out
    assert len(source.good("--split", "train", "--unlabelled", "skip")["images"]) == 2


def test_an_image_whose_header_pillow_cannot_read_is_named_or_left_out(source: Source) -> None:
    ultralytics(source)
    whole = source.image("images/val/sub/ü.png").read_bytes()
    text = b"a\0\0" + zlib.compress(bytes(2**26 + 1))  # more than is unpacked of a comment
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    source.write("images/val/sub/ü.png", whole[:33] + chunk + whole[33:])  # behind the signature and IHDR
    assert "ü.png" in source.bad("--split", "val")
    assert len(source.good("--split", "val", "--on-error", "skip")["images"]) == 1


def test_an_image_in_two_parts(source: Source) -> None:
    """As in the small sets of Ultralytics: both parts have it, by one id."""
    ultralytics(source, "train: images/train\nval: [images/train, images/val]\nnames: {0: cat, 1: dog}\n")
    assert source.convert(output="i_{split}.json") == 0, source.err
    train, val = source.coco("i_train.json"), source.coco("i_val.json")
    assert (len(train["images"]), len(val["images"])) == (3, 5)
    assert len({image["id"] for image in [*train["images"], *val["images"]]}) == 5
    assert "3 images in more than one part of the set" in source.out


def test_two_images_with_one_label_file(source: Source) -> None:
    for name in ("a.jpg", "a.png"):
        source.image(name)
    source.write("a.txt", HALF)
    source.write("classes.txt", "cat\n")
    assert "a.png: its label file a.txt is that of a.jpg too" in source.bad()


def test_several_parts_are_not_mixed_unasked(source: Source) -> None:
    ultralytics(source)
    assert "has the parts train, val: take one by --split" in source.bad()
    assert "--split tset: the set has the parts: train, val" in source.bad("--split", "tset")


def test_faults_are_named_with_file_and_line_and_counted(source: Source) -> None:
    ultralytics(source)
    wrong = ["5 .5 .5 .2 .2", "0 60 45 30 18", "0 .5 .5 .2", "0 .5 .5 .2 .2 .9", "x .5 .5 .2 .2", "0 .5 nan .2 .2"]
    wrong += ["0 .5 .5 -.2 .2", "0 .1 .1 .5 .1 .5 .6 .2", "-1 .5 .5 .2 .2", "0.5 .5 .5 .2 .2"]
    source.write("labels/train/b.txt", HALF + "\n".join(wrong))
    source.write("labels/train/gone.txt", HALF)
    error = source.bad("--split", "train")
    assert f"{len(wrong) + 1} faults (bad_object {len(wrong)}, missing_image 1)" in error
    assert "labels/train/b.txt: line 2: the class is 5, but there are 2 names: 0 to 1" in error
    assert (
        "labels/train/b.txt: line 3: 60 is beyond 0..1, the fractions of width and height; are these pixels?" in error
    )
    assert "labels/train/gone.txt: no image of its name" in error
    coco = source.good("--split", "train", "--on-error", "skip")
    assert [name for name, _, _ in boxes(coco)] == ["a b.jpg", "a b.jpg", "b.jpg"]
    assert f"left out: 1 images and {len(wrong) + 1} objects" in source.out
    assert source.convert("--split", "val") == 0, "faults of the other part do not matter"


@pytest.mark.parametrize("orientation", [6, 8])
def test_fractions_are_those_of_the_picture_as_seen(source: Source, orientation: int) -> None:
    """Labelling tools and Ultralytics turn photographs by EXIF."""
    source.image("a.jpg", orientation)
    source.write("a.txt", "0 0.5 0.5 0.5 0.1\n")
    source.write("classes.txt", "cat\n")
    coco = source.good()
    assert (coco["images"][0]["width"], coco["images"][0]["height"]) == (HEIGHT, WIDTH)
    assert boxes(coco) == [("a.jpg", "cat", [22.5, 54, 45, 12])]
    assert "1 images are turned by EXIF" in source.out and "--orientation upright" in source.out
    stored = source.good("--orientation", "stored")
    assert boxes(stored) == [("a.jpg", "cat", [30, 40.5, 60, 9])]


LAYOUTS = {
    "roboflow": ("train/images", "train/labels", "data.yaml", "train: ../train/images\nnc: 2\nnames: ['cat', 'dog']\n"),
    "flat": (".", ".", "classes.txt", "cat\ndog\n"),
    "label studio": ("images", "labels", "classes.txt", "cat\ndog\n"),
    "wrong path": ("images/train", "labels/train", "a.yaml", "path: /no/where\ntrain: images/train\nnames: [cat, dog]"),
    "darknet": ("obj_train_data", "obj_train_data", "obj.names", "cat\ndog\n"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str, source: Source) -> None:
    images, labels, file, text = LAYOUTS[name]
    source.image(f"{images}/a.jpg")
    source.write(f"{labels}/a.txt", HALF)
    source.write(file, text)
    if name == "darknet":
        source.write("obj.data", "classes = 2\ntrain = data/train.txt\nnames = data/obj.names\n")
        source.write("train.txt", "data/obj_train_data/a.jpg\n")
    coco = source.good()
    assert boxes(coco) == [("a.jpg", "cat", HALF_BOX)]
    assert [category["name"] for category in coco["categories"]] == ["cat", "dog"]


@pytest.mark.parametrize(
    ("yaml", "error"),
    [
        ("train: images/train\nnc: 3\nnames: [cat, dog]\n", "nc is 3, but there are 2 names"),
        ("train: images/tarin\nnames: [cat, dog]\n", "names 'images/tarin', which is not in"),
        ("train: images/train\nnames: {0: cat, 2: dog}\n", "names has the keys [0, 2], expected 0 to 1"),
        ("train: [images/train\nnames: [cat]\n", "not valid YAML"),
        ("names: []\n", "names is [], expected a list"),
    ],
)
def test_bad_descriptions(yaml: str, error: str, source: Source) -> None:
    ultralytics(source, yaml)
    assert error in source.bad()


def test_categories_of_an_earlier_conversion(source: Source) -> None:
    """A name without a number of the file; ids with gaps stay."""
    source.image("a.jpg")
    source.write("a.txt", "1 0.5 0.5 0.25 0.2\n")
    names = source.write("n/first.json", json.dumps({"categories": [{"id": 7, "name": "x"}, {"id": 3, "name": "y"}]}))
    assert "no names of the classes" in source.bad("--from", "yolo")
    coco = source.good("--categories", str(names))
    assert boxes(coco) == [("a.jpg", "y", HALF_BOX)] and coco["annotations"][0]["category_id"] == 3


def test_labels_that_another_library_wrote(source: Source, shapes: Path) -> None:
    """hotcoco writes six decimals."""
    truth = json.loads((shapes / "coco" / "annotations" / "instances_val.json").read_bytes())
    COCO(truth).to_yolo(str(source.folder))
    coco = source.good("--images", str(shapes / "coco" / "val"))
    expected = sorted((name, kind) for name, kind, _ in boxes(truth))
    assert sorted((name, kind) for name, kind, _ in boxes(coco)) == expected
    ours, theirs = (sorted(boxes(found), key=lambda entry: entry[0]) for found in (coco, truth))  # else in their order
    assert np.abs(np.array([box for *_, box in ours]) - np.array([box for *_, box in theirs])).max() < 2e-6 * 640


def test_pack_to_yolo_and_back(
    source: Source, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Equal images, boxes within 1e-5 pixels, the same outlines."""
    packs = [str(shapes / "train"), str(shapes / "val")]
    assert main(["--to", "yolo", *packs, "--output", str(tmp_path / "yolo")]) == 0, capsys.readouterr().err
    assert source.convert(source=tmp_path / "yolo", output="{split}.json") == 0, source.err
    for part in ("train", "val"):
        pack, coco = PackedCoco(shapes / part), source.coco(f"{part}.json")
        by_name = {image["file_name"]: image["id"] for image in coco["images"]}
        assert len(by_name) == len(pack)
        for index in range(len(pack)):
            name, truth = pack.file_name(index), pack.annotations(index)
            assert (tmp_path / "yolo" / "images" / part / name).read_bytes() == bytes(pack.read_image_bytes(index))
            back = [record for record in coco["annotations"] if record["image_id"] == by_name[name]]
            single = ~truth.iscrowd
            assert len(back) == single.sum()
            if len(back):
                found = np.array([record["bbox"] for record in back])
                assert np.abs(found - truth.boxes_xywh[single]).max() < 1e-5
    assert main(["--to", "yolo", *packs, "--output", str(tmp_path / "yolo")]) == 2
    assert "exists already" in capsys.readouterr().err


def own_pack(source: Source, tmp_path: Path, records: dict[str, object], *options: str) -> Path:
    annotations = source.write("truth.json", json.dumps(records))
    arguments = ["--annotations", str(annotations), "--images", str(source.folder), "--output", str(tmp_path / "pack")]
    assert pack_main([*arguments, *options]) == 0
    return tmp_path / "pack"


def test_outlines_crowds_and_edges(source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Parts of an outline are joined without changing its box; what YOLO cannot hold is counted."""
    source.image("a.jpg")
    two = [[10, 10, 30, 10, 30, 30], [50, 50, 70, 50, 70, 70]]
    common = {"image_id": 1, "category_id": 1, "area": 1.0}
    records = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": WIDTH, "height": HEIGHT}],
        "categories": [{"id": 1, "name": "cat: no"}],
        "annotations": [
            {"id": 1, **common, "bbox": [10, 10, 60, 60], "segmentation": two, "iscrowd": 0},
            {"id": 2, **common, "bbox": [-10, 5, 30, 30], "segmentation": [[-10, 5, 20, 5, 20, 35]], "iscrowd": 0},
            {"id": 3, **common, "bbox": [0, 0, 9, 9], "segmentation": [], "iscrowd": 1},
        ],
    }
    pack = own_pack(source, tmp_path, records)
    assert main(["--to", "yolo", str(pack), "--output", str(tmp_path / "y"), "--split", "val"]) == 0
    said = capsys.readouterr().out
    assert "1 images, 2 objects as outlines" in said and "1 crowd regions left out" in said
    assert "1 objects cut at their image's edge" in said and "it has no train" in said
    coco = source.good(source=tmp_path / "y")
    assert [box for *_, box in boxes(coco)] == [[10, 10, 60, 60], [0, 5, 20, 30]]
    assert coco["categories"][0]["name"] == "cat: no"
    assert coco["annotations"][0]["area"] == pytest.approx(400, abs=60)  # both triangles, and the line between
    assert main(["--to", "yolo", str(pack), "--output", str(tmp_path / "b"), "--boxes-only"]) == 0
    assert len((tmp_path / "b" / "labels" / "train" / "a.txt").read_text().splitlines()[0].split()) == 5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_photographs_of_a_pack_as_stored(
    orientation: int, source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """YOLO's labels are those of the picture as seen: a box at the stored picture's top left moves with it."""
    source.image("a.jpg", orientation)
    records = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": WIDTH, "height": HEIGHT}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 30, 9], "area": 270, "iscrowd": 0}],
    }
    pack = own_pack(source, tmp_path, records)
    assert main(["--to", "yolo", str(pack), "--output", str(tmp_path / "y")]) == 0
    seen = {1: (0, 0), 2: (1, 0), 3: (1, 1), 4: (0, 1), 5: (0, 0), 6: (1, 0), 7: (1, 1), 8: (0, 1)}[orientation]
    size = (WIDTH, HEIGHT) if orientation < 5 else (HEIGHT, WIDTH)
    box = (30, 9) if orientation < 5 else (9, 30)
    expected = [(side - length) * far for side, length, far in zip(size, box, seen, strict=True)]
    assert boxes(source.good(source=tmp_path / "y")) == [("a.jpg", "cat", [*expected, *box])]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--to", "yolo", "none"], "none"),
        (["none"], "no such file or folder"),
        (["--from", "yolo", "a", "b"], "one SOURCE at a time"),
        (["--from", "yolo", "--to", "yolo", "a"], "give one of them"),
    ],
)
def test_wrong_commands(arguments: list[str], error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--output", str(tmp_path / "x")]) == 2
    assert error in capsys.readouterr().err


def test_real_labels(source: Source) -> None:
    """Blood cells: YOLO's six decimals give the boxes back."""
    if not (REAL_DATA / "bccd").is_dir():
        pytest.skip(f"real data not found at {REAL_DATA / 'bccd'}")
    truth = json.loads((REAL_DATA / "bccd" / "annotations" / "instances_test.json").read_bytes())
    COCO(truth).to_yolo(str(source.folder))
    coco = source.good("--images", str(REAL_DATA / "bccd" / "images"), "--unlabelled", "skip")
    ours, theirs = (sorted(boxes(found), key=lambda entry: entry[0]) for found in (coco, truth))  # else in their order
    assert [entry[:2] for entry in ours] == [entry[:2] for entry in theirs]
    gap = np.abs(np.array([box for *_, box in ours]) - np.array([box for *_, box in theirs]))
    assert gap.max() < 2e-6 * 640


def test_a_list_of_absolute_and_relative_paths(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("a.jpg", "../other/b.jpg"):
        source.image(path)
        source.write(f"{path.removesuffix('jpg')}txt", HALF)
    source.write("list.txt", f"a.jpg\n{tmp_path}/other/b.jpg\n{tmp_path}/set/a.jpg\n")
    source.write("data.yaml", "train: list.txt\nnames: [cat]\n")
    monkeypatch.chdir(tmp_path)
    source.folder = Path("set")
    assert "a.txt: its image a.jpg has labels in a.txt already" in source.bad()
    coco = source.good("--on-error", "skip")
    assert boxes(coco) == [("other/b.jpg", "cat", HALF_BOX), ("set/a.jpg", "cat", HALF_BOX)]
    assert f"--images {tmp_path} " in source.out


def test_a_folder_may_be_written_in_any_way(source: Source) -> None:
    """`set/../set` is `set`, also where images are compared with those of the folder."""
    source.image("images/a.jpg")
    source.image("images/b.jpg")
    source.write("a.json", json.dumps({"shapes": [], "imagePath": "images/a.jpg"}))
    coco = source.good("--from", "labelme", "--unlabelled", "keep", source="../set/images/..")
    assert [image["file_name"] for image in coco["images"]] == ["a.jpg", "b.jpg"]
    images = str(source.folder / "images" / ".." / "images")
    assert len(source.good("--from", "labelme", "--images", images)["images"]) == 1
