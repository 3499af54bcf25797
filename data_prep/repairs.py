"""Repairs of records that have only one possible meaning. All other records stay as they are and are refused later.

Each function returns the record itself if it needs no repair, else a changed copy, and the repairs made as keys of
REPAIRS.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping, Sequence
from itertools import chain
from typing import Any
from urllib.parse import unquote, urlsplit

from data_prep.skips import INT64_MAX, is_id
from megdet_hpc.data.masks import mask_box, rle_of

Record = dict[str, Any]
Repaired = tuple[Record, Sequence[str]]

REPAIRS = {
    "number_from_text": "numbers written as text",
    "number_from_float": "whole numbers written as floating-point numbers",
    "size_from_file": "width or height missing, taken from the image file",
    "name_respelt": "files found by another case, slash, Unicode form, %XX or folder of their name",
    "name_from_url": "file_name missing, taken from coco_url",
    "id_numbered": "ids numbered anew by --number-images, the old ones kept as source_id",
    "id_given": "annotation ids missing or no 64-bit integers, numbered; nothing refers to them",
    "category_from_name": "category given by its name",
    "box_from_segmentation": "bbox missing, taken from the segmentation",
    "null_left_out": "iscrowd or area null, taken as absent",
}

FLOAT_WHOLE_END = 2**53  # from here on a float64 stands for more than one integer
SOURCE_ID = "source_id"
"""The key that keeps an id which a repair replaced."""

_WHOLE = re.compile(r"[+-]?[0-9]+(\.0*)?")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def whole_number(value: Any) -> tuple[int, str] | None:
    """The integer that a value stands for, with its repair ("" for an integer); None for other values."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value, ""
    if isinstance(value, float) and value.is_integer() and abs(value) < FLOAT_WHOLE_END:
        return int(value), "number_from_float"
    if isinstance(value, str) and len(value) < 40 and _WHOLE.fullmatch(value.strip()):
        return int(value.strip().partition(".")[0]), "number_from_text"
    return None


def number(value: Any) -> Any:
    """The number that a text stands for; any other value as it is."""
    if isinstance(value, str) and len(value) < 40 and _NUMBER.fullmatch(value.strip()):
        whole = whole_number(value)
        return whole[0] if whole else float(value)
    return value


def _repair_whole(record: Record, keys: Sequence[str], changed: Record, repairs: list[str]) -> None:
    """Note the integers that values of a record stand for."""
    for key in keys:
        value = record.get(key)
        if type(value) is not int and (whole := whole_number(value)) is not None and abs(whole[0]) <= INT64_MAX:
            changed[key] = whole[0]
            repairs.append(whole[1])


def _finish(record: Record, changed: Record, repairs: list[str], absent: Sequence[str] = ()) -> Repaired:
    if not (repairs or changed or absent):
        return record, ()
    return {**{k: v for k, v in record.items() if k not in absent}, **changed}, tuple(dict.fromkeys(repairs))


def repair_category(record: Any) -> Repaired:
    """A category with an integer id."""
    changed: Record = {}
    repairs: list[str] = []
    if isinstance(record, dict):
        _repair_whole(record, ("id",), changed, repairs)
    return _finish(record, changed, repairs)


def name_from_url(record: Record) -> tuple[str, str] | None:
    """Folder and file name at the end of a record's coco_url, as "train2017" and "000000391895.jpg"."""
    url = record.get("coco_url")
    if record.get("file_name") is not None or not isinstance(url, str):
        return None
    try:
        parts = unquote(urlsplit(url).path).split("/")
    except ValueError:  # no address, as http://[x/a.jpg
        return None
    return (parts[-2] if len(parts) > 1 else "", parts[-1]) if parts[-1] else None


def repair_image(record: Any, has_folder: Callable[[str], bool] = lambda _: False) -> Repaired:
    """An image with integers for id and size and with a file name. Null sizes are removed; the file gives them.

    Args:
        record: an image record.
        has_folder: whether the image folder has a subfolder of this name, for names from coco_url.
    """
    if not isinstance(record, dict):
        return record, ()
    changed: Record = {}
    repairs: list[str] = []
    _repair_whole(record, ("id", "width", "height"), changed, repairs)
    if (named := name_from_url(record)) is not None:
        folder, name = named
        changed["file_name"] = f"{folder}/{name}" if folder and has_folder(folder) else name
        repairs.append("name_from_url")
    null = [key for key in ("width", "height") if record.get(key, 0) is None]
    return _finish(record, changed, repairs, null)


