"""Reads an annotation file, repairs records with only one possible meaning, and checks every record."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from data_prep.annotation_file import load_annotations
from data_prep.record_faults import annotation_fault, can_be_numbered, image_fault, is_name
from data_prep.repairs import SOURCE_ID, name_from_url, repair_annotation, repair_category, repair_image, unique_names
from data_prep.skips import IDENTICAL, Skips, describe_entries, is_id
from megdet_hpc.errors import UserError


@dataclass
class SourceImage:
    """One image record with its annotations, each with its position in the source's list."""

    source_index: int
    record: dict[str, Any]
    annotations: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    path: str = ""  # of its file, relative to the image folder; find_images sets it
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


def read_source(path: Path, folder: Path, skips: Skips, number_images: bool = False) -> CocoSource:
    """Read an annotation file, repair it (`repairs`) and check every record of it.

    Args:
        path: COCO instances JSON, compressed by gzip or not.
        folder: image folder, in which only the subfolders of a coco_url are looked for.
        skips: list of bad records and count of repairs. If bad records are not skipped, all together end the run.
        number_images: whether images get new ids, 1, 2, ... in the file's order.

    Raises:
        UserError: the file is unreadable or not JSON; a top-level list or the category list is missing or wrong (never
            skipped); there are bad records that `skips` does not leave out; no image is left.
    """
    coco, sha256 = load_annotations(path)
    records, annotations = coco.pop("images"), coco.pop("annotations")
    coco["categories"] = _check_categories(path, coco["categories"], skips)
    numbers = image_numbers(records) if number_images else None
    reader = _Reader(path, skips, {category["id"] for category in coco["categories"]}, numbers)
    reader.read_images(records, _subfolders(records, folder))
    reader.read_annotations(annotations, unique_names(coco["categories"]))
    renumber = "--number-images gives all images new ids, " if reader.has_foreign_ids else ""
    skips.refuse(path, f"; {renumber}--on-error skip leaves them out")
    if not reader.images:
        text = f"{path}: no image to pack"
        raise UserError(f"{text}: {describe_entries(skips.entries, path)}" if skips.entries else text)
    return CocoSource(path, sha256, list(reader.images.values()), coco)


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


def _subfolders(records: Sequence[Any], folder: Path) -> dict[str, bool]:
    """Whether the image folder has each of the subfolders that coco_urls end in."""
    named = (name_from_url(record) for record in records if isinstance(record, dict))
    return {name: (folder / name).is_dir() for name in {pair[0] for pair in named if pair} if name}


def image_numbers(records: Sequence[Any]) -> dict[Any, int]:
    """The new ids under --number-images, by the old ones: positions in the file's list, from 1."""
    numbers: dict[Any, int] = {}
    for index, record in enumerate(records, start=1):
        old = record.get("id") if isinstance(record, dict) else None
        if can_be_numbered(old):
            numbers.setdefault(old, index)
    return numbers


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

    def __init__(self, path: Path, skips: Skips, category_ids: set[int], numbers: dict[Any, int] | None) -> None:
        self.path, self.skips, self.category_ids = path, skips, category_ids
        self.numbers = numbers  # new image ids by old ones; None if ids stay
        self.images: dict[int, SourceImage] = {}  # the good ones by id, in the source's order
        self.has_foreign_ids = False  # images whose ids --number-images would replace
        self._left_out: dict[Any, dict[str, Any]] = {}  # entries of bad images, by the value of their id

    def read_images(self, records: Sequence[Any], folders: dict[str, bool]) -> None:
        """Take the good image records. Of a repeated id the first is taken, or none if it names several files."""
        torn: dict[int, dict[str, Any]] = {}  # entries by ids that several files have
        for index, original in enumerate(records):
            if self.numbers is not None:
                original = number_record(original, "id", self.numbers)
            record, repairs = repair_image(original, folders)
            fault = image_fault(record)
            if fault is None and record["id"] not in self.images:
                self.images[record["id"]] = SourceImage(index, record)
                self.skips.repaired("images", repairs)
                self.skips.repaired("images", ["id_numbered"] if self.numbers else [])
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
            entry["images"] += 1
            self._left_out[image_id] = entry

    def read_annotations(self, records: Sequence[Any], names: dict[str, int]) -> None:
        """Give each image its good annotations, in the source's order."""
        seen: dict[int, dict[str, Any]] = {}
        without_id: list[tuple[list[tuple[int, dict[str, Any]]], int]] = []  # where in an image's list
        for index, original in enumerate(records):
            known = True
            if self.numbers is not None:
                numbered = number_record(original, "image_id", self.numbers)
                known, original = numbered is not original, numbered
            record, repairs = repair_annotation(original, names, self.category_ids)
            fault = annotation_fault(record, self.images if known else (), self.category_ids)
            if fault is not None:
                self._note(index, record, *fault)
                continue
            of_image = self.images[record["image_id"]].annotations
            if not is_id(record.get("id")):
                without_id.append((of_image, len(of_image)))
            elif (first := seen.setdefault(record["id"], record)) is not record and first == record:
                self._note(index, record, IDENTICAL, "the same record occurs before it")
                continue
            of_image.append((index, record))
            self.skips.repaired("annotations", repairs)
        free = (number for number in count(1) if number not in seen)
        for of_image, place in without_id:
            index, record = of_image[place]
            old = {SOURCE_ID: record["id"]} if "id" in record else {}
            of_image[place] = (index, {**record, "id": next(free), **old})
            self.skips.repaired("annotations", ("id_given",))

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
        self.skips.add(reason, self.path, f"annotations[{index}] ({which}): {text}", image_id, annotations=1)
