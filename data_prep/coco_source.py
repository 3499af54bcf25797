"""Reads and checks a COCO annotation file before anything is packed."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.skips import Skips, is_id
from megdet_hpc.errors import UserError

SIDE_MAX = 2**31 - 1  # pixels; stored as int32
NUMBER_MAX = 2**53  # beyond it float64 no longer holds every integer


@dataclass
class SourceImage:
    """One image record with its annotations, each with its position in the source's list."""

    source_index: int
    record: dict[str, Any]
    annotations: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    file_bytes: int = 0
    file_mtime_ns: int = 0


@dataclass(frozen=True)
class CocoSource:
    """A checked annotation file: images in its order, and every other top-level key as it is."""

    path: Path
    sha256: str
    images: list[SourceImage]
    other: dict[str, Any]


@contextmanager
def paused_collector() -> Iterator[None]:
    """Pause Python's cyclic garbage collector, which goes through millions of records again and again.

    Parsed JSON has no cycles, so its memory is still freed.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _is_number(value: Any) -> bool:
    """Finite int or float that float64 holds; NaN fails the comparison."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= NUMBER_MAX


def read_source(path: Path, skips: Skips) -> CocoSource:
    """Read an annotation file and check every record of it.

    Args:
        path: COCO instances JSON.
        skips: stops at the first bad record, or lists it and leaves it out.

    Raises:
        UserError: unreadable, not JSON, a top-level list or the category list is missing or wrong (never
            skipped); any bad record where `skips` stops.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        coco = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(coco, dict):
        raise UserError(f"{path}: holds a {type(coco).__name__}, expected an object")
    for key in ("images", "annotations", "categories"):
        if not isinstance(coco.get(key), list):
            raise UserError(f"{path}: no list {key!r}; expected images, annotations and categories")
    categories = _check_categories(path, coco["categories"])
    images = _read_images(path, coco.pop("images"), skips)
    _attach_annotations(path, images, coco.pop("annotations"), categories, skips)
    if not images:
        raise UserError(f"{path}: no image to pack")
    return CocoSource(path, hashlib.sha256(data).hexdigest(), list(images.values()), coco)


def _check_categories(path: Path, categories: list[Any]) -> set[int]:
    """The category ids.

    Raises:
        UserError: not an object with an integer id and a name, or an id that occurs twice.
    """
    ids: set[int] = set()
    for index, category in enumerate(categories):
        if not isinstance(category, dict) or not is_id(category.get("id")) or "name" not in category:
            raise UserError(f"{path}: categories[{index}] is {category!r}, expected an integer id and a name")
        if category["id"] in ids:
            raise UserError(f"{path}: category id {category['id']} occurs twice (categories[{index}])")
        ids.add(category["id"])
    return ids


def _image_fault(record: Any) -> str | None:
    """What is wrong with an image record itself, or None."""
    if not isinstance(record, dict):
        return f"is {record!r}, expected an object"
    for key in ("id", "file_name", "width", "height"):
        if key not in record:
            return f"has no {key!r}"
    if not is_id(record["id"]):
        return f"id is {record['id']!r}, expected a 64-bit integer"
    for key in ("width", "height"):
        if not is_id(record[key]) or not 1 <= record[key] <= SIDE_MAX:
            return f"{key} is {record[key]!r}, expected an integer from 1 to {SIDE_MAX} pixels"
    name = record["file_name"]
    if not isinstance(name, str) or not name or "\0" in name or not _is_utf8(name):
        return f"file_name is {name!r}, expected a file name in UTF-8"
    return None


def _is_utf8(name: str) -> bool:
    """JSON can escape half of a surrogate pair, which no file name in UTF-8 holds."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _read_images(path: Path, records: Iterable[Any], skips: Skips) -> dict[int, SourceImage]:
    """The good image records by id, in the source's order; of a repeated id the first."""
    images: dict[int, SourceImage] = {}
    for index, record in enumerate(records):
        fault = _image_fault(record)
        if fault is None and record["id"] not in images:
            images[record["id"]] = SourceImage(index, record)
            continue
        image_id = record.get("id") if isinstance(record, dict) else None
        name = record.get("file_name") if isinstance(record, dict) else None
        reason = "bad_image_record" if fault else "duplicate_image_id"
        text = fault or "an image with this id occurs before it"
        text = f"images[{index}] (image id {image_id!r}, file {name!r}): {text}"
        skips.report(reason, path, text, image_id, images=1)
    return images


def _annotation_fault(
    record: Any, images: dict[int, SourceImage], categories: set[int], seen: set[int]
) -> tuple[str, str] | None:
    """Reason and description of what is wrong with an annotation, or None."""
    if not isinstance(record, dict):
        return "bad_annotation_record", f"is {record!r}, expected an object"
    for key in ("id", "image_id", "category_id"):
        if not is_id(record.get(key)):
            return "bad_annotation_record", f"{key} is {record.get(key)!r}, expected a 64-bit integer"
    if record["id"] in seen:
        return "duplicate_annotation_id", "an annotation with this id occurs before it"
    if record["image_id"] not in images:
        return "unknown_image_id", "no image has this id"
    if record["category_id"] not in categories:
        return "unknown_category_id", f"category id {record['category_id']} is not in the category list"
    box = record.get("bbox")
    if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box)) and min(box[2:]) >= 0):
        return "bad_box", f"bbox is {box!r}, expected 4 finite numbers x, y, width >= 0, height >= 0"
    if "area" in record and not _is_number(record["area"]):
        return "bad_annotation_record", f"area is {record['area']!r}, expected a finite number"
    if "iscrowd" in record and not (isinstance(record["iscrowd"], int) and record["iscrowd"] in (0, 1)):
        return "bad_annotation_record", f"iscrowd is {record['iscrowd']!r}, expected 0 or 1"
    return None


def _attach_annotations(
    path: Path, images: dict[int, SourceImage], records: Iterable[Any], categories: set[int], skips: Skips
) -> None:
    """Give each image its good annotations, in the source's order."""
    seen: set[int] = set()
    for index, record in enumerate(records):
        fault = _annotation_fault(record, images, categories, seen)
        if fault is None:
            seen.add(record["id"])
            images[record["image_id"]].annotations.append((index, record))
            continue
        reason, text = fault
        annotation_id, image_id = (
            (record.get("id"), record.get("image_id")) if isinstance(record, dict) else (None, None)
        )
        name = images[image_id].record["file_name"] if is_id(image_id) and image_id in images else None
        which = f"annotation id {annotation_id!r}, image id {image_id!r}, file {name!r}"
        skips.report(reason, path, f"annotations[{index}] ({which}): {text}", image_id, annotations=1)
