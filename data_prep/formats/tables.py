"""Reads Open Images' CSV, CrowdHuman's odgt and DOTA's text labels."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

from data_prep.formats.image_index import ImageIndex
from data_prep.formats.labels import SPLITS, FileFault, LabelledImage, LabelSet, Shape, Wanted, split_of
from data_prep.formats.text_files import flag, number, read_text
from data_prep.voc_layout import files_below
from megdet_hpc.errors import UserError

LEEWAY = 0.01  # beyond 0..1
OPEN_IMAGES = ("ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax")
KEPT_FLAGS = {"IsOccluded": "occluded", "IsTruncated": "truncated", "IsDepiction": "depiction", "IsInside": "inside"}
CLASS_NAMES = "*class-descriptions*.csv"
CROWDHUMAN_BOXES = {"full": "fbox", "visible": "vbox", "head": "hbox"}
SHOWN = 3


def _part(path: Path) -> str:
    """The part of a set that a file's name or folder says; "" for none."""
    words = path.stem.lower().replace("-", "_").split("_")
    return next((word for word in words if word in SPLITS), "") or split_of(f"{path.parent.name}/x")


class _Images:
    """Images of a set by their id, as far as they are in the image folder; the others are counted, not kept.

    Args:
        index: the folder's files.
        suffixes: endings that make a name of an id.
    """

    def __init__(self, index: ImageIndex) -> None:
        self.stems: dict[str, list[Path]] = {}
        for path in index.files:
            self.stems.setdefault(path.stem, []).append(index.folder / path)
        self.folder = index.folder
        self.found: dict[tuple[str, str], LabelledImage] = {}
        self.missing: dict[str, Counter[str]] = {}  # number of objects by id, by file

    def get(self, identity: str, where: str, split: str, unit: str) -> LabelledImage | None:
        """The image of an id; None where it is missing."""
        if (image := self.found.get((split, identity))) is not None:
            return image
        if len(paths := self.stems.get(identity, [])) != 1:
            if len(paths) > 1:
                shown = ", ".join(path.name for path in paths[:SHOWN])
                raise UserError(f"{self.folder}: several images may be {identity!r}: {shown}")
            return None
        image = LabelledImage(where, paths[0].name, [], paths[0], unit=unit, split=split)
        self.found[split, identity] = image
        return image

    def miss(self, identity: str, file: str, objects: int) -> None:
        self.missing.setdefault(file, Counter())[identity] += objects

    def faults(self, splits: dict[str, str]) -> list[FileFault]:
        """One for each file with images that are missing."""
        faults = []
        for file, missing in self.missing.items():
            shown = ", ".join(list(missing)[:SHOWN])
            text = f"{len(missing):,} of its images are not in {self.folder}, the first are {shown}"
            faults.append(FileFault("missing_image", file, text, splits[file], len(missing), sum(missing.values())))
        return faults


def _class_names(path: Path) -> dict[str, str]:
    """Names by label, of a file with or without a header."""
    try:
        rows = [row for row in csv.reader(io.StringIO(read_text(path))) if row]
    except (UserError, csv.Error) as error:
        raise UserError(f"{path}: {error}") from error
    if any(len(row) != 2 for row in rows):
        raise UserError(
            f"{path}: line {next(n for n, row in enumerate(rows, 1) if len(row) != 2)}: expected label, name"
        )
    return {label: name.strip() for label, name in rows if label != "LabelName"}


