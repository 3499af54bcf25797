"""Small sets for the tests of the scorer: four boxes an image, packed by the packer itself."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from megdet_hpc.data.batch import Batch
from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.evaluation.detections import DetectionTable
from megdet_hpc.models.detector import Detections
from tests.conftest import run

BOXES = ([8, 10, 36, 28], [60, 42, 32, 26], [70, 6, 24, 24], [10, 52, 26, 26])
SIZE = (120, 90)


def coco(
    image_ids: Sequence[int] = (1, 2),
    names: dict[int, str] | None = None,
    annotation_ids: Sequence[int] | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """Images with four boxes each, categories in turn; `fields` go into each annotation."""
    names = names or {1: "red", 2: "blue"}
    ids, boxes = list(names), []
    for image_id in image_ids:
        for place, box in enumerate(BOXES):
            number = annotation_ids[len(boxes)] if annotation_ids else len(boxes) + 1
            record = {"id": number, "image_id": image_id, "category_id": ids[place % len(ids)]}
            boxes.append({**record, "bbox": box, "area": box[2] * box[3], "iscrowd": 0, **fields})
    images = [{"id": i, "file_name": f"{i}.png", "width": SIZE[0], "height": SIZE[1]} for i in image_ids]
    categories = [{"id": key, "name": name} for key, name in names.items()]
    return {"images": images, "annotations": boxes, "categories": categories}


def pack(source: dict[str, Any], folder: Path) -> Path:
    """Write images and annotations and pack them as a user does; the packed folder."""
    (folder / "images").mkdir(parents=True)
    for image in source["images"]:
        pixels = np.random.default_rng(0).integers(0, 255, (image["height"], image["width"], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / image["file_name"])
    (folder / "annotations.json").write_text(json.dumps(source))
    command = [sys.executable, "data_prep/pack_coco.py", "--annotations", str(folder / "annotations.json")]
    packed = run([*command, "--images", str(folder / "images"), "--output", str(folder / "pack")])
    assert packed.returncode == 0, packed.stderr
    return folder / "pack"


def truth(packed: PackedCoco) -> DetectionTable:
    """Every box of a set, found."""
    parts = []
    for index, image_id in enumerate(packed.image_ids.tolist()):
        own = packed.annotations(index)
        ids = np.full(len(own.ids), image_id, dtype=np.int64)
        parts.append(DetectionTable(ids, own.boxes_xywh, np.full(len(ids), 0.9), own.category_ids))
    return DetectionTable.joined(parts)


class Perfect(nn.Module):
    """A detector that finds the boxes of every image, each with the label that it was trained under.

    Args:
        labels: of the four boxes.
    """

    def __init__(self, labels: Sequence[int]) -> None:
        super().__init__()
        self.labels = torch.tensor(labels)

    def detect(self, batch: Batch) -> list[Detections]:
        height, width = batch.sizes[0]
        scale = torch.tensor([width / SIZE[0], height / SIZE[1]]).repeat(2)
        boxes = torch.tensor(BOXES, dtype=torch.float32)
        boxes[:, 2:] += boxes[:, :2]
        return [Detections(boxes * scale, torch.full((len(boxes),), 0.9), self.labels)]
