"""COCO results files: detections of this program or of another, as JSON."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megdet_hpc.data.masks import Rle, mask_box, rle_of
from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.errors import UserError, file_error
from megdet_hpc.evaluation.detections import DetectionTable, objects
from megdet_hpc.files import atomic_write

RESULTS, RAW_RESULTS = "detections.json", "detections_raw.json"
"""Results files in a run's folder: of its weights, or of the averaged ones where it has any; of the raw ones beside
those."""
_LARGEST = 1e300
_EXPECTED = '[{"image_id": 1, "category_id": 1, "bbox": [x, y, width, height], "score": 0.9}, ...]'


def write_results(path: Path, detections: DetectionTable | NDArray[np.float64]) -> None:
    """Write detections as a COCO results JSON, which the original annotation file's loadRes accepts.

    A mask is written beside the box, as `segmentation` in compressed RLE.

    Raises:
        OSError: disk full, no permission; an older file stays as it was.
    """
    with atomic_write(path) as file:
        file.write(json.dumps(result_rows(detections)).encode())


def result_rows(detections: DetectionTable | NDArray[np.float64]) -> list[dict[str, Any]]:
    """The rows of a COCO results file."""
    found = DetectionTable.of(detections)
    columns = (found.image_ids, found.category_ids, found.boxes_xywh, found.scores)
    rows: list[dict[str, Any]] = [
        {
            "image_id": image_id,
            "category_id": category_id,
            "bbox": [round(value, 3) for value in box],
            "score": round(score, 6),
        }
        for image_id, category_id, box, score in zip(*(column.tolist() for column in columns), strict=True)
    ]
    if found.masks is not None:
        for row, mask in zip(rows, found.masks, strict=True):
            row["segmentation"] = {"size": mask["size"], "counts": mask["counts"].decode("ascii")}
    return rows


@dataclass(frozen=True)
class _Set:
    """What a row is checked against."""

    directory: Path
    sizes: dict[int, tuple[int, int]]
    """(height, width) by image id."""
    categories: set[int]

    @classmethod
    def of(cls, pack: PackedCoco) -> _Set:
        """What is known of a set."""
        sizes = zip(pack.heights.tolist(), pack.widths.tolist(), strict=True)
        categories = {int(category["id"]) for category in pack.categories}
        return cls(pack.directory, dict(zip(pack.image_ids.tolist(), sizes, strict=True)), categories)


def read_results(path: Path, pack: PackedCoco | None) -> DetectionTable:
    """The detections of a COCO results file, checked against the set that they are to be scored on.

    Rows have boxes, masks or both; the box of a row without one is that around its mask. Either every row has a mask or
    none has.

    Args:
        path: file to read.
        pack: the set; None: it is not known, so any ids are accepted, each row needs a box, and masks are not read.

    Raises:
        UserError: unreadable, no list, or a row that cannot be scored; names the first such row and how many there are.
        MachineError: the file system failed.
    """
    try:
        rows = json.loads(path.read_bytes())
    except OSError as error:
        raise file_error(error, f"results {path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"results {path}: not valid JSON ({error})") from error
    if not isinstance(rows, list):
        raise UserError(f"results {path}: holds {_kind(rows)}, expected a list of detections: {_EXPECTED}")
    known = None if pack is None else _Set.of(pack)
    with_masks = known is not None and any(isinstance(row, dict) and bool(row.get("segmentation")) for row in rows)
    masks: list[Rle] = []
    faults: list[tuple[int, str]] = []
    for index, row in enumerate(rows):
        try:
            _check(row, known, with_masks=with_masks)
            if with_masks and known is not None:
                masks.append(_mask(row, known))
        except ValueError as error:
            faults.append((index, str(error)))
    if faults:
        index, fault = faults[0]
        count = f"; {len(faults)} of {len(rows)} rows cannot be scored" if len(faults) > 1 else ""
        raise UserError(f"results {path}: row {index} (of {len(rows)}, the first is 0): {fault}{count}")
    boxes = [row["bbox"] if "bbox" in row else mask_box(masks[index]) for index, row in enumerate(rows)]
    return DetectionTable(
        np.array([row["image_id"] for row in rows], dtype=np.int64),
        np.array(boxes, dtype=np.float64).reshape(-1, 4),
        np.array([row["score"] for row in rows], dtype=np.float64),
        np.array([row["category_id"] for row in rows], dtype=np.int64),
        objects(masks) if with_masks else None,
    )


def _mask(row: dict[str, Any], known: _Set) -> Rle:
    """The mask of a row that is right in all else; raises ValueError."""
    height, width = known.sizes[row["image_id"]]
    try:
        mask = rle_of(row.get("segmentation"), height, width)
    except ValueError as error:
        raise ValueError(f"its segmentation {error}") from None
    if mask is None:
        raise ValueError("has no segmentation, but others have one; give every row one, or none")
    return mask


def _kind(value: object) -> str:
    if isinstance(value, dict):
        keys = ", ".join(map(repr, list(value)[:5]))
        return f"an object with the keys {keys}" if keys else "an empty object"
    return f"a {type(value).__name__}"


def _is_number(value: object) -> bool:
    """Finite, and no integer beyond float64; NaN fails the comparison."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _check(row: Any, known: _Set | None, *, with_masks: bool) -> None:
    """Raise ValueError for what keeps a row from being used, its mask left aside."""
    if not isinstance(row, dict):
        raise ValueError(f"is {row!r:.80}, expected an object as in {_EXPECTED}")
    for key in ("image_id", "category_id"):
        if key not in row:
            raise ValueError(f"has no {key!r}")
        if not isinstance(row[key], int) or isinstance(row[key], bool):
            raise ValueError(f"{key} is {row[key]!r:.80}, expected an integer")
    if known is not None and row["image_id"] not in known.sizes:
        ids = f"its {len(known.sizes)} images: {_some(known.sizes)}"
        raise ValueError(f"image_id is {row['image_id']}, which {known.directory} has not; {ids}")
    if known is not None and row["category_id"] not in known.categories:
        ids = f"its categories: {_some(known.categories)}"
        raise ValueError(f"category_id is {row['category_id']}, which {known.directory} has not; {ids}")
    if "bbox" not in row and not with_masks:
        raise ValueError("has no 'bbox', nor a segmentation")
    box = row.get("bbox", [0, 0, 0, 0])
    if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box)) and min(box[2:]) >= 0):
        raise ValueError(f"bbox is {box!r:.80}, expected 4 finite numbers: x, y, width >= 0, height >= 0")
    if "score" not in row:
        raise ValueError("has no 'score'; is this a file of annotations?")
    if not _is_number(row["score"]):
        raise ValueError(f"score is {row['score']!r:.80}, expected a finite number")


def _some(ids: Collection[int]) -> str:
    shown = ", ".join(map(str, sorted(ids)[:5]))
    return f"{shown}, ..." if len(ids) > 5 else shown
