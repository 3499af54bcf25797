"""Likely causes of a set that looks wrong: boxes in another form, crowd regions, unused categories.

Shape legend: m annotations. Boxes are x, y, width, height in pixels, as the file gives them.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.box_counts import Boxes, Sorted

SHARE = 0.3
"""Share of a set's annotations above which a kind looks wrong."""

UNUSED_SHARE = 0.5  # of the categories; a small part of COCO lacks a third of them

LEAVING_SHARE = 0.05  # of the boxes; enough if another reading puts all of them into their images
FITTING_SHARE = 0.95  # of the boxes, for another reading of them to be likely
UNIT = 1.001  # largest number of a box in units of its image
LEAST_IMAGE = 8  # pixels; in smaller images a box of one pixel is no sign of units
MANY_BOXES = 50  # number of boxes from which their positions tell something
UPPER_LEFT = 0.7  # of an image's sides; a set without a box beyond this looks scaled
NAMES_SHOWN = 5

Points = NDArray[np.float64]


def warnings(boxes: Boxes, kind: Sorted, categories: Sequence[dict[str, Any]], unused: Sequence[str]) -> list[str]:
    """Warnings to look at before training, the most serious first; none if nothing looks wrong.

    Args:
        boxes: all annotations of the set, or those of a fair sample.
        kind: the same, sorted.
        categories: the set's categories.
        unused: the names that `unused_categories` gave for the whole set.
    """
    found = [*_untrainable(boxes, kind)]
    if len(boxes.bbox):
        found += _box_form(boxes, kind)
    return [*found, *_category_faults(boxes, kind, categories, unused)]


