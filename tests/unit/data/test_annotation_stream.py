"""data_prep/annotation_file.py and annotation_table.py: a file read record by record is what json.load makes of it."""

from __future__ import annotations

import copy
import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # data_prep of this checkout

from data_prep import annotation_file, annotation_table
from data_prep.annotation_file import walk
from data_prep.annotation_table import AnnotationTable
from data_prep.coco_source import CocoSource, read_source
from data_prep.skips import IDENTICAL, Skips
from megdet_hpc.errors import UserError

PIECES = (1, 7, 64, 2**22)

VALUES: dict[str, Any] = {
    "plain": {"info": {}, "images": [{"id": 1}, {"id": 2}], "annotations": [{"id": 3, "bbox": [1.5, 2, 3e2, -4]}]},
    "nothing": {},
    "empty lists": {"annotations": [], "images": [], "categories": []},
    "no lists": {"images": None, "annotations": {"a": [1]}, "x": 12345678901234567890123, "y": 1e-300},
    "texts": {"images": ['a"b\\', "\ud83d\ude00 \u00fc", "\ud800", "]}", ""], "a\\": "\u2028"},
    "bare values": {"images": [1, -2.5, True, None, [], {}, "x"], "z": [[[1], 2], 3]},
}


def whole(path: Path) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, Iterator) else value for key, value in walk(path)}


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("name", VALUES)
def test_records_are_those_of_json_load(name: str, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annotation_file, "_PIECE", piece)
    path = tmp_path / "set.json"
    for text in (json.dumps(VALUES[name]), json.dumps(VALUES[name], indent=3)):
        path.write_text(text)
        assert whole(path) == json.loads(text)
        path.write_bytes(gzip.compress(text.encode()))
        assert whole(path) == json.loads(text)
        for encoding in ("utf-8-sig", "utf-16"):
            path.write_text(text, encoding=encoding)
            assert whole(path) == json.loads(text)
    path.write_text('{"images": [NaN, Infinity, -Infinity], "u": "\u00fc"}', encoding="utf-8")
    (nan, *rest), text = whole(path).values()
    assert nan != nan and rest == [float("inf"), float("-inf")] and text == "\u00fc"


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize(
    "text",
    [
        '{"images": [{"id": 1}\n, {"id": ',
        '{"images": [{"id": 1}, {"file',
        '{"images": [{"id": 1} {"id": 2}]}',
        '{"images": [{"id": 1}],\n "annotations": [nul]}',
        '{"images": []}\n{"images": []}',
        '{"images" []}',
        '{"images": [1, 2, -]}',
        "",
        "  ",
    ],
)
def test_errors_are_those_of_json(text: str, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annotation_file, "_PIECE", piece)
    path = tmp_path / "set.json"
    path.write_text(text)
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)
    with pytest.raises(UserError) as found:
        whole(path)
    assert str(found.value).startswith(f"{path}: not valid JSON ({expected.value})")


def test_a_list_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "set.json").write_text('{"images": [], "images": []}')
    with pytest.raises(UserError, match="has 'images' twice"):
        whole(tmp_path / "set.json")


def coco() -> dict[str, Any]:
    draw = np.random.default_rng(0)
    images = [{"id": 10 * k, "file_name": f"{k}.jpg", "width": 64, "height": 48} for k in range(30)]
    annotations = [
        {"id": k + 1, "image_id": int(draw.integers(30)) * 10, "category_id": 1, "bbox": [k, 1, 2, 3], "note": "x" * k}
        for k in range(200)
    ]
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cat"}]}


def read(value: dict[str, Any], folder: Path, skips: Skips | None = None) -> CocoSource:
    (folder / "set.json").write_text(json.dumps(value))
    return read_source(folder / "set.json", folder, skips or Skips(False), False, folder / "later" / "pack")


def rows(source: CocoSource, images: list[int] | None = None) -> list[tuple[int, ...]]:
    wanted = np.array(images if images is not None else [image.source_index for image in source.images], np.int64)
    found = source.annotations.of(wanted).rows
    return list(zip(*(found[key].tolist() for key in ("image", "source_index", "id")), strict=True))


def expected_rows(value: dict[str, Any]) -> list[tuple[int, ...]]:
    place = {image["id"]: k for k, image in enumerate(value["images"])}
    return sorted((place[a["image_id"]], k, a["id"]) for k, a in enumerate(value["annotations"]))


