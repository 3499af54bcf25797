"""Checks the images of one shard and writes it; runs in worker processes and MPI ranks."""

from __future__ import annotations

import hashlib
import io
import json
import os
import zlib
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from PIL import Image

from data_prep.coco_source import Skips, SourceImage
from megdet_hpc.data.shard_format import (
    ANNOTATION_COLUMNS,
    ANNOTATION_KEYS,
    ENCODINGS,
    FORMAT_NAME,
    FORMAT_VERSION,
    IMAGE_COLUMNS,
    IMAGE_KEYS,
    NO_ISCROWD,
    encode_json,
    shard_name,
)
from megdet_hpc.errors import UserError
from megdet_hpc.files import publish_file, write_json

OUTSIDE_TOLERANCE = 0.01  # pixels; COCO rounds boxes to hundredths


@dataclass(frozen=True)
class ShardTask:
    """What a worker needs to write shard `index`; sent to it whole."""

    index: int
    folder: Path  # shards are written here, their reports under resume/
    image_folder: Path
    source_sha256: str
    skip: bool
    images: list[SourceImage]

    def inputs_sha256(self) -> str:
        """Tells whether the shard's images are those of an earlier run, by name, size and change time."""
        inputs = [[i.source_index, i.record["file_name"], i.file_bytes, i.file_mtime_ns] for i in self.images]
        return hashlib.sha256(encode_json([self.source_sha256, inputs])).hexdigest()


class BadImageError(Exception):
    """An image that cannot be packed.

    Args:
        reason: word by which skipped images are counted.
        text: what is wrong, for the message.
    """

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(reason, text)
        self.reason, self.text = reason, text


def check_image(data: bytes, width: int, height: int) -> int:
    """Decode an image file cheaply, to be sure that training can.

    A JPEG is decoded at an eighth of its size and without colour (934 images/s on one core against 542 in
    full, COCO images): all of its entropy-coded data is still read, which Pillow's `verify` does not do.
    EXIF orientation is ignored: COCO's sizes and boxes are those of the stored pixels.

    Args:
        data: the file's bytes.
        width, height: pixels that the annotation file gives.

    Returns:
        Index into `shard_format.ENCODINGS`.

    Raises:
        BadImageError: unknown format, truncated or undecodable, or another size than given.
    """
    try:
        with Image.open(io.BytesIO(data), formats=ENCODINGS) as image:
            encoding = "PNG" if image.format == "PNG" else "JPEG"  # MPO is a JPEG with a second one behind it
            size = image.size
            image.draft("L", (1, 1))
            image.load()
    except Image.UnidentifiedImageError as error:
        raise BadImageError("unsupported_image", f"not a {' or '.join(ENCODINGS)} file") from error
    except MemoryError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error and more
        raise BadImageError("unreadable_image", f"does not decode ({error})") from error
    # Pillow takes some JPEGs whose tail is zeroed or missing; torchvision does not. FF D9 ends an image and
    # never occurs in coded data, so it must follow the last start of scan; bytes behind it do no harm.
    if encoding == "JPEG" and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
        raise BadImageError("unreadable_image", "is truncated (no end-of-image marker)")
    if size != (width, height):
        text = f"is {size[0]} x {size[1]} pixels, the annotations say {width} x {height}"
        raise BadImageError("wrong_image_size", text)
    return ENCODINGS.index(encoding)


@dataclass(frozen=True)
class _CheckedImage:
    source: SourceImage
    data: bytes
    encoding: int


def _read_image(task: ShardTask, image: SourceImage) -> _CheckedImage:
    """Read and check one image.

    Raises:
        BadImageError: missing, unreadable, or refused by `check_image`.
    """
    try:
        data = (task.image_folder / image.record["file_name"]).read_bytes()
    except FileNotFoundError as error:
        raise BadImageError("missing_image", "no such file") from error
    except OSError as error:
        raise BadImageError("unreadable_image", f"cannot be read ({error.strerror})") from error
    return _CheckedImage(image, data, check_image(data, image.record["width"], image.record["height"]))


def _read_images(task: ShardTask) -> tuple[list[_CheckedImage], list[dict[str, Any]]]:
    """The good images of a shard and the list of those left out.

    Raises:
        UserError: a bad image where the task does not skip.
    """
    skips = Skips(task.skip)
    checked = []
    for image in task.images:
        try:
            checked.append(_read_image(task, image))
        except BadImageError as error:
            path, image_id = task.image_folder / image.record["file_name"], image.record["id"]
            text = f"image id {image_id}: {error.text}"
            skips.report(error.reason, path, text, image_id, images=1, annotations=len(image.annotations))
    return checked, skips.entries


def _write_columns(group: h5py.Group, layout: dict[str, str], columns: dict[str, list[Any]]) -> None:
    for name, dtype in layout.items():
        shape = (-1, 4) if name == "bbox" else (-1,)
        # Without times the bytes of a file depend on its content alone.
        group.create_dataset(name, data=np.array(columns[name], dtype).reshape(shape), track_times=False)


def _write_blobs(group: h5py.Group, blobs: dict[str, list[bytes]]) -> None:
    for name, entries in blobs.items():
        offset = np.fromiter(accumulate(map(len, entries), initial=0), "<i8", len(entries) + 1)
        data = group.create_dataset(name, shape=(int(offset[-1]),), dtype="|u1", track_times=False)
        if name == "bytes":  # a shard's images joined would double the memory
            for begin, entry in zip(offset.tolist(), entries, strict=False):
                data[begin : begin + len(entry)] = np.frombuffer(entry, np.uint8)
        else:
            data[...] = np.frombuffer(b"".join(entries), np.uint8)
        group.create_dataset(f"{name}_offset", data=offset, track_times=False)


