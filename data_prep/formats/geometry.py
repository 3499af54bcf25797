"""Geometry: a drawn shape becomes a box and a segmentation of COCO."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_prep.formats.labels import Points, Shape, ShapeError
from megdet_hpc.data.masks import Rle, encode_masks, mask_areas, mask_box, rle_of

ELLIPSE_CORNERS = 64  # of the polygon for a circle: within 0.12 % of its radius
DECIMALS = 6  # of a pixel
_FURTHEST = 1e5  # pixels from the image's corner


def _turned(points: Points, angle: float, pivot: tuple[float, float]) -> Points:
    """Points turned clockwise (y points down) by degrees."""
    cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    px, py = pivot
    return [(px + (x - px) * cosine - (y - py) * sine, py + (x - px) * sine + (y - py) * cosine) for x, y in points]


def _outline(shape: Shape, scale: tuple[float, float]) -> Points:
    """Corners of a shape in pixels: of a turned box four, of an ellipse many."""
    points = [(x * scale[0], y * scale[1]) for x, y in shape.points]
    if shape.kind in ("polygon", "quadrilateral"):
        if len(points) < 3:
            raise ShapeError(f"a polygon of {len(points)} points, expected 3 or more")
        return points
    (x0, y0), (x1, y1) = points
    if shape.kind == "ellipse":
        if x1 < 0 or y1 < 0:
            raise ShapeError(f"radii {x1:g}, {y1:g}, expected 0 or more")
        turns = [2 * math.pi * step / ELLIPSE_CORNERS for step in range(ELLIPSE_CORNERS)]
        return _turned([(x0 + x1 * math.cos(t), y0 + y1 * math.sin(t)) for t in turns], shape.angle, (x0, y0))
    if x1 < x0 or y1 < y0:
        raise ShapeError(f"corners {x0:g}, {y0:g} and {x1:g}, {y1:g}, expected the upper left one first")
    pivot = (x0, y0) if shape.pivot == "corner" else ((x0 + x1) / 2, (y0 + y1) / 2)
    return _turned([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], shape.angle, pivot)


def _rounded(value: float) -> float:
    value = round(value, DECIMALS)
    return int(value) if value == int(value) else value


def _flat(points: Points) -> list[float]:
    return [_rounded(value) for point in points for value in point]


def _box_around(points: Points) -> list[float]:
    left, top = (min(point[axis] for point in points) for axis in (0, 1))
    right, bottom = (max(point[axis] for point in points) for axis in (0, 1))
    return [_rounded(value) for value in (left, top, right - left, bottom - top)]


def _is_upright(points: Points) -> bool:
    """Whether four corners are those of an upright box."""
    return len({x for x, _ in points}) == 2 == len({y for _, y in points})


def _mask_rle(shape: Shape, width: int, height: int) -> Rle:
    """A mask in the image; what lies outside is cut."""
    assert shape.mask is not None
    filled = np.zeros((1, height, width), np.bool_)
    part, left, top = shape.mask.filled, shape.mask.left, shape.mask.top
    if left < 0 or top < 0 or left + part.shape[1] > width or top + part.shape[0] > height:
        size = f"{part.shape[1]} x {part.shape[0]} at {left}, {top}"
        raise ShapeError(f"a mask of {size}, which leaves the image of {width} x {height}")
    filled[0, top : top + part.shape[0], left : left + part.shape[1]] = part
    if not part.any():
        raise ShapeError("a mask without a pixel")
    return encode_masks(filled)[0]


def record_of(shapes: Sequence[Shape], size: tuple[int, int], unit: str) -> dict[str, Any]:
    """Box, area and segmentation of one object.

    Args:
        shapes: one of any kind; or several polygons and masks that are one object.
        size: width and height of the image [pixels].
        unit: the one of the shapes' points.

    Returns:
        The keys bbox, area and segmentation; and for a turned box `rotated_box`, its corners.

    Raises:
        ShapeError: says what is wrong.
    """
    width, height = size
    scale = {"pixel": (1.0, 1.0), "fraction": (float(width), float(height)), "percent": (width / 100, height / 100)}
    polygons: list[list[float]] = []
    rles: list[Rle] = []
    corners: Points = []
    for shape in shapes:
        if shape.kind == "mask":
            rles.append(_mask_rle(shape, width, height))
            continue
        points = _outline(shape, scale[unit])
        for value in (value for point in points for value in point):
            if not abs(value) <= _FURTHEST:  # NaN fails the comparison
                raise ShapeError(f"a coordinate of {value:g} pixels, expected up to {_FURTHEST:g}")
        if shape.kind in ("box", "quadrilateral"):
            box = _box_around(points)
            upright = not shape.angle % 180 if shape.kind == "box" else _is_upright(points)
            turned = {} if upright else {"rotated_box": _flat(points)}
            return {"bbox": box, "area": _rounded(box[2] * box[3]), "segmentation": [], **turned}
        corners += points
        polygons.append(_flat(points))
    if not rles:
        if (rle := rle_of(polygons, height, width)) is None:
            raise ShapeError("no outline")
        return {"bbox": _box_around(corners), "area": float(mask_areas([rle])[0]), "segmentation": polygons}
    from pycocotools import mask

    rle = dict(mask.merge([*rles, *(rle_of([polygon], height, width) for polygon in polygons)]))
    return {
        "bbox": [_rounded(value) for value in mask_box(rle)],
        "area": float(mask_areas([rle])[0]),
        "segmentation": {"size": [height, width], "counts": rle["counts"].decode("ascii")},
    }
