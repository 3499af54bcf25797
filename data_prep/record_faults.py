"""Faults of a record that cannot be repaired."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from data_prep.skips import is_id

SIDE_MAX = 2**31 - 1  # pixels; stored as int32
NUMBER_MAX = 2**53  # beyond it float64 no longer holds every integer


def _is_number(value: Any) -> bool:
    """Finite int or float that float64 holds; NaN fails the comparison."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= NUMBER_MAX


def is_name(value: Any) -> bool:
    """Whether a value names a category; digits may be written as numbers."""
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def can_be_numbered(old: Any) -> bool:
    """Whether --number-images accepts a value as id: a text or a number, but not NaN, which equals nothing."""
    return isinstance(old, str | int | float) and not isinstance(old, bool) and old == old


def image_fault(record: Any) -> str | None:
    """The fault of an image record, or None. A missing width or height is no fault, since the file has it."""
    if not isinstance(record, dict):
        return f"is {record!r}, expected an object"
    if "id" not in record:
        return "has no 'id'"
    if not is_id(record["id"]):
        hint = " (--number-images gives all images new ids)" if can_be_numbered(record["id"]) else ""
        return f"id is {record['id']!r}, expected a 64-bit integer{hint}"
    for key in ("width", "height"):
        if key in record and (not is_id(record[key]) or not 1 <= record[key] <= SIDE_MAX):
            return f"{key} is {record[key]!r}, expected an integer from 1 to {SIDE_MAX} pixels"
    name = record.get("file_name")
    if name is None:
        return "has no 'file_name' (nor 'coco_url')"
    if not isinstance(name, str) or not name or "\0" in name or not _is_utf8(name):
        return f"file_name is {name!r}, expected a file name in UTF-8"
    return None


def _is_utf8(name: str) -> bool:
    """Whether a text is UTF-8: JSON can escape half of a surrogate pair, which no file name holds."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def annotation_fault(record: Any, image_ids: Container[Any], category_ids: Container[int]) -> tuple[str, str] | None:
    """Reason and description of an annotation's fault, or None. Its own id is not checked.

    Args:
        record: an annotation that `repair_annotation` gave.
        image_ids: the ids of all good images.
        category_ids: the ids of all categories.
    """
    if not isinstance(record, dict):
        return "bad_annotation_record", f"is {record!r}, expected an object"
    for key in ("image_id", "category_id"):
        if not is_id(record.get(key)):
            hint = (
                " or a name that one category has" if key == "category_id" and isinstance(record.get(key), str) else ""
            )
            if "segments_info" in record:
                hint = "; the file is a panoptic one, the instances file is needed"
            return "bad_annotation_record", f"{key} is {record.get(key)!r}, expected a 64-bit integer{hint}"
    if record["image_id"] not in image_ids:
        return "unknown_image_id", "no image has this id"
    if record["category_id"] not in category_ids:
        return "unknown_category_id", f"category id {record['category_id']} is not in the category list"
    box = record.get("bbox")
    if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box)) and min(box[2:]) >= 0):
        return "bad_box", f"bbox is {box!r}, expected 4 finite numbers x, y, width >= 0, height >= 0"
    if "area" in record and not _is_number(record["area"]):
        return "bad_annotation_record", f"area is {record['area']!r}, expected a finite number"
    if "iscrowd" in record and not (isinstance(record["iscrowd"], int) and record["iscrowd"] in (0, 1)):
        return "bad_annotation_record", f"iscrowd is {record['iscrowd']!r}, expected 0 or 1"
    return None
