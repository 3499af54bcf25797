"""Writes packs as a YOLO set that Ultralytics trains on: images as they are stored, text labels, data.yaml."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.formats.image_index import plain_name
from data_prep.formats.yolo import PARTS, label_path
from megdet_hpc.data.image_header import UPRIGHT, read_header
from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.data.pixels import flips, swaps_sides
from megdet_hpc.errors import UserError
from megdet_hpc.files import naming, sync_folder, temporary_for

DIGITS = 9  # behind the point: below 1e-5 pixels at 10,000
EDGE = 0.01  # pixels beyond the image that are no cut: the rounding of labels
LEEWAY = 1.0  # pixels by which a box may differ from its outline before that is counted
PNG_START = b"\x89PNG"


@dataclass
class YoloSummary:
    """What was written.

    Attributes:
        images, objects: numbers by part.
        outlines: whether labels are outlines; else boxes.
        counts: numbers of what was changed or left out, by its name.
    """

    images: Counter[str] = field(default_factory=Counter)
    objects: Counter[str] = field(default_factory=Counter)
    outlines: bool = False
    counts: Counter[str] = field(default_factory=Counter)


def parts_of(folders: Sequence[Path], split: str | None) -> dict[str, Path]:
    """The part of each pack: train, val or test, by its folder's name.

    Raises:
        UserError: a name says none, or two the same.
    """
    if split is not None and len(folders) > 1:
        raise UserError(f"--split {split}: names the part of one pack, but {len(folders)} are given")
    found: dict[str, Path] = {}
    for folder in folders:
        name = split or folder.resolve().name
        part = next((key for key, words in PARTS.items() if name.lower().startswith((key, *words))), None)
        part = part or ("train" if len(folders) == 1 and split is None else None)
        if part is None:
            raise UserError(f"{name!r}: no part of a YOLO set, expected a name that begins with train, val or test")
        if part in found:
            raise UserError(f"{found[part]} and {folder}: both are the part {part!r}; one pack for each part")
        found[part] = folder
    return found


def _classes(packs: dict[str, PackedCoco]) -> list[dict[str, Any]]:
    """The categories in the order of their ids, the same in all packs."""
    first, *others = packs.values()
    categories = sorted(first.categories, key=lambda category: int(category["id"]))
    for other in others:
        theirs = {category["id"]: category["name"] for category in other.categories}
        if theirs != {category["id"]: category["name"] for category in categories}:
            raise UserError(f"{first.directory} and {other.directory}: their categories differ by id or name")
    return categories


def _is_outline(segmentation: Any) -> bool:
    return isinstance(segmentation, list) and bool(segmentation) and all(len(part) >= 6 for part in segmentation)


def _without_outline(packs: dict[str, PackedCoco], keep_difficult: bool) -> tuple[int, int]:
    """Number of the objects to write that have no polygons, and of all of them."""
    without = total = 0
    for pack in packs.values():
        for index in range(len(pack)):
            found = pack.annotations(index)
            wanted = ~found.iscrowd | (found.difficult if keep_difficult else False)
            total += int(wanted.sum())
            if found.segmented.any():
                parts = pack.segmentations(index)
                without += sum(keep and not _is_outline(part) for part, keep in zip(parts, wanted, strict=True))
            else:
                without += int(wanted.sum())
    return without, total


def _joined(parts: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """One outline of several: each next one is joined at the points that lie nearest, by a line there and back.

    Returns:
        (k, 2) points.
    """
    outline = np.array(parts[0], np.float64)[: len(parts[0]) // 2 * 2].reshape(-1, 2)
    for part in parts[1:]:
        points = np.array(part, np.float64)[: len(part) // 2 * 2].reshape(-1, 2)
        distance = ((outline[:, None] - points[None]) ** 2).sum(-1)  # [k, points]
        here, there = np.unravel_index(distance.argmin(), distance.shape)
        ring = np.roll(points, -int(there), axis=0)
        outline = np.concatenate([outline[: here + 1], ring, ring[:1], outline[here:]])
    return outline


def _seen(points: NDArray[np.float64], width: int, height: int, orientation: int) -> NDArray[np.float64]:
    """Points of the stored pixels as fractions of the picture turned by EXIF, as Ultralytics reads it."""
    points = points / (width, height)
    if swaps_sides(orientation):
        points = points[:, ::-1]
    top_bottom, left_right = flips(orientation)
    return np.stack(
        [1 - points[:, 0] if left_right else points[:, 0], 1 - points[:, 1] if top_bottom else points[:, 1]], 1
    )


def _numbers(values: NDArray[np.float64]) -> str:
    return " ".join(f"{value:.{DIGITS}f}".rstrip("0").rstrip(".") for value in values.ravel())


class _Writer:
    """Writes the label lines of images.

    Args:
        place: class number by category id.
        outlines: whether to write outlines.
        keep_difficult: whether objects that are ignored because they are difficult are written.
        summary: takes in the counts.
    """

    def __init__(self, place: dict[int, int], outlines: bool, keep_difficult: bool, summary: YoloSummary) -> None:
        self.place, self.outlines, self.keep_difficult, self.summary = place, outlines, keep_difficult, summary

    def lines(self, pack: PackedCoco, index: int, encoded: bytes | memoryview) -> list[str]:
        """The lines of one image."""
        found, counts = pack.annotations(index), self.summary.counts
        orientation = UPRIGHT if pack.upright else read_header(encoded).orientation
        counts["images turned by EXIF: the labels are those of the picture as seen"] += orientation != UPRIGHT
        parts = pack.segmentations(index) if self.outlines else [None] * len(found.ids)
        size = int(pack.widths[index]), int(pack.heights[index])
        written = []
        for box, category, crowd, difficult, part in zip(
            found.boxes_xywh, found.category_ids, found.iscrowd, found.difficult, parts, strict=True
        ):
            if crowd and not (self.keep_difficult and difficult):
                counts["difficult objects left out" if difficult else "crowd regions left out, YOLO has none"] += 1
                continue
            corners = np.array([box[:2], box[:2] + box[2:]])
            points = _joined(part) if _is_outline(part) else corners
            around = np.array([points.min(0), points.max(0)])
            counts["boxes that differ by more than a pixel from their outline, whose box counts in YOLO"] += bool(
                np.abs(around - corners).max() > LEEWAY
            )
            width, height = size
            counts["objects cut at their image's edge"] += bool(
                min(around.min(), width - around[1, 0], height - around[1, 1]) < -EDGE
            )
            line = self._line(_seen(points, width, height, orientation), _is_outline(part))
            if line is not None:
                written.append(f"{self.place[int(category)]} {line}")
        return written

    def _line(self, points: NDArray[np.float64], outline: bool) -> str | None:
        """The numbers of one object; None where nothing of it lies in its image."""
        low, high = points.min(0), points.max(0)
        inside_low, inside_high = np.clip(low, 0, 1), np.clip(high, 0, 1)
        if not (inside_high > inside_low).all():
            self.summary.counts["objects without width or height in their image left out"] += 1
            return None
        if outline:
            return _numbers(np.clip(points, 0, 1))
        return _numbers(np.concatenate([(inside_low + inside_high) / 2, inside_high - inside_low]))


def _file_name(pack: PackedCoco, index: int, encoded: bytes | memoryview, used: set[str], counts: Counter[str]) -> str:
    """A name below the part's image folder; raises UserError where another image has the same label file."""
    said = pack.file_name(index)
    name = PurePosixPath(*(part for part in PurePosixPath(plain_name(said)).parts if part != ".."))
    if name.suffix.lower() not in (".jpg", ".jpeg", ".png"):
        name = name.with_name(f"{name.name}.{'png' if bytes(encoded[:4]) == PNG_START else 'jpg'}")
    counts["file names changed"] += str(name) != said
    stem = str(name.with_suffix("")).casefold()
    if stem in used:
        where = f"{pack.directory}: image id {pack.image_ids[index]}"
        raise UserError(f"{where}: {said!r} would have the label file of another image; YOLO has one for each name")
    used.add(stem)
    return str(name)