@pytest.mark.parametrize("order", ["iac", "aic", "cai", "cia", "aci", "ica"])
def test_the_order_of_the_lists_changes_nothing(order: str, tmp_path: Path) -> None:
    value = coco()
    keys = {key[0]: key for key in value}
    source = read({keys[letter]: value[keys[letter]] for letter in order}, tmp_path)
    assert rows(source) == expected_rows(value)
    assert [image.num_annotations for image in source.images] == np.bincount(
        [place for place, _, _ in expected_rows(value)], minlength=30
    ).tolist()


@pytest.mark.parametrize("group", [1, 4, 4096])
def test_any_images_have_their_annotations(group: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annotation_table, "_GROUP", group)
    monkeypatch.setattr(annotation_table, "_FLUSH", 300)
    value = coco()
    source = read(value, tmp_path)
    for images in ([], [0], [3, 4, 5], [2, 9, 29], list(range(30))):
        found = source.annotations.of(np.array(images, np.int64))
        assert rows(source, images) == [row for row in expected_rows(value) if row[0] in images]
        extra = b"".join(
            json.dumps({"note": "x" * k}, separators=(",", ":")).encode() for k in found.rows["source_index"]
        )
        assert found.extra == extra


def test_categories_at_the_end_are_only_an_assumption(tmp_path: Path) -> None:
    """What looks like them may be a part of something else; then the file is read a second time."""
    value = coco()
    value = {"categories": value.pop("categories"), **value, "info": {"categories": [{"id": 7, "name": "dog"}]}}
    assert rows(read(value, tmp_path)) == expected_rows(value)
    value = {key: value[key] for key in ("images", "annotations", "categories", "info")}
    assert rows(read(value, tmp_path)) == expected_rows(value)


def test_a_repeated_record_is_left_out_wherever_it_is(tmp_path: Path) -> None:
    value = coco()
    value["annotations"].insert(5, copy.deepcopy(value["annotations"][100]))
    value["annotations"].append({**value["annotations"][7], "bbox": [0, 0, 1, 1]})  # the same id, another record
    skips = Skips(False)
    source = read(value, tmp_path, skips)
    assert [entry["reason"] for entry in skips.entries] == [IDENTICAL]
    assert skips.entries[0]["message"].startswith("annotations[101] (annotation id 101, image id ")
    assert rows(source) == [row for row in expected_rows(value) if row[1] != 101]
    assert len(source.annotations) == sum(image.num_annotations for image in source.images) == 201


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"bbox": [-1, 5, 10, 10]}, {"bbox": [-2, 5, 10, 10]}),  # hash(-1.0) == hash(-2.0)
        ({"note": "ab", "segmentation": [[1]]}, {"note": "a", "segmentation": [[1, 1]]}),
        ({"area": 5}, {}),
    ],
)
def test_another_record_with_the_same_id_stays(first: dict[str, Any], second: dict[str, Any], tmp_path: Path) -> None:
    value = coco()
    common = {"id": 7, "image_id": 0, "category_id": 1, "bbox": [1, 2, 3, 4]}
    value["annotations"] = [{**common, **first}, {**common, **second}, {**common, **first}]
    skips = Skips(False)
    source = read(value, tmp_path, skips)
    assert rows(source) == [(0, 0, 7), (0, 1, 7)] and [entry["reason"] for entry in skips.entries] == [IDENTICAL]
    boxes = source.annotations.of(np.array([0])).rows["bbox"]
    assert boxes.tolist() == [[float(x) for x in {**common, **one}["bbox"]] for one in (first, second)]


@pytest.mark.parametrize("content", [b"\x1f\x8b\0\0", b"\x1f\x8b\x08\0", gzip.compress(b"{}" * 999, mtime=0)[:20]])
def test_a_damaged_gzip_file_is_called_so(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "set.json").write_bytes(content)
    with pytest.raises(UserError, match=r"cannot be unpacked by gzip .*; copy it again"):
        whole(tmp_path / "set.json")


def test_ids_are_given_where_there_are_none(tmp_path: Path) -> None:
    value = coco()
    del value["annotations"][3]["id"]
    value["annotations"][9]["id"] = "nine"
    value["annotations"][20]["id"] = 2**40
    skips = Skips(False)
    source = read(value, tmp_path, skips)
    given = {index: key for _, index, key in rows(source)}
    assert (given[3], given[9], given[20], given[4]) == (4, 10, 2**40, 5)
    assert skips.repairs["annotations"] == {"id_given": 2}
    found = source.annotations.of(np.arange(30))
    assert b'"source_id":"nine"' in found.extra


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        AnnotationTable(Path("/proc/self/task"))
