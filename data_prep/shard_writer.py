"""Checks the images of one shard and writes it; runs in worker processes and MPI ranks."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from data_prep.annotation_table import Annotations
from data_prep.coco_source import SourceImage, places
from data_prep.image_faults import add_image_fault
from data_prep.image_files import (
    TOO_LARGE,
    BadImageError,
    ImageRules,
    check_image,
    open_ahead,
    read_image,
    value_changes,
)
from data_prep.skips import Skips
from megdet_hpc.data.shard_format import (
    ANNOTATION_COLUMNS,
    FORMAT_NAME,
    FORMAT_VERSION,
    IMAGE_COLUMNS,
    IMAGE_KEYS,
    Blob,
    encode_json,
    file_position,
    image_segmentation_crc32,
    shard_name,
)
from megdet_hpc.errors import UserError
from megdet_hpc.files import file_sha256, publish_file, write_json

DIGEST_BATCH = 2**20  # bytes given to the hashing thread at a time, for which it needs half a millisecond
LATE_COLUMNS = ("crc32", "encoding")  # known only after an image is read


@dataclass(frozen=True)
class ShardTask:
    """Everything that a worker needs to write shard `index`."""

    index: int
    folder: Path  # shards are written here, their reports under resume/
    image_folder: Path
    source_sha256: str
    skip: bool
    rules: ImageRules
    images: list[SourceImage]
    annotations: Annotations  # of these images

    def inputs_sha256(self) -> str:
        """A hash of the images' names, sizes and change times, which tells whether an earlier run had the same."""
        inputs = [[i.source_index, i.path, i.file_bytes, i.file_mtime_ns] for i in self.images]
        return hashlib.sha256(encode_json([self.source_sha256, inputs])).hexdigest()


class _Layout(NamedTuple):
    """Positions in a shard's file of the parts that depend on the images' bytes [bytes]."""

    begin: int  # of the images' bytes
    end: int
    columns: dict[str, int]  # "crc32" and "encoding", which come behind


class _Digests:
    """The SHA-256 of a file and the CRC-32 of its images, computed in another thread."""

    def __init__(self, pool: Executor) -> None:
        self.sha256 = hashlib.sha256()
        self._pool = pool
        self._batch: list[bytes] = []
        self._batch_bytes = 0
        self._futures: list[Future[list[int]]] = []

    def _run(self, batch: list[bytes]) -> list[int]:
        for data in batch:
            self.sha256.update(data)  # releases Python's lock, as crc32 does
        return [zlib.crc32(data) for data in batch]

    def add(self, data: bytes) -> None:
        """Add the next bytes of the file. The call waits if the thread is two batches behind."""
        self._batch.append(data)
        self._batch_bytes += len(data)
        if self._batch_bytes >= DIGEST_BATCH:
            self._submit()

    def _submit(self) -> None:
        self._futures.append(self._pool.submit(self._run, self._batch))
        self._batch, self._batch_bytes = [], 0
        if len(self._futures) > 2:
            self._futures[-3].result()

    def crc32(self) -> list[int]:
        """The CRC-32 of everything added so far, one number for each `add`."""
        self._submit()
        return [number for future in self._futures for number in future.result()]


