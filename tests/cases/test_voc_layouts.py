"""Pascal VOC sets in other folders than VOC's, under other names, and with bad objects."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT))  # data_prep of this checkout

from data_prep.pack_coco import main as pack_main
from data_prep.voc_to_coco import main
from megdet_hpc.data.packed_coco import PackedCoco

GOOD, TURNED = (8, 11, 44, 38), (50, 11, 8, 38)


class Voc:
    """A set to be written file by file, and what converting it said."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.json, self._capsys = folder / "set", folder / "voc.json", capsys
        self.out = self.err = ""

    def xml(self, path: str, *boxes: tuple[int, ...], name: str = "thing", filename: str = "", more: str = "") -> None:
        keys = ("xmin", "ymin", "xmax", "ymax")
        objects = [
            f"<object><name>{name}</name>{more}<bndbox>"
            + "".join(f"<{key}>{value}</{key}>" for key, value in zip(keys, box, strict=True))
            + "</bndbox></object>"
            for box in boxes
        ]
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        filename = filename or f"{target.stem}.jpg"
        target.write_text(f"<annotation><filename>{filename}</filename>{''.join(objects)}</annotation>")

    def image(self, path: str) -> None:
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (120, 90)).save(target, {".png": "PNG", ".bmp": "BMP"}.get(target.suffix.lower(), "JPEG"))

    def convert(self, *more: str) -> int:
        status = main([str(self.folder), "--output", str(self.json), "--overwrite", *more])
        self.out, self.err = self._capsys.readouterr()
        return status

    @property
    def coco(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.json.read_bytes())
        return found

    @property
    def names(self) -> list[str]:
        return [image["file_name"] for image in self.coco["images"]]


