"""Checks a pack as a whole: the manifest, agreement of the shards, and the annotation file of its source."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.box_counts import num_distinct
from data_prep.coco_source import image_numbers, number_record
from data_prep.findings import Findings
from data_prep.repairs import SOURCE_ID, repair_annotation, repair_category, repair_image, unique_names
from data_prep.shard_check import ShardReport, merge_counts
from data_prep.skips import count_skips, is_id
from megdet_hpc.data.coco_json import read_records
from megdet_hpc.data.pack_checks import READ_ERRORS, manifest_faults
from megdet_hpc.data.pack_index import index_faults
from megdet_hpc.data.shard_format import MANIFEST_NAME

COUNTED = ("images", "annotations")


def check_manifest_and_files(folder: Path, manifest: dict[str, Any]) -> Findings:
    """Contradictions in the manifest, and shards in the folder that it does not list."""
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


def check_index_file(folder: Path, manifest: dict[str, Any]) -> Findings:
    """The pack's index file, compared with shards that have no fault. A pack may lack it."""
    found = Findings()
    for fault in index_faults(folder, manifest):
        text = fault.replace(f"{folder}{os.sep}", "")
        found.add("index", f"{text}; remove it, and the next program that opens the pack makes it anew")
    return found


def num_skipped(manifest: dict[str, Any], what: str) -> int:
    """Number of `what` ("images" or "annotations") that packing left out."""
    return sum(manifest["summary"]["skipped"][what].values())


def check_across_shards(manifest: dict[str, Any], reports: Sequence[ShardReport]) -> Findings:
    """Ids and source positions over the whole pack, and the manifest's totals and summary.

    Args:
        manifest: a manifest without faults.
        reports: the reports of all shards, in their order.
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
        repeated = manifest["summary"].get("repeated_annotation_ids", 0) if what == "annotation" else 0
        if len(joined) - num_distinct(joined) != repeated:
            _check_unique(f"{what} id", joined, joined, shard, names, what, found)
        _check_unique(f"{what}s/source_index", source, joined, shard, names, what, found)
        skipped = num_skipped(manifest, f"{what}s")
        end = manifest["totals"][f"{what}s"] + skipped
        for k in np.flatnonzero(source >= end).tolist():
            text = f"{names[shard[k]]}: {what} id {joined[k]}: source_index is {source[k]}, accepted: 0 to {end - 1}"
            found.add("source_index", text)
        if complete and not skipped:  # then the positions are a permutation, and none may be missing
            held = np.zeros(end, np.bool_)
            held[source[(source >= 0) & (source < end)]] = True
            for absent in np.flatnonzero(~held).tolist():
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
    # An older packer did not sort the boxes, and its packs count some of them in another way.
    summed = tuple(count) if "trainable_boxes" in manifest["summary"] else (*COUNTED, "crowd")
    for section, keys in (("totals", (*COUNTED, "image_bytes")), ("summary", summed)):
        for key in keys:
            said = manifest[section].get(key)
            if said != count[key]:
                found.add("totals", f"{MANIFEST_NAME}: {section}.{key} is {said!r}, the shards hold {count[key]}")


def compare_annotations(
    folder: Path, manifest: dict[str, Any], reports: Sequence[ShardReport], original: dict[str, Any]
) -> Findings:
    """Rebuild every record from the shards and compare it with the original's at its position.

    Args:
        folder: the pack's folder.
        manifest: a manifest without faults.
        reports: the reports of all shards. Those without counts have a finding already and are left out.
        original: the annotation file's content, from `load_annotations`. The packer's repairs are made in it before
            records are compared.
    """
    found = Findings()
    for what in COUNTED:
        expected = manifest["totals"][what] + num_skipped(manifest, what)
        if len(original[what]) != expected:
            text = f"the original has {len(original[what])} {what}, the pack was made from {expected}"
            found.add("annotations", text)
    categories = [repair_category(category)[0] for category in original["categories"]]
    other = {**{key: value for key, value in original.items() if key not in COUNTED}, "categories": categories}
    for key in sorted(other.keys() | manifest["coco"].keys()):
        if key not in other or _differ(other[key], manifest["coco"].get(key, other)):
            found.add("annotations", f"{MANIFEST_NAME}: the key {key!r} differs from the original's")
    numbered = manifest["summary"].get("repaired", {}).get("images", {}).get("id_numbered")
    repair = _Repair(categories, image_numbers(original["images"]) if numbered else None)
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
                difference = _difference(what, position, record, original[what], repair)
                if difference is not None:
                    found.add("annotations", f"{name}: {difference}")
    return found


class _Repair:
    """The original's records as the packer repaired them.

    Args:
        categories: repaired.
        numbers: new image ids by old ones, under --number-images.
    """

    def __init__(self, categories: list[dict[str, Any]], numbers: dict[Any, int] | None) -> None:
        self.names, self.ids = unique_names(categories), {category["id"] for category in categories}
        self.numbers = numbers

    def image(self, original: Any, packed: dict[str, Any]) -> Any:
        """An original image. Values that come from its file and folder are taken from the packed image."""
        if self.numbers is not None:
            original = number_record(original, "id", self.numbers)
        record, _ = repair_image(original, lambda name: name == packed["file_name"].rpartition("/")[0])
        sizes = {key: packed[key] for key in ("width", "height")}
        return {**sizes, **record} if isinstance(record, dict) else record

    def annotation(self, original: Any, packed: dict[str, Any]) -> Any:
        """An original annotation. If it has no id, the id is taken from the packed annotation."""
        if self.numbers is not None:
            original = number_record(original, "image_id", self.numbers)
        record, _ = repair_annotation(original, self.names, self.ids)
        if not isinstance(record, dict) or is_id(record.get("id")):
            return record
        return {**record, "id": packed["id"], **({SOURCE_ID: record["id"]} if "id" in record else {})}


def _difference(what: str, position: int, record: dict[str, Any], originals: list[Any], repair: _Repair) -> str | None:
    """The difference between a rebuilt record and the original's at its position, or None."""
    other = originals[position] if 0 <= position < len(originals) else None
    if record == other:
        return None
    other = (repair.image if what == "images" else repair.annotation)(other, record)
    if record == other:
        return None
    whose = f"{what[:-1]} id {record['id']}"
    if what == "annotations":
        whose += f" of image id {record['image_id']}"
    else:
        whose += f" (file {record['file_name']!r})"
    if not isinstance(other, dict):
        return f"{whose}: the original has no record at {what}[{position}]"
    differing = [key for key in record.keys() | other.keys() if _differ(record.get(key, other), other.get(key, record))]
    if not differing:
        return None
    key = min(differing, key=lambda name: (name != "id", name))
    ours, theirs = (repr(r[key])[:80] if key in r else "absent" for r in (record, other))
    return f"{whose}: {key} is {ours}, the original says {theirs} ({what}[{position}])"


def _differ(one: Any, other: Any) -> bool:
    """Whether two values of JSON differ. NaN counts as equal to NaN."""
    return bool(one != other and json.dumps(one, sort_keys=True) != json.dumps(other, sort_keys=True))
