"""Tells a set's format by its files, where they leave one answer only."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.formats.text_files import read_json, read_text, read_xml
from data_prep.formats.yolo import find_yaml
from data_prep.voc_layout import files_below
from megdet_hpc.errors import UserError

TRIED = 5  # files of one suffix that are looked into
_YOLO_LINE = re.compile(r"\d+(\s+-?[\d.,]+(e-?\d+)?){4,}$", re.IGNORECASE)
_DOTA_LINE = re.compile(r"(-?[\d.]+\s+){8}\S+(\s+[0-2])?$")
_DOTA_HEAD = re.compile(r"(imagesource|gsd)\s*:", re.IGNORECASE)


@dataclass(frozen=True)
class Guess:
    """A format, and the file that shows it, relative to the source."""

    format: str
    by: str


def detect(source: Path) -> Guess:
    """The format of a file or folder.

    Raises:
        UserError: none is known, or several may be meant.
    """
    if not source.exists():
        raise UserError(f"{source}: no such file or folder")
    found: dict[str, str] = {}
    for guess in _of_folder(source) if source.is_dir() else _of_file(source, source.name):
        found.setdefault(guess.format, guess.by)
    if "coco" in found and len(found) == 1:
        raise UserError(f"{source}: {found['coco']} is COCO's format already; pack it by python data_prep/pack_coco.py")
    found.pop("coco", None)
    if not found:
        raise UserError(f"{source}: no labels of a known format found; name it by --from, see --help for all")
    if len(found) > 1:
        shown = ", ".join(f"{name} ({by})" for name, by in found.items())
        raise UserError(f"{source}: may be of several formats: {shown}; name one by --from")
    return Guess(*next(iter(found.items())))


def _of_folder(folder: Path) -> Iterator[Guess]:
    yaml = find_yaml(folder)
    if yaml is not None:
        yield Guess("yolo", yaml.name)
    if (folder / "obj.data").is_file():
        yield Guess("yolo", "obj.data")
    suffixes = (".xml", ".json", ".csv", ".odgt", ".txt")
    tried: dict[str, int] = {}
    for path in files_below(folder, suffixes):
        suffix = path.suffix.lower()
        tried[suffix] = tried.get(suffix, 0) + 1
        known_yolo = yaml is not None and suffix == ".txt"
        if tried[suffix] <= TRIED and not known_yolo:
            yield from _of_file(folder / path, str(path))


def _of_file(path: Path, by: str) -> Iterator[Guess]:
    """The formats that a file may be of; none where it cannot be read."""
    try:
        yield from _KINDS.get(path.suffix.lower(), lambda path, by: iter(()))(path, by)
    except UserError:
        return


def _xml(path: Path, by: str) -> Iterator[Guess]:
    kinds = {"annotation": "voc", "annotations": "cvat"}
    if (kind := kinds.get(read_xml(path).tag)) is not None:
        yield Guess(kind, by)


def _json(path: Path, by: str) -> Iterator[Guess]:
    value: Any = read_json(path)
    if isinstance(value, dict):
        if isinstance(value.get("shapes"), list):
            yield Guess("labelme", by)
        elif isinstance(value.get("images"), list) and "categories" in value:
            yield Guess("coco", by)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        first = value[0]
        if isinstance(first.get("data"), dict) or ("annotator" in first and "id" in first) or "completions" in first:
            yield Guess("labelstudio", by)


def _csv(path: Path, by: str) -> Iterator[Guess]:
    with open(path, "rb") as file:
        head = file.readline(2000).decode("utf-8-sig", "replace")
    if {"ImageID", "LabelName", "XMin"} <= set(re.split(r"[,;\t\s]+", head)):
        yield Guess("openimages", by)


def _odgt(path: Path, by: str) -> Iterator[Guess]:
    yield Guess("crowdhuman", by)


def _txt(path: Path, by: str) -> Iterator[Guess]:
    lines = [line.strip() for line in read_text(path).splitlines()[:20] if line.strip()]
    if lines and all(_YOLO_LINE.match(line) for line in lines):
        yield Guess("yolo", by)
    elif lines and (_DOTA_HEAD.match(lines[0]) or all(_DOTA_LINE.match(line) for line in lines)):
        yield Guess("dota", by)
    elif lines and lines[0].startswith("{") and "gtboxes" in lines[0]:
        yield Guess("crowdhuman", by)


def _yaml(path: Path, by: str) -> Iterator[Guess]:
    yield Guess("yolo", by)


_KINDS = {
    ".xml": _xml,
    ".json": _json,
    ".csv": _csv,
    ".odgt": _odgt,
    ".txt": _txt,
    ".yaml": _yaml,
    ".yml": _yaml,
    ".data": _yaml,
}
