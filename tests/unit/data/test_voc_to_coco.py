"""data_prep/voc_to_coco.py: coordinates, ids, difficult objects, bad input, and packing the result."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # data_prep of this checkout

from data_prep.convert import main as convert
from data_prep.pack_coco import main as pack_main
from data_prep.voc_to_coco import main
from megdet_hpc.data.packed_coco import PackedCoco

ROOT = Path(__file__).resolve().parents[3]
BCCD = ROOT.parent / "shared" / "data" / "bccd"


def voc_object(name: str, box: tuple[Any, Any, Any, Any], more: str = "") -> str:
    corners = "".join(
        f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    return f"<object><name>{name}</name>{more}<bndbox>{corners}</bndbox></object>"


class Voc:
    """A Pascal VOC folder that a test fills."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "my VOC"
        for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
            (self.folder / name).mkdir(parents=True)
        self.output = folder / "out" / "instances.json"

    def xml(self, stem: str) -> Path:
        return self.folder / "Annotations" / f"{stem}.xml"

    def add(self, stem: str, *objects: str, size: tuple[int, int] = (40, 30), image: bool = True) -> None:
        width, height = size
        self.xml(stem).write_text(
            f"<annotation><filename>{stem}.jpg</filename><size><width>{width}</width><height>{height}</height>"
            f"<depth>3</depth></size>{''.join(objects)}</annotation>"
        )
        if image:
            Image.new("RGB", size).save(self.folder / "JPEGImages" / f"{stem}.jpg")

    def split(self, name: str, *stems: str) -> None:
        (self.folder / "ImageSets" / "Main" / f"{name}.txt").write_text("\n".join(stems) + "\n")

    def convert(self, *more: str) -> dict[str, Any]:
        assert main([str(self.folder), "--output", str(self.output), "--overwrite", *more]) == 0
        return dict(json.loads(self.output.read_text()))


@pytest.fixture
def voc(tmp_path: Path) -> Voc:
    return Voc(tmp_path)


def test_corners_are_inclusive_and_count_from_one(voc: Voc) -> None:
    """The box of the whole 40 x 30 image is 1, 1, 40, 30 in VOC; one pixel has equal corners."""
    voc.add(
        "a", voc_object("cat", (1, 1, 40, 30)), voc_object("cat", (5, 6, 5, 6)), voc_object("cat", (2.5, 3, 4.75, 9))
    )
    coco = voc.convert()
    boxes = [record["bbox"] for record in coco["annotations"]]
    assert boxes == [[0, 0, 40, 30], [4, 5, 1, 1], [1.5, 2, 3.25, 7]]
    assert [record["area"] for record in coco["annotations"]] == [1200, 1, 22.75]
    assert all(isinstance(value, int) for value in boxes[0])
    voc.add("a", voc_object("cat", (0, 0, 39, 29)))
    assert voc.convert("--first-pixel", "0")["annotations"][0]["bbox"] == [0, 0, 40, 30]


def test_boxes_outside_the_image_are_kept_and_said(voc: Voc, capsys: pytest.CaptureFixture[str]) -> None:
    voc.add(
        "a", voc_object("cat", (0, 1, 40, 30)), voc_object("cat", (1, 1, 41, 30)), voc_object("cat", (1, 1, 40, 30))
    )
    assert voc.convert()["annotations"][0]["bbox"] == [-1, 0, 41, 30]
    assert "2 boxes leave their image" in capsys.readouterr().out


def test_ids_agree_between_splits(voc: Voc) -> None:
    voc.add("b", voc_object("dog", (1, 1, 2, 2)))
    voc.add("a", voc_object("cat", (1, 1, 2, 2)), voc_object("ape", (1, 1, 2, 2)))
    voc.add("c")
    voc.split("train", "b", "", "c ")
    voc.split("val", "a")
    train, val, everything = voc.convert("--split", "train"), voc.convert("--split", "val"), voc.convert()
    assert [(image["id"], image["file_name"]) for image in train["images"]] == [(2, "b.jpg"), (3, "c.jpg")]
    assert [image["id"] for image in val["images"]] == [1]
    assert [image["id"] for image in everything["images"]] == [1, 2, 3]
    assert train["categories"] == val["categories"] == everything["categories"]
    assert [(c["id"], c["name"]) for c in train["categories"]] == [(1, "ape"), (2, "cat"), (3, "dog")]
    assert [(r["id"], r["image_id"], r["category_id"]) for r in val["annotations"]] == [(1, 1, 2), (2, 1, 1)]