def read_open_images(wanted: Wanted) -> LabelSet:
    """Boxes of Open Images.

    Args:
        wanted: a CSV file of boxes, or a folder with those of several parts. The file of class names is looked for
            beside it.

    Raises:
        UserError: no such file, or one without the columns.
    """
    source = wanted.source
    files = [source]
    if source.is_dir():
        files = [path for path in sorted(source.glob("*.csv")) if {*OPEN_IMAGES} <= set(_columns(path))]
    if not files:
        raise UserError(f"{source}: no CSV file with the columns {', '.join(OPEN_IMAGES)}")
    described = [wanted.class_names] if wanted.class_names else sorted(wanted.root.glob(CLASS_NAMES))
    if len(described) > 1:
        raise UserError(f"{wanted.root}: several files of class names: name one by --class-names")
    names = _class_names(described[0]) if described else {}
    result = LabelSet([], list(dict.fromkeys(names.values())) or None)
    result.notes.append(
        f"names of {len(names)} classes: {described[0].name}" if described else "no file of class names"
    )
    images = _Images(ImageIndex(wanted.images or wanted.root))
    splits = {wanted.relative(path): _part(path) if len(files) > 1 else "" for path in files}
    for path in files:
        _read_boxes(path, wanted.relative(path), splits[wanted.relative(path)], names, images)
    result.images, result.faults = list(images.found.values()), images.faults(splits)
    return result


def _delimiter(path: Path) -> str:
    with open(path, "rb") as file:
        head = file.readline(4000).decode("utf-8-sig", "replace")
    return max(",;\t", key=head.count)


def _columns(path: Path) -> list[str]:
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        return [name.strip() for name in next(csv.reader(file, delimiter=_delimiter(path)), [])]


def _read_boxes(path: Path, where: str, split: str, names: dict[str, str], images: _Images) -> None:
    """Put the boxes of one file on the images that are there."""
    if missing := [name for name in OPEN_IMAGES if name not in (columns := _columns(path))]:
        raise UserError(f"{path}: no column {', '.join(missing)}; it has {', '.join(columns[:12])}")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=_delimiter(path), strict=True)
            next(reader)
            place = {name: column for column, name in enumerate(columns)}
            for row in reader:
                if not row:
                    continue
                line = f"line {reader.line_num}"
                if len(row) < len(columns):
                    raise UserError(
                        f"{path}: {line}: {len(row)} columns, expected {len(columns)}; is the file cut off?"
                    )
                identity = row[place["ImageID"]].strip()
                image = images.get(identity, where, split, "fraction")
                if image is None:
                    images.miss(identity, where, 1)
                    continue
                try:
                    image.shapes.append(_open_box(row, place, line, names))
                except UserError as error:
                    image.faults.append(f"{line}: {error}")
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: line {reader.line_num + 1}: not valid CSV in UTF-8 ({error})") from error


def _open_box(row: list[str], place: dict[str, int], line: str, names: dict[str, str]) -> Shape:
    label = row[place["LabelName"]].strip()
    if not label:
        raise UserError("has no label")
    if names and label not in names:
        raise UserError(f"the label {label!r} is not in the file of class names")
    left, right, top, bottom = (number(row[place[key]], key) for key in ("XMin", "XMax", "YMin", "YMax"))
    for value in (left, right, top, bottom):
        if not -LEEWAY <= value <= 1 + LEEWAY:
            raise UserError(f"{value:g} is beyond 0..1, the fractions of width and height")
    made = Shape(names.get(label, label), line, "box", [(left, top), (right, bottom)])
    made.ignored = "IsGroupOf" in place and flag(row[place["IsGroupOf"]])
    made.extra = {key: 1 for column, key in KEPT_FLAGS.items() if column in place and flag(row[place[column]])}
    if made.ignored:
        made.extra["group_of"] = 1
    return made


def read_crowdhuman(wanted: Wanted) -> LabelSet:
    """CrowdHuman's file: a JSON object of an image in each line.

    A box of the tag `mask` and one whose attributes say `ignore` mark a region to ignore.

    Args:
        wanted: an odgt file, or a folder with those of several parts.
    """
    source = wanted.source
    files = sorted(source.glob("*.odgt")) if source.is_dir() else [source]
    if not files:
        raise UserError(f"{source}: no file *.odgt")
    images = _Images(ImageIndex(wanted.images or wanted.root))
    splits = {wanted.relative(path): _part(path) if len(files) > 1 else "" for path in files}
    result = LabelSet([], notes=[f"boxes of CrowdHuman: {wanted.box} ({CROWDHUMAN_BOXES[wanted.box]})"])
    for path in files:
        where = wanted.relative(path)
        try:
            text = read_text(path)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        for line, record in enumerate(text.splitlines(), start=1):
            if record.strip():
                try:
                    _read_people(record, f"{where} line {line}", where, splits[where], wanted.box, images)
                except UserError as error:
                    result.faults.append(FileFault("bad_record", f"{where} line {line}", str(error), splits[where]))
    result.images = list(images.found.values())
    result.faults += images.faults(splits)
    return result


