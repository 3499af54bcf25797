"""Reads one XML file of a Pascal VOC set."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

from megdet_hpc.errors import UserError

FLAGS = {"": 0, "0": 0, "1": 1, "false": 0, "true": 1}


@dataclass(frozen=True)
class VocObject:
    """One object of an XML file."""

    index: int  # among the file's objects
    name: str
    bbox: list[float]  # x, y, width, height in pixels
    difficult: int
    truncated: int


@dataclass(frozen=True)
class VocFile:
    """The content of an XML file about one image.

    Attributes:
        objects: good objects.
        faults: a text for each bad object.
        filename: the image's file name, without folders; "" where there is none.
        size: width and height as written, "0" where there is none.
    """

    objects: list[VocObject]
    faults: list[str]
    filename: str
    size: tuple[str, str]


class _Builder(ElementTree.TreeBuilder):
    """A builder that refuses document types, and so every entity that could expand or refer to another file."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise UserError("has a DOCTYPE, which is not accepted")


def _flag(element: ElementTree.Element, key: str) -> int:
    text = (element.findtext(key) or "").strip()
    if text.lower() not in FLAGS:
        raise UserError(f"{key} is {text!r}, expected 0 or 1")
    return FLAGS[text.lower()]


def _corners(element: ElementTree.Element) -> list[float]:
    """xmin, ymin, xmax, ymax as written; whole numbers as int."""
    box = element.find("bndbox")
    if box is None:
        raise UserError("no bndbox")
    corners: list[float] = []
    for key in ("xmin", "ymin", "xmax", "ymax"):
        text = (box.findtext(key) or "").strip()
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not abs(value) < 2**31:
            raise UserError(f"{key} is {text!r}, expected a number of pixels")
        corners.append(int(value) if value.is_integer() else value)
    if corners[2] < corners[0] or corners[3] < corners[1]:
        raise UserError(f"xmin, ymin, xmax, ymax are {corners}; expected xmin <= xmax and ymin <= ymax")
    return corners


def _object(index: int, element: ElementTree.Element, first_pixel: int) -> VocObject:
    name = (element.findtext("name") or "").strip()
    if not name:
        raise UserError("no name")
    x, y, right, bottom = _corners(element)
    bbox = [x - first_pixel, y - first_pixel, right - x + 1, bottom - y + 1]
    return VocObject(index, name, bbox, _flag(element, "difficult"), _flag(element, "truncated"))


def read_voc_xml(path: Path, first_pixel: int = 1) -> VocFile:
    """Read one annotation file.

    Args:
        path: the XML file.
        first_pixel: the index of an image's first pixel, 1 in VOC itself.

    Raises:
        UserError: the file is not readable, or no XML in VOC's form. The message does not name the file.
    """
    try:
        root = ElementTree.parse(path, ElementTree.XMLParser(target=_Builder())).getroot()
    except UserError:
        raise
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # the latter two: an unknown encoding
        raise UserError(f"not valid XML ({error})") from error
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})") from error
    if root.tag != "annotation":
        raise UserError(f"the outermost element is {root.tag!r}, expected 'annotation'")
    objects, faults = [], []
    for index, element in enumerate(root.findall("object")):  # only direct children, since a part is no object
        try:
            objects.append(_object(index, element, first_pixel))
        except UserError as error:
            faults.append(f"object[{index}]: {error}")
    filename = (root.findtext("filename") or "").strip().replace("\\", "/").rpartition("/")[2]
    width, height = ((root.findtext(f"size/{key}") or "0").strip() for key in ("width", "height"))
    return VocFile(objects, faults, filename, (width, height))