def test_given_categories(voc: Voc, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = tmp_path / "names.txt"
    voc.add("a", voc_object("cat", (1, 1, 2, 2)))
    names.write_text("zebra\ntraffic light\ncat\n")
    coco = voc.convert("--categories", str(names))
    assert [(c["id"], c["name"]) for c in coco["categories"]] == [(1, "zebra"), (2, "traffic light"), (3, "cat")]
    assert coco["annotations"][0]["category_id"] == 3
    names.write_text("zebra\n")
    assert main([str(voc.folder), "--output", str(voc.output), "--overwrite", "--categories", str(names)]) == 1
    assert "a.xml: object[0]: 'cat' is not in the list" in capsys.readouterr().err


@pytest.mark.parametrize(("given", "size"), [((), (48, 64)), (("--orientation", "stored"), None)])
def test_labels_of_a_turned_photograph(
    voc: Voc, capsys: pytest.CaptureFixture[str], given: tuple[str, ...], size: tuple[int, int] | None
) -> None:
    """64 x 48 pixels as stored, turned by EXIF, and labelled as it is seen; the sizes say so, also as 48.0."""
    voc.add("a", voc_object("cat", (1, 1, 40, 60)), size=(48, 64), image=False)
    voc.xml("a").write_text(voc.xml("a").read_text().replace("<width>48<", "<width>48.0<"))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 48)).save(voc.folder / "JPEGImages" / "a.jpg", exif=exif)
    if size is None:
        assert main([str(voc.folder), "--output", str(voc.output), *given]) == 1
        assert "as it would be turned by 90 degrees; see --orientation" in capsys.readouterr().err
        return
    (image,) = voc.convert(*given)["images"]
    assert (image["width"], image["height"]) == size
    assert capsys.readouterr().out.splitlines()[1].endswith("JPEGImages --orientation upright")


def test_convert_refuses_what_it_does_not_do_for_voc(voc: Voc, capsys: pytest.CaptureFixture[str]) -> None:
    voc.add("a", voc_object("cat", (1, 1, 4, 6)))
    assert convert([str(voc.folder), "--from", "voc", "--output", str(voc.output), "--unlabelled", "keep"]) != 0
    assert "--unlabelled does not work for voc" in capsys.readouterr().err


def test_difficult_objects_and_parts(voc: Voc) -> None:
    part = "<difficult>1</difficult><truncated>1</truncated><part><name>head</name><bndbox/></part>"
    voc.add("a", voc_object("man", (1, 1, 9, 9), part), voc_object("man", (1, 1, 9, 9), "<difficult>0</difficult>"))
    ignored, kept = voc.convert(), voc.convert("--difficult", "keep")
    assert [record["iscrowd"] for record in ignored["annotations"]] == [1, 0]
    assert [record["iscrowd"] for record in kept["annotations"]] == [0, 0]
    for coco in (ignored, kept):
        assert [(r["difficult"], r["truncated"]) for r in coco["annotations"]] == [(1, 1), (0, 0)]
        assert [category["name"] for category in coco["categories"]] == ["man"]


def test_image_is_found_by_stem_then_by_filename(voc: Voc) -> None:
    voc.add("a", size=(40, 30), image=False)
    Image.new("RGB", (40, 30)).save(voc.folder / "JPEGImages" / "a.png")
    voc.add("b", image=False)
    voc.xml("b").write_text("<annotation><filename>x y.jpg</filename></annotation>")
    Image.new("RGB", (7, 5)).save(voc.folder / "JPEGImages" / "x y.jpg")
    images = voc.convert()["images"]
    assert [(i["file_name"], i["width"], i["height"]) for i in images] == [("a.png", 40, 30), ("x y.jpg", 7, 5)]