def write_yolo(
    packs: dict[str, PackedCoco], output: Path, boxes_only: bool = False, keep_difficult: bool = False
) -> YoloSummary:
    """Write packs as one YOLO set.

    Args:
        packs: pack by part: train, val, test.
        output: new folder; it appears once it is whole.
        boxes_only: write boxes also where all objects have outlines.
        keep_difficult: write objects that are ignored because they are difficult.

    Raises:
        UserError: `output` exists, the packs' categories differ, two images have one name, or a pack is damaged.
    """
    import yaml

    if output.exists():
        raise UserError(f"{output}: exists already; give a new folder")
    categories = _classes(packs)
    summary = YoloSummary()
    if not boxes_only:
        without, total = _without_outline(packs, keep_difficult)
        summary.outlines = total > 0 and not without
        if without < total and without:
            summary.counts[f"of {total:,} objects have no outline, so boxes are written for all"] += without
    place = {int(category["id"]): number for number, category in enumerate(categories)}
    writer = _Writer(place, summary.outlines, keep_difficult, summary)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_for(output)
    try:
        with naming(output):
            for part, pack in packs.items():
                _write_part(pack, temporary / "images" / part, writer, part)
            description = {part: f"images/{part}" for part in packs}
            names = {number: str(category["name"]) for number, category in enumerate(categories)}
            text = yaml.safe_dump({**description, "names": names}, sort_keys=False, allow_unicode=True)
            (temporary / "data.yaml").write_text(text, "utf-8")
            os.replace(temporary, output)
            sync_folder(output.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return summary


def _write_part(pack: PackedCoco, folder: Path, writer: _Writer, part: str) -> None:
    used: set[str] = set()
    for index in range(len(pack)):
        encoded = pack.read_image_bytes(index)
        path = folder / _file_name(pack, index, encoded, used, writer.summary.counts)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded)
        lines = writer.lines(pack, index, encoded)
        label = label_path(path)
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text("".join(f"{line}\n" for line in lines), "utf-8")
        writer.summary.images[part] += 1
        writer.summary.objects[part] += len(lines)