def _percent(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({100 * part / whole:.0f} %)"


def _untrainable(boxes: Boxes, kind: Sorted) -> Iterator[str]:
    """Warnings of annotations that training leaves out, if they are many."""
    total, trainable = len(boxes.bbox), int(kind.trainable.sum())
    if not total:
        yield "there is no annotation: a set without ground truth, with nothing to train on and nothing to score"
        return
    if not trainable:
        yield f"no annotation can be trained on: none of {total:,} is a box of at least 1 pixel inside its image"
    if (number := int(kind.crowd.sum())) > SHARE * total:
        yield (
            f"{_percent(number, total)} of the annotations are crowd regions (iscrowd 1), left out of training and "
            "ignored in scoring; exporters that write masks as RLE set it throughout: give single objects iscrowd 0"
        )
    if (number := int(kind.zero_size.sum())) > SHARE * total:
        yield (
            f"{_percent(number, total)} of the boxes have no width or no height: points, or coordinates in 0..1 that "
            "were rounded to integers?"
        )


def _box_form(boxes: Boxes, kind: Sorted) -> Iterator[str]:
    """Warnings of boxes that are wrong as x, y, width, height in pixels, with another possible meaning."""
    used = (boxes.bbox != 0).any(axis=1)
    bbox, size = boxes.bbox[used], boxes.size[used].astype(np.float64)
    if not len(bbox):
        return
    unit = (np.abs(bbox).max(axis=1) <= UNIT) & (size.min(axis=1) >= LEAST_IMAGE)
    if unit.mean() > SHARE:
        yield (
            f"{_percent(int(unit.sum()), len(bbox))} of the boxes lie within 0..1: they look normalized, "
            f"{_unit_form(bbox[unit])}; COCO's are x, y, width, height in pixels"
        )
        return
    far = bbox[:, :2] + bbox[:, 2:]
    slack = 1 + 0.01 * size
    leaving = ((bbox[:, :2] < -slack) | (far > size + slack)).any(axis=1)
    number = int(leaving.sum())
    if number > LEAVING_SHARE * len(bbox) and (reading := _other_reading(bbox, size, slack, leaving)):
        yield f"{_percent(number, len(bbox))} of the boxes leave their image as x, y, width, height; {reading}"
    elif number > SHARE * len(bbox):
        low, high = np.quantile(bbox[:, :2] / size, 0.01, axis=0), np.quantile(far / size, 0.99, axis=0)
        outside = f", {int(kind.outside.sum()):,} lie wholly outside" if kind.outside.any() else ""
        yield (
            f"{_percent(number, len(bbox))} of the boxes leave their image{outside}: x from {low[0]:.2g} to "
            f"{high[0]:.2g} image widths, y from {low[1]:.2g} to {high[1]:.2g} image heights; were they drawn at "
            "another resolution, or on larger images that these are parts of?"
        )
    elif number := _corners_by_area(bbox, boxes.area[used]):
        yield (
            f"{_percent(number, len(bbox))} of the boxes have the area that the file gives if they are read as corners "
            "x1, y1, x2, y2, and none or few if read as x, y, width, height"
        )
    elif len(bbox) >= MANY_BOXES and (far / size).max() < UPPER_LEFT:
        reach = (far / size).max(axis=0)
        percent = ", perhaps in percent" if far.max() <= 100.5 and np.median(size) > 150 else ""
        yield (
            f"all {len(bbox):,} boxes lie in the upper left {reach[0]:.0%} x {reach[1]:.0%} of their images: were "
            f"these annotated at a smaller resolution{percent}?"
        )
    elif (number := int(kind.thin.sum())) > SHARE * len(bbox):
        yield f"{_percent(number, len(bbox))} of the boxes are thinner than 1 pixel: drawn at another resolution?"


def _corners_by_area(bbox: Points, area: NDArray[np.float64]) -> int:
    """Number of boxes whose `area` fits corners; 0 unless it fits nearly all, and hardly any as width and height."""
    known = area > 0
    corners, box = np.prod(bbox[:, 2:] - bbox[:, :2], axis=1), np.prod(bbox[:, 2:], axis=1)
    close = 1 + 0.01 * area[known]
    as_corners = int((np.abs(corners - area)[known] <= close).sum())
    as_box = int((np.abs(box - area)[known] <= close).sum())
    enough = SHARE * len(bbox) < known.sum() and FITTING_SHARE * known.sum() <= as_corners
    return as_corners if enough and as_box <= LEAVING_SHARE * known.sum() else 0


def _unit_form(bbox: Points) -> str:
    """The form of normalized boxes: the reading that puts nearly all of them into the unit square."""
    size = np.ones((len(bbox), 2))
    slack = np.full((len(bbox), 2), 0.01)
    if _inside(bbox[:, :2], bbox[:, :2] + bbox[:, 2:], size, slack).mean() >= FITTING_SHARE:
        half = bbox[:, 2:] / 2  # no centre is nearer to the edge than this, but among many boxes some corner is
        if _inside(bbox[:, :2] - half, bbox[:, :2] + half, size, slack).all():
            return "as x, y, width, height or, where YOLO wrote them, as centre x, y, width, height"
        return "as x, y, width, height"
    return _other_reading(bbox, size, slack, np.ones(len(bbox), np.bool_)) or "in a form that is none of the usual ones"


def _inside(near: Points, far: Points, size: Points, slack: Points) -> NDArray[np.bool_]:
    """Which boxes between two corners, [m, 2] each, have an area and lie in their image."""
    inside: NDArray[np.bool_] = np.all((near < far) & (near >= -slack) & (far <= size + slack), axis=1)
    return inside


def _other_reading(bbox: Points, size: Points, slack: Points, leaving: NDArray[np.bool_]) -> str:
    """The reading of the four numbers that puts the boxes into their images, or "".

    It must fit nearly all boxes of the set. If the set mixes two forms, it must fit nearly all boxes that leave.
    """
    first, last = bbox[:, :2], bbox[:, 2:]
    turned = first[:, ::-1], last[:, ::-1]
    readings = {
        "they look like corners x1, y1, x2, y2": _inside(first, last, size, slack),
        "they look like centre x, y, width, height (YOLO)": _inside(first - last / 2, first + last / 2, size, slack),
        "they look like y, x, height, width, or were drawn on images turned by 90 degrees": _inside(
            turned[0], turned[0] + turned[1], size, slack
        ),
        "they look like corners y1, x1, y2, x2": _inside(*turned, size, slack),
    }
    best = max(readings, key=lambda name: float(readings[name].mean()))
    if readings[best].mean() >= FITTING_SHARE:
        return best
    best = max(readings, key=lambda name: float(readings[name][leaving].mean()))
    many = leaving.mean() > SHARE and readings[best][leaving].mean() >= FITTING_SHARE
    return f"these {best.removeprefix('they ')}" if many else ""


def _category_faults(
    boxes: Boxes, kind: Sorted, categories: Sequence[dict[str, Any]], unused: Sequence[str]
) -> Iterator[str]:
    """Warnings of categories without a use, or with another meaning here."""
    if not categories:
        yield "the file has no category: nothing can be trained"
    if kind.trainable.any() and len(unused) > UNUSED_SHARE * len(categories):
        yield (
            f"{_percent(len(unused), len(categories))} of the categories have no box to train on "
            f"({shown_names(unused)}): part of a larger set, or ids that were numbered anew?"
        )
    by_name: dict[str, list[int]] = {}
    for category in categories:
        name = str(category["name"])
        by_name.setdefault(name, []).append(category["id"])
        if name.strip(" _-").lower() == "background":
            number = int((boxes.category_id[kind.trainable] == category["id"]).sum())
            yield (
                f"category id {category['id']} is named {name!r}: label 0 is the background here already, and this "
                f"one is trained as a class like any other, with {number:,} boxes; take it out of the categories"
            )
    for name, ids in by_name.items():
        if len(ids) > 1:
            yield f"{len(ids)} categories have the name {name!r} (ids {', '.join(map(str, ids[:NAMES_SHOWN]))})"


def unused_categories(used: Container[int], categories: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the categories without a trainable box, in the file's order.

    Args:
        used: the ids of categories that have one.
        categories: the set's categories.
    """
    return [str(category["name"]) for category in categories if category["id"] not in used]


def shown_names(names: Sequence[str]) -> str:
    """The first names of a list, for a message."""
    return ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")
