"""Checks one shard of a pack in a single pass over its file; runs in worker processes and MPI ranks."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
from numpy.typing import NDArray

from data_prep.box_counts import Boxes, count_boxes, sort_boxes
from data_prep.findings import Findings
from megdet_hpc.data.image_header import JPEG_START, PNG_START
from megdet_hpc.data.pack_checks import READ_ERRORS, attribute_faults, image_of, index_faults, read_columns
from megdet_hpc.data.pixels import rgb_pixels
from megdet_hpc.data.shard_format import ENCODINGS, Blob, PackError, file_position, image_segmentation_crc32

BLOCK_BYTES = 4 * 2**20
ENCODING_STARTS = (JPEG_START, PNG_START)  # in the order of ENCODINGS


@dataclass(frozen=True)
class ShardJob:
    """A shard to check, and the values to compare it with."""

    index: int
    folder: Path
    entry: dict[str, Any]  # of the manifest's "shards"
    source_sha256: str
    category_ids: tuple[int, ...]
    decode: bool  # decode every image in full
    upright: bool  # sizes are those of the pictures turned by EXIF
    shard_format: int


def _no_ids() -> NDArray[np.int64]:
    return np.empty(0, np.int64)


@dataclass
class ShardReport:
    """Findings of a shard, and values to compare between shards. Values that could not be read are empty."""

    index: int
    findings: Findings = field(default_factory=Findings)
    bytes_read: int = 0
    count: dict[str, int] | None = None  # the shard's part of totals and summary
    image_ids: NDArray[np.int64] = field(default_factory=_no_ids)
    annotation_ids: NDArray[np.int64] = field(default_factory=_no_ids)
    image_sources: NDArray[np.int64] = field(default_factory=_no_ids)  # positions in the source's lists
    annotation_sources: NDArray[np.int64] = field(default_factory=_no_ids)


@dataclass
class _Index:
    """A shard's index with offsets that are right."""

    columns: dict[str, NDArray[Any]]
    blobs: dict[str, Blob]  # all but the images
    begin: int  # position of the first image in the file

    def image(self, local: int) -> str:
        """Id and file name of an image, for messages."""
        name = self.blobs["images/file_name"].entry(local)
        return f"image id {self.columns['images/id'][local]} (file {name.decode('utf-8', 'backslashreplace')!r})"

    def annotation(self, local: int) -> str:
        """Id of an annotation and its image, for messages."""
        image = image_of(self.columns, "annotations/id", local)
        whose = "" if image is None else f" of {self.image(image)}"
        return f"annotation id {self.columns['annotations/id'][local]}{whose}"

    def owner(self, dataset: str, local: int) -> str:
        return self.annotation(local) if dataset.startswith("annotations/") else self.image(local)


def check_shard(job: ShardJob) -> ShardReport:
    """Check a shard's size, SHA-256, attributes, index and images. Raises nothing for a damaged shard."""
    report = ShardReport(job.index)
    found, name, path = report.findings, job.entry["file"], job.folder / job.entry["file"]
    try:
        size = path.stat().st_size
    except OSError as error:
        why = "missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        found.add("missing shard", f"{name}: {why}, but manifest.json lists it with {job.entry['images']} images")
        return report
    whole = size == job.entry["bytes"]
    if not whole:
        how = "truncated" if size < job.entry["bytes"] else "too long"
        found.add("size", f"{name}: {how}: {size} bytes, manifest.json says {job.entry['bytes']}")
    index = None
    try:
        with h5py.File(path, "r", locking=False) as file:
            foreign = _check_attributes(job, file, found)
            if foreign or not whole:
                return report  # everything else would differ too
            index = _read_index(job, file, report)
    except PackError as error:
        found.add("counts", str(error).replace(f"{job.folder}{os.sep}", ""))
    except READ_ERRORS as error:
        if not whole:
            return report
        found.add("unreadable shard", f"{name}: HDF5 cannot read it ({error})")
    try:
        _check_bytes(job, path, index, report)
    except OSError as error:
        found.add("unreadable shard", f"{name}: cannot be read ({error.strerror or error})")
    return report


