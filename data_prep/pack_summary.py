"""The manifest of a finished pack, and the summary that the packer prints."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_prep.box_counts import Boxes, count_boxes, num_distinct, sort_boxes
from data_prep.coco_source import CocoSource, SourceImage, places
from data_prep.likely_causes import NAMES_SHOWN, unused_categories, warnings
from data_prep.repairs import REPAIRS
from data_prep.skips import Skips, count_skips
from megdet_hpc import __version__
from megdet_hpc.data.shard_format import FORMAT_NAME, manifest_version

GIB = 2**30
_IMAGES = 2**16  # whose annotations are looked at together
_MOST_BOXES = 2_000_000  # in the sample from which likely causes are guessed; a smaller set is looked at as a whole
LABEL_WIDTH = 32
# Label, key of the manifest's summary, treatment. Each annotation is counted once in the lines from "trainable boxes"
# to "boxes outside their image".
LINES = (
    ("images", "images", ""),
    ("annotations", "annotations", ""),
    ("images without annotations", "images_without_annotations", ""),
    ("images without a trainable box", "images_without_trainable_box", "kept; trained on as background"),
    ("trainable boxes", "trainable_boxes", "at least 1 x 1 pixel inside the image"),
    ("crowd regions", "crowd", "kept; training leaves them out, scoring ignores what lies in them"),
    ("boxes of zero size", "zero_size_boxes", "kept; training leaves them out"),
    ("boxes thinner than 1 pixel", "thin_boxes", "kept; training leaves them out unless its resize makes them 1 pixel"),
    ("boxes outside their image", "boxes_outside", "kept; training leaves them out"),
    ("boxes partly outside", "boxes_partly_outside", "kept as they are; training cuts them at the edge"),
)
EXIF_NOTES = {
    "stored": "boxes are taken as those of the stored pixels; if drawn on upright pictures: --orientation upright",
    "upright": "boxes are taken as those of the upright pictures; decoding turns the pixels",
}
# Label and note by the summary's key. A line is printed if its number is not 0.
PIXEL_NOTES = {
    "sixteen_bits": ("images of 16 bits", "reduced to 8, 65535 becomes 255"),
    "sixteen_bits_dark": ("nearly black among them", "no value reaches 16384: scale them first"),
    "transparency": ("images with transparency", "transparent pixels are seen on white"),
    "cmyk": ("CMYK images", "converted to RGB without a colour profile"),
}


def make_manifest(
    source: CocoSource,
    images: Sequence[SourceImage],
    arguments: argparse.Namespace,
    reports: list[dict[str, Any]],
    skips: Skips,
) -> dict[str, Any]:
    """The manifest. It holds no times and no machine names, so equal input gives equal bytes.

    Args:
        source: the annotation file.
        images: the images that the shards were asked to pack.
        arguments: the command line's arguments.
        reports: the reports of all shards, in their order, with the images that were left out.
        skips: records that were left out or repaired before the shards.
    """
    count: Counter[str] = Counter()
    for report in reports:
        count.update(report["count"])
    left_out = [entry for report in reports for entry in report["skipped"]]
    skipped = skips.entries + left_out
    gone = {entry["image_id"] for entry in left_out if entry.get("images")}
    packed = [image for image in images if image.record["id"] not in gone]
    summary = {**count, **_describe_labels(source, packed)}
    repaired = {kind: dict(sorted(repairs.items())) for kind, repairs in sorted(skips.repairs.items())}
    return {
        "format": FORMAT_NAME,
        "version": manifest_version(arguments.orientation),
        "packer": f"pack_coco {__version__}",
        "source": {"file": source.path.name, "sha256": source.sha256},
        "shard_mib": arguments.shard_mib,
        "orientation": arguments.orientation,
        "shards": [report["shard"] for report in reports],
        "totals": {key: count[key] for key in ("images", "annotations", "image_bytes")},
        "summary": {**summary, "repaired": repaired, "skipped": count_skips(skipped)},
        "skipped": skipped,
        "coco": source.other,
    }


def _describe_labels(source: CocoSource, images: Sequence[SourceImage]) -> dict[str, Any]:
    """The part of the summary about training data and warnings. A part of the set is in memory at a time."""
    categories = source.other["categories"]
    step = max(1, len(source.annotations) // _MOST_BOXES)
    count: Counter[str] = Counter()
    used: set[int] = set()
    sample, ids = [], [np.empty(0, np.int64)]
    for begin in range(0, len(images), _IMAGES):
        part = images[begin : begin + _IMAGES]
        annotations = source.annotations.of(places(part))
        boxes = Boxes.of(part, annotations)
        kind = sort_boxes(boxes)
        count.update(count_boxes(boxes, kind))
        used.update(np.unique(boxes.category_id[kind.trainable]).tolist())
        sample.append(boxes.every(step))
        ids.append(annotations.rows["id"].copy())
    unused = unused_categories(used, categories)
    boxes = Boxes.joined(sample)
    warned = warnings(boxes, sort_boxes(boxes), categories, unused)
    if step > 1:
        warned = [f"{text} (one image in {step} was looked at)" for text in warned]
    names = Counter(os.path.normpath(image.record["file_name"]) for image in images)
    repeated: dict[str, list[int]] = {}
    if len(names) < len(images):
        for image in images:
            if names[name := os.path.normpath(image.record["file_name"])] > 1:
                repeated.setdefault(name, []).append(image.record["id"])
    if repeated:
        name, own = next(iter(repeated.items()))
        warned.append(
            f"file names that occur in several image records: {len(repeated):,}, the first {name!r} in image ids "
            f"{', '.join(map(str, own[:5]))}; were sets merged into one folder, and files overwritten?"
        )
    every_id = np.concatenate(ids)
    return {
        **count,
        "categories": len(categories),
        "categories_without_box": len(unused),
        "first_categories_without_box": unused[:NAMES_SHOWN],
        "repeated_file_names": len(repeated),
        "images_of_repeated_file_names": sum(map(len, repeated.values())),
        "repeated_annotation_ids": len(every_id) - num_distinct(every_id),
        "warnings": warned,
    }


def _line(label: str, value: str, note: str = "") -> None:
    print(f"{label:<{LABEL_WIDTH}} {value:>12}" + (f"   {note}" if note else ""))


def print_summary(
    manifest: dict[str, Any], reports: list[dict[str, Any]], seconds: float, planning_seconds: float
) -> None:
    """Print what was packed, in numbers.

    Args:
        manifest: the pack's manifest.
        reports: the reports of its shards.
        seconds: time that packing took.
        planning_seconds: part of this time before the first shard.
    """
    summary = manifest["summary"]
    written = sum(report["count"]["images"] for report in reports if not report["kept"])
    kept = sum(report["kept"] for report in reports)
    for label, key, note in LINES:
        _line(label, f"{summary[key]:,}", note)
    _print_pixels(manifest)
    _line("categories", f"{summary['categories']:,}")
    unused = summary["first_categories_without_box"]
    more = ", ..." if summary["categories_without_box"] > len(unused) else ""
    _line("categories without such a box", f"{summary['categories_without_box']:,}", ", ".join(unused) + more)
    number = summary["images_of_repeated_file_names"]
    _line(
        "file names that occur repeatedly",
        f"{summary['repeated_file_names']:,}",
        f"in {number:,} image records" if number else "",
    )
    number = summary["repeated_annotation_ids"]
    _line("repeated annotation ids", f"{number:,}", "kept; scoring numbers them anew" if number else "")
    for kind, repairs in summary["repaired"].items():
        for repair, number in repairs.items():
            _line(f"repaired {kind}", f"{number:,}", REPAIRS[repair])
    for kind, reasons in summary["skipped"].items():
        for reason, number in sorted(reasons.items()):
            _line(f"skipped {kind}", f"{number:,}", reason)
    _line("shards", f"{len(reports):,}", f"{kept} kept from an earlier run")
    _line("size", f"{sum(shard['bytes'] for shard in manifest['shards']) / GIB:.3f}", "GiB")
    planning = f"{planning_seconds:.1f} s of it reading the annotations and planning"
    _line("time", f"{seconds:.1f}", f"s, {written / seconds:.1f} images/s, {planning}")
    if summary["warnings"]:
        print("\nWARNING: look at this before training (data_prep/README.md, what is checked):")
        for text in summary["warnings"]:
            print(f"  - {text}")


def _print_pixels(manifest: dict[str, Any]) -> None:
    """Print the changes that decoding makes to values and places of pixels."""
    summary = manifest["summary"]
    if number := summary["exif_orientation"]:
        _line("EXIF orientation not 1", f"{number:,}", EXIF_NOTES[manifest["orientation"]])
    for key, (label, note) in PIXEL_NOTES.items():
        if number := summary[key]:
            _line(label, f"{number:,}", note)
