"""Reads LabelMe's JSON files, and those of tools that write its form (AnyLabeling, X-AnyLabeling)."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.formats.labels import FileFault, LabelledImage, LabelSet, Mask, Points, Shape, Wanted, split_of
from data_prep.formats.text_files import flag, number, read_json
from data_prep.voc_layout import files_below
from megdet_hpc.errors import UserError

WITHOUT_BOX = ("point", "points", "line", "linestrip", "cuboid")
OUTLINES = ("polygon", "quadrilateral")
MARKS = ("difficult", "iscrowd", "crowd", "ignore")  # flags that keep an object out of training


def _points(shape: dict[str, Any]) -> Points:
    points = shape.get("points")
    if not isinstance(points, list) or not all(isinstance(point, list) and len(point) == 2 for point in points):
        raise UserError(f"points are {points!r:.60}, expected pairs of x and y")
    return [(number(x, "x"), number(y, "y")) for x, y in points]


def _mask(shape: dict[str, Any], points: Points) -> Mask:
    """The pixels of a mask: a PNG in base64, whose corners both belong to it."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(shape["mask"], validate=True))) as image:
            filled = np.asarray(image.convert("L" if image.mode != "1" else "1")) > 0
    except (KeyError, TypeError, ValueError, OSError, Image.DecompressionBombError) as error:
        raise UserError(f"its mask cannot be read ({error})") from error
    return Mask(filled, int(min(x for x, _ in points)), int(min(y for _, y in points)))


def _shape(shape: Any, where: str) -> Shape | str:
    """A drawn object; or the kind of a shape without a box.

    Raises:
        UserError: says what is wrong.
    """
    if not isinstance(shape, dict):
        raise UserError(f"is a {type(shape).__name__}, expected an object")
    kind = shape.get("shape_type") or "polygon"
    if kind in WITHOUT_BOX:
        return f"shapes of the kind {kind!r} left out, since they have no box"
    name = shape.get("label")
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"label is {name!r:.40}, expected a name")
    points, group = _points(shape), shape.get("group_id")
    flags = shape.get("flags") if isinstance(shape.get("flags"), dict) else {}
    made = Shape(name.strip(), where, kind, points)
    made.ignored = any(flag(source.get(mark, 0)) for source in (shape, flags or {}) for mark in MARKS)
    made.group = group if isinstance(group, Hashable) else None
    if kind in OUTLINES:
        made.kind = "polygon"
    elif kind in ("rectangle", "rotation") and len(points) == (4 if kind == "rotation" else len(points)):
        if len(points) not in (2, 4):
            raise UserError(f"a rectangle of {len(points)} points, expected 2 or 4")
        return _box(made, points, turned=kind == "rotation")
    elif kind == "circle" and len(points) == 2:
        radius = math.dist(*points)
        made.kind, made.points = "ellipse", [points[0], (radius, radius)]
    elif kind == "mask" and len(points) == 2:
        made.mask, made.points = _mask(shape, points), []
    else:
        raise UserError(f"a {kind!r:.40} of {len(points)} points, which is not known")
    return made


def _box(made: Shape, points: Points, turned: bool) -> Shape:
    """A rectangle from any two opposite corners, or from four, which may be turned."""
    made.kind = "box"
    if turned:
        (x, y), (x1, y1), (x2, y2) = points[0], points[1], points[2]
        width, height = math.dist((x, y), (x1, y1)), math.dist((x1, y1), (x2, y2))
        made.points, made.pivot = [(x, y), (x + width, y + height)], "corner"
        made.angle = math.degrees(math.atan2(y1 - y, x1 - x))
        if math.dist(points[3], (x2 - (x1 - x), y2 - (y1 - y))) > 1 or (x1 - x) * (y2 - y1) < (y1 - y) * (x2 - x1):
            raise UserError("its four corners are no turned rectangle, drawn clockwise")
    else:
        xs, ys = ([point[axis] for point in points] for axis in (0, 1))
        made.points = [(min(xs), min(ys)), (max(xs), max(ys))]
    return made


def _size(value: dict[str, Any]) -> tuple[int, int] | None:
    width, height = value.get("imageWidth"), value.get("imageHeight")
    return (
        None
        if width is None or height is None
        else (int(number(width, "imageWidth")), int(number(height, "imageHeight")))
    )


def _image(path: Path, where: str, split: str) -> LabelledImage:
    """One file; raises UserError where it is not LabelMe's."""
    value = read_json(path)
    if not isinstance(value, dict) or not isinstance(value.get("shapes"), list):
        raise UserError("no list 'shapes', expected a file of LabelMe")
    name = value.get("imagePath")
    if not isinstance(name, str) or not name.strip():
        name = f"{path.stem}.jpg"
    image = LabelledImage(where, name, [], beside=path.parent, size=_size(value), split=split)
    for place, shape in enumerate(value["shapes"]):
        try:
            made = _shape(shape, f"shapes[{place}]")
        except UserError as error:
            image.faults.append(f"shapes[{place}]: {error}")
            continue
        if isinstance(made, str):
            image.left_out[made] += 1
        else:
            image.shapes.append(made)
    if value.get("imageData") and not (path.parent / name.replace("\\", "/")).exists():
        image.hint = "; the JSON holds a copy of it: labelme_export_json gets it out"
    return image


def read_labelme(wanted: Wanted) -> LabelSet:
    """A folder of LabelMe's files, or one of them."""
    source = wanted.annotations or wanted.source
    files = [Path(file) for file in files_below(source, (".json",))] if source.is_dir() else [Path(source.name)]
    top = source if source.is_dir() else source.parent
    result = LabelSet([])
    parts = {split_of(str(file)) for file in files}
    for file in files:
        split = split_of(str(file)) if "" not in parts else ""
        try:
            result.images.append(_image(top / file, str(file), split))
        except UserError as error:
            result.faults.append(FileFault("bad_file", str(file), str(error), split))
    if not files:
        raise UserError(f"{source}: no file *.json of LabelMe")
    return result
