"""Reads an annotation file, repairs records with only one possible meaning, and checks every record."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from operator import itemgetter
from pathlib import Path
from sys import intern
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.annotation_file import LISTS, check_lists, walk
from data_prep.annotation_table import AnnotationTable
from data_prep.record_faults import annotation_fault, can_be_numbered, image_fault, is_name
from data_prep.repairs import SOURCE_ID, repair_annotation, repair_category, repair_image, unique_names
from data_prep.skips import IDENTICAL, Skips, describe_entries, is_id
from megdet_hpc.errors import UserError
from megdet_hpc.files import file_sha256

_TAIL = 2**22  # bytes at the end of a file in which its categories are looked for
_CATEGORIES = re.compile(r'"categories"\s*:\s*\[')


@dataclass(slots=True)
class SourceImage:
    """One image record, with its position in the source's list."""

    source_index: int
    record: dict[str, Any]
    num_annotations: int = 0
    path: str = ""  # of its file, relative to the image folder; find_images sets it
    file_bytes: int = 0
    file_mtime_ns: int = 0


@dataclass(frozen=True)
class CocoSource:
    """A checked annotation file: images in its order, their annotations, and every other top-level key as it is."""

    path: Path
    sha256: str
    images: list[SourceImage]
    annotations: AnnotationTable
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


def places(images: Sequence[SourceImage]) -> NDArray[np.int64]:
    """Positions of images in the source's list, rising."""
    return np.fromiter((image.source_index for image in images), np.int64)


def read_source(path: Path, folder: Path, skips: Skips, number_images: bool, spool: Path) -> CocoSource:
    """Read an annotation file, repair it (`repairs`) and check every record of it.

    The file is read record by record. An annotation is checked against images and categories. Where these come behind
    the annotations, the file is read twice, but for categories that are found at its end beforehand.

    Args:
        path: COCO instances JSON, compressed by gzip or not.
        folder: image folder, in which only the subfolders of a coco_url are looked for.
        skips: list of bad records and count of repairs. If bad records are not skipped, all together end the run.
        number_images: whether images get new ids, 1, 2, ... in the file's order.
        spool: folder, or a folder to be made, on whose disk the annotations wait; about 90 bytes each and their texts.

    Raises:
        UserError: the file is unreadable or not JSON; a top-level list or the category list is missing or wrong (never
            skipped); there are bad records that `skips` does not leave out; no image is left.
    """
    assumed = _categories_at_the_end(path)
    checked = _good_categories(path, assumed)
    reader = _Reader(path, folder, skips, number_images)
    coco: dict[str, Any] = {}
    table = None
    for key, value in walk(path):
        coco[key] = value
        if key == "images" and isinstance(value, Iterator):
            coco[key] = []
            reader.read_images(value)
        elif key == "annotations" and isinstance(value, Iterator):
            coco[key] = []
            known = _good_categories(path, coco["categories"]) if "categories" in coco else checked
            if known is not None and "images" in coco:
                assumed = coco.get("categories", assumed)
                table = reader.read_annotations(value, known, spool)
    check_lists(path, coco)
    categories = _check_categories(path, coco["categories"], skips)
    if table is None or coco["categories"] != assumed:
        for key, value in walk(path):
            if key == "annotations" and isinstance(value, Iterator):
                table = reader.read_annotations(value, categories, spool)
    table = table or AnnotationTable(spool)
    skips.entries += reader.annotation_skips.entries
    skips.repaired("annotations", table.repairs.elements())
    other = {**{key: value for key, value in coco.items() if key not in LISTS}, "categories": categories}
    renumber = "--number-images gives all images new ids, " if reader.has_foreign_ids else ""
    skips.refuse(path, f"; {renumber}--on-error skip leaves them out")
    if not reader.images:
        text = f"{path}: no image to pack"
        raise UserError(f"{text}: {describe_entries(skips.entries, path)}" if skips.entries else text)
    return CocoSource(path, file_sha256(path), list(reader.images.values()), table, other)