def _extra(record: dict[str, Any], known: frozenset[str]) -> bytes:
    rest = {key: value for key, value in record.items() if key not in known}
    return encode_json(rest) if rest else b""


def _write_hdf5(path: Path, task: ShardTask, images: list[_CheckedImage]) -> None:
    """Write a shard's file under `path`."""
    records = [image.source.record for image in images]
    annotations = [entry for image in images for entry in image.source.annotations]
    with h5py.File(path, "w", libver=("earliest", "v110"), locking=False) as file:
        file.attrs["format"] = FORMAT_NAME
        file.attrs["format_version"] = np.int64(FORMAT_VERSION)
        file.attrs["shard"] = np.int64(task.index)
        file.attrs["source_sha256"] = task.source_sha256
        group = file.create_group("images")
        columns: dict[str, list[Any]]
        columns = {key: [record[key] for record in records] for key in ("id", "height", "width")}
        columns["encoding"] = [image.encoding for image in images]
        columns["crc32"] = [zlib.crc32(image.data) for image in images]
        columns["source_index"] = [image.source.source_index for image in images]
        _write_columns(group, IMAGE_COLUMNS, columns)
        names = [record["file_name"].encode("utf-8") for record in records]
        extras = [_extra(record, IMAGE_KEYS) for record in records]
        _write_blobs(group, {"bytes": [image.data for image in images], "file_name": names, "extra": extras})

        group = file.create_group("annotations")
        counts = [len(image.source.annotations) for image in images]
        offset = np.fromiter(accumulate(counts, initial=0), "<i8", len(counts) + 1)
        group.create_dataset("offset", data=offset, track_times=False)
        columns = {key: [record[key] for _, record in annotations] for key in ("id", "category_id", "bbox")}
        columns["area"] = [record.get("area", np.nan) for _, record in annotations]
        columns["iscrowd"] = [record.get("iscrowd", NO_ISCROWD) for _, record in annotations]
        columns["source_index"] = [source_index for source_index, _ in annotations]
        _write_columns(group, ANNOTATION_COLUMNS, columns)
        segmentations = [
            encode_json(record["segmentation"]) if "segmentation" in record else b"" for _, record in annotations
        ]
        extras = [_extra(record, ANNOTATION_KEYS) for _, record in annotations]
        _write_blobs(group, {"segmentation": segmentations, "extra": extras})


def _count(images: list[_CheckedImage]) -> dict[str, int]:
    """The shard's part of the summary."""
    names = ("images_without_annotations", "crowd", "zero_size_boxes", "boxes_partly_outside")
    count = dict.fromkeys(names, 0)
    for image in images:
        record = image.source.record
        count["images_without_annotations"] += not image.source.annotations
        for _, annotation in image.source.annotations:
            x, y, width, height = annotation["bbox"]
            over = max(-x, -y, x + width - record["width"], y + height - record["height"])
            count["crowd"] += annotation.get("iscrowd", 0)
            count["zero_size_boxes"] += width == 0 or height == 0
            count["boxes_partly_outside"] += over > OUTSIDE_TOLERANCE
    num_annotations = sum(len(image.source.annotations) for image in images)
    image_bytes = sum(len(image.data) for image in images)
    return {"images": len(images), "annotations": num_annotations, **count, "image_bytes": image_bytes}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _finished_report(task: ShardTask, path: Path, report_path: Path) -> dict[str, Any] | None:
    """The report of an earlier run, where its shard is whole and of the same inputs; else None."""
    try:
        report: dict[str, Any] = json.loads(report_path.read_bytes())
        same = report["inputs_sha256"] == task.inputs_sha256() and (task.skip or not report["skipped"])
        return report if same and _sha256(path) == report["shard"]["sha256"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def pack_shard(task: ShardTask) -> dict[str, Any]:
    """Write one shard and its report, or keep those of an earlier run that are still right.

    Returns:
        shard: its entry in the manifest; count: its part of the summary; skipped: what was left out;
        source_images: images it was asked to pack; kept: whether an earlier run had written it.

    Raises:
        UserError: a bad image where the task does not skip; a write that failed.
    """
    path = task.folder / shard_name(task.index)
    report_path = task.folder / "resume" / f"{path.stem}.json"
    report = _finished_report(task, path, report_path)
    if report is not None:
        return {**report, "source_images": len(task.images), "kept": True}
    images, skipped = _read_images(task)
    temporary = path.with_name(path.name + ".tmp")
    try:
        _write_hdf5(temporary, task, images)
    except (OSError, RuntimeError) as error:  # a full disk is an OSError, and a RuntimeError again on closing
        cause = error if isinstance(error, OSError) else error.__context__
        number = cause.errno if isinstance(cause, OSError) else None
        raise UserError(f"{path}: cannot be written ({os.strerror(number) if number else error})") from error
    sha256 = _sha256(temporary)
    publish_file(temporary, path)
    count = _count(images)
    shard = {
        "file": path.name,
        "images": count["images"],
        "annotations": count["annotations"],
        "bytes": path.stat().st_size,
        "sha256": sha256,
    }
    report = {"shard": shard, "count": count, "skipped": skipped, "inputs_sha256": task.inputs_sha256()}
    write_json(report_path, report)
    return {**report, "source_images": len(task.images), "kept": False}
