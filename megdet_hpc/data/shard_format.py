"""The packed data format: names and types of what a shard and its manifest hold (docs/data_format.md).

Shared by the packer (`data_prep/pack_coco.py`) and the reader (`packed_coco.py`); imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from megdet_hpc.errors import UserError
from megdet_hpc.programs import as_called_here

FORMAT_NAME = "megdet_hpc.packed_coco"
FORMAT_VERSION = 2
"""Format of the shards that the packer writes. Format 1 has neither of NEW_IN_2 and is read all the same."""
FORMATS = (1, 2)
MANIFEST_NAME = "manifest.json"

MAX_SHARDS = 512
"""A reader holds one open file per shard, and the usual limit of a process is 1024."""

ENCODINGS = ("JPEG", "PNG")
"""File formats by their number in `images/encoding`; both decode with `decode.decode_rgb`."""

ORIENTATIONS = ("stored", "upright")
"""Pixels that a pack's sizes and boxes count: those of the files, or those of the pictures turned by EXIF."""

# One value (or row of four) per image or annotation. Little-endian, so that equal input gives equal bytes.
IMAGE_COLUMNS = {
    "id": "<i8",
    "height": "<i4",  # pixels as stored; of an upright pack as EXIF turns them
    "width": "<i4",
    "encoding": "|u1",  # index into ENCODINGS
    "crc32": "<u4",  # zlib.crc32 of the image's bytes
    "segmentation_crc32": "<u4",  # of the image's segmentations, see segmentation_crc32()
    "source_index": "<i8",  # position in the source's "images"
}
ANNOTATION_COLUMNS = {
    "id": "<i8",
    "category_id": "<i8",
    "bbox": "<f8",  # [num_annotations, 4] x, y, width, height in pixels
    "area": "<f8",  # square pixels; NaN where the source has no "area"
    "iscrowd": "|i1",  # 0 or 1; -1 where the source has no "iscrowd"
    "difficult": "|i1",  # 0 or 1; -1 where the source's "difficult" is neither
    "source_index": "<i8",  # position in the source's "annotations"
}
NO_FLAG = -1
NEW_IN_2 = ("segmentation_crc32", "difficult")

# Byte strings of varying length, end to end in `NAME`; entry i is NAME[NAME_offset[i]:NAME_offset[i + 1]].
# "segmentation" and "extra" (all keys without a column) are JSON; an empty entry: the source has none.
IMAGE_BLOBS = ("bytes", "file_name", "extra")
ANNOTATION_BLOBS = ("segmentation", "extra")

IMAGE_KEYS = frozenset({"id", "height", "width", "file_name"})
ANNOTATION_KEYS = frozenset({"id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation"})
"""Keys with a column of their own; "difficult" is a further one where its value is 0 or 1."""


class PackError(UserError):
    """A packed folder that is unfinished, damaged or of another version. Names the file and what to do."""


def shard_name(index: int) -> str:
    """File name of a shard, counted from 0."""
    return f"shard-{index:05d}.h5"


def encode_json(value: Any) -> bytes:
    """Compact ASCII JSON that `json.loads` turns into an equal value (floats by their shortest repr)."""
    return json.dumps(value, separators=(",", ":")).encode("ascii")


def file_position(dataset: h5py.Dataset) -> int:
    """Position of a contiguous dataset's first byte in its file, for positioned reads; 0 for an empty one.

    Raises:
        PackError: the dataset is chunked or compressed, so its bytes do not lie in one run.
    """
    if dataset.chunks is not None:
        raise PackError(f"{dataset.file.filename}: {dataset.name} is not contiguous; pack the set again")
    position = dataset.id.get_offset()
    return 0 if position is None else int(position)


class Blob(NamedTuple):
    """Byte strings held in memory, end to end."""

    data: NDArray[np.uint8]
    offset: NDArray[np.int64]  # [num_entries + 1]

    @classmethod
    def read(cls, group: h5py.Group, name: str) -> Blob:
        """Read the blob `name` of a shard's group."""
        return cls(group[name][()], group[f"{name}_offset"][()])

    def entry(self, index: int) -> bytes:
        """One byte string."""
        return self.data[self.offset[index] : self.offset[index + 1]].tobytes()


def image_segmentation_crc32(segmentation: Blob, first: int, last: int) -> int:
    """The checksum of the segmentations of an image whose annotations are `first` to `last` - 1 of a shard."""
    offset = segmentation.offset[first : last + 1]
    return segmentation_crc32(offset, segmentation.data[offset[0] : offset[-1]].tobytes())