def _categories_at_the_end(path: Path) -> Any:
    """What seems to be the list of categories at the end of a file, where COCO has it; None if nothing does."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL))
            text = file.read().decode("utf-8", "ignore")
    except OSError:
        return None
    for match in reversed(list(_CATEGORIES.finditer(text))):
        try:
            return json.JSONDecoder().raw_decode(text, match.end() - 1)[0]
        except (ValueError, RecursionError):
            continue
    return None


def _good_categories(path: Path, categories: Any) -> list[dict[str, Any]] | None:
    """The categories, repaired; None where they are wrong, which is said later."""
    try:
        return _check_categories(path, categories, Skips(False)) if isinstance(categories, list) else None
    except UserError:
        return None


def _check_categories(path: Path, categories: list[Any], skips: Skips) -> list[dict[str, Any]]:
    """The categories, repaired.

    Raises:
        UserError: a category is not an object with an integer id and a name, or its id occurs twice. All are listed.
    """
    ids: set[int] = set()
    good = []
    faults = Skips(False)
    for index, record in enumerate(categories):
        category, repairs = repair_category(record)
        if not isinstance(category, dict) or not is_id(category.get("id")) or not is_name(category.get("name")):
            text = f"categories[{index}] is {record!r}, expected an integer id and a name"
            faults.add("bad_category", path, text)
        elif category["id"] in ids:
            text = f"category id {category['id']} occurs twice (categories[{index}])"
            faults.add("duplicate_category_id", path, text)
        else:
            ids.add(category["id"])
            good.append(category)
            skips.repaired("categories", repairs)
    faults.refuse(path, hint="")
    return good


def image_numbers(records: Iterable[Any]) -> dict[Any, int]:
    """The new ids under --number-images, by the old ones: positions in the file's list, from 1."""
    numbers: dict[Any, int] = {}
    for index, record in enumerate(records):
        note_number(record, index, numbers)
    return numbers


def note_number(record: Any, index: int, numbers: dict[Any, int]) -> None:
    """Enter the new id of the image at a position of the file's list, unless its old one has occurred."""
    old = record.get("id") if isinstance(record, dict) else None
    if can_be_numbered(old):
        numbers.setdefault(old, index + 1)


def number_record(record: Any, key: str, numbers: dict[Any, int]) -> Any:
    """A record with the new id of an image under `key`; the record itself if there is no new id.

    Args:
        record: an image (`key` "id", which keeps the old one as SOURCE_ID) or an annotation ("image_id").
        numbers: new image ids, as `image_numbers` gives them.
    """
    old = record.get(key) if isinstance(record, dict) else None
    if not can_be_numbered(old) or old not in numbers:
        return record
    return {**record, key: numbers[old], **({SOURCE_ID: old} if key == "id" else {})}


