"""Checks a pack as a whole: the manifest, what its shards must agree in, and its source's annotation file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.findings import Findings
from data_prep.shard_check import ShardReport, merge_counts
from data_prep.skips import count_skips
from megdet_hpc.data.coco_json import read_records
from megdet_hpc.data.pack_checks import READ_ERRORS, manifest_faults
from megdet_hpc.data.shard_format import MANIFEST_NAME
from megdet_hpc.errors import UserError

COUNTED = ("images", "annotations")


def check_manifest_and_files(folder: Path, manifest: dict[str, Any]) -> Findings:
    """What the manifest contradicts itself in, and shards in the folder that it does not list."""
    found = Findings()
    for fault in manifest_faults(manifest):
        found.add("manifest", f"{MANIFEST_NAME}: {fault}")
    if found:
        return found
    try:
        agree = count_skips(manifest["skipped"]) == manifest["summary"]["skipped"]
    except (KeyError, TypeError, AttributeError):
        agree = False
    if not agree:
        found.add("manifest", f"{MANIFEST_NAME}: summary.skipped does not count what the list skipped names")
    listed = {shard["file"] for shard in manifest["shards"]}
    for path in sorted(folder.glob("shard-*.h5")):
        if path.name not in listed:
            found.add("foreign shard", f"{path.name}: lies in the folder, but manifest.json does not list it")
    return found


def num_skipped(manifest: dict[str, Any], what: str) -> int:
    """Number of `what` ("images" or "annotations") that packing left out."""
    return sum(manifest["summary"]["skipped"][what].values())


def check_across_shards(manifest: dict[str, Any], reports: Sequence[ShardReport]) -> Findings:
    """Ids and source positions over the whole pack, and the manifest's totals and summary.

    Args:
        manifest: without faults.
        reports: of all shards, in their order.
    """
    found = Findings()
    names = [shard["file"] for shard in manifest["shards"]]
    complete = all(report.count is not None for report in reports)
    for what, ids, sources in (
        ("image", [r.image_ids for r in reports], [r.image_sources for r in reports]),
        ("annotation", [r.annotation_ids for r in reports], [r.annotation_sources for r in reports]),
    ):
        shard = np.repeat(np.arange(len(reports)), [len(part) for part in ids])
        joined, source = np.concatenate(ids), np.concatenate(sources)
        _check_unique(f"{what} id", joined, joined, shard, names, what, found)
        _check_unique(f"{what}s/source_index", source, joined, shard, names, what, found)
        skipped = num_skipped(manifest, f"{what}s")
        end = manifest["totals"][f"{what}s"] + skipped
        for k in np.flatnonzero(source >= end).tolist():
            text = f"{names[shard[k]]}: {what} id {joined[k]}: source_index is {source[k]}, accepted: 0 to {end - 1}"
            found.add("source_index", text)
        if complete and not skipped:  # then the positions are a permutation: none may be absent
            for absent in np.setdiff1d(np.arange(end), source).tolist():
                found.add("source_index", f"no shard holds the {what} at position {absent} of the source's {what}s")
    if complete:
        _check_totals(manifest, merge_counts(list(reports)), found)
    return found


def _check_unique(
    label: str,
    values: NDArray[np.int64],
    ids: NDArray[np.int64],
    shard: NDArray[np.int64],
    names: list[str],
    what: str,
    found: Findings,
) -> None:
    """Report each value that occurs more than once, with the shards and records that hold it."""
    unique, counts = np.unique(values, return_counts=True)
    kind = "source_index" if label.endswith("source_index") else "duplicate id"
    repeated = unique[counts > 1].tolist()
    for number, value in enumerate(repeated):
        if not found.wants(kind):
            found.skip(kind, len(repeated) - number)
            return
        holders = np.flatnonzero(values == value)[:4].tolist()
        where = ", ".join(f"{names[shard[k]]} ({what} id {ids[k]})" for k in holders)
        found.add(kind, f"{label} {value} occurs {int((values == value).sum())} times: {where}")


def _check_totals(manifest: dict[str, Any], count: Counter[str], found: Findings) -> None:
    for section, keys in (("totals", (*COUNTED, "image_bytes")), ("summary", tuple(count))):
        for key in keys:
            said = manifest[section].get(key)
            if said != count[key]:
                found.add("totals", f"{MANIFEST_NAME}: {section}.{key} is {said!r}, the shards hold {count[key]}")


def read_original(path: Path) -> dict[str, Any]:
    """Read the annotation file that a pack is compared with.

    Raises:
        UserError: unreadable, or no COCO instances file.
    """
    try:
        coco = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(coco, dict) or not all(isinstance(coco.get(key), list) for key in COUNTED):
        raise UserError(f"{path}: expected an object with the lists images and annotations")
    return coco


def compare_annotations(
    folder: Path, manifest: dict[str, Any], reports: Sequence[ShardReport], original: dict[str, Any]
) -> Findings:
    """Rebuild every record from the shards and compare it with the original's at its position.

    Args:
        folder: of the pack.
        manifest: without faults.
        reports: of all shards; one without counts has been reported already and is left out.
        original: the annotation file's content; equality is that of `json.load`.
    """
    found = Findings()
    for what in COUNTED:
        expected = manifest["totals"][what] + num_skipped(manifest, what)
        if len(original[what]) != expected:
            text = f"the original has {len(original[what])} {what}, the pack was made from {expected}"
            found.add("annotations", text)
    for key in sorted((original.keys() - set(COUNTED)) | manifest["coco"].keys()):
        if key not in original or original[key] != manifest["coco"].get(key, original):
            found.add("annotations", f"{MANIFEST_NAME}: the key {key!r} differs from the original's")
    for report in reports:
        if report.count is None:
            continue
        name = manifest["shards"][report.index]["file"]
        try:
            both = read_records(folder / name)
        except READ_ERRORS as error:
            found.add("annotations", f"{name}: its records cannot be rebuilt ({error})")
            continue
        for what, records in zip(COUNTED, both, strict=True):
            for position, record in records:
                difference = _difference(what, position, record, original[what])
                if difference is not None:
                    found.add("annotations", f"{name}: {difference}")
    return found


def _difference(what: str, position: int, record: dict[str, Any], originals: list[Any]) -> str | None:
    """How a rebuilt record differs from the original's at its position, or None."""
    other = originals[position] if 0 <= position < len(originals) else None
    if record == other:
        return None
    whose = f"{what[:-1]} id {record['id']}"
    if what == "annotations":
        whose += f" of image id {record['image_id']}"
    else:
        whose += f" (file {record['file_name']!r})"
    if not isinstance(other, dict):
        return f"{whose}: the original has no record at {what}[{position}]"
    differing = [key for key in record.keys() | other.keys() if record.get(key, other) != other.get(key, record)]
    key = min(differing, key=lambda name: (name != "id", name))
    ours, theirs = (repr(r[key])[:80] if key in r else "absent" for r in (record, other))
    return f"{whose}: {key} is {ours}, the original says {theirs} ({what}[{position}])"
