"""Reads CVAT's XML, "CVAT for images 1.1" and "CVAT for video 1.1"."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from data_prep.formats.image_index import ImageIndex
from data_prep.formats.labels import FileFault, LabelledImage, LabelSet, Mask, Points, Shape, Wanted
from data_prep.formats.text_files import Element, flag, number, read_xml
from data_prep.voc_layout import files_below
from megdet_hpc.errors import UserError

WITHOUT_BOX = ("points", "polyline", "cuboid", "skeleton", "tag")
SHAPES = ("box", "polygon", "ellipse", "mask")
MARKS = ("difficult", "iscrowd", "is_crowd", "crowd", "ignore")  # attributes that keep an object out of training
_NUMBER = re.compile(r"(\d+)$")


def _value(element: Element, key: str) -> float:
    return number(element.get(key), key)


def _points(element: Element) -> Points:
    pairs = [pair.split(",") for pair in (element.get("points") or "").split(";") if pair.strip()]
    if any(len(pair) != 2 for pair in pairs):
        raise UserError(f"points are {element.get('points')!r:.60}, expected x,y;x,y;...")
    return [(number(x, "x"), number(y, "y")) for x, y in pairs]


def _mask(element: Element) -> Mask:
    """A mask: runs of background and object in turn, row by row, within its own box."""
    left, top, width, height = (int(_value(element, key)) for key in ("left", "top", "width", "height"))
    try:
        runs = [int(text) for text in (element.get("rle") or "").split(",") if text.strip()]
    except ValueError as error:
        raise UserError(f"rle is no list of whole numbers ({error})") from error
    if min(runs, default=-1) < 0 or sum(runs) != width * height:
        raise UserError(f"rle has {sum(runs)} pixels, the mask {width} x {height}")
    values = np.arange(len(runs)) % 2 == 1
    return Mask(np.repeat(values, runs).reshape(height, width), left, top)


def _shape(element: Element, name: str) -> Shape:
    """A drawn object; raises UserError that says what is wrong."""
    if not name.strip():
        raise UserError("has no label")
    made = Shape(name.strip(), f"line {element.line}", element.tag)
    if element.tag == "box":
        made.points = [
            (_value(element, "xtl"), _value(element, "ytl")),
            (_value(element, "xbr"), _value(element, "ybr")),
        ]
    elif element.tag == "ellipse":
        made.points = [(_value(element, "cx"), _value(element, "cy")), (_value(element, "rx"), _value(element, "ry"))]
    elif element.tag == "polygon":
        made.points = _points(element)
    else:
        made.mask = _mask(element)
    made.angle = _value(element, "rotation") if element.get("rotation") else 0.0
    group = element.get("group_id", "0")
    made.group = None if group in ("0", "") else group
    marks = [mark for mark in element.findall("attribute") if (mark.get("name") or "").strip().lower() in MARKS]
    made.ignored = any(flag(mark.text) for mark in marks)
    return made


def _names(root: Element) -> list[str]:
    """Labels in the order of the task or project; those of a skeleton's points are none."""
    labels = [label for label in root.iter("label") if label.find("name") is not None and label.find("parent") is None]
    return list(dict.fromkeys((label.findtext("name") or "").strip() for label in labels))


def _left_out(element: Element) -> str:
    return f"shapes of the kind {element.tag!r} left out, since they have no box"


def _image(element: Element, where: str, several: bool) -> LabelledImage:
    """An image of "CVAT for images"; raises UserError where it has no name or size."""
    name, split = element.get("name") or "", element.get("subset") or ""
    if not name:
        raise UserError("an image without a name")
    size = int(_value(element, "width")), int(_value(element, "height"))
    image = LabelledImage(f"{where} line {element.line}", name, [], size=size)
    image.split = split if several else ""
    for child in element:
        assert isinstance(child, Element)
        try:
            if child.tag in SHAPES:
                image.shapes.append(_shape(child, child.get("label") or ""))
            elif child.tag in WITHOUT_BOX:
                image.left_out[_left_out(child)] += 1
            else:
                raise UserError(f"a shape of the kind {child.tag!r}, which is not known")
        except UserError as error:
            image.faults.append(f"line {child.line}: {error}")
    return image


def _frames(folder: Path) -> dict[int, Path]:
    """Images of a folder by the number that their names end in; raises UserError where two have one number."""
    found: dict[int, Path] = {}
    for path in ImageIndex(folder).files:
        if match := _NUMBER.search(path.stem):
            frame = int(match[1])
            if frame in found:
                raise UserError(f"{folder}: {found[frame].name} and {path.name} are both frame {frame}; see --images")
            found[frame] = folder / path
    return found