def _fill(
    path: Path, task: ShardTask, images: Sequence[SourceImage], layout: _Layout, skips: Skips
) -> tuple[str, set[int], Counter[str]]:
    """Check the images and write their bytes and columns into the file that `_write_hdf5` made.

    Returns:
        The file's SHA-256 in hexadecimal, the source indices of bad images, and the numbers of images that decoding
        changes. The file is whole if no image is bad.
    """
    bad: set[int] = set()
    changes: Counter[str] = Counter()
    position = layout.begin
    encodings = []
    files = open_ahead(task.image_folder, images)
    with open(path, "r+b", buffering=0) as file, ThreadPoolExecutor(1) as pool, closing(files):
        digests = _Digests(pool)
        digests.sha256.update(file.read(layout.begin))
        for image, descriptor in files:
            try:
                data = read_image(image, descriptor)
                encodings.append(check_image(data, image.record["width"], image.record["height"], task.rules))
                changes.update(value_changes(data))
            except BadImageError as error:
                image_id, number = image.record["id"], image.num_annotations
                add_image_fault(skips, error.reason, image.path, image_id, error.text, number)
                bad.add(image.source_index)
            if not bad:
                position += os.pwrite(file.fileno(), data, position)
                digests.add(data)
        if not bad and position != layout.end:
            raise OSError(errno.EIO, f"{layout.end - position} bytes were not taken")
        columns = {"crc32": digests.crc32(), "encoding": encodings}
        for name, numbers in columns.items():
            os.pwrite(file.fileno(), np.array(numbers, IMAGE_COLUMNS[name]).tobytes(), layout.columns[name])
        file.seek(layout.end)
        while block := file.read(2**20):
            digests.sha256.update(block)
    return digests.sha256.hexdigest(), bad, changes


def _write_columns(group: h5py.Group, layout: dict[str, str], columns: dict[str, Any]) -> None:
    for name, dtype in layout.items():
        shape = (-1, 4) if name == "bbox" else (-1,)
        # without times the bytes of a file depend only on its content
        group.create_dataset(name, data=np.array(columns[name], dtype).reshape(shape), track_times=False)


def _offset(lengths: Iterable[int]) -> NDArray[np.int64]:
    return np.array([0, *accumulate(lengths)], "<i8")


def _blob(entries: Sequence[bytes]) -> Blob:
    return Blob(np.frombuffer(b"".join(entries), np.uint8), _offset(map(len, entries)))


def _write_blobs(group: h5py.Group, blobs: dict[str, Blob]) -> None:
    for name, blob in blobs.items():
        data = group.create_dataset(name, shape=blob.data.shape, dtype="|u1", track_times=False)
        data[...] = blob.data
        group.create_dataset(f"{name}_offset", data=blob.offset, track_times=False)


def _reserve(group: h5py.Group, name: str, length: int) -> tuple[int, int]:
    """Make a dataset of `length` bytes without writing it. Returns the positions of its begin and end in the file."""
    options = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    options.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    options.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    options.set_obj_track_times(False)
    space = h5py.h5s.create_simple((length,))
    h5py.h5d.create(group.id, name.encode(), h5py.h5t.STD_U8LE, space, options)
    begin = file_position(group[name])
    return begin, begin + length


def _extra(record: dict[str, Any], known: frozenset[str]) -> bytes:
    rest = {key: value for key, value in record.items() if key not in known}
    return encode_json(rest) if rest else b""


def _write_hdf5(path: Path, task: ShardTask, images: Sequence[SourceImage]) -> _Layout:
    """Write a shard's file under `path`, without the images' bytes, CRC-32 and encodings.

    These are filled in later in one pass, so that no shard is held in memory or read again for its SHA-256. For this
    the images' bytes are the first raw data in the file: nothing before them changes later.
    """
    records = [image.record for image in images]
    own, counts = task.annotations.of(places(images))
    texts = {
        name: Blob(np.frombuffer(getattr(own, name), np.uint8), _offset(own.rows[name].tolist()))
        for name in ("segmentation", "extra")
    }
    annotation_offset = _offset(counts.tolist())
    with h5py.File(path, "w", libver=("earliest", "v110"), locking=False) as file:
        file.attrs["format"] = FORMAT_NAME
        file.attrs["format_version"] = np.int64(FORMAT_VERSION)
        file.attrs["shard"] = np.int64(task.index)
        file.attrs["source_sha256"] = task.source_sha256
        group = file.create_group("images")
        sizes = [image.file_bytes for image in images]
        begin, end = _reserve(group, "bytes", sum(sizes))
        group.create_dataset("bytes_offset", data=_offset(sizes), track_times=False)
        columns: dict[str, Any]
        columns = {key: [record[key] for record in records] for key in ("id", "height", "width")}
        columns |= {name: [0] * len(images) for name in LATE_COLUMNS}
        columns["source_index"] = [image.source_index for image in images]
        columns["segmentation_crc32"] = [
            image_segmentation_crc32(texts["segmentation"], a, b) for a, b in pairwise(annotation_offset.tolist())
        ]
        _write_columns(group, IMAGE_COLUMNS, columns)
        late = {name: file_position(group[name]) for name in LATE_COLUMNS}
        names = [record["file_name"].encode("utf-8") for record in records]
        extras = [_extra(record, IMAGE_KEYS) for record in records]
        _write_blobs(group, {"file_name": _blob(names), "extra": _blob(extras)})

        group = file.create_group("annotations")
        group.create_dataset("offset", data=annotation_offset, track_times=False)
        _write_columns(group, ANNOTATION_COLUMNS, {name: own.rows[name] for name in ANNOTATION_COLUMNS})
        _write_blobs(group, texts)
    assert not images or begin <= end <= min(late.values()), f"{path}: HDF5 put {late} before {end}"
    return _Layout(begin, end, late)


