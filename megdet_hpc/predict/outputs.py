"""The folder that `megdet predict` leaves: results, pictures, counts, and the files that failed."""

from __future__ import annotations

import csv
import io
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megdet_hpc.errors import UserError, file_error
from megdet_hpc.evaluation.detections import DetectionTable
from megdet_hpc.evaluation.results import write_results
from megdet_hpc.files import atomic_write, write_json

PICTURES = "pictures"
RESULTS, IMAGES, TABLE, COUNTS, FAILED = "detections.json", "images.json", "detections.csv", "counts.csv", "failed.csv"
_UNFINISHED = ".megdet_predict"  # is there until the results are
_OURS = {PICTURES, RESULTS, IMAGES, TABLE, COUNTS, FAILED, _UNFINISHED}


@dataclass(frozen=True)
class Record:
    """What was found in a picture or in a frame of a video.

    Attributes:
        source: place of the file among the sources.
        frame: number of the frame; 0 of a picture.
        file_name: name of the file; of a frame with #NUMBER behind it.
        size: height and width [pixels].
        table: detections, their image ids of no meaning.
    """

    source: int
    frame: int
    file_name: str
    size: tuple[int, int]
    table: DetectionTable


def make_folder(output: Path, overwrite: bool) -> None:
    """Make the folder, or empty it of an earlier output.

    Raises:
        UserError: it holds an earlier output and may not be overwritten, holds anything else, or cannot be written.
    """
    with writing(output):
        held = {path.name for path in output.iterdir()} if output.exists() else set()
        ours = {RESULTS, IMAGES} <= held or _UNFINISHED in held  # a user's own folder may have one of these names
        if other := sorted(held - _OURS if ours else held):
            raise UserError(f"--output {output} holds {other[0]}, which is none of its results; name a new folder")
        if held and not overwrite:
            raise UserError(f"--output {output} holds earlier results; name a new folder, or give --overwrite")
        for name in held:
            path = output / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        output.mkdir(parents=True, exist_ok=True)
        (output / _UNFINISHED).touch()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an operating system's error into one line with the path that was written.

    Raises:
        UserError: disk full, no permission, a file in the way of a folder.
        MachineError: the file system failed.
    """
    try:
        yield
    except OSError as error:
        raise file_error(error, f"{path}: cannot be written ({error.strerror or error})") from error


def write_outputs(
    output: Path, records: Sequence[Record], faults: Sequence[tuple[str, str]], categories: list[dict[str, Any]]
) -> None:
    """Write all but the pictures.

    Args:
        output: folder.
        records: records of all pictures and frames, in the order of the sources.
        faults: file and reason of each that failed.
        categories: id and name of each.

    Raises:
        UserError: they cannot be written.
    """
    numbered = list(enumerate(records, start=1))
    images = [
        {"id": number, "file_name": record.file_name, "height": record.size[0], "width": record.size[1]}
        for number, record in numbered
    ]
    tables = [replace(record.table, image_ids=np.full(len(record.table), number)) for number, record in numbered]
    table = DetectionTable.joined(tables)
    names = {category["id"]: category["name"] for category in categories}
    files = {image["id"]: image["file_name"] for image in images}
    columns = (table.image_ids, table.category_ids, table.scores, table.boxes_xywh)
    rows = (
        (files[image], names[category], f"{score:.6f}", *(f"{side:.3f}" for side in box))
        for image, category, score, box in zip(*(column.tolist() for column in columns), strict=True)
    )
    with writing(output):
        # pycocotools' COCO(images.json).loadRes(detections.json) reads both
        write_json(output / IMAGES, {"images": images, "categories": categories, "annotations": []})
        write_results(output / RESULTS, table)
        _write_csv(output / TABLE, ("file", "category", "score", "x", "y", "width", "height"), rows)
        _write_csv(output / COUNTS, ("category", "objects", "pictures"), counts(records, names))
        if faults:
            _write_csv(output / FAILED, ("file", "reason"), faults)
        (output / _UNFINISHED).unlink(missing_ok=True)


def counts(records: Sequence[Record], names: dict[int, str]) -> list[tuple[str, int, int]]:
    """Name of each category, how many objects of it were found, and in how many pictures."""
    objects: Counter[int] = Counter()
    pictures: Counter[int] = Counter()
    for record in records:
        found = record.table.category_ids.tolist()
        objects.update(found)
        pictures.update(set(found))
    return [(name, objects[key], pictures[key]) for key, name in names.items()]


def _write_csv(path: Path, heading: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heading)
    writer.writerows(rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())