def _check_attributes(job: ShardJob, file: h5py.File, found: Findings) -> bool:
    """Report wrong attributes. Returns whether the shard belongs to another pack or version."""
    faults = dict(attribute_faults(file, job.index, job.source_sha256, job.shard_format))
    for name, text in faults.items():
        kind = "version" if name.startswith("format") else "foreign shard"
        why = "of another format or version" if kind == "version" else "of another pack or place"
        found.add(kind, f"{job.entry['file']}: {text}, so it is {why}")
    return bool(faults)


def _read_index(job: ShardJob, file: h5py.File, report: ShardReport) -> _Index | None:
    """Read and check the index, and fill in the report; None if offsets are wrong."""
    found, name = report.findings, job.entry["file"]
    columns = read_columns(file, job.entry["images"], job.entry["annotations"], job.shard_format)
    faults = list(index_faults(file, columns, job.category_ids))
    broken = [fault for fault in faults if fault.dataset.endswith("offset")]
    for fault in broken:
        for number in range(len(fault.entries)):
            if not found.wants("offsets"):
                found.skip("offsets", len(fault.entries) - number)
                break
            image = image_of(columns, fault.dataset, int(fault.entries[number]))
            whose = "" if image is None else f"image id {columns['images/id'][image]}: "
            found.add("offsets", f"{name}: {whose}{fault.describe(number)}")
    report.image_ids, report.annotation_ids = columns["images/id"], columns["annotations/id"]
    report.image_sources = columns["images/source_index"]
    report.annotation_sources = columns["annotations/source_index"]
    if broken:
        return None
    names = ("images/file_name", "images/extra", "annotations/segmentation", "annotations/extra")
    blobs = {blob: Blob(file[blob][()], columns[f"{blob}_offset"]) for blob in names}
    index = _Index(columns, blobs, file_position(file["images/bytes"]))
    for fault in faults:
        for number, entry in enumerate(fault.entries.tolist()):
            if not found.wants("values"):
                found.skip("values", len(fault.entries) - number)
                break
            found.add("values", f"{name}: {index.owner(fault.dataset, entry)}: {fault.describe(number)}")
    _check_texts(name, index, found)
    _check_segmentations(name, index, found)
    report.count = _count(columns)
    return index


def _check_texts(shard: str, index: _Index, found: Findings) -> None:
    """Check that file names are UTF-8, and that JSON has the right type."""
    kinds = {"images/file_name": str, "images/extra": dict, "annotations/extra": dict}
    for name, blob in index.blobs.items():
        for local in np.flatnonzero(np.diff(blob.offset)).tolist():
            entry = blob.entry(local)
            try:
                value = entry.decode("utf-8") if name == "images/file_name" else json.loads(entry)
                fault = None if isinstance(value, kinds.get(name, object)) else f"holds {entry[:40]!r}"
            except (ValueError, RecursionError) as error:
                fault = str(error)
            if fault:
                found.add("texts", f"{shard}: {index.owner(name, local)}: {name}[{local}] is damaged ({fault})")
    for local in np.flatnonzero(np.diff(index.blobs["images/file_name"].offset) == 0).tolist():
        found.add("texts", f"{shard}: {index.image(local)}: has no file name")


def _check_segmentations(shard: str, index: _Index, found: Findings) -> None:
    """Compare each image's segmentations with their checksum. Format 1 has none."""
    sums = index.columns.get("images/segmentation_crc32")
    if sums is None:
        return
    offset, blob = index.columns["annotations/offset"].tolist(), index.blobs["annotations/segmentation"]
    for local, expected in enumerate(sums.tolist()):
        crc32 = image_segmentation_crc32(blob, offset[local], offset[local + 1])
        if crc32 != expected:
            text = f"its segmentations have the CRC-32 {crc32:08x}, the index says {expected:08x}"
            found.add("segmentation", f"{shard}: {index.image(local)}: {text}")


