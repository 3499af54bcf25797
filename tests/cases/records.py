"""A small set whose annotation file a test changes, and the packer's answer to it."""

from __future__ import annotations

import copy
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT))  # data_prep of this checkout

from data_prep import pack_coco, verify_pack
from megdet_hpc.data.coco_json import rebuild_coco
from megdet_hpc.data.packed_coco import PackedCoco

WIDTH, HEIGHT = 120, 90
BOXES = ([8, 10, 36, 28], [60, 42, 32, 26], [12, 10, 36, 28], [60, 44, 32, 26])


class RecordSet:
    """Two images of 120 x 90 pixels with two boxes each, of the categories red and blue.

    Attributes:
        coco: the annotation file's content, to be changed before `pack`.
        source: what of it is packed where it is right: the same before any change.
        out, err: what the last command printed.
    """

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capsys = folder, capsys
        self.images, self.path, self.output = folder / "images", folder / "annotations.json", folder / "pack"
        self.images.mkdir()
        for name in ("im0.jpg", "im1.jpg"):
            Image.new("RGB", (WIDTH, HEIGHT), "gray").save(self.images / name)
        self.coco: dict[str, Any] = {
            "images": [{"id": k, "file_name": f"im{k - 1}.jpg", "width": WIDTH, "height": HEIGHT} for k in (1, 2)],
            "annotations": [
                {"id": k + 1, "image_id": 1 + k // 2, "category_id": 1 + k % 2, "bbox": box, "area": 9, "iscrowd": 0}
                for k, box in enumerate(BOXES)
            ],
            "categories": [{"id": 1, "name": "red"}, {"id": 2, "name": "blue"}],
        }
        self.source = copy.deepcopy(self.coco)
        self.out = self.err = ""

    def each(self, kind: str, **values: Any) -> None:
        """Give all records of a kind these values; a function of the old value makes the new one."""
        for record in self.coco[kind]:
            for key, value in values.items():
                record[key] = value(record[key]) if callable(value) else value

    def drop(self, kind: str, *keys: str) -> None:
        """Take keys out of all records of a kind."""
        for record in self.coco[kind]:
            for key in keys:
                record.pop(key, None)

    def write(self) -> None:
        """Write the annotation file."""
        self.path.write_text(json.dumps(self.coco))

    def command(self, *more: str) -> list[str]:
        """The packer's command line."""
        paths = ["--annotations", str(self.path), "--images", str(self.images), "--output", str(self.output)]
        return [*paths, "--overwrite", *more]

    def pack(self, *more: str) -> int:
        """Write the file and pack it; the exit status."""
        self.write()
        status = pack_coco.main(self.command(*more))
        self.out, err = self._capsys.readouterr()
        self.err = "\n".join(line for line in re.split(r"[\r\n]+", err) if line and "packing:" not in line)
        return status

    def verify(self) -> int:
        """Check the pack, and compare it with the annotation file; the exit status."""
        status = verify_pack.main([str(self.output), "--annotations", str(self.path)])
        self.out, self.err = self._capsys.readouterr()
        return status

    @property
    def summary(self) -> dict[str, Any]:
        """Of the manifest."""
        found: dict[str, Any] = json.loads((self.output / "manifest.json").read_bytes())["summary"]
        return found

    @property
    def rebuilt(self) -> dict[str, Any]:
        """The annotation file as the pack gives it back."""
        return rebuild_coco(PackedCoco(self.output))

    def printed(self, label: str) -> int:
        """The number that the summary shows behind a label."""
        found = re.search(rf"^{label} +([\d,]+)", self.out, re.MULTILINE)
        assert found, f"{label!r} is not in the summary:\n{self.out}"
        return int(found[1].replace(",", ""))
