"""Small sets in COCO's format, written file by file."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT))  # data_prep of this checkout

from data_prep.pack_coco import main


def scene(height: int = 90, width: int = 120) -> NDArray[np.uint8]:
    """A grey picture with a red box at [8, 10, 36, 27] and a blue one at [60, 42, 32, 26], x, y, width, height."""
    pixels = np.full((height, width, 3), 120, np.uint8)
    pixels[10:37, 8:44] = (220, 30, 30)
    pixels[42:68, 60:92] = (30, 30, 220)
    return pixels


SCENE_BOXES = ([8, 10, 36, 27], [60, 42, 32, 26])


def encoded(pixels: NDArray[Any], kind: str = "PNG", **options: Any) -> bytes:
    """An image file of these pixels."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def write_set(
    folder: Path, files: dict[str, bytes], sizes: dict[str, tuple[int, int]], names: dict[str, str] | None = None
) -> list[str]:
    """Write images and annotations; the packer's options for them, without --output.

    Args:
        folder: new, for images/ and annotations.json.
        files: by the path of each in images/.
        sizes: (width, height) that the annotations say, by the same paths; each gets the two boxes of `scene`.
        names: file_name in the annotations where it is another.
    """
    images, annotations = [], []
    for image_id, (path, (width, height)) in enumerate(sizes.items(), start=1):
        name = (names or {}).get(path, path)
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
        for category, box in enumerate(SCENE_BOXES, start=1):
            annotation = {"image_id": image_id, "category_id": category, "bbox": box, "area": box[2] * box[3]}
            annotations.append({"id": len(annotations) + 1, "iscrowd": 0, **annotation})
    (folder / "images").mkdir(parents=True)
    for path, data in files.items():
        (folder / "images" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "images" / path).write_bytes(data)
    categories = [{"id": 1, "name": "red"}, {"id": 2, "name": "blue"}]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(coco))
    return ["--annotations", str(folder / "annotations.json"), "--images", str(folder / "images")]


def pack(options: list[str], output: Path, *more: str) -> int:
    """Run the packer in this process; its exit status."""
    return main([*options, "--output", str(output), *more])


def summary(output: Path) -> dict[str, Any]:
    """The summary in a pack's manifest."""
    found: dict[str, Any] = json.loads((output / "manifest.json").read_bytes())["summary"]
    return found