def _read_people(record: str, where: str, file: str, split: str, box: str, images: _Images) -> None:
    try:
        value = json.loads(record)
    except ValueError as error:
        raise UserError(f"not valid JSON ({error})") from error
    if not isinstance(value, dict) or not isinstance(value.get("gtboxes"), list) or not value.get("ID"):
        raise UserError("expected an object with ID and gtboxes")
    identity = str(value["ID"])
    if (split, identity) in images.found:
        raise UserError(f"the image {identity!r} occurs before it")
    image = images.get(identity, where, split, "pixel")
    if image is None:
        images.miss(identity, file, len(value["gtboxes"]))
        return
    for place, person in enumerate(value["gtboxes"]):
        try:
            if (made := _person(person, f"gtboxes[{place}]", box)) is None:
                image.left_out[f"people without a box of the kind {box!r} left out"] += 1
            else:
                image.shapes.append(made)
        except UserError as error:
            image.faults.append(f"gtboxes[{place}]: {error}")


def _person(person: Any, where: str, box: str) -> Shape | None:
    """One box; None where there is none of this kind."""
    if not isinstance(person, dict):
        raise UserError(f"is a {type(person).__name__}, expected an object")
    tag = str(person.get("tag") or "person")
    mask = tag == "mask"
    values = person.get(CROWDHUMAN_BOXES[box], person.get("fbox") if mask else None)
    if values is None:
        return None
    if not isinstance(values, list) or len(values) != 4:
        raise UserError(f"its box is {values!r:.40}, expected x, y, width, height")
    x, y, width, height = (number(value, "a number of its box") for value in values)
    attributes = [person.get("extra"), person.get("head_attr") if box == "head" else None]
    made = Shape("person" if mask else tag, where, "box", [(x, y), (x + width, y + height)])
    made.ignored = mask or any(isinstance(found, dict) and flag(found.get("ignore", 0)) for found in attributes)
    return made


def read_dota(wanted: Wanted) -> LabelSet:
    """DOTA's labels: a text file an image, a line an object of four corners, a category and how difficult it is."""
    source = wanted.annotations or wanted.source
    files = [Path(file) for file in files_below(source, (".txt",))] if source.is_dir() else [Path(source.name)]
    top = source if source.is_dir() else source.parent
    result = LabelSet([])
    parts = {split_of(str(file)) for file in files}
    for file in files:
        split = split_of(str(file)) if "" not in parts else ""
        image = LabelledImage(str(file), file.stem, [], split=split)
        try:
            for line, text in enumerate(read_text(top / file).splitlines(), start=1):
                words = text.split()
                if not words or (":" in words[0] and len(words) < 8):  # imagesource:..., gsd:...
                    continue
                try:
                    image.shapes.append(_quadrilateral(words, f"line {line}"))
                except UserError as error:
                    image.faults.append(f"line {line}: {error}")
            result.images.append(image)
        except UserError as error:
            result.faults.append(FileFault("bad_file", str(file), str(error), split))
    if not files:
        raise UserError(f"{source}: no file *.txt of DOTA")
    return result


def _quadrilateral(words: list[str], where: str) -> Shape:
    if len(words) not in (9, 10):
        raise UserError(f"{len(words)} words, expected 8 numbers, a category and 0, 1 or 2 for difficult")
    values = [number(word, f"number {place}") for place, word in enumerate(words[:8], start=1)]
    corners = list(zip(values[::2], values[1::2], strict=True))
    made = Shape(words[8], where, "quadrilateral", corners)
    if len(words) == 10:
        if words[9] not in ("0", "1", "2"):
            raise UserError(f"difficult is {words[9]!r:.40}, expected 0, 1 or 2")
        made.ignored, made.extra = words[9] != "0", {"difficult": int(words[9] != "0")}
    return made
