"""What a reader gives: images with the shapes that are drawn on them, in the format's own unit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.image_faults import printable
from data_prep.skips import Skips

Points = list[tuple[float, float]]

SPLITS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing")
"""Names of folders and files that tell the part of a set."""


class ShapeError(ValueError):
    """A shape that cannot be converted; the text says why, without file and place."""


@dataclass(frozen=True)
class Mask:
    """Pixels of an object: `filled` (rows, columns), whose top left pixel is (left, top) of the image."""

    filled: NDArray[np.bool_]
    left: int = 0
    top: int = 0


@dataclass
class Shape:
    """One drawn object.

    Attributes:
        name: its category.
        where: its place in the file, such as "line 3".
        kind: "box" (two corners: the upper left, the lower right), "quadrilateral" (a turned box by its four
            corners), "polygon" (its corners), "ellipse" (centre, then the two radii) or "mask".
        points: x, y in the image's unit; empty for a mask.
        mask: pixels of a "mask".
        angle: degrees by which a box or an ellipse is turned clockwise.
        pivot: what it is turned about, "centre" or "corner", the upper left one.
        ignored: whether the format marks it as difficult, as a group or as a region to ignore.
        group: polygons and masks of one image with one name and one group are one object; None is no group.
        extra: further keys of the record.
    """

    name: str
    where: str
    kind: str
    points: Points = field(default_factory=list)
    mask: Mask | None = None
    angle: float = 0.0
    pivot: str = "centre"
    ignored: bool = False
    group: Hashable | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class LabelledImage:
    """One image and what is drawn on it.

    Attributes:
        where: the file that describes it, relative to the source, and the place in it.
        name: the image's name as the file has it.
        other_name: a second name to look for; "" for none.
        hint: end of the message where the image is missing.
        shapes: objects that could be read.
        path: the image's file, where the reader knows it; else it is looked for by its name.
        beside: folder that `name` is relative to, where there is one.
        size: width and height as the file says [pixels].
        unit: "pixel", "fraction" or "percent" of width and height.
        split: part of the set; "" where it has none.
        faults: what is wrong with each object that could not be read, with its place.
        left_out: number of shapes that no box can be made of, by their name in the plural; and what else was changed.
    """

    where: str
    name: str
    shapes: list[Shape]
    path: Path | None = None
    beside: Path | None = None
    size: tuple[int, int] | None = None
    unit: str = "pixel"
    split: str = ""
    other_name: str = ""
    hint: str = ""
    faults: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class FileFault:
    """A file, or a record of it, that gives no image.

    Attributes:
        reason: word by which it is counted.
        where: the file below the source, and the place in it.
        text: what is wrong.
        split: part of the set.
        images, annotations: numbers left out with it.
    """

    reason: str
    where: str
    text: str
    split: str = ""
    images: int = 1
    annotations: int = 0


@dataclass
class LabelSet:
    """A whole source.

    Attributes:
        images: all of it, in any order.
        names: categories in the order of their ids, where the source says it; else None.
        faults: files that give no image.
        notes: lines for the summary.
        unlabelled: images without labels, with their split, that may be background.
        whole: whether `unlabelled` has all of them; else they are what else is in the image folder.
    """

    images: list[LabelledImage]
    names: list[str] | None = None
    faults: list[FileFault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unlabelled: list[LabelledImage] = field(default_factory=list)
    whole: bool = False


@dataclass(frozen=True)
class Wanted:
    """What a reader is asked for.

    Attributes:
        source: folder or file.
        images: folder of the images; None: the source's own.
        annotations: folder of the label files, where it is another one.
        names: categories of the command line, in the order of their ids.
        box: the one of CrowdHuman's boxes that is taken: "full", "visible" or "head".
        class_names: Open Images' file of class names.
    """

    source: Path
    images: Path | None = None
    annotations: Path | None = None
    names: Sequence[str] | None = None
    box: str = "full"
    class_names: Path | None = None

    @property
    def root(self) -> Path:
        """The source's folder."""
        return self.source if self.source.is_dir() else self.source.parent

    def relative(self, path: Path) -> str:
        """A path below the source's folder, for messages."""
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)


def add_fault(skips: Skips, reason: str, where: str, text: str, images: int = 0, annotations: int = 0) -> None:
    """List a fault under the file that it is in, with folders and place.

    Args:
        skips: the run's list.
        reason: word by which it is counted.
        where: file below the source.
        text: what is wrong.
        images, annotations: numbers left out.
    """
    entry = skips.add(reason, Path(where), text, images=images, annotations=annotations)
    entry["file"] = printable(where)


def split_of(path: str) -> str:
    """The part of a set that a relative path names by one of its folders; "" for none."""
    return next((part for part in Path(path).parts[:-1] if part.lower() in SPLITS), "")
