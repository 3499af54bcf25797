"""Files of published sets to COCO: Open Images, CrowdHuman and DOTA."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hotcoco import COCO

from tests.conftest import ROOT
from tests.unit.data.formats import HEIGHT, WIDTH, Source, boxes

sys.path.insert(0, str(ROOT))  # data_prep of this checkout

from data_prep.pack_coco import main as pack_main
from megdet_hpc.data.packed_coco import PackedCoco

HEADER = (
    "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside\n"
)
ROW = "{},xclick,{},1,0.25,0.5,0.2,0.6,{},0,{},0,0\n"


@pytest.fixture
def source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Source:
    return Source(tmp_path, capsys)


def test_open_images_parts_and_flags(source: Source) -> None:
    """Groups are regions to ignore; the file of class names gives the ids, of all parts."""
    for name in ("a", "b", "c"):
        source.image(f"{name}.jpg")
    source.write("class-descriptions-boxable.csv", '/m/02,Dog\n/m/01,"Cat, big"\n')
    source.write("train-annotations-bbox.csv", HEADER + ROW.format("a", "/m/01", 1, 0) + ROW.format("a", "/m/02", 0, 1))
    source.write("validation-annotations-bbox.csv", HEADER + ROW.format("b", "/m/01", 0, 0))
    assert source.convert(output="{split}.json") == 0, source.err
    train, val = source.coco("train.json"), source.coco("validation.json")
    assert boxes(train) == [("a.jpg", "Cat, big", [30, 18, 30, 36]), ("a.jpg", "Dog", [30, 18, 30, 36])]
    assert boxes(val) == [("b.jpg", "Cat, big", [30, 18, 30, 36])]
    assert [record["iscrowd"] for record in train["annotations"]] == [0, 1]
    assert train["annotations"][0]["occluded"] == 1 and train["annotations"][1]["group_of"] == 1
    assert train["categories"] == val["categories"] and val["annotations"][0]["category_id"] == 2
    assert "1 other images in the folder" in source.out


def test_open_images_of_which_a_part_is_there(source: Source) -> None:
    source.image("a.jpg")
    source.write("boxes.csv", HEADER + "".join(ROW.format(name, "/m/01", 0, 0) for name in ("a", "x", "x", "y")))
    assert "2 of its images are not in" in source.bad() and "the first are x, y" in source.err
    assert len(source.good("--on-error", "skip")["annotations"]) == 1
    assert "left out: 2 images and 3 objects" in source.out


def test_open_images_faults(source: Source) -> None:
    source.image("a.jpg")
    swapped, beyond = (f"a,x,/m/01,1,{left},0.5,0.2,0.6,0,0,0,0,0\n" for left in (0.9, -0.3))
    source.write("boxes.csv", HEADER + swapped + beyond + ROW.format("a", "", 0, 0) + ROW.format("a", "/m/01", 0, 0))
    error = source.bad()
    assert "3 faults" in error
    assert "boxes.csv: line 2: corners 108, 18 and 60, 54, expected the upper left one first" in error
    assert "boxes.csv: line 3: -0.3 is beyond 0..1" in error and "boxes.csv: line 4: has no label" in error
    source.write("boxes.csv", HEADER + ROW.format("a", "/m/01", 0, 0) + "a,xclick,/m/0")
    assert "line 3: 3 columns, expected 13; is the file cut off?" in source.bad()
    source.write("boxes.csv", "ImageID,LabelName,XMin,MaskPath\n")
    assert "no column XMax, YMin, YMax" in source.bad(source="boxes.csv")


def test_open_images_with_semicolons_and_decimal_commas(source: Source) -> None:
    source.image("a.jpg")
    text = (HEADER + ROW.format("a", "/m/01", 0, 0)).replace(",", ";").replace(".", ",")
    source.write("boxes.csv", "\ufeff" + text)
    assert boxes(source.good()) == [("a.jpg", "/m/01", [30, 18, 30, 36])]


def test_open_images_that_another_library_wrote(source: Source, shapes: Path) -> None:
    truth = json.loads((shapes / "coco" / "annotations" / "instances_val.json").read_bytes())
    COCO(truth).to_oid(str(source.folder / "boxes.csv"))
    coco = source.good("--images", str(shapes / "coco" / "val"), "--unlabelled", "keep")
    assert [entry[0] for entry in boxes(coco)] == [entry[0] for entry in boxes(truth)]
    assert len(coco["images"]) == len(truth["images"])
    gap = np.array([box for *_, box in boxes(coco)]) - np.array([box for *_, box in boxes(truth)])
    assert np.abs(gap).max() < 1e-5 * 640
    arguments = ["--annotations", str(source.json), "--images", str(shapes / "coco" / "val")]
    assert pack_main([*arguments, "--output", str(source.folder / "pack")]) == 0
    assert PackedCoco(source.folder / "pack").num_annotations == len(truth["annotations"])


def people(*found: dict[str, Any], identity: str = "27,a") -> str:
    return json.dumps({"ID": identity, "gtboxes": found}) + "\n"


def person(tag: str = "person", **more: Any) -> dict[str, Any]:
    return {"tag": tag, "fbox": [-5, 2, 20, 60], "vbox": [0, 2, 15, 30], "hbox": [3, 2, 6, 7], **more}


def test_crowdhuman(source: Source) -> None:
    """Masks and what is to be ignored are crowd regions; boxes may leave the image."""
    source.image("Images/27,a.jpg")
    source.image("Images/27,b.jpg")
    ignored = person(extra={"ignore": 1, "box_id": 0})
    mask = {"tag": "mask", "fbox": [1, 1, 5, 5], "extra": {"ignore": 1}}
    source.write("val.odgt", people(person(), ignored, mask) + "\n" + people(identity="27,b"))
    coco = source.good()
    assert [box for *_, box in boxes(coco)] == [[-5, 2, 20, 60]] * 2 + [[1, 1, 5, 5]]
    assert [record["iscrowd"] for record in coco["annotations"]] == [0, 1, 1] and len(coco["categories"]) == 1
    assert "2 boxes leave their image and are kept" in source.out and len(coco["images"]) == 2
    assert [box for *_, box in boxes(source.good("--box", "head"))] == [[3, 2, 6, 7]] * 2 + [[1, 1, 5, 5]]
    assert [r["iscrowd"] for r in source.good("--difficult", "keep")["annotations"]] == [0, 0, 0]


def test_crowdhuman_faults(source: Source) -> None:
    source.image("27,a.jpg")
    wrong = [person(fbox=[1, 2, 3]), person(fbox=[1, 2, -3, 4]), person(fbox=[1, 2, None, 4])]
    source.write("val.odgt", people(*wrong, person()) + '{"ID": 1\n' + people(person()) + people(identity="x"))
    error = source.bad()
    assert "val.odgt line 1: gtboxes[0]: its box is [1, 2, 3], expected x, y, width, height" in error
    assert "val.odgt line 2: not valid JSON" in error and "val.odgt line 3: the image '27,a' occurs before it" in error
    assert "1 of its images are not in" in error
    assert len(source.good("--on-error", "skip")["annotations"]) == 1


def test_dota(source: Source) -> None:
    source.image("images/P0001.png")
    source.image("images/P2.x.png")
    lines = "imagesource:GoogleEarth\ngsd:0.1\n10 10 50 10 50 40 10 40 plane 0\n20.0 20.0 40 25 38 40 18 35 ship 1\n"
    source.write("labelTxt/P0001.txt", lines)
    source.write("labelTxt/P2.x.txt", "")
    coco = source.good()
    assert boxes(coco) == [("P0001.png", "plane", [10, 10, 40, 30]), ("P0001.png", "ship", [18, 20, 22, 20])]
    assert [record["iscrowd"] for record in coco["annotations"]] == [0, 1] and len(coco["images"]) == 2
    assert "rotated_box" not in coco["annotations"][0]
    assert coco["annotations"][1]["rotated_box"] == [20, 20, 40, 25, 38, 40, 18, 35]
    assert "another spelling" not in source.out
    source.write("labelTxt/P0001.txt", lines + "1 2 3 4 ship 0\n1 1 2 2 3 3 4 x ship 0\n")
    assert "labelTxt/P0001.txt: line 5: 6 words" in source.bad() and "line 6: number 8 is 'x'" in source.err


def test_dota_that_another_library_wrote(source: Source, shapes: Path) -> None:
    truth = json.loads((shapes / "coco" / "annotations" / "instances_val.json").read_bytes())
    plain = []
    for record in truth["annotations"]:
        x, y, width, height = record["bbox"]
        kept = {key: record[key] for key in ("id", "image_id", "category_id", "bbox", "area", "iscrowd")}
        plain.append({**kept, "obb": [x + width / 2, y + height / 2, width, height, 0.0]})
    COCO({**truth, "annotations": plain}).to_dota(str(source.folder))
    coco = source.good("--images", str(shapes / "coco" / "val"))
    assert [entry[:2] for entry in boxes(coco)] == [entry[:2] for entry in boxes(truth)]
    gap = np.array([box for *_, box in boxes(coco)]) - np.array([box for *_, box in boxes(truth)])
    assert np.abs(gap).max() <= 0.11  # one decimal


def test_formats_that_may_be_meant(source: Source) -> None:
    source.image("a.jpg")
    source.write("a.txt", "0 0.5 0.5 0.25 0.2\n")
    source.write("a.json", json.dumps({"shapes": [], "imagePath": "a.jpg"}))
    source.write("classes.txt", "cat\n")
    assert "may be of several formats: labelme (a.json), yolo (a.txt); name one by --from" in source.bad()
    assert source.good("--from", "yolo")["annotations"] and not source.good("--from", "labelme")["annotations"]
    source.write("b/instances.json", json.dumps({"images": [], "categories": []}))
    assert "is COCO's format already" in source.bad(source="b")
    assert (WIDTH, HEIGHT) == (120, 90) and "no labels of a known format" in source.bad(source="classes.txt")