def damaged_segmentations(shard: object, image_id: int, why: str = "their bytes differ from their CRC-32") -> str:
    """The message for an image whose segmentations cannot be used."""
    return f"{shard}: image id {image_id}: its segmentations are damaged ({why}); copy it again or pack the set again"


def manifest_hash(directory: Path) -> str:
    """SHA-256 of a pack's manifest, which holds those of its shards: equal on two hosts for equal packs."""
    return hashlib.sha256((directory / MANIFEST_NAME).read_bytes()).hexdigest()


def manifest_version(orientation: str, shard_format: int = FORMAT_VERSION) -> int:
    """The manifest's version number: that of the shards, and one more in an upright pack.

    So a reader that turns no image refuses an upright pack, and a reader of an older format refuses a newer one.
    """
    return shard_format + (orientation == "upright")


def shard_format_of(manifest: dict[str, Any]) -> int:
    """The format of the shards that a manifest of `read_manifest` lists."""
    return int(manifest["version"]) - (manifest.get("orientation") == "upright")


def columns_of(columns: dict[str, str], shard_format: int) -> dict[str, str]:
    """Those of IMAGE_COLUMNS or ANNOTATION_COLUMNS that a format has."""
    return {name: dtype for name, dtype in columns.items() if shard_format >= 2 or name not in NEW_IN_2}


def segmentation_crc32(offset: NDArray[np.int64], data: bytes) -> int:
    """The checksum of one image's segmentations.

    Args:
        offset: where each of its m entries begins and where the last one ends, from any origin; [m + 1].
        data: the entries end to end.

    Returns:
        The CRC-32 of the offsets, counted from the first, as little-endian int64, followed by the entries: so a shifted
        border between two annotations shows too.
    """
    return zlib.crc32(data, zlib.crc32((offset - offset[0]).astype("<i8").tobytes()))


_PICTURES = (".jpg", ".jpeg", ".png")


def _without_manifest(directory: Path) -> str:
    """What a folder without a manifest is instead of a pack. The packer gives a pack its name once it is finished."""
    inside = sorted(directory.iterdir())
    packs = [folder.name for folder in inside if (folder / MANIFEST_NAME).is_file()]
    if packs:
        return f"{directory}: holds packed sets and is none; name one of them: {', '.join(packs)}"
    if directory.name.endswith(".partial"):
        return f"{directory}: an unfinished pack; the same command of python data_prep/pack_coco.py again finishes it"
    if any(file.suffix == ".h5" for file in inside):
        return f"{directory / MANIFEST_NAME}: missing, so this copy of a pack is not whole; copy or pack it again"
    hint = "python data_prep/pack_coco.py packs a set, python -m megdet_hpc.predict detects in pictures"
    if any(file.suffix.lower() in _PICTURES for file in inside):
        return f"{directory}: holds images and no packed set; {hint}"
    return f"{directory}: holds no packed set, since it has no {MANIFEST_NAME}; {hint}"


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read and check a packed folder's manifest.

    Returns:
        The manifest; its keys are listed in docs/data_format.md.

    Raises:
        PackError: no such folder, no manifest, not JSON, another format or version.
    """
    path = directory / MANIFEST_NAME
    if not directory.is_dir():
        unfinished = directory.with_name(directory.name + ".partial")
        hint = (
            "run the same command of pack_coco again to finish it"
            if unfinished.is_dir()
            else as_called_here("pack the set with python data_prep/pack_coco.py")
        )
        raise PackError(f"{directory}: no such folder; {hint}")
    if not path.is_file():
        raise PackError(as_called_here(_without_manifest(directory)))
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise PackError(f"{path}: not valid JSON ({error}); copy it or pack the set again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT_NAME:
        raise PackError(f"{path}: no manifest of format {FORMAT_NAME}; give a folder that pack_coco.py wrote")
    orientation = manifest.get("orientation", ORIENTATIONS[0])
    if orientation not in ORIENTATIONS:
        raise PackError(f"{path}: orientation {orientation!r}, this reader knows {' and '.join(ORIENTATIONS)}")
    known = [manifest_version(orientation, shard_format) for shard_format in FORMATS]
    if manifest.get("version") not in known:
        raise PackError(
            f"{path}: format version {manifest.get('version')!r} with orientation {orientation}, this reader knows "
            f"{' and '.join(map(str, known))}; pack the set again with this version"
        )
    missing = {"shards", "totals", "coco", "source", "skipped", "summary"} - manifest.keys()
    if missing:
        raise PackError(f"{path}: without {', '.join(sorted(missing))}; copy it or pack the set again")
    return manifest
