"""A pack's index, all that a reader holds of every image and box: one file, which all processes of a node map.

The packer writes `index.bin` beside the shards (docs/data_format.md). Where it is missing or belongs to another state
of the shards, the first that opens the pack writes it anew. Where the folder cannot be written, each rank makes its own
in memory.

Shape legend: n images and m annotations of the set, k shards.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from megdet_hpc.data.masks import mask_areas, rle_of
from megdet_hpc.data.pack_checks import READ_ERRORS, attribute_faults, check_index, check_unique_images
from megdet_hpc.data.shard_format import (
    ANNOTATION_COLUMNS,
    IMAGE_COLUMNS,
    MANIFEST_NAME,
    PackError,
    file_position,
    shard_format_of,
)
from megdet_hpc.data.shared_block import Layout, SharedBlock, positions, unnamed_file
from megdet_hpc.errors import MachineError, is_machine_fault
from megdet_hpc.files import publish_file

INDEX_NAME = "index.bin"
BEGIN = 4096  # of the arrays in the file; a page, so that they can be mapped [bytes]

_MAGIC, _VERSION = b"MEGDETIX", 1
# magic, version, CRC-32 of the sums, SHA-256 of the manifest, bytes of all file names; then the CRC-32 of these
_HEADER = struct.Struct("<8sII32sQ")
_CRC32 = struct.Struct("<I")
_SUMMED = 2**20  # a sum for each so many bytes, which takes a third of a CRC-32's time
_NO_SEGMENTATION = len(b"null")  # bytes of the longest entry that says so; the others are empty and []

_IMAGES = ("id", "height", "width", "crc32", "segmentation_crc32")
_ANNOTATIONS = ("id", "category_id", "area")
FLAGS = ("iscrowd", "difficult", "segmented")


class _UnusableError(Exception):
    """Why an index file is not taken."""


class PackIndex:
    """The arrays of a pack's index, mapped and not to be written to. Loader processes map the same memory.

    Args:
        block: the arrays.
        origin: where they lie, for people.

    Attributes:
        image_ids, heights, widths, crc32, segmentation_crc32: columns of the images, [n].
        byte_begin, byte_count: where an image lies in its shard's file, [n].
        offset: annotations of image i are offset[i] to offset[i + 1], [n + 1].
        ids, category_ids, areas: columns of the annotations, [m].
        boxes: [m, 4] x, y, width, height in pixels.
        flags: iscrowd, difficult and segmented, bool, [m] each.
        segmentations: where a shard's segmentations and their int64 offsets begin in its file, [k, 2].
    """

    def __init__(self, block: SharedBlock, origin: str) -> None:
        self.block, self.origin, arrays = block, origin, block.arrays
        self.image_ids: NDArray[np.int64] = arrays["images/id"]
        self.heights: NDArray[np.int32] = arrays["images/height"]
        self.widths: NDArray[np.int32] = arrays["images/width"]
        self.crc32, self.segmentation_crc32 = arrays["images/crc32"], arrays["images/segmentation_crc32"]
        self.byte_begin, self.byte_count, self.offset = arrays["byte_begin"], arrays["byte_count"], arrays["offset"]
        self.ids, self.category_ids = arrays["annotations/id"], arrays["annotations/category_id"]
        self.areas, self.boxes = arrays["annotations/area"], arrays["boxes"]
        self.flags = {name: arrays[name] for name in FLAGS}
        self.segmentations = arrays["segmentation"]
        self._names, self._name_offset = arrays["file_name"], arrays["file_name_offset"]

    def __reduce__(self) -> tuple[Callable[..., PackIndex], tuple[Any, ...]]:
        return (PackIndex, (self.block, self.origin))

    def file_name(self, index: int) -> bytes:
        """File name of image `index` in the source."""
        return self._names[self._name_offset[index] : self._name_offset[index + 1]].tobytes()


def _layout(manifest: Mapping[str, Any], name_bytes: int) -> Layout:
    """The arrays of a pack's index. File names come last: their size is known when all shards are read."""
    n, m = (sum(int(shard[key]) for shard in manifest["shards"]) for key in ("images", "annotations"))
    return {
        **{f"images/{name}": ((n,), IMAGE_COLUMNS[name]) for name in _IMAGES},
        "byte_begin": ((n,), "<i8"),
        "byte_count": ((n,), "<i8"),
        "offset": ((n + 1,), "<i8"),
        "boxes": ((m, 4), ANNOTATION_COLUMNS["bbox"]),
        **{f"annotations/{name}": ((m,), ANNOTATION_COLUMNS[name]) for name in _ANNOTATIONS},
        **dict.fromkeys(FLAGS, ((m,), "?")),
        "segmentation": ((len(manifest["shards"]), 2), "<i8"),
        "file_name_offset": ((n + 1,), "<i8"),
        "file_name": ((name_bytes,), "|u1"),
    }


