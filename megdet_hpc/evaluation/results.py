"""COCO results files: detections as JSON, of this program or of another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.errors import MachineError, UserError, is_machine_fault
from megdet_hpc.evaluation.detections import DetectionTable
from megdet_hpc.files import atomic_write

_LARGEST = 1e300
_EXPECTED = '[{"image_id": 1, "category_id": 1, "bbox": [x, y, width, height], "score": 0.9}, ...]'


def write_results(path: Path, detections: DetectionTable | NDArray[np.float64]) -> None:
    """Write detections as a COCO results JSON, which the original annotation file's loadRes accepts.

    Raises:
        OSError: disk full, no permission; an older file stays as it was.
    """
    found = DetectionTable.of(detections)
    columns = (found.image_ids, found.category_ids, found.boxes_xywh, found.scores)
    rows = [
        {
            "image_id": image_id,
            "category_id": category_id,
            "bbox": [round(value, 3) for value in box],
            "score": round(score, 6),
        }
        for image_id, category_id, box, score in zip(*(column.tolist() for column in columns), strict=True)
    ]
    with atomic_write(path) as file:
        file.write(json.dumps(rows).encode())


def read_results(path: Path, pack: PackedCoco) -> DetectionTable:
    """The boxes of a COCO results file, checked against the set that they are to be scored on.

    Raises:
        UserError: unreadable, no list, or a row that cannot be scored; names the first such row and how many there are.
        MachineError: the file system failed.
    """
    try:
        rows = json.loads(path.read_bytes())
    except OSError as error:
        kind = MachineError if is_machine_fault(error) else UserError
        raise kind(f"results {path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"results {path}: not valid JSON ({error})") from error
    if not isinstance(rows, list):
        raise UserError(f"results {path}: holds {_kind(rows)}, expected a list of boxes: {_EXPECTED}")
    images = set(pack.image_ids.tolist())
    categories = {int(category["id"]) for category in pack.categories}
    faults = [(index, fault) for index, row in enumerate(rows) if (fault := _fault(row, images, categories, pack))]
    if faults:
        index, fault = faults[0]
        count = f"; {len(faults)} of {len(rows)} rows cannot be scored" if len(faults) > 1 else ""
        raise UserError(f"results {path}: row {index} (of {len(rows)}, the first is 0): {fault}{count}")
    return DetectionTable(
        np.array([row["image_id"] for row in rows], dtype=np.int64),
        np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(-1, 4),
        np.array([row["score"] for row in rows], dtype=np.float64),
        np.array([row["category_id"] for row in rows], dtype=np.int64),
    )


def _kind(value: object) -> str:
    if isinstance(value, dict):
        keys = ", ".join(map(repr, list(value)[:5]))
        return f"an object with the keys {keys}" if keys else "an empty object"
    return f"a {type(value).__name__}"


def _is_number(value: object) -> bool:
    """Finite, and no integer beyond float64; NaN fails the comparison."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _fault(row: Any, images: set[int], categories: set[int], pack: PackedCoco) -> str:
    """What keeps a row from being scored; "" for nothing."""
    if not isinstance(row, dict):
        return f"is {row!r:.80}, expected an object as in {_EXPECTED}"
    for key in ("image_id", "category_id"):
        if key not in row:
            return f"has no {key!r}"
        if not isinstance(row[key], int) or isinstance(row[key], bool):
            return f"{key} is {row[key]!r:.80}, expected an integer"
    if row["image_id"] not in images:
        return (
            f"image_id is {row['image_id']}, which {pack.directory} has not; its {len(images)} images: {_some(images)}"
        )
    if row["category_id"] not in categories:
        ids = _some(categories)
        return f"category_id is {row['category_id']}, which {pack.directory} has not; its categories: {ids}"
    if "bbox" not in row:
        hint = "; it has a segmentation, but boxes are scored" if "segmentation" in row else ""
        return f"has no 'bbox'{hint}"
    box = row["bbox"]
    if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box)) and min(box[2:]) >= 0):
        return f"bbox is {box!r:.80}, expected 4 finite numbers: x, y, width >= 0, height >= 0"
    if "score" not in row:
        return "has no 'score'; is this a file of annotations?"
    if not _is_number(row["score"]):
        return f"score is {row['score']!r:.80}, expected a finite number"
    return ""


def _some(ids: set[int]) -> str:
    shown = ", ".join(map(str, sorted(ids)[:5]))
    return f"{shown}, ..." if len(ids) > 5 else shown