def _track(track: Element, frames: dict[int, Path], images: dict[int, LabelledImage]) -> Counter[str]:
    """Put a track's shapes on the frames that are there; returns counts.

    A shape holds from its frame to the next one of the track. Boxes between two are on the straight way from one to
    the other, as CVAT shows them. `outside` ends an object.
    """
    counts: Counter[str] = Counter()
    seen: list[tuple[int, Element]] = []
    for child in track:
        assert isinstance(child, Element)
        if child.tag in SHAPES:
            seen.append((int(_value(child, "frame")), child))
        elif child.tag in WITHOUT_BOX:
            counts[_left_out(child)] += 1
    seen.sort(key=lambda entry: entry[0])
    name = track.get("label") or ""
    between = {frame for frame in frames if seen and seen[0][0] < frame < seen[-1][0]} - {frame for frame, _ in seen}
    left_out = "shapes on frames whose image is not there left out"
    for frame, element in seen:
        if flag(element.get("outside", "0")):
            continue
        if frame not in images:
            counts[left_out] += 1
            continue
        try:
            images[frame].shapes.append(replace(_shape(element, name), extra={"track_id": track.get("id", "")}))
        except UserError as error:
            images[frame].faults.append(f"line {element.line}: {error}")
    for (first, start), (last, end) in pairwise(seen):
        for frame in sorted(frame for frame in between if first < frame < last):
            if flag(start.get("outside", "0")):
                continue
            if frame not in images:  # beyond start_frame or stop_frame
                counts[left_out] += 1
                continue
            if start.tag != "box" or end.tag != "box" or start.get("rotation", "0") != end.get("rotation", "0"):
                text = f"line {start.line}: a {start.tag} that frame {frame} needs between two others"
                images[frame].faults.append(f"{text}; export the set as CVAT for images, which has each frame's")
                continue
            try:
                here, there = _shape(start, name), _shape(end, name)
            except UserError:
                continue  # listed with its own frame
            part = (frame - first) / (last - first) if not flag(end.get("outside", "0")) else 0.0
            points = [
                (x + (x1 - x) * part, y + (y1 - y) * part)
                for (x, y), (x1, y1) in zip(here.points, there.points, strict=True)
            ]
            images[frame].shapes.append(replace(here, points=points, extra={"track_id": track.get("id", "")}))
            counts["boxes between two frames of a track put on the straight way"] += 1
    return counts


def _video(root: Element, where: str, folder: Path) -> list[LabelledImage]:
    """The frames of "CVAT for video", as far as their images are there."""
    frames = _frames(folder)
    size = None
    if (original := next(root.iter("original_size"), None)) is not None:
        size = int(number(original.findtext("width"), "width")), int(number(original.findtext("height"), "height"))
    last = next((int(number(e.text, e.tag)) for e in root.iter("stop_frame")), max(frames, default=0))
    first = next((int(number(e.text, e.tag)) for e in root.iter("start_frame")), 0)
    images = {
        frame: LabelledImage(f"{where} frame {frame}", path.name, [], path, size=size)
        for frame, path in frames.items()
        if first <= frame <= last
    }
    if not images:
        raise UserError(f"no image in {folder} whose name ends in a frame number {first} to {last}; see --images")
    counts: Counter[str] = Counter()
    for track in root.iter("track"):
        assert isinstance(track, Element)
        counts += _track(track, frames, images)
    images[min(images)].left_out.update(counts)
    return list(images.values())


def read_cvat(wanted: Wanted) -> LabelSet:
    """A set of CVAT.

    Args:
        wanted: an XML file, or a folder with one or more.

    Raises:
        UserError: there is none, or the labels of several files have no common order.
    """
    source = wanted.source
    files = [source / file for file in files_below(source, (".xml",))] if source.is_dir() else [source]
    result, names, roots = LabelSet([]), list[str](), list[tuple[str, Element]]()
    for path in files:
        where = wanted.relative(path)
        try:
            root = read_xml(path)
            if root.tag != "annotations":
                raise UserError(f"the outermost element is {root.tag!r}, expected 'annotations'")
        except UserError as error:
            result.faults.append(FileFault("bad_file", where, str(error)))
            continue
        roots.append((where, root))
        names += [name for name in _names(root) if name not in names]
    if not files:
        raise UserError(f"{source}: no file *.xml of CVAT")
    subsets = {element.get("subset") or "" for _, root in roots for element in root.iter("image")}
    for where, root in roots:
        if root.find("track") is not None:
            try:
                result.images += _video(root, where, wanted.images or wanted.root)
            except UserError as error:
                result.faults.append(FileFault("bad_file", where, str(error)))
            continue
        for element in root.iter("image"):
            assert isinstance(element, Element)
            try:
                result.images.append(_image(element, where, several="" not in subsets and len(subsets) > 1))
            except UserError as error:
                result.faults.append(FileFault("bad_image_record", f"{where} line {element.line}", str(error)))
    result.names = names or None
    return result
