"""Files of labelling tools to COCO: LabelMe, CVAT and Label Studio."""

from __future__ import annotations

import base64
import io
import json
import math
import sys
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hotcoco import COCO
from PIL import Image

from tests.conftest import ROOT
from tests.unit.data.formats import HEIGHT, WIDTH, Source, boxes

sys.path.insert(0, str(ROOT))  # data_prep of this checkout

from data_prep.convert import main as convert_main
from data_prep.pack_coco import main as pack_main
from megdet_hpc.data.masks import decode_masks, rle_of
from megdet_hpc.data.packed_coco import PackedCoco


@pytest.fixture
def source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Source:
    return Source(tmp_path, capsys)


def test_the_source_is_not_replaced(source: Source, capsys: pytest.CaptureFixture[str]) -> None:
    source.write("export.json", "{}")
    file = source.folder / "export.json"
    assert convert_main([str(file), "--output", str(file), "--overwrite"]) == 2
    assert f"{file}: is the file that is converted" in capsys.readouterr().err and file.read_text() == "{}"


def labelme(source: Source, path: str, *shapes: dict[str, Any], **more: Any) -> None:
    value = {
        "shapes": shapes,
        "imagePath": f"{Path(path).stem}.jpg",
        "imageWidth": WIDTH,
        "imageHeight": HEIGHT,
        **more,
    }
    source.write(path, json.dumps(value))


def shape(kind: str, *points: tuple[float, float], label: str = "cat", **more: Any) -> dict[str, Any]:
    return {"label": label, "shape_type": kind, "points": points, **more}


def test_labelme_shapes(source: Source) -> None:
    source.image("a.jpg")
    png = io.BytesIO()
    Image.fromarray(np.array([[True, False], [True, True]])).save(png, "PNG")
    mask = base64.b64encode(png.getvalue()).decode()
    labelme(
        source,
        "a.json",
        shape("rectangle", (50, 40), (10, 60)),
        shape("rectangle", (10, 10), (20, 10), (20, 30), (10, 30)),
        shape("polygon", (1, 2), (11, 2), (11, 22)),
        shape("circle", (60, 40), (60, 50), label="dog"),
        shape("mask", (5, 6), (6, 7), mask=mask),
        shape("rotation", (60, 20), (70, 30), (60, 40), (50, 30)),
        shape("point", (1, 1)),
        shape("rectangle", (0, 0), (9, 9), flags={"difficult": True}),
    )
    coco = source.good()
    found = [box for *_, box in boxes(coco)]
    assert found[:3] == [[10, 40, 40, 20], [10, 10, 10, 20], [1, 2, 10, 20]]
    assert found[3] == pytest.approx([50, 30, 20, 20], abs=1e-5) and found[4] == [5, 6, 2, 2]
    assert found[5] == pytest.approx([50, 20, 20, 20], abs=1e-5)
    records = coco["annotations"]
    assert records[3]["area"] == pytest.approx(math.pi * 100, rel=0.03) and records[4]["area"] == 3
    assert records[5]["rotated_box"] == pytest.approx([60, 20, 70, 30, 60, 40, 50, 30], abs=1e-5)
    assert [record["iscrowd"] for record in records] == [0] * 6 + [1]
    assert [category["name"] for category in coco["categories"]] == ["cat", "dog"]
    assert "1 shapes of the kind 'point' left out" in source.out and "1 turned boxes" in source.out


def test_labelme_parts_of_a_group_are_one_object(source: Source) -> None:
    source.image("a.jpg")
    parts = [shape("polygon", (x, 0), (x + 10, 0), (x + 10, 10), group_id=1) for x in (0, 50)]
    labelme(source, "a.json", *parts, shape("polygon", (0, 50), (10, 50), (10, 60)))
    coco = source.good()
    assert [box for *_, box in boxes(coco)] == [[0, 0, 60, 10], [0, 50, 10, 10]]
    assert len(coco["annotations"][0]["segmentation"]) == 2
    assert "1 shapes joined with others of their group" in source.out


