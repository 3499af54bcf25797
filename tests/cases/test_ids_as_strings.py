"""Records that need a repair: made and counted where one reading is possible, else refused with all reasons counted."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep import rebuild_coco, show_pack
from megdet_hpc.data.packed_coco import PackedCoco
from tests.cases.records import RecordSet

Change = Callable[[RecordSet], object]


def both(change: Callable[[int], Any]) -> Change:
    """Change image ids where they stand."""

    def make(records: RecordSet) -> None:
        records.each("images", id=change)
        records.each("annotations", image_id=change)

    return make


def of_float(records: RecordSet) -> None:
    both(float)(records)
    records.each("images", width=float, height=float)
    records.each("annotations", category_id=float)


def without_name(records: RecordSet) -> None:
    for record in records.coco["images"]:
        record["coco_url"] = f"http://images.cocodataset.org/val2017/{record.pop('file_name')}"


def without_box(records: RecordSet) -> None:
    for record in records.coco["annotations"]:
        x, y, width, height = record.pop("bbox")
        record["segmentation"] = [[x, y, x + width, y, x + width, y + height]]


def by_name(records: RecordSet) -> None:
    names = {1: "red", 2: "blue"}
    records.each("annotations", category_id=names.get)


def beside_name(records: RecordSet) -> None:
    by_name(records)
    for record in records.coco["annotations"]:
        record["category"] = record.pop("category_id")


TEXT, FLOAT = "number_from_text", "number_from_float"
# what is done to the set, and the repairs of its 2 images, 4 annotations and 2 categories that the summary counts
REPAIRED: dict[str, tuple[Change, dict[str, dict[str, int]]]] = {
    "image ids as text": (both(str), {"images": {TEXT: 2}, "annotations": {TEXT: 4}}),
    "padded": (both(lambda k: f" {k:012} "), {"images": {TEXT: 2}, "annotations": {TEXT: 4}}),
    "text with a point": (both(lambda k: f"{k}.0"), {"images": {TEXT: 2}, "annotations": {TEXT: 4}}),
    "floats": (of_float, {"images": {FLOAT: 2}, "annotations": {FLOAT: 4}}),
    "sizes as text": (lambda r: r.each("images", width=str, height=str), {"images": {TEXT: 2}}),
    "no sizes": (lambda r: r.drop("images", "width", "height"), {"images": {"size_from_file": 2}}),
    "no width": (lambda r: r.drop("images", "width"), {"images": {"size_from_file": 2}}),
    "null sizes": (lambda r: r.each("images", width=None, height=None), {"images": {"size_from_file": 2}}),
    "no name": (without_name, {"images": {"name_from_url": 2}}),
    "category ids as text": (lambda r: r.each("annotations", category_id=str), {"annotations": {TEXT: 4}}),
    "ids of the categories as text": (lambda r: r.each("categories", id=str), {"categories": {TEXT: 2}}),
    "categories by name": (by_name, {"annotations": {"category_from_name": 4}}),
    "categories by name, without an id": (beside_name, {"annotations": {"category_from_name": 4}}),
    "boxes as text": (lambda r: r.each("annotations", bbox=lambda box: [*map(str, box)]), {"annotations": {TEXT: 4}}),
    "boxes of polygons": (without_box, {"annotations": {"box_from_segmentation": 4}}),
    "iscrowd as text": (lambda r: r.each("annotations", iscrowd="0"), {"annotations": {TEXT: 4}}),
    "iscrowd as a word": (lambda r: r.each("annotations", iscrowd="False"), {"annotations": {TEXT: 4}}),
    "iscrowd as a float": (lambda r: r.each("annotations", iscrowd=0.0), {"annotations": {FLOAT: 4}}),
    "iscrowd false": (lambda r: r.each("annotations", iscrowd=False), {}),
    "area as text": (lambda r: r.each("annotations", area="9"), {"annotations": {TEXT: 4}}),
    "no annotation ids": (lambda r: r.drop("annotations", "id"), {"annotations": {"id_given": 4}}),
    "annotation ids as text": (lambda r: r.each("annotations", id=str), {"annotations": {TEXT: 4}}),
}


@pytest.mark.parametrize("name", REPAIRED)
def test_is_repaired_and_counted(name: str, records: RecordSet) -> None:
    change, repairs = REPAIRED[name]
    change(records)
    assert records.pack() == 0, records.err
    assert records.summary["repaired"] == repairs
    for kind, number in (("images", 2), ("annotations", 4), ("categories", 2)):
        if kind in repairs:
            assert records.printed(f"repaired {kind}") == number
    rebuilt, source = records.rebuilt, records.source
    assert rebuilt["categories"] == source["categories"]
    for kind in ("images", "annotations"):
        known = [{key: record[key] for key in source[kind][0]} for record in rebuilt[kind]]
        assert known == source[kind]
    assert records.verify() == 0


def test_boxes_of_masks(records: RecordSet) -> None:
    """Runs go down the columns: 10 pixels in column 1, then 5 in column 3."""
    runs = {"size": [90, 120], "counts": [90, 10, 90 * 2 - 10 + 20, 5, 90 * 120 - 295]}
    records.each("annotations", bbox=None, segmentation=runs)
    assert records.pack() == 0, records.err
    assert [record["bbox"] for record in records.rebuilt["annotations"]] == [[1, 0, 3, 25]] * 4
    assert records.summary["repaired"] == {"annotations": {"box_from_segmentation": 4}}
    assert records.verify() == 0


def test_null_is_taken_as_absent(records: RecordSet) -> None:
    records.each("annotations", iscrowd=None, area=None)
    assert records.pack() == 0
    assert all(record.keys().isdisjoint(("iscrowd", "area")) for record in records.rebuilt["annotations"])
    assert records.summary["repaired"] == {"annotations": {"null_left_out": 4}}
    assert records.verify() == 0


def test_keys_of_other_tools_stay(records: RecordSet) -> None:
    """Among them NaN, which pandas writes for an empty cell and which equals nothing."""
    records.each("annotations", score=float("nan"), attributes={"occluded": False}, id=str)
    records.coco["info"] = {"year": float("nan")}
    assert records.pack() == 0
    assert all(record["attributes"] == {"occluded": False} for record in records.rebuilt["annotations"])
    assert records.verify() == 0
    records.coco["annotations"][2]["attributes"] = {"occluded": True}
    records.write()
    assert records.verify() == 1
    assert "annotation id 3 of image id 2: attributes is {'occluded': False}" in records.err


def test_names_of_lvis_name_the_folder_of_the_split(records: RecordSet) -> None:
    """LVIS's splits mix COCO's two folders, so its users name the folder above them."""
    without_name(records)
    (records.images / "val2017").mkdir()
    for name in ("im0.jpg", "im1.jpg"):
        (records.images / name).rename(records.images / "val2017" / name)
    assert records.pack() == 0, records.err
    assert [image["file_name"] for image in records.rebuilt["images"]] == ["val2017/im0.jpg", "val2017/im1.jpg"]
    assert records.verify() == 0


NAMED = both(lambda k: f"img_{k:03}")


def test_names_as_ids_are_refused_and_the_option_is_named(records: RecordSet) -> None:
    NAMED(records)
    for more in ([], ["--on-error", "skip"]):
        assert records.pack(*more) == 1
        assert "2 faults (bad_image_record 2)" in records.err
        assert "images[0] (image id 'img_001', file 'im0.jpg'): id is 'img_001', expected a 64-bit int" in records.err
        assert "images[1] (image id 'img_002'" in records.err
        assert "--number-images gives all images new ids" in records.err
    assert "no image to pack" in records.err
    assert records.pack() == 1
    assert "--number-images gives all images new ids, --on-error skip leaves" in records.err.splitlines()[0]


UNREADABLE_IDS = {
    "names": NAMED,
    "beyond 64 bits": both(lambda k: 2**64 + k),
    "floats that stand for several integers": both(lambda k: 2.0**53 + 2 * k),
}


@pytest.mark.parametrize("name", UNREADABLE_IDS)
def test_new_image_ids_on_demand(name: str, records: RecordSet, tmp_path: Path) -> None:
    UNREADABLE_IDS[name](records)
    assert records.pack() == 1
    assert records.pack("--number-images") == 0, records.err
    assert records.summary["repaired"] == {"images": {"id_numbered": 2}}
    images = records.rebuilt["images"]
    assert [image["id"] for image in images] == [1, 2]
    assert [image["source_id"] for image in images] == [image["id"] for image in records.coco["images"]]
    assert [record["image_id"] for record in records.rebuilt["annotations"]] == [1, 1, 2, 2]
    assert records.verify() == 0
    back = tmp_path / "back.json"
    assert rebuild_coco.main([str(records.output), "--output", str(back)]) == 0
    records.coco = json.loads(back.read_bytes())
    assert records.pack() == 0  # results that are told by the new ids can be scored against it
    if name == "names":
        assert show_pack.main([str(records.output), "--output", str(tmp_path / "pictures")]) == 0


def test_an_old_id_is_not_taken_for_a_new_one(records: RecordSet) -> None:
    NAMED(records)
    records.coco["annotations"][0]["image_id"] = 2
    assert records.pack("--number-images") == 1
    assert "annotations[0] (annotation id 1, image id 2, file 'im1.jpg'): no image has this id" in records.err


# what is done to the set, the reasons that are counted, and a part of the message
REFUSED: dict[str, tuple[Change, str, str]] = {
    "bool": (both(lambda k: k == 1), "bad_image_record 2", "id is True, expected a 64-bit integer"),
    "not a number": (both(lambda k: float("nan")), "bad_image_record 2", "id is nan, expected a 64-bit integer"),
    "infinite": (both(lambda k: float("inf")), "bad_image_record 2", "id is inf, expected a 64-bit integer"),
    "fractions": (both(lambda k: k + 0.5), "bad_image_record 2", "id is 1.5, expected a 64-bit integer"),
    "half a pixel": (lambda r: r.each("images", width=120.5), "bad_image_record 2", "width is 120.5, expected an int"),
    "no ids": (lambda r: r.drop("images", "id"), "unknown_image_id 4, bad_image_record 2", "has no 'id'"),
    "no names": (lambda r: r.drop("images", "file_name"), "bad_image_record 2", "has no 'file_name'"),
    "no address": (lambda r: (r.drop("images", "file_name"), r.each("images", coco_url="http://[x/a.jpg")),
        "bad_image_record 2", "has no 'file_name'"),
    "no categories": (lambda r: r.drop("annotations", "category_id"), "bad_annotation_record 4", "category_id is None"),
    "unknown category": (lambda r: r.each("annotations", category_id="green"), "bad_annotation_record 4",
        "category_id is 'green', expected a 64-bit integer or a name that one category has"),
    "no boxes": (lambda r: r.drop("annotations", "bbox"), "bad_box 4", "bbox is None, expected 4 finite numbers"),
    "boxes of nothing": (lambda r: r.each("annotations", bbox=[], segmentation=[[1, 2]]), "bad_box 4", "bbox is []"),
    "box of nan": (lambda r: r.each("annotations", bbox=[1, 2, 3, float("nan")]), "bad_box 4", "bbox is [1, 2, 3"),
    "crowd of 2": (lambda r: r.each("annotations", iscrowd="2"), "bad_annotation_record 4", "iscrowd is 2, expected"),
    "panoptic": (lambda r: (r.drop("annotations", "category_id", "bbox"), r.each("annotations", segments_info=[])),
        "bad_annotation_record 4", "the file is a panoptic one"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_all_faults_are_told_at_once(name: str, records: RecordSet) -> None:
    change, reasons, text = REFUSED[name]
    change(records)
    assert records.pack() == 1
    first, *lines = records.err.splitlines()
    assert first.startswith(f"pack_coco: error: {records.path}: ")
    assert f"({reasons})" in first and "--on-error skip leaves them out" in first
    assert any(text in line for line in lines), records.err
    assert sum("... and 1 more" in line for line in lines) == reasons.count(" 4")  # three of each are shown
    assert not records.output.exists()


def test_a_name_that_is_another_category_s_id_is_refused(records: RecordSet) -> None:
    """Digits are numbered from 1 and named from 0: "1" may be either."""
    records.coco["categories"] = [{"id": 1, "name": "0"}, {"id": 2, "name": "1"}]
    records.each("annotations", category_id="1")
    assert records.pack() == 1
    assert "4 faults (bad_annotation_record 4)" in records.err


def test_good_records_stay_where_others_are_left_out(records: RecordSet) -> None:
    records.coco["images"].append({"id": "x", "file_name": "im0.jpg"})
    records.coco["annotations"] += [{"id": 9, "image_id": "x", "category_id": 1, "bbox": [1, 1, 5, 5]}, None]
    assert records.pack("--on-error", "skip") == 0
    assert records.rebuilt == records.source
    expected = {"bad_image_record": 1}, {"bad_image_record": 1, "bad_annotation_record": 1}
    assert (records.summary["skipped"]["images"], records.summary["skipped"]["annotations"]) == expected
    assert records.verify() == 0


def test_bad_categories_are_told_at_once(records: RecordSet) -> None:
    records.coco["categories"] = [{"name": "red"}, {"id": 2, "name": "blue"}, {"id": 2, "name": "green"}]
    assert records.pack("--on-error", "skip") == 1
    assert "2 faults (bad_category 1, duplicate_category_id 1)" in records.err
    assert "category id 2 occurs twice (categories[2])" in records.err


def test_a_compressed_file_is_packed_and_compared(records: RecordSet) -> None:
    assert records.pack() == 0
    records.path = records.folder / "annotations.json.gz"
    records.path.write_bytes(gzip.compress(json.dumps(records.coco).encode()))
    records.write = lambda: None  # type: ignore[method-assign]
    assert records.pack() == 0, records.err
    assert records.rebuilt == records.source
    assert records.verify() == 0


CONTENTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut": (lambda data: data[: len(data) // 2], "it ends in the middle, after "),
    "cut in a number": (lambda data: data[: data.index(b": 1") + 3], "it ends in the middle, after "),
    "lines": (lambda data: b'{"id": 1}\n{"id": 2}\n', "it holds one record a line (JSON Lines)"),
    "results": (lambda data: b'[{"image_id": 1, "score": 0.5}]', "it is a results file (detections with scores)"),
    "list": (lambda data: b"[1]", "holds a list, expected an object with images, annotations and categories"),
    "empty": (lambda data: b"", "it is empty"),
    "page": (lambda data: b"<!DOCTYPE html>", "it is XML or HTML"),
    "archive": (lambda data: b"PK\x03\x04", "it is a ZIP archive"),
    "pointer": (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "gzip": (lambda data: gzip.compress(data)[:-9], "cannot be unpacked by gzip"),
    "labelme": (lambda data: b'{"shapes": [], "imagePath": "1.jpg"}', "it is labelme's file of one image"),
    "via": (lambda data: b'{"1.jpg5": {"regions": []}}', "it is a project of VIA"),
    "not in UTF-8": (lambda data: data.replace(b"red", b"ros\xe9"), "it is not in UTF-8"),
    "captions": (lambda data: b'{"images": [], "annotations": []}', "no list 'categories'"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_another_file_is_named(name: str, records: RecordSet) -> None:
    change, text = CONTENTS[name]
    content = change(json.dumps(records.coco).encode())
    records.write = lambda: records.path.write_bytes(content)  # type: ignore[method-assign, assignment, return-value]
    assert records.pack() == 1
    assert text in records.err
    assert len(records.err.splitlines()) == 1


def test_a_byte_order_mark_is_no_obstacle(records: RecordSet) -> None:
    content = b"\xef\xbb\xbf" + json.dumps(records.coco).encode()
    records.write = lambda: records.path.write_bytes(content)  # type: ignore[method-assign, assignment, return-value]
    assert records.pack() == 0
    assert records.rebuilt == records.source


def test_ids_stay_integers_of_64_bits(records: RecordSet) -> None:
    both(lambda k: 2**63 - 1 - k)(records)
    assert records.pack() == 0
    assert PackedCoco(records.output).image_ids.tolist() == [2**63 - 2, 2**63 - 3]
