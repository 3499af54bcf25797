"""The manifest of a finished pack, and the summary that the packer prints."""

from __future__ import annotations

from collections import Counter
from typing import Any

from data_prep.coco_source import CocoSource
from data_prep.skips import count_skips
from megdet_hpc import __version__
from megdet_hpc.data.shard_format import FORMAT_NAME, FORMAT_VERSION

GIB = 2**30
LABEL_WIDTH = 32


def make_manifest(
    source: CocoSource, shard_mib: float, reports: list[dict[str, Any]], skipped: list[dict[str, Any]]
) -> dict[str, Any]:
    """The manifest; it holds no times and no machine, so equal input gives equal bytes."""
    count: Counter[str] = Counter()
    for report in reports:
        count.update(report["count"])
    skipped = skipped + [entry for report in reports for entry in report["skipped"]]
    return {
        "format": FORMAT_NAME,
        "version": FORMAT_VERSION,
        "packer": f"pack_coco {__version__}",
        "source": {"file": source.path.name, "sha256": source.sha256},
        "shard_mib": shard_mib,
        "shards": [report["shard"] for report in reports],
        "totals": {key: count[key] for key in ("images", "annotations", "image_bytes")},
        "summary": {**count, "skipped": count_skips(skipped)},
        "skipped": skipped,
        "coco": source.other,
    }


def _line(label: str, value: str, note: str = "") -> None:
    print(f"{label:<{LABEL_WIDTH}} {value:>12}" + (f"   {note}" if note else ""))


def print_summary(
    manifest: dict[str, Any], reports: list[dict[str, Any]], seconds: float, planning_seconds: float
) -> None:
    """Print what was packed, in numbers.

    Args:
        manifest: of the pack.
        reports: of its shards.
        seconds: that packing took.
        planning_seconds: the part of them before the first shard.
    """
    summary = manifest["summary"]
    written = sum(report["count"]["images"] for report in reports if not report["kept"])
    kept = sum(report["kept"] for report in reports)
    _line("images", f"{summary['images']:,}")
    _line("annotations", f"{summary['annotations']:,}")
    _line("images without annotations", f"{summary['images_without_annotations']:,}")
    _line("crowd regions", f"{summary['crowd']:,}")
    _line("boxes of zero size", f"{summary['zero_size_boxes']:,}", "kept; training leaves them out")
    _line("boxes partly outside", f"{summary['boxes_partly_outside']:,}", "kept as they are")
    for kind, reasons in summary["skipped"].items():
        for reason, number in sorted(reasons.items()):
            _line(f"skipped {kind}", f"{number:,}", reason)
    _line("shards", f"{len(reports):,}", f"{kept} kept from an earlier run")
    _line("size", f"{sum(shard['bytes'] for shard in manifest['shards']) / GIB:.3f}", "GiB")
    planning = f"{planning_seconds:.1f} s of it reading the annotations and planning"
    _line("time", f"{seconds:.1f}", f"s, {written / seconds:.1f} images/s, {planning}")