def test_labelme_names_from_other_systems(source: Source) -> None:
    """An image beside the file, in a folder that Windows names, under a wrong suffix, or nowhere."""
    for path in ("json/a.jpg", "pictures/sub/b ü.jpg", "pictures/c.png", "pictures/new.jpg"):
        source.image(path)
    box = shape("rectangle", (1, 2), (11, 22))
    labelme(source, "json/a.json", box)
    labelme(source, "json/b.json", box, imagePath="..\\pictures\\sub\\b ü.jpg")
    labelme(source, "json/c.json", box, imagePath="D:\\photos\\C.JPG")
    coco = source.good()
    assert [image["file_name"] for image in coco["images"]] == ["json/a.jpg", "pictures/c.png", "pictures/sub/b ü.jpg"]
    assert "1 images found under another spelling" in source.out
    assert "1 images without labels are left out" in source.out
    assert len(source.good("--unlabelled", "keep")["images"]) == 4
    labelme(source, "json/d.json", box, box, imageData="iVBO")
    labelme(source, "json/e.json", box, imagePath="a.jpg")
    error = source.bad()
    assert "json/d.json: no image 'd.jpg' in" in error and "the JSON holds a copy of it" in error
    assert "json/e.json: its image a.jpg has labels in json/a.json already" in error
    assert len(source.good("--on-error", "skip")["images"]) == 3
    assert "left out: 2 images and 3 objects" in source.out