BOMB = '<!DOCTYPE a [<!ENTITY x "y">]><annotation><object><name>&x;</name></object></annotation>'
BAD_XML = {
    "cut": ("<annotation><object>", "a.xml: not valid XML"),
    "entity": (BOMB, "a.xml: has a DOCTYPE"),
    "entity in UTF-16": (BOMB.encode("utf-16"), "a.xml: has a DOCTYPE"),
    "encoding": ('<?xml version="1.0" encoding="none"?><annotation/>', "a.xml: not valid XML"),
    "other root": ("<svg/>", "a.xml: the outermost element is 'svg'"),
    "no box": ("<annotation><object><name>cat</name></object></annotation>", "a.xml: object[0]: no bndbox"),
    "no name": ("<annotation><object/></annotation>", "a.xml: object[0]: no name"),
    "not a number": (f"<annotation>{voc_object('cat', (1, 'x', 3, 4))}</annotation>", "object[0]: ymin is 'x'"),
    "infinite": (f"<annotation>{voc_object('cat', (1, 2, 'inf', 4))}</annotation>", "object[0]: xmax is 'inf'"),
    "turned": (f"<annotation>{voc_object('cat', (5, 2, 4, 4))}</annotation>", "expected xmin <= xmax"),
    "flag": (
        f"<annotation>{voc_object('c', (1, 2, 3, 4), '<difficult>2</difficult>')}</annotation>",
        "difficult is '2'",
    ),
    "size": ("<annotation><size><width>41</width></size></annotation>", "a.xml: width is '41', but a.jpg is 40 x 30"),
}


@pytest.mark.parametrize("case", BAD_XML)
def test_bad_xml_is_named(voc: Voc, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    text, message = BAD_XML[case]
    voc.add("a")
    voc.xml("a").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main([str(voc.folder), "--output", str(voc.output)]) == 1
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert not voc.output.exists()


def test_missing_files_are_named(voc: Voc, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*more: str) -> str:
        assert main([str(voc.folder), "--output", str(voc.output), *more]) == 1
        return capsys.readouterr().err

    assert "no annotation file *.xml" in error()
    voc.add("a", image=False)
    assert "a.xml: no image" in error()
    voc.add("a")
    assert "train.txt: cannot be read" in error("--split", "train")
    voc.split("train", "a", "b 1")
    assert "train.txt: 'b 1' has no" in error("--split", "train")
    voc.split("train", "a", "a")
    assert "'a' occurs twice" in error("--split", "train")
    (voc.folder / "JPEGImages" / "a.jpg").write_bytes(b"no image")
    assert "a.jpg: cannot be read as an image" in error()
    voc.output.parent.mkdir()
    voc.output.write_text("kept")
    assert "exists already" in error()
    assert voc.output.read_text() == "kept"


def test_result_is_packed(voc: Voc, tmp_path: Path) -> None:
    voc.add("a", voc_object("cat", (1, 1, 40, 30)), voc_object("cat", (2, 2, 3, 3), "<difficult>1</difficult>"))
    voc.add("b")
    voc.convert()
    source = ["--annotations", str(voc.output), "--images", str(voc.folder / "JPEGImages")]
    assert pack_main([*source, "--output", str(tmp_path / "packed")]) == 0
    pack = PackedCoco(tmp_path / "packed")
    assert pack.annotations(0).boxes_xywh.tolist() == [[0, 0, 40, 30], [1, 1, 2, 2]]
    assert pack.annotations(0).iscrowd.tolist() == [False, True]
    assert len(pack) == 2


def test_real_set_comes_back_equal(voc: Voc) -> None:
    """BCCD's boxes, written as VOC XML beside its own images, are converted back to themselves."""
    path = BCCD / "annotations" / "instances_val.json"
    if not path.is_file():
        pytest.skip(f"real data not found at {path}")
    source = json.loads(path.read_text())
    names = {category["id"]: category["name"] for category in source["categories"]}
    (voc.folder / "JPEGImages").rmdir()
    (voc.folder / "JPEGImages").symlink_to(BCCD / "images")
    stems = {}
    for image in source["images"]:
        stem = stems[image["id"]] = image["file_name"].removesuffix(".jpg")
        objects = []
        for record in source["annotations"]:
            if record["image_id"] == image["id"]:
                x, y, width, height = record["bbox"]
                objects.append(voc_object(names[record["category_id"]], (x + 1, y + 1, x + width, y + height)))
        voc.add(stem, *objects, size=(image["width"], image["height"]), image=False)
    coco = voc.convert()
    new_names = {category["id"]: category["name"] for category in coco["categories"]}
    files = {image["id"]: image["file_name"].removesuffix(".jpg") for image in coco["images"]}
    assert [(i["file_name"], i["width"], i["height"]) for i in coco["images"]] == sorted(
        (i["file_name"], i["width"], i["height"]) for i in source["images"]
    )

    def plain(records: list[dict[str, Any]], file: dict[int, str], name: dict[int, str]) -> list[tuple[Any, ...]]:
        return sorted((file[r["image_id"]], name[r["category_id"]], *r["bbox"], r["area"]) for r in records)

    assert plain(coco["annotations"], files, new_names) == plain(source["annotations"], stems, names)
    assert len(coco["annotations"]) > 1000