def _count(columns: dict[str, NDArray[Any]]) -> dict[str, int]:
    """The numbers that the packer counts for the manifest's totals and summary."""
    offset = columns["annotations/offset"]
    image = np.repeat(np.arange(len(offset) - 1), np.diff(offset))  # of each annotation
    size = np.stack([columns["images/width"], columns["images/height"]], axis=1).astype(np.int64)
    crowd, categories = columns["annotations/iscrowd"] == 1, columns["annotations/category_id"]
    area = columns["annotations/area"]
    boxes = Boxes(columns["annotations/bbox"], size[image], crowd, categories, area, image, len(size))
    return {
        "images": len(size),
        "annotations": len(image),
        "image_bytes": int(columns["images/bytes_offset"][-1]),
        **count_boxes(boxes, sort_boxes(boxes)),
    }


def _blocks(file: BinaryIO, count: int) -> Iterator[bytes]:
    """The next `count` bytes of a file in blocks; fewer at its end."""
    while count > 0 and (block := file.read(min(count, BLOCK_BYTES))):
        count -= len(block)
        yield block


def _check_bytes(job: ShardJob, path: Path, index: _Index | None, report: ShardReport) -> None:
    """Read the whole file once and check its SHA-256 and, if the index is right, every image.

    Raises:
        OSError: a read failed.
    """
    digest = hashlib.sha256()
    found, name, wrong_images = report.findings, job.entry["file"], False
    with open(path, "rb") as file:
        if index is not None:
            for block in _blocks(file, index.begin):
                digest.update(block)
            for local, size in enumerate(np.diff(index.columns["images/bytes_offset"]).tolist()):
                data = file.read(size)
                digest.update(data)
                for kind, text in _image_faults(data, index, local, job.decode, job.upright):
                    wrong_images = True
                    found.add(kind, f"{name}: {index.image(local)}: {text}")
        for block in _blocks(file, job.entry["bytes"]):
            digest.update(block)
        report.bytes_read = file.tell()
    if digest.hexdigest() != job.entry["sha256"]:
        where = ""
        if index is not None and not wrong_images:
            where = (
                "; its images are right, so the damage is in the index or the annotations, or manifest.json is wrong"
            )
        found.add("sha256", f"{name}: SHA-256 is {digest.hexdigest()}, manifest.json says {job.entry['sha256']}{where}")


def _image_faults(data: bytes, index: _Index, local: int, decode: bool, upright: bool) -> Iterator[tuple[str, str]]:
    """Kind and text of each fault in an image's bytes."""
    crc32, expected = zlib.crc32(data), int(index.columns["images/crc32"][local])
    if crc32 != expected:
        yield "image", f"its bytes have the CRC-32 {crc32:08x}, the index says {expected:08x}"
        return
    encoding = int(index.columns["images/encoding"][local])
    if encoding < len(ENCODINGS) and not data.startswith(ENCODING_STARTS[encoding]):
        yield "image", f"begins with {data[:4]!r}, the index says it is a {ENCODINGS[encoding]}"
    elif decode:
        size = int(index.columns["images/width"][local]), int(index.columns["images/height"][local])
        if fault := decode_fault(data, size, upright):
            yield "decode", fault


def decode_fault(data: bytes, size: tuple[int, int], upright: bool = False) -> str | None:
    """Decode an image in full.

    Args:
        data: a JPEG or PNG file.
        size: width and height in pixels that it should have.
        upright: whether that size is the one after its EXIF orientation is applied.

    Returns:
        What is wrong, or None.
    """
    try:
        height, width, _ = rgb_pixels(data, upright).shape
    except OSError as error:
        return f"does not decode ({error})"
    if (width, height) != size:
        return f"is {width} x {height} pixels, the index says {size[0]} x {size[1]}"
    if data.startswith(JPEG_START) and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
        return "is truncated (no end-of-image marker)"  # Pillow takes some JPEGs without their tail
    return None


def merge_counts(reports: list[ShardReport]) -> Counter[str]:
    """The sums of all shards' counts."""
    total: Counter[str] = Counter()
    for report in reports:
        total.update(report.count or {})
    return total
