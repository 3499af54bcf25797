"""Reads a packed COCO set: the index mapped, image bytes by positioned reads (docs/data_format.md).

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

import numpy as np
from numpy.typing import NDArray

from megdet_hpc.data.pack_checks import check_manifest
from megdet_hpc.data.pack_index import open_index
from megdet_hpc.data.shard_files import ShardFiles
from megdet_hpc.data.shard_format import (
    PackError,
    damaged_segmentations,
    read_manifest,
    segmentation_crc32,
    shard_format_of,
)
from megdet_hpc.errors import file_error

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


class PackedCoco:
    """A finished packed folder, opened for reading.

    The index takes 59 bytes per annotation and 80 per image: 57 MiB for the 118k images and 860k annotations of COCO
    train2017. It is a file that all processes of a node map (`pack_index`). Loader processes share the very mapping of
    the process that opened it, under fork, forkserver and spawn. Any other pickle holds the folder's name and opens it
    anew. Images and segmentations stay on disk. Each process opens its own files at its first read.

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
        self.num_annotations = int(self._first_annotation[-1])
        for shard in range(len(self.shard_paths)):
            self._files.check_size(shard)
        self.index = open_index(self.directory, self.manifest)

    def __len__(self) -> int:
        """Number of images."""
        return self._first_image_list[-1]

    def __reduce__(self) -> tuple[Callable[..., PackedCoco], tuple[Any, ...]]:
        """The set in a pickle. A process that multiprocessing starts shares the index; any other opens the folder."""
        if get_spawning_popen() is None:
            return (partial(PackedCoco, memory_map=self.memory_map), (self.directory,))
        return (_share, (vars(self),))

    @property
    def image_ids(self) -> NDArray[np.int64]:
        """COCO's id of each image, [n]."""
        return self.index.image_ids

    @property
    def heights(self) -> NDArray[np.int32]:
        """Height of each image, [n] pixels."""
        return self.index.heights

    @property
    def widths(self) -> NDArray[np.int32]:
        """Width of each image, [n] pixels."""
        return self.index.widths

    @property
    def index_bytes(self) -> int:
        """Size of the index [bytes]; `index.origin` says who shares it."""
        return self.index.block.size

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
            raise file_error(error, f"{self._where(shard, index)}: cannot be read ({error})", PackError) from error

    def file_name(self, index: int) -> str:
        """File name of image `index` in the source. Of a damaged one that is no UTF-8 it is what is left."""
        self._locate(index)
        return self.index.file_name(index).decode("utf-8", "backslashreplace")

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
        data = self._read(shard, index, int(self.index.byte_begin[index]), int(self.index.byte_count[index]))
        if check and crc32(data) != int(self.index.crc32[index]):
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
        counts = np.diff(self.index.offset[: num_images + 1])
        return np.repeat(np.arange(num_images), counts), self._annotations(0, num_images)

    def _annotations(self, first: int, end: int) -> ImageAnnotations:
        part = slice(self.index.offset[first], self.index.offset[end])
        return ImageAnnotations(
            ids=self.index.ids[part],
            boxes_xywh=self.index.boxes[part],
            category_ids=self.index.category_ids[part],
            **{name: column[part] for name, column in self.index.flags.items()},
            areas=self.index.areas[part],
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
        first, last = (int(self.index.offset[index + step] - self._first_annotation[shard]) for step in (0, 1))
        if first == last:
            return []
        begin_of_data, begin_of_offsets = self.index.segmentations[shard].tolist()
        begins = self._read(shard, index, begin_of_offsets + 8 * first, 8 * (last - first + 1))
        try:
            offset = np.frombuffer(begins, "<i8")
            position, count = begin_of_data + int(offset[0]), int(offset[-1] - offset[0])
        except (ValueError, IndexError) as error:  # the shard became shorter while it was open
            raise PackError(self._damaged(shard, index, str(error))) from error
        data = bytes(self._read(shard, index, position, count))
        if self.shard_format >= 2 and segmentation_crc32(offset, data) != self.index.segmentation_crc32[index]:
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
    return pack
