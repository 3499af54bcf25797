"""A small set that tests write in each format, and what converting it said."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT))  # data_prep of this checkout

from data_prep.convert import main

WIDTH, HEIGHT = 120, 90


class Source:
    """A folder to be filled file by file, and the conversion of it."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.json, self._capsys = folder / "set", folder / "out" / "coco.json", capsys
        self.folder.mkdir()
        self.out = self.err = ""

    def write(self, path: str, content: str | bytes) -> Path:
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return target

    def image(self, path: str, orientation: int = 1, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Path:
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        if orientation != 1:
            exif[0x0112] = orientation
        Image.new("RGB", size).save(target, exif=exif)
        return target

    def convert(self, *more: str, source: str | Path = "", output: str = "") -> int:
        """Status of a conversion to `self.json`, or to `output` below its folder."""
        target = str(self.json.parent / output) if output else str(self.json)
        status = main([str(self.folder / source), "--output", target, "--overwrite", *more])
        self.out, self.err = self._capsys.readouterr()
        return status

    def good(self, *more: str, source: str | Path = "") -> dict[str, Any]:
        """The records of a conversion that must succeed."""
        assert self.convert(*more, source=source) == 0, self.err
        return self.coco()

    def coco(self, name: str = "") -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.json.parent / (name or self.json.name)).read_bytes())
        return found

    def bad(self, *more: str, source: str | Path = "") -> str:
        """The error of a conversion that must fail, without a file."""
        self.json.unlink(missing_ok=True)
        assert self.convert(*more, source=source) == 2, self.out
        assert not self.json.exists() and "Traceback" not in self.err
        return self.err


def boxes(coco: dict[str, Any]) -> list[tuple[str, str, list[float]]]:
    """File name, category and box of each object."""
    names = {image["id"]: image["file_name"] for image in coco["images"]}
    kinds = {category["id"]: category["name"] for category in coco["categories"]}
    return [(names[a["image_id"]], kinds[a["category_id"]], a["bbox"]) for a in coco["annotations"]]
