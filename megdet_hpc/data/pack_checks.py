"""What must hold in a manifest and in a shard's index: checked at opening and, in full, by verify_pack.py.

A value may be wrong and yet possible, such as a changed digit of a box. Only the shard's SHA-256 shows that.

Shape legend: n images of a shard, m annotations of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from megdet_hpc.data.shard_format import (
    ANNOTATION_BLOBS,
    ANNOTATION_COLUMNS,
    ENCODINGS,
    FORMAT_NAME,
    IMAGE_BLOBS,
    IMAGE_COLUMNS,
    MANIFEST_NAME,
    NO_FLAG,
    PackError,
    columns_of,
    shard_name,
)

MEND = "copy it again or pack the set again"
SIDE_MAX = 2**31 - 1  # pixels; stored as int32

READ_ERRORS = (OSError, KeyError, ValueError, RuntimeError, TypeError, AttributeError, MemoryError)
"""Errors that h5py raises for a damaged file, also for a dataset that has become a group and a size beyond memory."""


class Fault(NamedTuple):
    """Entries of one dataset that break one rule."""

    dataset: str  # as "images/width"
    entries: NDArray[np.int64]  # their positions; at least one
    values: NDArray[Any]  # what they hold
    accepted: str

    def describe(self, number: int) -> str:
        """What is wrong with the fault's entry `number`."""
        value = self.values[number].tolist()
        return f"{self.dataset}[{self.entries[number]}] is {value}, accepted: {self.accepted}"


def manifest_faults(manifest: dict[str, Any]) -> list[str]:
    """The places where a manifest that `read_manifest` took contradicts itself."""
    faults = []
    shards, totals, coco = manifest["shards"], manifest["totals"], manifest["coco"]
    if not isinstance(shards, list) or not shards:
        return [f"shards is {shards!r}, expected a list of at least one shard"]
    for index, shard in enumerate(shards):
        counts = ("images", "annotations", "bytes")
        if not isinstance(shard, dict) or not all(_is_count(shard.get(key)) for key in counts):
            faults.append(f"shards[{index}] is {shard!r}, expected counts of {', '.join(counts)}")
        elif shard.get("file") != shard_name(index):
            faults.append(f"shards[{index}] names the file {shard.get('file')!r}, expected {shard_name(index)!r}")
        elif not isinstance(shard.get("sha256"), str):
            faults.append(f"shards[{index}] has the sha256 {shard.get('sha256')!r}, expected a text")
    if not isinstance(totals, dict) or not isinstance(manifest["summary"], dict):
        faults.append("totals or summary is no object")
    elif not faults:
        for key in ("images", "annotations"):
            found = sum(shard[key] for shard in shards)
            if totals.get(key) != found:
                faults.append(f"totals say {totals.get(key)!r} {key}, the shards' counts add up to {found}")
    source = manifest["source"]
    if not isinstance(source, dict) or not isinstance(source.get("sha256"), str):
        faults.append(f"source is {source!r}, expected file and sha256")
    categories = coco.get("categories") if isinstance(coco, dict) else None
    if not isinstance(categories, list) or not all(isinstance(c, dict) and "id" in c for c in categories):
        faults.append("coco has no list of categories with ids")
    return faults


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def check_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Refuse a manifest that contradicts itself.

    Raises:
        PackError: names the first of `manifest_faults`.
    """
    for fault in manifest_faults(manifest):
        raise PackError(f"{directory / MANIFEST_NAME}: {fault}; {MEND}")


def attribute_faults(file: h5py.File, shard: int, source_sha256: str, shard_format: int) -> Iterator[tuple[str, str]]:
    """Name and description of each attribute by which a file is not shard number `shard` of its pack."""
    expected = {
        "format": FORMAT_NAME,
        "format_version": shard_format,
        "shard": shard,
        "source_sha256": source_sha256,
    }
    for name, value in expected.items():
        found = file.attrs.get(name)
        found = found.item() if isinstance(found, np.generic) else found
        if found != value:
            yield name, f"attribute {name} is {found!r}, expected {value!r}"


def _expected_shapes(
    num_images: int, num_annotations: int, shard_format: int
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of every dataset but the blobs' bytes."""
    n, m = num_images, num_annotations
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    shapes |= {f"images/{name}": (dtype, (n,)) for name, dtype in columns_of(IMAGE_COLUMNS, shard_format).items()}
    shapes |= {f"images/{name}_offset": ("<i8", (n + 1,)) for name in IMAGE_BLOBS}
    shapes["annotations/offset"] = ("<i8", (n + 1,))
    columns = columns_of(ANNOTATION_COLUMNS, shard_format)
    shapes |= {f"annotations/{k}": (v, (m, 4) if k == "bbox" else (m,)) for k, v in columns.items()}
    shapes |= {f"annotations/{name}_offset": ("<i8", (m + 1,)) for name in ANNOTATION_BLOBS}
    return shapes