def open_index(directory: Path, manifest: Mapping[str, Any]) -> PackIndex:
    """The index of a pack, from its file if that is right, else made from the shards and, if possible, stored.

    Processes that open the pack at the same time wait for the first of them, where the file system has locks.

    Args:
        directory: the pack's folder, whose shards have the manifest's sizes.
        manifest: what `read_manifest` gave.

    Raises:
        PackError: a shard is of another pack, damaged, or has an index that cannot be right.
        MachineError: the file system failed.
    """
    with suppress(_UnusableError):
        return _mapped(directory, manifest)
    with _locked(directory):
        with suppress(_UnusableError):  # another process has written it meanwhile
            return _mapped(directory, manifest)
        try:
            write_index(directory, manifest)
            return _mapped(directory, manifest)
        except _UnusableError as error:
            why = str(error)
        except OSError as error:
            why = f"{directory / INDEX_NAME} cannot be written ({error.strerror or error})"
    descriptor = unnamed_file()
    name_bytes = _write(descriptor, directory, manifest)
    block = SharedBlock(_layout(manifest, name_bytes), descriptor, BEGIN)
    return PackIndex(block, f"in memory, one copy for this rank and its loader processes: {why}")


def write_index(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Write a pack's index from its shards, atomically. Equal packs get equal bytes.

    Args:
        directory: a folder with the manifest and all shards.
        manifest: its manifest.

    Raises:
        OSError: it cannot be written, or a shard cannot be read.
        PackError: a shard's index cannot be right.
    """
    descriptor, name = tempfile.mkstemp(".tmp", f".{INDEX_NAME}.", directory)  # nodes may have equal process ids
    try:
        try:
            _write(descriptor, directory, manifest)
            os.fchmod(descriptor, (directory / MANIFEST_NAME).stat().st_mode & 0o777)
        finally:
            os.close(descriptor)
        publish_file(Path(name), directory / INDEX_NAME)
        _note_checked(directory, manifest)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def index_faults(directory: Path, manifest: Mapping[str, Any]) -> list[str]:
    """What is wrong with a pack's index file, compared with the shards' datasets; nothing where there is no file.

    Raises:
        PackError, MachineError: a shard cannot be read.
    """
    if not (directory / INDEX_NAME).is_file():
        return []
    try:
        index = _mapped(directory, manifest)
    except _UnusableError as error:
        return [str(error)]
    shards = range(len(manifest["shards"]))
    differing = dict.fromkeys(name for k in shards for name in _differing(index, k, manifest, directory))
    return [f"{directory / INDEX_NAME}: {name} differs from the shards" for name in differing]


def _mapped(directory: Path, manifest: Mapping[str, Any]) -> PackIndex:
    """The index from its file, all of whose bytes are checked.

    Raises:
        _UnusableError: there is none, it is damaged, or belongs to another manifest or to other shards.
    """
    path = directory / INDEX_NAME
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise _UnusableError(f"{path}: {error.strerror}") from error
    try:
        layout = _checked_layout(path, descriptor, directory, manifest)
        written = os.fstat(descriptor).st_mtime_ns
        block = SharedBlock(layout, os.dup(descriptor), BEGIN)
    except OSError as error:
        raise _UnusableError(f"{path}: cannot be read ({error.strerror})") from error
    finally:
        os.close(descriptor)
    index = PackIndex(block, "one copy for all processes of this node")
    # A shard that is newer may be another one, so its datasets are read: a copied pack has times in any order.
    times = [(directory / shard["file"]).stat().st_mtime_ns for shard in manifest["shards"]]
    newer = [k for k, changed in enumerate(times) if changed >= written]
    for k in newer:
        if any(_differing(index, k, manifest, directory)):
            raise _UnusableError(f"{path}: {manifest['shards'][k]['file']} has changed since it was written")
    if newer:
        with suppress(OSError):
            _note_checked(directory, manifest)
    return index


def _checked_layout(path: Path, descriptor: int, directory: Path, manifest: Mapping[str, Any]) -> Layout:
    """The arrays of an index file, after a look at every byte.

    Raises:
        OSError: it cannot be read.
        _UnusableError: see `_mapped`.
    """
    header, own_crc32 = os.pread(descriptor, _HEADER.size, 0), os.pread(descriptor, _CRC32.size, _HEADER.size)
    if own_crc32 != _CRC32.pack(zlib.crc32(header)):
        raise _UnusableError(f"{path}: damaged header")
    magic, version, sums_crc32, of_manifest, name_bytes = _HEADER.unpack(header)
    if (magic, version) != (_MAGIC, _VERSION):
        raise _UnusableError(f"{path}: of another version")
    if of_manifest != hashlib.sha256((directory / MANIFEST_NAME).read_bytes()).digest():
        raise _UnusableError(f"{path}: of another manifest")
    layout = _layout(manifest, name_bytes)
    _, size = positions(layout)
    sums = os.pread(descriptor, 8 * -(-size // _SUMMED) + 1, BEGIN + size)
    if len(sums) != 8 * -(-size // _SUMMED) or zlib.crc32(sums) != sums_crc32:
        raise _UnusableError(f"{path}: of another size, or damaged sums")
    for number, (found, expected) in enumerate(zip(_sums(descriptor, size), np.frombuffer(sums, "<u8"), strict=True)):
        if found != expected:
            raise _UnusableError(f"{path}: damaged between bytes {BEGIN + number * _SUMMED} and {_SUMMED} further on")
    return layout


def _sums(descriptor: int, size: int) -> Iterator[int]:
    """The sum of each MiB of the arrays as 64-bit words, modulo 2^64. It is read, not mapped: no page table grows."""
    buffer = bytearray(_SUMMED)
    for begin in range(0, size, _SUMMED):
        part = memoryview(buffer)[: min(_SUMMED, size - begin)]
        got = os.preadv(descriptor, [part], BEGIN + begin)
        yield int(np.frombuffer(part[: got // 8 * 8], "<u8").sum(dtype=np.uint64)) if got == len(part) else -1


def _write(descriptor: int, directory: Path, manifest: Mapping[str, Any]) -> int:
    """Fill an empty file, one shard in memory at a time. Returns the bytes of all file names."""
    begins, _ = positions(_layout(manifest, 0))
    place = _Place()
    image_ids = []
    for k, shard in enumerate(manifest["shards"]):
        rows_of = _read_shard(k, manifest, directory)
        image_ids.append(rows_of["images/id"])
        for name, first, rows in place.of(rows_of):
            data = memoryview(rows.tobytes())
            position = BEGIN + begins[name] + first * (len(data) // max(len(rows), 1))
            while data:
                done = os.pwrite(descriptor, data, position)
                data, position = data[done:], position + done
        place = place.after(shard, len(rows_of["file_name"]))
    name_bytes = place.name_byte
    check_unique_images(directory, np.concatenate(image_ids))
    _, size = positions(_layout(manifest, name_bytes))
    os.ftruncate(descriptor, BEGIN + size)  # zeros where nothing was written
    sums = np.fromiter(_sums(descriptor, size), "<u8").tobytes()
    of_manifest = hashlib.sha256((directory / MANIFEST_NAME).read_bytes()).digest()
    header = _HEADER.pack(_MAGIC, _VERSION, zlib.crc32(sums), of_manifest, name_bytes)
    os.pwrite(descriptor, sums, BEGIN + size)
    os.pwrite(descriptor, header + _CRC32.pack(zlib.crc32(header)), 0)
    return name_bytes


@dataclass(frozen=True)
class _Place:
    """Where a shard's rows begin in the arrays of the whole pack."""

    shard: int = 0
    image: int = 0
    annotation: int = 0
    name_byte: int = 0

    def after(self, shard: Mapping[str, Any], name_bytes: int) -> _Place:
        """The place of the next shard."""
        return _Place(
            self.shard + 1,
            self.image + int(shard["images"]),
            self.annotation + int(shard["annotations"]),
            self.name_byte + name_bytes,
        )

    def of(self, rows_of: dict[str, NDArray[Any]]) -> Iterator[tuple[str, int, NDArray[Any]]]:
        """Each array's name, the place of the shard's first row in it, and the shard's rows as they are there."""
        for name, rows in rows_of.items():
            if name == "offset":
                yield name, self.image + 1, rows + self.annotation
            elif name == "file_name_offset":
                yield name, self.image + 1, rows + self.name_byte
            elif name == "file_name":
                yield name, self.name_byte, rows
            elif name == "segmentation":
                yield name, self.shard, rows
            elif name == "boxes" or name in FLAGS or name.startswith("annotations/"):
                yield name, self.annotation, rows
            else:
                yield name, self.image, rows


def _differing(index: PackIndex, k: int, manifest: Mapping[str, Any], directory: Path) -> Iterator[str]:
    """The arrays in which a shard's datasets are not what an index says."""
    arrays, place = index.block.arrays, _Place()
    for shard in manifest["shards"][:k]:
        place = place.after(shard, 0)
    place = replace(place, name_byte=int(arrays["file_name_offset"][place.image]))
    for name, first, rows in place.of(_read_shard(k, manifest, directory)):
        if arrays[name][first : first + len(rows)].tobytes() != rows.tobytes():
            yield name


def _read_shard(k: int, manifest: Mapping[str, Any], directory: Path) -> dict[str, NDArray[Any]]:
    """The rows of a shard, with offsets that count from its begin, after a check of all its datasets.

    Raises:
        PackError, MachineError: it is of another pack, damaged, cannot be right or cannot be read.
    """
    entry = manifest["shards"][k]
    path, shard_format = directory / entry["file"], shard_format_of(dict(manifest))
    counts = int(entry["images"]), int(entry["annotations"])
    try:
        # No HDF5 lock: the file never changes, and some parallel file systems refuse locks.
        with h5py.File(path, "r", locking=False) as file:
            for _, fault in attribute_faults(file, k, manifest["source"]["sha256"], shard_format):
                mend = "copy the whole folder again or pack the set again"
                raise PackError(f"{path}: {fault}, so the shard is of another pack; {mend}")
            check_index(file, *counts, [category["id"] for category in manifest["coco"]["categories"]], shard_format)
            return _rows(file, *counts)
    except PackError:
        raise
    except READ_ERRORS as error:
        if is_machine_fault(error):
            raise MachineError(f"{path}: cannot be read ({error})") from error
        raise PackError(f"{path}: damaged ({error}); copy it again or pack the set again") from error


def _outlined_areas(file: h5py.File, chosen: NDArray[np.int64], otherwise: NDArray[np.float64]) -> NDArray[np.float64]:
    """The areas of segmentations, as COCO's own files have them; `otherwise` where one is none of COCO's forms.

    Args:
        file: open shard.
        chosen: (k,) places of annotations.
        otherwise: (k,) areas [square pixels].
    """
    images, annotations = file["images"], file["annotations"]
    offset, data = annotations["segmentation_offset"][()], annotations["segmentation"]
    heights, widths = images["height"][()], images["width"][()]
    image_of = np.searchsorted(annotations["offset"][()], chosen, side="right") - 1
    areas = otherwise.copy()
    for place, (row, image) in enumerate(zip(chosen.tolist(), image_of.tolist(), strict=True)):
        try:
            segmentation = json.loads(data[offset[row] : offset[row + 1]].tobytes())
            mask = rle_of(segmentation, int(heights[image]), int(widths[image]))
        except (ValueError, RecursionError):  # told of where masks are asked for
            continue
        if mask is not None:
            areas[place] = mask_areas([mask])[0]
    return areas


def _rows(file: h5py.File, num_images: int, num_annotations: int) -> dict[str, NDArray[Any]]:
    """The rows of an open shard. What format 1 lacks is 0."""
    images, annotations = file["images"], file["annotations"]
    bytes_offset = images["bytes_offset"][()]
    boxes, areas = annotations["bbox"][()], annotations["area"][()]
    absent = np.flatnonzero(np.isnan(areas))
    areas[absent] = boxes[absent, 2] * boxes[absent, 3]
    outlined = absent[np.diff(annotations["segmentation_offset"])[absent] > _NO_SEGMENTATION]
    if len(outlined):
        areas[outlined] = _outlined_areas(file, outlined, areas[outlined])
    none = {"iscrowd": np.zeros(num_annotations, np.int8), "difficult": np.zeros(num_annotations, np.int8)}
    flags = {name: annotations[name][()] if name in annotations else zeros for name, zeros in none.items()}
    no_sums = np.zeros(num_images, IMAGE_COLUMNS["segmentation_crc32"])
    return {
        **{f"images/{name}": images[name][()] if name in images else no_sums for name in _IMAGES},
        "byte_begin": bytes_offset[:-1] + file_position(images["bytes"]),
        "byte_count": np.diff(bytes_offset),
        "offset": annotations["offset"][1:],
        "boxes": boxes,
        **{f"annotations/{name}": annotations[name][()] for name in ("id", "category_id")},
        "annotations/area": areas,
        **{name: flag == 1 for name, flag in flags.items()},
        "segmented": np.diff(annotations["segmentation_offset"]) > _NO_SEGMENTATION,
        "segmentation": np.array(
            [[file_position(annotations["segmentation"]), file_position(annotations["segmentation_offset"])]], "<i8"
        ),
        "file_name_offset": images["file_name_offset"][1:],
        "file_name": images["file_name"][()],
    }


def _note_checked(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Make an index file just newer than its shards, whatever the clocks that gave them their times."""
    later = 1 + max((directory / shard["file"]).stat().st_mtime_ns for shard in manifest["shards"])
    os.utime(directory / INDEX_NAME, ns=(later, later))


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the folder's lock, where its file system has locks. The kernel drops the lock of a process that dies."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        yield
        return
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
