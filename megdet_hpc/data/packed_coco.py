"""Reads a packed COCO set: the index in memory, image bytes by positioned reads (docs/data_format.md).

n: images, m: annotations of one image. Boxes are x, y, width, height in pixels, as in COCO.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Callable
from functools import partial
from multiprocessing.context import get_spawning_popen
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from megdet_hpc.data.pack_checks import (
    READ_ERRORS,
    attribute_faults,
    check_index,
    check_manifest,
    check_unique_images,
)
from megdet_hpc.data.shard_files import ShardFiles
from megdet_hpc.data.shard_format import (
    ANNOTATION_COLUMNS,
    IMAGE_COLUMNS,
    Blob,
    PackError,
    damaged_segmentations,
    file_position,
    read_manifest,
    segmentation_crc32,
    shard_format_of,
)
from megdet_hpc.data.shared_block import SharedBlock
from megdet_hpc.errors import MachineError, is_machine_fault

try:
    from zlib_ng.zlib_ng import crc32  # the same sum, ten times as fast: the `fast` extra
except ImportError:
    from zlib import crc32

CRC32_BY = crc32.__module__ or "zlib"


class ImageAnnotations(NamedTuple):
    """The annotations of one image or of several, in the source's order; views of the index, not to be written to."""

    ids: NDArray[np.int64]  # [m]
    boxes_xywh: NDArray[np.float64]  # [m, 4] pixels; width or height may be 0, boxes may leave the image
    category_ids: NDArray[np.int64]  # [m] COCO category ids, with their gaps
    iscrowd: NDArray[np.bool_]  # [m] False where the source has no "iscrowd"
    difficult: NDArray[np.bool_]  # [m] False where the source has no "difficult", and in packs of format 1
    segmented: NDArray[np.bool_]  # [m] whether there are polygons or an RLE
    areas: NDArray[np.float64]  # [m] square pixels; the box's area where the source has no "area"


class _BlobPosition(NamedTuple):
    """Where one shard's byte strings and their int64 offsets begin in its file."""

    data: int
    offset: int


_IMAGE_COLUMNS = ("id", "height", "width", "crc32", "segmentation_crc32")
_ANNOTATION_COLUMNS = ("id", "category_id", "area")
_FLAGS = ("iscrowd", "difficult", "segmented")
_NO_SEGMENTATION = len(b"null")  # bytes of the longest entry that says so; the others are empty and []