@pytest.fixture
def voc(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Voc:
    return Voc(tmp_path, capsys)


def case(voc: Voc) -> None:
    """Three images in images/, their XML in annots/, the last with a turned box."""
    for stem, box in (("0", GOOD), ("1", GOOD), ("2", TURNED)):
        voc.xml(f"annots/{stem}.xml", box)
        voc.image(f"images/{stem}.jpg")


def test_bad_objects_are_refused_all_at_once(voc: Voc) -> None:
    case(voc)
    assert voc.convert() == 1
    assert "annots: 2.xml: object[0]: xmin, ymin, xmax, ymax are [50, 11, 8, 38]; expected xmin <= xmax" in voc.err
    voc.xml("annots/1.xml", GOOD, TURNED, (1, 1, 1, 0))
    voc.xml("annots/0.xml", GOOD, name="")
    assert voc.convert() == 1
    assert "4 faults (bad_object 4); --on-error skip leaves them out" in voc.err
    assert "0.xml: object[0]: no name" in voc.err and "1.xml: object[2]: " in voc.err
    assert not voc.json.exists()


def test_a_bad_object_is_left_out_and_counted(voc: Voc, tmp_path: Path) -> None:
    case(voc)
    assert voc.convert("--on-error", "skip") == 0
    assert voc.names == ["0.jpg", "1.jpg", "2.jpg"]
    assert [record["bbox"] for record in voc.coco["annotations"]] == [[7, 10, 37, 28]] * 2
    assert "3 images, 2 boxes" in voc.out
    assert "left out: 0 images and 1 objects: 2.xml: object[0]: xmin, ymin, xmax, ymax are" in voc.out
    assert "1 images are kept though all of their objects were left out" in voc.out
    images = re.search(r"for pack_coco.py: --images (\S+)", voc.out)
    assert images and images[1] == str(voc.folder / "images")
    source = ["--annotations", str(voc.json), "--images", images[1]]
    assert pack_main([*source, "--output", str(tmp_path / "pack")]) == 0
    assert PackedCoco(tmp_path / "pack").num_annotations == 2


def test_bad_files_are_left_out_and_counted(voc: Voc) -> None:
    voc.xml("a/1.xml", GOOD)
    voc.image("i/1.jpg")
    voc.xml("a/2.xml", GOOD, GOOD)  # no image
    voc.xml("a/3.xml", GOOD)
    voc.image("i/3.bmp")
    (voc.folder / "a" / "4.xml").write_text("<annotation>")
    voc.xml("a/5.xml", GOOD)
    (voc.folder / "i" / "5.jpg").write_bytes(b"no image")
    counted = "5 faults (bad_image 3, bad_xml 1, wrong_image_size 1)"
    (voc.folder / "a" / "6.xml").write_text(
        "<annotation><size><width>90</width><height>120</height></size></annotation>"
    )
    voc.image("i/6.jpg")
    assert voc.convert() == 1
    assert counted in voc.err and "2.xml: no image" in voc.err and "its image 3.bmp is neither JPEG nor PNG" in voc.err
    assert "6.xml: width is '90', but 6.jpg is 120 x 90 pixels, as it would be turned by 90 degrees" in voc.err
    assert voc.convert("--on-error", "skip") == 0
    assert voc.names == ["1.jpg"]
    assert f"left out: 5 images and 4 objects: {counted}" in voc.out


def test_nothing_left_is_refused_with_the_reasons(voc: Voc) -> None:
    voc.xml("a/1.xml", GOOD)
    voc.image("i/2.jpg")
    assert voc.convert("--on-error", "skip") == 1
    assert "no image to convert: 1.xml: no image" in voc.err


# folders of the XML files and of the images, and the options that are needed
LAYOUTS: dict[str, tuple[str, str, list[str]]] = {
    "raccoon": ("annotations", "images", []),
    "side by side": (".", ".", []),
    "one folder below": ("data", "data", []),
    "half of VOC": ("Annotations", "images", []),
    "the other half": ("xml", "JPEGImages", []),
    "nested": ("VOCdevkit/VOC2007/Annotations", "VOCdevkit/VOC2007/JPEGImages", []),
    "deep": ("annotations/xmls", "images", []),
    "named": ("a", "b", ["--annotations", "a", "--images", "b"]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_folders_are_found(name: str, voc: Voc) -> None:
    annotations, images, options = LAYOUTS[name]
    for stem in ("x 1", "y"):
        voc.xml(f"{annotations}/{stem}.xml", GOOD)
        voc.image(f"{images}/{stem}.jpg")
    assert voc.convert(*options) == 0, voc.err
    assert voc.names == ["x 1.jpg", "y.jpg"]
    assert len(voc.coco["annotations"]) == 2
    assert Path(re.search(r"--images (.+)", voc.out)[1]) == Path(voc.folder, images)  # type: ignore[index]


def test_folders_below_of_one_set(voc: Voc) -> None:
    """By class, with the same names in each."""
    for kind in ("cat", "dog"):
        voc.xml(f"annotations/{kind}/1.xml", GOOD, name=kind)
        voc.image(f"images/{kind}/1.JPG")
    assert voc.convert() == 0, voc.err
    assert voc.names == ["cat/1.JPG", "dog/1.JPG"]
    assert [record["category_id"] for record in voc.coco["annotations"]] == [1, 2]


def test_splits_in_several_folders_are_not_mixed_unasked(voc: Voc) -> None:
    for split, stem in (("train", "a"), ("valid", "b")):
        voc.xml(f"{split}/{stem}.xml", GOOD)
        voc.image(f"{split}/{stem}.jpg")
    assert voc.convert() == 1
    assert "XML files in several folders" in voc.err and "--annotations" in voc.err
    assert voc.convert("--annotations", "valid") == 0
    assert voc.names == ["b.jpg"]
    assert voc.convert("--annotations", str(voc.folder)) == 0
    assert voc.names == ["train/a.jpg", "valid/b.jpg"]


def test_images_in_several_folders_are_not_guessed(voc: Voc) -> None:
    voc.xml("a/1.xml", GOOD)
    for folder in ("large", "small"):
        voc.image(f"{folder}/1.jpg")
    assert voc.convert() == 1
    assert "images in several folders" in voc.err and "--images" in voc.err
    assert voc.convert("--images", "small") == 0
    assert voc.convert("--images", "none") == 1
    assert "none: no such folder" in voc.err


def test_the_folder_with_the_xml_files_images_is_taken(voc: Voc) -> None:
    voc.xml("a/1.xml", GOOD)
    voc.image("photos/1.jpg")
    voc.image("icons/other.png")
    voc.image("masks/1.png")
    assert voc.convert() == 0, voc.err
    assert voc.names == ["1.jpg"]


def test_filename_that_disagrees(voc: Voc) -> None:
    """Files renamed after labelling: their own name counts, and the others are counted."""
    voc.xml("a/1.xml", GOOD, filename="DSC_0001.jpg")
    voc.xml("a/2.xml", GOOD, filename=r"C:\photos\b.png")
    voc.xml("a/3.xml", GOOD, filename="c")
    for name in ("1.jpg", "b.png", "c.jpeg"):
        voc.image(f"i/{name}")
    assert voc.convert() == 0, voc.err
    assert voc.names == ["1.jpg", "b.png", "c.jpeg"]
    assert "1 XML files have another filename than their own (the first 1.xml: DSC_0001.jpg)" in voc.out


def test_flags_in_words(voc: Voc) -> None:
    voc.xml("a/1.xml", GOOD, more="<difficult>True</difficult><truncated>false</truncated>")
    voc.image("i/1.jpg")
    assert voc.convert() == 0
    assert [(r["iscrowd"], r["truncated"]) for r in voc.coco["annotations"]] == [(1, 0)]