def box_of(segmentation: Any) -> list[float] | None:
    """x, y, width, height of the box around polygons or an RLE; None if they are empty or damaged."""
    if isinstance(segmentation, list) and segmentation:
        if not all(
            isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in segmentation
        ):
            return None
        if not all(type(value) in (int, float) and abs(value) < 2**31 for value in chain(*segmentation)):
            return None
        xs = [x for polygon in segmentation for x in polygon[0::2]]
        ys = [y for polygon in segmentation for y in polygon[1::2]]
        return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
    if isinstance(segmentation, dict):
        try:
            rle = rle_of(segmentation, *segmentation["size"])
            box = mask_box(rle) if rle else [0.0] * 4
        except (ImportError, ValueError, TypeError, KeyError):
            return None
        return box if box[2] > 0 and box[3] > 0 else None
    return None


def repair_annotation(record: Any, names: Mapping[str, int], category_ids: Container[int]) -> Repaired:
    """An annotation with integers for ids and iscrowd, and four numbers for its box. Its own id may be missing.

    Args:
        record: an annotation record.
        names: category ids by name, for names that only one category has.
        category_ids: the ids of all categories.
    """
    if not isinstance(record, dict):
        return record, ()
    changed: Record = {}
    repairs: list[str] = []
    absent: list[str] = []
    _repair_whole(record, ("id", "image_id", "category_id"), changed, repairs)
    category = record.get("category_id")
    if type(category) is not int:
        _repair_category_name(record, category, names, category_ids, changed, repairs)
    box = record.get("bbox")
    if not box:
        if (made := box_of(record.get("segmentation"))) is not None:
            changed["bbox"] = made
            repairs.append("box_from_segmentation")
    elif isinstance(box, list) and any(type(value) is str for value in box):
        changed["bbox"] = list(map(number, box))
        repairs.append("number_from_text")
    _repair_crowd_and_area(record, changed, repairs, absent)
    return _finish(record, changed, repairs, absent)


def _repair_crowd_and_area(record: Record, changed: Record, repairs: list[str], absent: list[str]) -> None:
    """Note the values that iscrowd and area stand for, and which of them are null."""
    for key in ("iscrowd", "area"):
        value = record.get(key, 0)
        if value is None:
            absent.append(key)
            repairs.append("null_left_out")
        elif type(value) is str and number(value) != value:
            changed[key] = number(value)
            repairs.append("number_from_text")
    crowd = changed.get("iscrowd", record.get("iscrowd"))
    if type(crowd) is float and crowd in (0.0, 1.0):
        changed["iscrowd"] = int(crowd)
        repairs.append("number_from_float")
    elif isinstance(crowd, str) and crowd.strip().lower() in ("true", "false"):
        changed["iscrowd"] = int(crowd.strip().lower() == "true")
        repairs.append("number_from_text")
    elif type(crowd) is bool:
        changed["iscrowd"] = int(crowd)  # equal in Python and in pycocotools, so no repair


def _repair_category_name(
    record: Record,
    category: Any,
    names: Mapping[str, int],
    category_ids: Container[int],
    changed: Record,
    repairs: list[str],
) -> None:
    """Note the category that a record gives by its name."""
    by_id = changed.get("category_id")
    if by_id is not None:
        by_name = names.get(category) if isinstance(category, str) else None
        if by_name is None or by_name == by_id:
            return
        del changed["category_id"]  # "3" is one category's id and another's name
        if by_id in category_ids:
            return
        repairs.remove("number_from_text")
    text = category if category is not None else record.get("category_name", record.get("category"))
    if isinstance(text, str) and text in names:
        changed["category_id"] = names[text]
        repairs.append("category_from_name")


def unique_names(categories: Sequence[Any]) -> dict[str, int]:
    """Category ids by name, for good records whose name is unique."""
    names: dict[str, list[int]] = {}
    for category in categories:
        if isinstance(category, dict) and isinstance(category.get("name"), str) and is_id(category.get("id")):
            names.setdefault(category["name"], []).append(category["id"])
    return {name: ids[0] for name, ids in names.items() if len(ids) == 1}