def test_labelme_absolute_names_beside_relative_ones(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = shape("rectangle", (1, 2), (11, 22))
    source.image("a.jpg")
    labelme(source, "a.json", box)
    labelme(source, "b.json", box, imagePath=str(source.image("../other/b.jpg").resolve()))
    monkeypatch.chdir(tmp_path)
    source.folder = Path("set")
    assert [image["file_name"] for image in source.good()["images"]] == ["other/b.jpg", "set/a.jpg"]
    assert f"--images {tmp_path} " in source.out
    labelme(source, "b.json", box, imagePath=str(tmp_path / "set" / "a.jpg"))
    assert "b.json: its image a.jpg has labels in a.json already" in source.bad()


def test_labelme_faults(source: Source) -> None:
    for name in "abc":
        source.image(f"{name}.jpg")
    wrong = [shape("polygon", (1, 1), (2, 2)), shape("heart", (1, 1)), shape("rectangle", (1, 1), (2, 2), label=" ")]
    wrong += [{"label": "cat", "points": [[1, "x"], [2, 2], [3, 4]]}, shape("mask", (1, 1), (2, 2), mask="???")]
    wrong += [shape("polygon", (1, 1), (2, 2), (math.nan, 5))]
    labelme(source, "a.json", *wrong, shape("rectangle", (1, 1), (2, 2)))
    source.write("b.json", '{"shapes": [\n{]')
    labelme(source, "c.json", imageWidth=HEIGHT, imageHeight=WIDTH)
    error = source.bad()
    assert (
        f"{len(wrong) + 2} faults" in error
        and "b.json: not valid JSON (Expecting" in error
        and "line 2 column" in error
    )
    listed = source.json.with_suffix(".faults.txt").read_text()
    assert f"all of them: {source.json.with_suffix('.faults.txt')}" in error
    assert "a.json: shapes[0]: a polygon of 2 points, expected 3 or more" in listed and listed.count("\n") == 8
    assert "c.json: its image is 120 x 90 pixels, the labels say 90 x 120, as it would be turned by 90 degrees" in error
    assert len(source.good("--on-error", "skip")["annotations"]) == 1


@pytest.mark.parametrize("upright", [True, False])
def test_the_sizes_in_labels_say_whose_pixels_they_are_of(upright: bool, source: Source, tmp_path: Path) -> None:
    """A photograph turned by EXIF; the pack that the printed command makes has the same orientation."""
    source.image("a.jpg", orientation=6)
    size = {"imageWidth": HEIGHT, "imageHeight": WIDTH} if upright else {}
    labelme(source, "a.json", shape("rectangle", (1, 2), (11, 22)), **size)
    coco = source.good()
    assert coco["images"][0]["width"] == (HEIGHT if upright else WIDTH)
    word = "upright" if upright else "stored"
    assert f"--orientation {word}" in source.out
    arguments = ["--annotations", str(source.json), "--images", str(source.folder), "--output", str(tmp_path / "pack")]
    assert pack_main([*arguments, "--orientation", word]) == 0
    assert PackedCoco(tmp_path / "pack").annotations(0).boxes_xywh.tolist() == [[1, 2, 10, 20]]


LABELS = (
    "<label><name>dog</name></label><label><name>cat</name></label><label><name>eye</name><parent>cat</parent></label>"
)


def cvat(source: Source, body: str, path: str = "annotations.xml", meta: str = "") -> None:
    text = f"<meta><task>{meta}<labels>{LABELS}</labels></task></meta>\n{body}"
    source.write(
        path, f'\ufeff<?xml version="1.0" encoding="utf-8"?>\n<annotations><version>1.1</version>{text}</annotations>'
    )


def cvat_image(name: str, body: str = "", more: str = "") -> str:
    return f'<image id="0" name="{name}" width="{WIDTH}" height="{HEIGHT}" {more}>\n{body}</image>\n'


BOX = '<box label="cat" xtl="1" ytl="2" xbr="11" ybr="22" {}>{}</box>\n'


def test_cvat_images(source: Source) -> None:
    source.image("images/sub/a.jpg")
    source.image("images/b.jpg")
    shapes = [
        BOX.format("", ""),
        '<box label="dog" xtl="40" ytl="40" xbr="60" ybr="50" rotation="90.0"/>',
        BOX.format("", '<attribute name="is_crowd">true</attribute>'),
        '<polygon label="cat" points="1.5,2;11.5,2;11.5,22" group_id="3"/>',
        '<polygon label="cat" points="50,2;60,2;60,22" group_id="3"/>',
        '<mask label="cat" rle="1,2,3" left="5" top="6" width="3" height="2"/>',
        '<ellipse label="dog" cx="60" cy="40" rx="20" ry="10" rotation="90"/>',
        '<points label="eye" points="1,1"/><polyline label="cat" points="1,1;2,2"/>',
    ]
    cvat(source, cvat_image("sub/a.jpg", "\n".join(shapes)) + cvat_image("b.jpg"))
    coco = source.good()
    assert "format: cvat (annotations.xml)" in source.out and "another spelling" not in source.out
    assert [image["file_name"] for image in coco["images"]] == ["b.jpg", "sub/a.jpg"]
    found = [(kind, box) for _, kind, box in boxes(coco)]
    assert found[0] == ("cat", [1, 2, 10, 20]) and found[2][1] == [1, 2, 10, 20]
    assert found[1][1] == pytest.approx([45, 35, 10, 20]) and found[3] == ("cat", [1.5, 2, 58.5, 20])
    assert found[4] == ("cat", [6, 6, 2, 1]) and found[5][1] == pytest.approx([50, 20, 20, 40], abs=1e-5)
    assert [record["iscrowd"] for record in coco["annotations"]] == [0, 0, 1, 0, 0, 0]
    mask = rle_of(coco["annotations"][4]["segmentation"], HEIGHT, WIDTH)
    assert mask is not None and np.argwhere(decode_masks([mask], HEIGHT, WIDTH)[0]).tolist() == [[6, 6], [6, 7]]
    assert [category["name"] for category in coco["categories"]] == ["dog", "cat"]
    assert "1 shapes of the kind 'polyline' left out" in source.out


def test_cvat_faults_have_their_lines(source: Source) -> None:
    source.image("a.jpg")
    wrong = (
        '<box label="cat" xtl="x" ytl="2" xbr="11" ybr="22"/>\n<box label="cow" xtl="1" ytl="2" xbr="11" ybr="22"/>\n'
    )
    wrong += '<box label="cat" xtl="11" ytl="2" xbr="1" ybr="22"/>\n'
    wrong += '<mask label="cat" rle="1" left="0" top="0" width="3" height="3"/>'
    cvat(source, cvat_image("a.jpg", wrong) + cvat_image("gone.jpg", BOX.format("", "")))
    error = source.bad()
    assert "annotations.xml line 3: line 4: xtl is 'x', expected a finite number" in error
    assert "line 5: 'cow' is not in the list of categories" in error and "no image 'gone.jpg'" in error
    assert "line 6: corners 11, 2 and 1, 22, expected the upper left one first" in error
    source.write("annotations.xml", "<annotations>\n<image>\n</annotations>")
    assert "mismatched tag: line 3" in source.bad("--from", "cvat")
    source.write("annotations.xml", '<!DOCTYPE a [<!ENTITY b "c">]><annotations/>')
    assert "DOCTYPE" in source.bad("--from", "cvat")


def test_cvat_parts_by_subset(source: Source) -> None:
    for name in ("a", "b"):
        source.image(f"images/{name}.jpg")
    cvat(source, cvat_image("a.jpg", BOX.format("", ""), 'subset="Train"') + cvat_image("b.jpg", "", 'subset="Val"'))
    assert source.convert(output="{split}.json") == 0, source.err
    assert [len(source.coco(f"{part}.json")["images"]) for part in ("Train", "Val")] == [1, 1]
    cvat(source, cvat_image("a.jpg", more='subset="x/y"') + cvat_image("b.jpg", more='subset="x_y"'))
    assert source.convert(output="of_{split}.json") == 2
    assert "the parts 'x/y' and 'x_y' would both become" in source.err and "of_x_y.json; take one" in source.err
    assert not list(source.json.parent.glob("of_*"))
    assert source.convert("--split", "x/y", output="of_{split}.json") == 0, source.err
    assert source.coco("of_x_y.json")["images"][0]["file_name"] == "a.jpg"


def test_cvat_tracks(source: Source) -> None:
    """A box is carried on between the frames that the file has, and ends where it is outside."""
    for frame in range(6):
        source.image(f"frames/frame_{frame:06}.png")
    boxed = '<box frame="{}" outside="{}" xtl="{}" ytl="2" xbr="{}" ybr="22" keyframe="1"/>\n'
    track = '<track id="7" label="cat">' + boxed.format(0, 0, 10, 20) + boxed.format(2, 0, 20, 30)
    track += boxed.format(3, 1, 20, 30) + boxed.format(9, 0, 1, 2) + "</track>"
    cvat(source, track, meta=f"<original_size><width>{WIDTH}</width><height>{HEIGHT}</height></original_size>")
    coco = source.good("--images", str(source.folder / "frames"))
    assert [(name[-5], box[0]) for name, _, box in boxes(coco)] == [("0", 10), ("1", 15), ("2", 20)]
    assert len(coco["images"]) == 6 and coco["annotations"][0]["track_id"] == "7"
    assert "1 boxes between two frames" in source.out and "1 shapes on frames whose image is not there" in source.out


def test_cvat_tracks_beyond_the_frames_of_the_task(source: Source) -> None:
    """Images behind stop_frame are no part of it, though boxes lead there."""
    for frame in range(6):
        source.image(f"frames/frame_{frame:06}.png")
    boxed = '<box frame="{}" outside="0" xtl="{}" ytl="2" xbr="{}" ybr="22" keyframe="1"/>\n'
    track = '<track id="7" label="cat">' + boxed.format(0, 10, 20) + boxed.format(5, 60, 70) + "</track>"
    cvat(source, track, meta="<start_frame>0</start_frame><stop_frame>2</stop_frame>")
    coco = source.good("--images", str(source.folder / "frames"), "--unlabelled", "skip")
    assert [(name[-5], box[0]) for name, _, box in boxes(coco)] == [("0", 10), ("1", 20), ("2", 30)]
    assert "2 boxes between two frames" in source.out and "3 shapes on frames whose image is not there" in source.out


def test_cvat_that_another_library_wrote(source: Source, shapes: Path) -> None:
    truth = json.loads((shapes / "coco" / "annotations" / "instances_val.json").read_bytes())
    COCO({**truth, "annotations": [{**a, "segmentation": []} for a in truth["annotations"]]}).to_cvat(
        str(source.folder / "c.xml")
    )
    coco = source.good("--images", str(shapes / "coco" / "val"))
    assert [entry[:2] for entry in boxes(coco)] == [entry[:2] for entry in boxes(truth)]
    gap = np.array([box for *_, box in boxes(coco)]) - np.array([box for *_, box in boxes(truth)])
    assert np.abs(gap).max() <= 0.011  # two decimals


def test_zip_files(source: Source, tmp_path: Path) -> None:
    image = source.image("images/a.jpg")
    cvat(source, cvat_image("a.jpg", BOX.format("", "")))
    path = tmp_path / "export.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in ("annotations.xml", "images/a.jpg"):
            archive.write(source.folder / file, file)
    assert "holds images: --unpack DIR unpacks it, --images DIR names" in source.bad(source=path)
    assert boxes(source.good("--images", str(image.parent), source=path)) == [("a.jpg", "cat", [1, 2, 10, 20])]
    assert len(source.good("--unpack", str(tmp_path / "new"), source=path)["annotations"]) == 1
    assert (tmp_path / "new" / "images" / "a.jpg").read_bytes() == image.read_bytes()
    assert len(source.good("--unpack", str(tmp_path / "new"), source=path)["annotations"]) == 1
    (tmp_path / "new" / "images" / "a.jpg").write_bytes(image.read_bytes()[:-1] + b"x")
    assert "holds other files than the archive" in source.bad("--unpack", str(tmp_path / "new"), source=path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../evil.xml", "")
    assert "leaves the folder" in source.bad("--images", str(image.parent), source=path)
    path.write_bytes(b"PK\x03\x04")
    assert "cannot be unpacked" in source.bad(source=path)


def test_a_conversion_that_failed_is_repeated_in_the_folder_of_its_archive(source: Source, tmp_path: Path) -> None:
    source.image("a.jpg")
    cvat(source, cvat_image("a.jpg", BOX.format("", "")) + cvat_image("gone.jpg"))
    path, folder = tmp_path / "export.zip", tmp_path / "new"
    with zipfile.ZipFile(path, "w") as archive:
        for file in ("annotations.xml", "a.jpg"):
            archive.write(source.folder / file, file)
    for _ in range(2):
        assert "no image 'gone.jpg'" in source.bad("--unpack", str(folder), source=path)
    assert len(source.good("--unpack", str(folder), "--on-error", "skip", source=path)["annotations"]) == 1
    content = (
        path.read_bytes().replace(b"CVAT", b"cvat").replace((source.folder / "a.jpg").read_bytes()[-40:], b"-" * 40)
    )
    path.write_bytes(content)
    for again in (tmp_path / "damaged", tmp_path / "empty"):
        if again.name == "empty":
            again.mkdir()
        assert "cannot be unpacked" in source.bad("--unpack", str(again), source=path)
        assert not list(again.glob("*")) and again.exists() == (again.name == "empty")


def region(kind: str, name: str = "cat", **value: Any) -> dict[str, Any]:
    return {
        "type": f"{kind}labels",
        "original_width": WIDTH,
        "original_height": HEIGHT,
        "value": {f"{kind}labels": [name], **value},
    }


def task(image: str, *regions: dict[str, Any], **annotation: Any) -> dict[str, Any]:
    return {"id": 5, "data": {"image": image}, "annotations": [{"result": list(regions), **annotation}]}


def brush_bytes(alpha: np.ndarray) -> list[int]:
    """Label Studio's run lengths, written by its description: every run of one value, with lengths of 16 bits."""
    samples = np.repeat(alpha.ravel(), 4)
    bits = f"{len(samples):032b}" + f"{7:05b}" + f"{15:04b}" * 4
    edges = [0, *(np.flatnonzero(np.diff(samples)) + 1).tolist(), len(samples)]
    for place, (begin, end) in enumerate(pairwise(edges)):
        if place % 2 and end - begin < 50:  # a block of samples one by one
            bits += f"0{2:02b}{end - begin - 1:016b}" + "".join(f"{value:08b}" for value in samples[begin:end])
        else:
            bits += f"1{1:02b}{end - begin - 1:016b}{samples[begin]:08b}"
    bits += "0" * (-len(bits) % 8)
    return [int(bits[place : place + 8], 2) for place in range(0, len(bits), 8)]


def test_label_studio_regions(source: Source) -> None:
    source.image("0123abcd-a b.jpg")
    alpha = np.zeros((HEIGHT, WIDTH), np.uint8)
    alpha[10:20, 30:40] = 255
    alpha[50, 7] = 128
    separate = [
        {"id": "r", "type": "rectangle", "value": {"x": 50, "y": 50, "width": 25, "height": 20}},
        {"id": "r", "type": "labels", "value": {"x": 50, "y": 50, "width": 25, "height": 20, "labels": ["dog"]}},
    ]
    one = task(
        "/data/upload/3/0123abcd-a%20b.jpg",
        region("rectangle", x=10, y=20, width=25, height=20, rotation=0),
        region("rectangle", x=50, y=20, width=10, height=40, rotation=90),
        region("polygon", points=[[0, 0], [50, 0], [50, 100]]),
        region("ellipse", x=50, y=50, radiusX=10, radiusY=10, rotation=0),
        region("brush", format="rle", rle=brush_bytes(alpha)),
        region("keypoint", x=5, y=5, width=1),
        *separate,
    )
    source.write("export.json", json.dumps([one]))
    coco = source.good()
    found = [box for *_, box in boxes(coco)]
    assert found[0] == [12, 18, 30, 18] and found[2] == [0, 0, 60, 90] and found[5] == [60, 45, 30, 18]
    # turned about its upper left corner, (60, 18), in pixels: 12 x 36 becomes 36 x 12 to the left of it
    assert found[1] == pytest.approx([24, 18, 36, 12]) and found[3] == pytest.approx([48, 36, 24, 18], abs=1e-4)
    assert found[4] == [7, 10, 33, 41] and coco["annotations"][4]["area"] == 101
    assert [kind for _, kind, _ in boxes(coco)][-1] == "dog"
    assert "1 shapes of the kind 'keypoint' left out" in source.out


def test_label_studio_tasks(source: Source) -> None:
    """Several annotations, none, an empty one, a name that lost its hash, and JSON-MIN."""
    for name in "abc":
        source.image(f"pictures/{name}.jpg")
    first = region("rectangle", x=0, y=0, width=25, height=20)
    second = region("rectangle", x=50, y=0, width=25, height=20)
    twice = task("/data/upload/1/0123abcd-a.jpg", first, ground_truth=True)
    twice["annotations"].append({"result": [second], "updated_at": "2024"})
    skipped = task("s3://bucket/c.jpg", first, was_cancelled=True)
    tasks = [twice, task("/data/local-files/?d=x/pictures/b.jpg"), skipped]
    source.write("export.json", json.dumps(tasks))
    coco = source.good()
    assert boxes(coco) == [("a.jpg", "cat", [0, 0, 30, 18])] and len(coco["images"]) == 2
    assert "1 annotations left out" in source.out and "1 tasks that nobody has annotated" in source.out
    assert len(source.good("--unlabelled", "keep")["images"]) == 3
    minimal = {
        "id": 1,
        "annotator": 1,
        "image": "https://x.org/a.jpg?q=1",
        "label": [
            {
                "x": 0,
                "y": 0,
                "width": 25,
                "height": 20,
                "rectanglelabels": ["cat"],
                "original_width": 240,
                "original_height": 180,
            }
        ],
    }
    source.write("export.json", json.dumps([minimal]))
    assert boxes(source.good()) == [("a.jpg", "cat", [0, 0, 30, 18])]
    assert "1 images of another size than the labels say, of the same shape: scaled" in source.out


def test_label_studio_faults(source: Source) -> None:
    source.image("a.jpg")
    wrong = [
        region("rectangle", x=110, y=0, width=2, height=2),
        {**region("rectangle", x=0, y=0, width=2, height=2), "value": {"x": 0, "y": 0, "width": 2, "height": 2}},
        region("brush", rle=[0, 0, 1]),
        {**region("rectangle", x=0, y=0, width=2, height=2), "image_rotation": 90},
        region("rectangle", x=0, y=0, width=float("nan"), height=2),
        region("rectangle", x=0, y=0, width=2, height=2, rectanglelabels=7),
    ]
    source.write("export.json", json.dumps([task("a.jpg", *wrong), task("gone.jpg", wrong[0])]))
    error = source.bad()
    assert f"{len(wrong) + 1} faults" in error
    assert "export.json task 5: result[0]: x is 110, expected 0 to 100 percent of the image" in error
    assert "no image 'gone.jpg'" in error
    good = region("rectangle", x=0, y=0, width=25, height=20)
    link = {"id": 6, "data": {"page": "http://[x", "photo": "a.jpg"}, "annotations": [{"result": [good]}]}
    source.write("export.json", json.dumps([task("http://[x/a.jpg", good), link]))
    assert "task 5: its image has the address 'http://[x/a.jpg', which is none (" in source.bad()
    assert boxes(source.good("--on-error", "skip")) == [("a.jpg", "cat", [0, 0, 30, 18])]
    assert "left out: 1 images" in source.out
    source.write("export.json", json.dumps([task("a.jpg", {**wrong[0], "original_width": 300})]))
    assert "the labels say 300 x 90" in source.bad() or "x is 110" in source.err