class _Reader:
    """Sorts records into good ones and entries of `skips`. The annotations of an image that is left out are too."""

    def __init__(self, path: Path, folder: Path, skips: Skips, number_images: bool) -> None:
        self.path, self.skips = path, skips
        self.annotation_skips = Skips(skips.skip)  # of the annotations, which may be read twice
        self._noted: list[int] = []  # positions in the source of its entries
        self.numbers: dict[Any, int] | None = {} if number_images else None  # new image ids by old ones
        self.images: dict[int, SourceImage] = {}  # the good ones by id, in the source's order
        self.has_foreign_ids = False  # images whose ids --number-images would replace
        self._has_folder = cache(lambda name: (folder / name).is_dir())
        self._left_out: dict[Any, dict[str, Any]] = {}  # entries of bad images, by the value of their id

    def read_images(self, records: Iterable[Any]) -> None:
        """Take the good image records. Of a repeated id the first is taken, or none if it names several files."""
        torn: dict[int, dict[str, Any]] = {}  # entries by ids that several files have
        repaired: dict[int, Sequence[str]] = {}  # repairs by id
        for index, original in enumerate(records):
            if self.numbers is not None:
                note_number(original, index, self.numbers)
                original = number_record(original, "id", self.numbers)
            record, repairs = repair_image(original, self._has_folder)
            fault = image_fault(record)
            if fault is None and record["id"] not in self.images:
                own = {intern(key): value for key, value in record.items()}  # the decoder makes keys anew each time
                self.images[record["id"]] = SourceImage(index, own)
                if self.numbers:
                    repairs = (*repairs, "id_numbered")
                if repairs:
                    repaired[record["id"]] = repairs
                continue
            image_id = record.get("id") if isinstance(record, dict) else None
            name = record.get("file_name") if isinstance(record, dict) else None
            where = f"images[{index}] (image id {image_id!r}, file {name!r})"
            if fault is not None:
                self.has_foreign_ids |= can_be_numbered(image_id) and not is_id(image_id)
                entry = self.skips.add("bad_image_record", self.path, f"{where}: {fault}", image_id, images=1)
                if isinstance(image_id, str | int | float) and image_id not in self.images:
                    self._left_out.setdefault(image_id, entry)
            elif record == self.images[record["id"]].record:
                self.skips.add(IDENTICAL, self.path, f"{where}: the same record occurs before it", image_id, images=1)
            else:
                text = f"{where}: an image with this id occurs before it"
                entry = self.skips.add("duplicate_image_id", self.path, text, image_id, images=1)
                if name != self.images[record["id"]].record["file_name"]:
                    torn.setdefault(record["id"], entry)
        for image_id, entry in torn.items():  # it is unknown which boxes belong to which file
            del self.images[image_id]
            repaired.pop(image_id, None)
            entry["images"] += 1
            self._left_out[image_id] = entry
        for repairs in repaired.values():
            self.skips.repaired("images", repairs)

    def read_annotations(
        self, records: Iterable[Any], categories: Sequence[dict[str, Any]], spool: Path
    ) -> AnnotationTable:
        """Put the good annotations into a table, in the source's order; anew each time.

        Args:
            records: the source's annotations.
            categories: good categories.
            spool: folder on whose disk the table lies.
        """
        names, category_ids = unique_names(categories), {category["id"] for category in categories}
        self.annotation_skips.entries, self._noted = [], []
        for entry in self._left_out.values():
            entry.pop("annotations", None)
        for image in self.images.values():
            image.num_annotations = 0
        table = AnnotationTable(spool)
        for index, original in enumerate(records):
            known = True
            if self.numbers is not None:
                numbered = number_record(original, "image_id", self.numbers)
                known, original = numbered is not original, numbered
            record, repairs = repair_annotation(original, names, category_ids)
            fault = annotation_fault(record, self.images if known else (), category_ids)
            if fault is not None:
                self._note(index, record, *fault)
                continue
            image = self.images[record["image_id"]]
            image.num_annotations += 1
            if not is_id(record.get("id")) and "id" in record:
                record = {**record, SOURCE_ID: record["id"]}
            table.add(index, image.source_index, record, repairs)
        by_source = {image.source_index: image for image in self.images.values()}
        for index, annotation_id, image_index in table.finish():
            image = by_source[image_index]
            image.num_annotations -= 1
            known_as = {"id": annotation_id, "image_id": image.record["id"]}
            self._note(index, known_as, IDENTICAL, "the same record occurs before it")
        entries = zip(self._noted, self.annotation_skips.entries, strict=True)
        self.annotation_skips.entries = [entry for _, entry in sorted(entries, key=itemgetter(0))]
        return table

    def _note(self, index: int, record: Any, reason: str, text: str) -> None:
        """List an annotation that is left out; if its image is left out too, in the entry of the image."""
        known = record if isinstance(record, dict) else {}
        image_id = known.get("image_id")
        if isinstance(image_id, str | int | float) and image_id in self._left_out:
            entry = self._left_out[image_id]
            entry["annotations"] = entry.get("annotations", 0) + 1
            return
        image = self.images.get(image_id) if isinstance(image_id, int) else None
        name = image.record["file_name"] if image else None
        which = f"annotation id {known.get('id')!r}, image id {image_id!r}, file {name!r}"
        self._noted.append(index)
        self.annotation_skips.add(reason, self.path, f"annotations[{index}] ({which}): {text}", image_id, annotations=1)