def read_columns(file: h5py.File, num_images: int, num_annotations: int, shard_format: int) -> dict[str, NDArray[Any]]:
    """Every dataset of a shard but the blobs' bytes, by its path.

    Args:
        file: an open shard.
        num_images, num_annotations: n and m as the manifest gives them.
        shard_format: the format that the manifest gives.

    Raises:
        PackError: a dataset has another type or shape.
        KeyError, OSError, RuntimeError: it is missing or cannot be read.
    """
    columns = {}
    for name, (dtype, shape) in _expected_shapes(num_images, num_annotations, shard_format).items():
        dataset = file[name]
        if dataset.dtype != np.dtype(dtype) or dataset.shape != shape:
            raise PackError(
                f"{file.filename}: {name} is {dataset.dtype} of shape {dataset.shape}, the format and manifest.json's "
                f"counts say {np.dtype(dtype)} of shape {shape}; {MEND}"
            )
        columns[name] = dataset[()]
    return columns


def index_faults(file: h5py.File, columns: dict[str, NDArray[Any]], category_ids: Collection[int]) -> Iterator[Fault]:
    """Offsets that leave their data and values that the format does not have.

    Args:
        file: an open shard.
        columns: the columns that `read_columns` gave.
        category_ids: those of the manifest's categories.
    """
    ends = {f"{group}/{name}": f"{group}/{name}_offset" for group, names in _BLOBS for name in names}
    for name, offset in ends.items():
        yield from _offset_faults(offset, columns[offset], file[name].size)
    yield from _offset_faults("annotations/offset", columns["annotations/offset"], len(columns["annotations/id"]))

    bbox, area = columns["annotations/bbox"], columns["annotations/area"]
    wrong = {
        "images/height": (columns["images/height"] < 1, f"1 to {SIDE_MAX} pixels"),
        "images/width": (columns["images/width"] < 1, f"1 to {SIDE_MAX} pixels"),
        "images/encoding": (columns["images/encoding"] >= len(ENCODINGS), f"0 to {len(ENCODINGS) - 1}"),
        "images/source_index": (columns["images/source_index"] < 0, "0 or more"),
        "annotations/source_index": (columns["annotations/source_index"] < 0, "0 or more"),
        "annotations/category_id": (
            ~np.isin(columns["annotations/category_id"], np.fromiter(category_ids, np.int64)),
            "the ids of the manifest's categories",
        ),
        "annotations/bbox": (
            ~np.isfinite(bbox).all(axis=1) | (bbox[:, 2:] < 0).any(axis=1),
            "4 finite numbers x, y, width >= 0, height >= 0",
        ),
        "annotations/area": (np.isinf(area), "a finite number, or NaN for none"),
    }
    for name in ("annotations/iscrowd", "annotations/difficult"):
        if name in columns:
            wrong[name] = (columns[name] < NO_FLAG) | (columns[name] > 1), f"0, 1, or {NO_FLAG} for none"
    for name, (mask, accepted) in wrong.items():
        if mask.any():
            entries = np.flatnonzero(mask)
            yield Fault(name, entries, columns[name][entries], accepted)


_BLOBS = (("images", IMAGE_BLOBS), ("annotations", ANNOTATION_BLOBS))


def _offset_faults(name: str, offset: NDArray[np.int64], end: int) -> Iterator[Fault]:
    """Where an offset index does not rise from 0 to `end`."""
    bad = np.zeros(len(offset), np.bool_)
    bad[1:] = offset[1:] < offset[:-1]
    bad |= (offset < 0) | (offset > end)
    bad[0] |= offset[0] != 0
    bad[-1] |= offset[-1] != end
    if bad.any():
        entries = np.flatnonzero(bad)
        yield Fault(name, entries, offset[entries], f"rising from 0 to {end}")


def check_index(
    file: h5py.File, num_images: int, num_annotations: int, category_ids: Collection[int], shard_format: int
) -> None:
    """Refuse a shard whose index cannot be right, before anything is read by it.

    Args:
        file: an open shard.
        num_images, num_annotations: n and m as the manifest gives them.
        category_ids: those of the manifest's categories.
        shard_format: the format that the manifest gives.

    Raises:
        PackError: names the file, the dataset's entry and, for an image's, its id.
    """
    columns = read_columns(file, num_images, num_annotations, shard_format)
    for fault in index_faults(file, columns, category_ids):
        image = image_of(columns, fault.dataset, int(fault.entries[0]))
        whose = "" if image is None else f"image id {columns['images/id'][image]}: "
        raise PackError(f"{file.filename}: {whose}{fault.describe(0)}; {MEND}")


def image_of(columns: dict[str, NDArray[Any]], dataset: str, entry: int) -> int | None:
    """The image (its place in the shard) that an entry of a dataset belongs to; None where that is unknown."""
    num_images = len(columns["images/id"])
    if dataset.startswith("images/") or dataset == "annotations/offset":
        return min(entry, num_images - 1) if num_images else None
    offset = columns["annotations/offset"]
    image = int(np.searchsorted(offset, entry, side="right")) - 1
    # A damaged index gives no answer, or a wrong one: believe it only where it agrees.
    return image if 0 <= image < num_images and offset[image] <= entry < offset[image + 1] else None


def check_unique_images(directory: Path, image_ids: NDArray[np.int64]) -> None:
    """Refuse a pack in which an image id occurs twice.

    Raises:
        PackError: names the id.
    """
    ids, counts = np.unique(image_ids, return_counts=True)
    if len(ids) < len(image_ids):
        twice = ids[counts > 1][0]
        raise PackError(f"{directory}: image id {twice} occurs twice, so a shard is damaged; run verify_pack.py")