def _count(images: Sequence[SourceImage]) -> dict[str, int]:
    """The shard's part of the totals."""
    num_annotations = sum(image.num_annotations for image in images)
    image_bytes = sum(image.file_bytes for image in images)
    return {"images": len(images), "annotations": num_annotations, "image_bytes": image_bytes}


def _same_for_limit(max_pixels: int, report: dict[str, Any]) -> bool:
    """Whether a limit of pixels leaves out the images that the limit of an earlier run did."""
    fewer = any(entry["reason"] == TOO_LARGE for entry in report["skipped"])
    before: int = report["max_pixels"]
    return max_pixels == before or (max_pixels > before and not fewer)


def _finished_report(task: ShardTask, path: Path, report_path: Path) -> dict[str, Any] | None:
    """The report of an earlier run if its shard is whole and has the same inputs, else None."""
    try:
        report: dict[str, Any] = json.loads(report_path.read_bytes())
        same = report["inputs_sha256"] == task.inputs_sha256() and report["decode"] == task.rules.decode
        same = same and (task.skip or not report["skipped"]) and _same_for_limit(task.rules.max_pixels, report)
        return report if same and file_sha256(path) == report["shard"]["sha256"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def pack_shard(task: ShardTask) -> dict[str, Any]:
    """Write one shard and its report, or keep those of an earlier run if they still fit.

    Returns:
        shard: its entry in the manifest; count: its part of the summary; skipped: what was left out;
        kept: whether an earlier run had written it.
        Where images are bad and the task does not skip, shard is None, and skipped lists them.

    Raises:
        UserError: a write that failed.
    """
    path = task.folder / shard_name(task.index)
    report_path = task.folder / "resume" / f"{path.stem}.json"
    report = _finished_report(task, path, report_path)
    if report is not None:
        return {**report, "kept": True}
    skips = Skips(task.skip)
    images = task.images
    temporary = path.with_name(path.name + ".tmp")
    try:
        while True:
            layout = _write_hdf5(temporary, task, images)
            sha256, bad, changes = _fill(temporary, task, images, layout, skips)
            if not bad:
                break
            if not task.skip:
                temporary.unlink()
                return {"shard": None, "skipped": skips.entries}
            images = [image for image in images if image.source_index not in bad]
    except (OSError, RuntimeError) as error:  # a full disk is an OSError on writing and a RuntimeError on closing
        cause = error if isinstance(error, OSError) else error.__context__
        number = cause.errno if isinstance(cause, OSError) else None
        raise UserError(f"{path}: cannot be written ({os.strerror(number) if number else error})") from error
    publish_file(temporary, path)
    count = {**_count(images), **changes}
    shard = {
        "file": path.name,
        "images": count["images"],
        "annotations": count["annotations"],
        "bytes": path.stat().st_size,
        "sha256": sha256,
    }
    report = {"shard": shard, "count": count, "skipped": skips.entries}
    report |= {"inputs_sha256": task.inputs_sha256(), "decode": task.rules.decode}
    report |= {"max_pixels": task.rules.max_pixels}
    write_json(report_path, report)
    return {**report, "kept": False}
