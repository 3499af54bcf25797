"""Rebuilds the COCO annotation file from a packed set, equal to the source under `json.load`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import h5py

from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.data.shard_format import (
    ANNOTATION_COLUMNS,
    NO_FLAG,
    Blob,
    PackError,
    columns_of,
    damaged_segmentations,
    image_segmentation_crc32,
)

Record = tuple[int, dict[str, Any]]
"""Position in the source's list, and the record there."""


def rebuild_coco(pack: PackedCoco, with_segmentations: bool = True) -> dict[str, Any]:
    """The source annotation file as a dictionary, in COCO's layout.

    It equals `json.load` of the source if packing skipped nothing: the order, the ids, further keys and absent keys
    are the same. What was skipped is left out.

    Args:
        pack: an open packed set.
        with_segmentations: False leaves out the "segmentation" keys. The scoring of boxes does not need them, and on
            COCO they are most of the memory.

    Raises:
        OSError: a shard cannot be read.
        PackError: segmentations differ from their checksum.
    """
    images: list[Record] = []
    annotations: list[Record] = []
    for path in pack.shard_paths:
        shard_images, shard_annotations = read_records(path, with_segmentations)
        images += shard_images
        annotations += shard_annotations
    return {
        **pack.manifest["coco"],
        "images": [record for _, record in sorted(images, key=itemgetter(0))],
        "annotations": [record for _, record in sorted(annotations, key=itemgetter(0))],
    }


def read_records(path: Path, with_segmentations: bool = True) -> tuple[list[Record], list[Record]]:
    """The images and the annotations of one shard as COCO has them.

    Raises:
        OSError: the shard cannot be read.
        PackError: an image's segmentations differ from their checksum; names the shard and the image.
    """
    with h5py.File(path, "r", locking=False) as file:
        return list(_images(file["images"])), list(_annotations(file, with_segmentations))


def _images(group: h5py.Group) -> Iterator[Record]:
    """Source index and record of each image of a shard."""
    column = {name: group[name][()].tolist() for name in ("id", "height", "width", "source_index")}
    file_name, extra = Blob.read(group, "file_name"), Blob.read(group, "extra")
    for index, source_index in enumerate(column["source_index"]):
        record = {name: column[name][index] for name in ("id", "height", "width")}
        record["file_name"] = file_name.entry(index).decode("utf-8")
        yield source_index, {**record, **json.loads(extra.entry(index) or b"{}")}


def _annotations(file: h5py.File, with_segmentations: bool) -> Iterator[Record]:
    """Source index and record of each annotation of a shard."""
    group = file["annotations"]
    shard_format = int(file.attrs["format_version"])
    column = {name: group[name][()].tolist() for name in columns_of(ANNOTATION_COLUMNS, shard_format)}
    extra = Blob.read(group, "extra")
    segmentation = Blob.read(group, "segmentation") if with_segmentations else None
    offset = group["offset"][()].tolist()
    if segmentation and shard_format >= 2:
        _check_segmentations(file, segmentation, offset)
    for image, image_id in enumerate(file["images/id"][()].tolist()):
        for index in range(offset[image], offset[image + 1]):
            record = {name: column[name][index] for name in ("id", "category_id", "bbox")}
            record["image_id"] = image_id
            if column["area"][index] == column["area"][index]:  # NaN stands for an absent key
                record["area"] = column["area"][index]
            for flag in ("iscrowd", "difficult"):
                if flag in column and column[flag][index] != NO_FLAG:
                    record[flag] = column[flag][index]
            if segmentation and (entry := segmentation.entry(index)):
                record["segmentation"] = json.loads(entry)
            yield column["source_index"][index], {**record, **json.loads(extra.entry(index) or b"{}")}


def _check_segmentations(file: h5py.File, segmentation: Blob, offset: list[int]) -> None:
    """Compare every image's segmentations with their checksum; raises PackError for the first that differ."""
    sums, ids = file["images/segmentation_crc32"][()].tolist(), file["images/id"][()].tolist()
    for image, (expected, image_id) in enumerate(zip(sums, ids, strict=True)):
        if image_segmentation_crc32(segmentation, offset[image], offset[image + 1]) != expected:
            raise PackError(damaged_segmentations(file.filename, image_id))