class PackedCoco:
    """A finished packed folder, opened for reading.

    The index takes 59 bytes per annotation and 48 per image: 54 MiB for the 118k images and 860k annotations of COCO
    train2017. Loader processes share its memory with the process that opened it, under fork, forkserver and spawn.
    File names, 24 bytes an image, are every process's own. Any other pickle holds the folder's name and opens it anew.
    Images and segmentations stay on disk. Each process opens its own files at its first read.

    Args:
        directory: the folder that `data_prep/pack_coco.py` wrote.
        memory_map: read through a mapping of the shards instead of positioned reads. Nothing is copied then. But a
            disk error ends the process by SIGBUS, without a word, and the mapped pages count as its memory.

    Raises:
        PackError: the folder is missing, unfinished or of another version; or a shard is missing, is not the
            manifest's, or has an index that cannot be right (`pack_checks`). Images are compared with their CRC-32
            when they are read.
    """

    def __init__(self, directory: str | os.PathLike[str], *, memory_map: bool = False) -> None:
        self.directory, self.memory_map = Path(directory), memory_map
        self.manifest = read_manifest(self.directory)
        check_manifest(self.directory, self.manifest)
        # Whether sizes and boxes are those of the pictures turned by EXIF, so that who decodes turns them too.
        self.upright: bool = self.manifest.get("orientation") == "upright"
        self.shard_format = shard_format_of(self.manifest)
        self.categories: list[dict[str, Any]] = self.manifest["coco"]["categories"]
        self.shard_paths = [self.directory / shard["file"] for shard in self.manifest["shards"]]
        sizes = [int(shard["bytes"]) for shard in self.manifest["shards"]]
        self._files = ShardFiles(self.shard_paths, sizes, memory_map=memory_map)
        num_images = [int(shard["images"]) for shard in self.manifest["shards"]]
        num_annotations = [int(shard["annotations"]) for shard in self.manifest["shards"]]
        self._first_image = np.concatenate([[0], np.cumsum(num_images)]).astype(np.int64)  # [shards + 1]
        self._first_image_list: list[int] = self._first_image.tolist()  # bisect is quicker than numpy on one number
        self._first_annotation = np.concatenate([[0], np.cumsum(num_annotations)]).astype(np.int64)
        n, total = int(self._first_image[-1]), int(self._first_annotation[-1])
        self.num_annotations = total

        self._block = SharedBlock(
            {
                **{f"images/{name}": ((n,), IMAGE_COLUMNS[name]) for name in _IMAGE_COLUMNS},
                "byte_begin": ((n,), np.int64),
                "byte_count": ((n,), np.int64),
                "offset": ((n + 1,), np.int64),
                "boxes": ((total, 4), ANNOTATION_COLUMNS["bbox"]),
                **{f"annotations/{name}": ((total,), ANNOTATION_COLUMNS[name]) for name in _ANNOTATION_COLUMNS},
                **dict.fromkeys(_FLAGS, ((total,), np.bool_)),
            }
        )
        self._name_arrays()
        self._file_names: list[Blob] = []  # one per shard
        self._segmentations: list[_BlobPosition] = []
        for shard in range(len(self.shard_paths)):
            self._read_index(shard)
        check_unique_images(self.directory, self._images["id"])
        absent = np.flatnonzero(np.isnan(self._columns["area"]))
        self._columns["area"][absent] = self._boxes[absent, 2] * self._boxes[absent, 3]

    def _name_arrays(self) -> None:
        """Make the index's arrays attributes."""
        arrays = self._block.arrays
        self._images = {name: arrays[f"images/{name}"] for name in _IMAGE_COLUMNS}
        self._byte_begin = arrays["byte_begin"]  # position in the shard's file
        self._byte_count = arrays["byte_count"]
        self._offset = arrays["offset"]  # annotations of image i: offset[i] to offset[i + 1]
        self._boxes = arrays["boxes"]
        self._columns = {name: arrays[f"annotations/{name}"] for name in _ANNOTATION_COLUMNS}
        self._flags = {name: arrays[name] for name in _FLAGS}
        self.image_ids: NDArray[np.int64] = self._images["id"]  # [n]
        self.heights: NDArray[np.int32] = self._images["height"]  # [n] pixels
        self.widths: NDArray[np.int32] = self._images["width"]  # [n] pixels

    def _read_index(self, shard: int) -> None:
        """Fill the index with one shard's images and annotations."""
        path = self.shard_paths[shard]
        self._files.check_size(shard)
        images = slice(self._first_image[shard], self._first_image[shard + 1])
        annotations = slice(self._first_annotation[shard], self._first_annotation[shard + 1])
        try:
            # No HDF5 lock: the file never changes, and some parallel file systems refuse locks.
            with h5py.File(path, "r", locking=False) as file:
                self._check_attributes(shard, path, file)
                counts = images.stop - images.start, annotations.stop - annotations.start
                check_index(file, *counts, [category["id"] for category in self.categories], self.shard_format)
                for name, column in self._images.items():
                    if name in file["images"]:  # format 1 has no checksum of segmentations: there they stay 0
                        column[images] = file["images"][name][()]
                offset = file["images/bytes_offset"][()]
                self._byte_begin[images] = offset[:-1] + file_position(file["images/bytes"])
                self._byte_count[images] = np.diff(offset)
                self._file_names.append(Blob.read(file["images"], "file_name"))
                group = file["annotations"]
                for name, column in self._columns.items():
                    column[annotations] = group[name][()]
                self._boxes[annotations] = group["bbox"][()]
                for name in ("iscrowd", "difficult"):
                    if name in group:
                        self._flags[name][annotations] = group[name][()] == 1
                self._flags["segmented"][annotations] = np.diff(group["segmentation_offset"]) > _NO_SEGMENTATION
                self._offset[images.start + 1 : images.stop + 1] = group["offset"][1:] + annotations.start
                self._segmentations.append(
                    _BlobPosition(file_position(group["segmentation"]), file_position(group["segmentation_offset"]))
                )
        except PackError:
            raise
        except READ_ERRORS as error:
            if is_machine_fault(error):
                raise MachineError(f"{path}: cannot be read ({error})") from error
            raise PackError(f"{path}: damaged ({error}); copy it again or pack the set again") from error

    def _check_attributes(self, shard: int, path: Path, file: h5py.File) -> None:
        for _, fault in attribute_faults(file, shard, self.manifest["source"]["sha256"], self.shard_format):
            raise PackError(
                f"{path}: {fault}, so the shard is of another pack; copy the whole folder again or pack the set again"
            )

    def __len__(self) -> int:
        """Number of images."""
        return len(self._byte_begin)

    def __reduce__(self) -> tuple[Callable[..., PackedCoco], tuple[Any, ...]]:
        """The set in a pickle. A process that multiprocessing starts shares the index; any other opens the folder."""
        if get_spawning_popen() is None:
            return (partial(PackedCoco, memory_map=self.memory_map), (self.directory,))
        own = {"_images", "_columns", "image_ids", "heights", "widths"}
        own |= {"_byte_begin", "_byte_count", "_offset", "_boxes", "_flags"}
        return (_share, ({name: value for name, value in vars(self).items() if name not in own},))

    @property
    def index_bytes(self) -> int:
        """Memory of the index without file names [bytes]; once for a process and the loader workers it starts."""
        return self._block.size

    @property
    def images_per_shard(self) -> tuple[int, ...]:
        """Images of each shard; shard by shard they are the images 0, 1, 2, ..."""
        return tuple(np.diff(self._first_image).tolist())

    def _locate(self, index: int) -> tuple[int, int]:
        """The shard that holds an image, and the image's place in it.

        Raises:
            IndexError: no such image; negative indexes do not count from the end.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {self.directory}: accepted are 0 to {len(self) - 1}")
        shard = bisect_right(self._first_image_list, index) - 1
        return shard, index - self._first_image_list[shard]

    def _read(self, shard: int, index: int, position: int, count: int) -> bytes | memoryview:
        """Bytes of a shard that belong to image `index`; raises PackError or MachineError where they cannot be read."""
        try:
            return self._files.read(shard, position, count)
        except OSError as error:
            kind = MachineError if is_machine_fault(error) else PackError
            raise kind(f"{self._where(shard, index)}: cannot be read ({error})") from error

    def file_name(self, index: int) -> str:
        """File name of image `index` in the source. Of a damaged one that is no UTF-8 it is what is left."""
        shard, local = self._locate(index)
        return self._file_names[shard].entry(local).decode("utf-8", "backslashreplace")

    def read_image_bytes(self, index: int, *, check: bool = True) -> bytes | memoryview:
        """The JPEG or PNG file of image `index`, as it was packed; with memory_map a view that copies nothing.

        Args:
            index: 0 to len - 1.
            check: compare the bytes with their checksum; False is for measuring what that costs.

        Raises:
            IndexError: no such image.
            PackError: the bytes differ from their checksum, or the shard is too short.
            MachineError: the file system failed.
        """
        shard, _ = self._locate(index)
        data = self._read(shard, index, int(self._byte_begin[index]), int(self._byte_count[index]))
        if check and crc32(data) != int(self._images["crc32"][index]):
            raise PackError(
                f"{self._where(shard, index)}: its bytes differ from their CRC-32; the shard is damaged or was "
                "replaced: check its sha256 against manifest.json, copy it again or pack the set again"
            )
        return data

    def _where(self, shard: int, index: int) -> str:
        return f"{self.shard_paths[shard]}: image id {self.image_ids[index]}"

    def annotations(self, index: int) -> ImageAnnotations:
        """The annotations of image `index`, crowd regions and degenerate boxes among them; m may be 0."""
        self._locate(index)
        return self._annotations(index, index + 1)

    def first_annotations(self, num_images: int) -> tuple[NDArray[np.int64], ImageAnnotations]:
        """The annotations of the first so many images, one after the other.

        Returns:
            The position of each annotation's image, and the annotations.
        """
        counts = np.diff(self._offset[: num_images + 1])
        return np.repeat(np.arange(num_images), counts), self._annotations(0, num_images)

    def _annotations(self, first: int, end: int) -> ImageAnnotations:
        part = slice(self._offset[first], self._offset[end])
        return ImageAnnotations(
            ids=self._columns["id"][part],
            boxes_xywh=self._boxes[part],
            category_ids=self._columns["category_id"][part],
            **{name: column[part] for name, column in self._flags.items()},
            areas=self._columns["area"][part],
        )

    def segmentations(self, index: int) -> list[Any]:
        """The m segmentations of image `index`, read from disk and decoded.

        Returns:
            For each annotation a list of polygons ([x0, y0, x1, y1, ...] in pixels), an RLE dict, or None
            where the source has none.

        Raises:
            PackError: they differ from their checksum, or are no JSON.
            MachineError: the file system failed.
        """
        shard, _ = self._locate(index)
        first, last = (int(self._offset[index + step] - self._first_annotation[shard]) for step in (0, 1))
        if first == last:
            return []
        blob = self._segmentations[shard]
        begins = self._read(shard, index, blob.offset + 8 * first, 8 * (last - first + 1))
        try:
            offset = np.frombuffer(begins, "<i8")
            position, count = blob.data + int(offset[0]), int(offset[-1] - offset[0])
        except (ValueError, IndexError) as error:  # the shard became shorter while it was open
            raise PackError(self._damaged(shard, index, str(error))) from error
        data = bytes(self._read(shard, index, position, count))
        if self.shard_format >= 2 and segmentation_crc32(offset, data) != self._images["segmentation_crc32"][index]:
            raise PackError(self._damaged(shard, index))
        begin = (offset - offset[0]).tolist()
        try:
            entries = [data[begin[k] : begin[k + 1]] for k in range(last - first)]
            return [json.loads(entry) if entry else None for entry in entries]
        except (ValueError, RecursionError) as error:
            raise PackError(self._damaged(shard, index, str(error))) from error

    def _damaged(self, shard: int, index: int, *why: str) -> str:
        return damaged_segmentations(self.shard_paths[shard], int(self.image_ids[index]), *why)

    def close(self) -> None:
        """Close this process's files; a later read opens them again."""
        self._files.close()


def _share(values: dict[str, Any]) -> PackedCoco:
    """The set again in a loader process, over the same memory."""
    pack = object.__new__(PackedCoco)
    vars(pack).update(values)
    pack._name_arrays()
    return pack
