"""Reads YOLO's text labels: boxes and outlines, in the layouts of Ultralytics, Roboflow, Darknet and labelImg."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.formats.labels import FileFault, LabelledImage, LabelSet, Shape, Wanted
from data_prep.formats.text_files import number, read_text
from data_prep.voc_layout import IMAGE_SUFFIXES, OTHER_SUFFIXES, files_below
from megdet_hpc.errors import UserError

LEEWAY = 0.01  # beyond 0..1, as rounding and tools that clip late leave it
NAME_FILES = ("classes.txt", "obj.names", "predefined_classes.txt", "_darknet.labels", "labels.txt", "classes.names")
PARTS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}  # keys of data.yaml, obj.data
_IMAGES = IMAGE_SUFFIXES + OTHER_SUFFIXES


@dataclass
class _Layout:
    """Where a set's images are, by part, and what its files say."""

    root: Path
    names: list[str] | None = None
    parts: dict[str, list[Path]] = field(default_factory=dict)
    keypoints: int = 0  # numbers behind each box
    notes: list[str] = field(default_factory=list)
    said_by: str = ""  # the file that says all this


def label_path(image: Path) -> Path:
    """The label file that Ultralytics looks for: the last folder `images` becomes `labels`, the suffix .txt."""
    parts = list(image.parts)
    for place in range(len(parts) - 2, -1, -1):
        if parts[place] == "images":
            parts[place] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def find_yaml(folder: Path) -> Path | None:
    """The one YAML file of a folder that has `names`; raises UserError where there are several."""
    found = [
        path
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in (".yaml", ".yml") and re.search(r"^\s*names\s*:", _peek(path), re.MULTILINE)
    ]
    if len(found) > 1:
        shown = ", ".join(path.name for path in found[:6])
        raise UserError(f"{folder}: several files have names ({shown}): give one of them in place of the folder")
    return found[0] if found else None


def _peek(path: Path) -> str:
    try:
        return read_text(path)
    except UserError:
        return ""


def _load_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        value = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, expected keys such as train, val and names")
    return value


def _names_of(value: Any, path: Path) -> list[str]:
    """Names in the order of their class numbers; raises UserError where numbers have gaps."""
    if isinstance(value, dict):
        if sorted(value, key=str) != sorted(range(len(value)), key=str):
            raise UserError(f"{path}: names has the keys {list(value)[:8]}, expected 0 to {len(value) - 1}")
        value = [value[place] for place in range(len(value))]
    if not isinstance(value, list) or not value or any(isinstance(name, dict | list) or name is None for name in value):
        raise UserError(f"{path}: names is {value!r:.80}, expected a list, or numbers from 0 with a name each")
    return [str(name).strip() for name in value]


def _from_yaml(path: Path, with_images: bool) -> _Layout:
    """The layout that a data.yaml describes; its images only where they are asked for."""
    data = _load_yaml(path)
    layout = _Layout(path.parent, said_by=path.name)
    if data.get("names") is None:
        raise UserError(f"{path}: has no names; give --categories FILE")
    layout.names = _names_of(data["names"], path)
    if (count := data.get("nc")) is not None and count != len(layout.names):
        raise UserError(f"{path}: nc is {count!r}, but there are {len(layout.names)} names")
    if isinstance(shape := data.get("kpt_shape"), list) and all(isinstance(value, int) for value in shape):
        layout.keypoints = shape[0] * (shape[1] if len(shape) > 1 else 1)
    said = str(data.get("path") or "").replace("\\", "/")
    if said and not os.path.isabs(said) and (path.parent / said).is_dir():
        layout.root = path.parent / said
    elif said and os.path.isabs(said) and Path(said).is_dir():
        layout.root = Path(said)
    elif said not in ("", "."):
        layout.notes.append(f"path {said!r} of {path.name} is not here: its own folder is taken")
    for part, keys in PARTS.items() if with_images else ():
        value = next((data[key] for key in keys if data.get(key)), None)
        if value is not None:
            places = value if isinstance(value, list) else [value]
            layout.parts[part] = [image for place in places for image in _images_at(layout, str(place), path)]
    return layout


def _from_darknet(path: Path, with_images: bool) -> _Layout:
    """The layout that an obj.data describes, as CVAT's "YOLO 1.1" has it; its images only where they are asked for."""
    layout = _Layout(path.parent, said_by=path.name)
    pairs = [line.partition("=") for line in read_text(path).splitlines() if "=" in line]
    data = {key.strip(): value.strip() for key, _, value in pairs}
    if "names" in data:
        layout.names = _read_names(_there(layout, data["names"], path))
    for part, keys in PARTS.items() if with_images else ():
        value = next((data[key] for key in keys if data.get(key)), None)
        if value is not None:
            layout.parts[part] = _images_at(layout, value, path)
    return layout


def _there(layout: _Layout, place: str, path: Path) -> Path:
    """A file or folder that a description names, also if it leads out of the set by mistake.

    Roboflow writes ../train/images into a file beside train/, CVAT data/train.txt for train.txt.
    """
    text = place.strip().replace("\\", "/")
    parts = Path(text).parts
    for first in range(len(parts)):
        if first and parts[first - 1] not in ("..", ".", "data", "/"):
            break
        if (found := layout.root.joinpath(*parts[first:])).exists():
            if first:
                layout.notes.append(f"{place!r} of {path.name} is taken as {'/'.join(parts[first:])!r}")
            return found
    raise UserError(f"{path}: names {place!r}, which is not in {layout.root}")


def _images_at(layout: _Layout, place: str, path: Path) -> list[Path]:
    """The images of a folder, or those that a text file lists."""
    found = _there(layout, place, path)
    if found.is_dir():
        return [found / file for file in files_below(found, _IMAGES)]
    images = []
    for line in read_text(found).splitlines():
        if text := line.strip().replace("\\", "/"):
            near = found.parent / text
            images.append(near if near.is_file() else _listed(layout, text, found))
    return images


def _listed(layout: _Layout, text: str, path: Path) -> Path:
    """An image that a list names; where it is not there, the likeliest path, which then is told as missing."""
    parts = Path(text).parts
    for first in range(len(parts)):
        if (found := layout.root.joinpath(*parts[first:])).is_file():
            return found
    return path.parent / text


def _read_names(path: Path) -> list[str]:
    try:
        return [line.strip() for line in read_text(path).splitlines() if line.strip()]
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _from_folder(folder: Path, images: Path | None) -> _Layout:
    """The layout of a folder without a description: images/ and labels/, or images and labels side by side."""
    layout = _Layout(folder)
    for place in (folder, folder / "labels", folder.parent, *(f for f in (images,) if f)):
        if found := next((place / name for name in NAME_FILES if (place / name).is_file()), None):
            layout.names, layout.said_by = _read_names(found), found.name
            break
    top = images or (folder / "images" if (folder / "images").is_dir() else folder)
    for file in files_below(top, _IMAGES):
        part = next((part for part, words in PARTS.items() if set(file.parts[:-1]) & {part, *words}), "")
        layout.parts.setdefault(part, []).append(top / file)
    return layout


def _layout(wanted: Wanted) -> _Layout:
    source = wanted.source
    described = source if source.is_file() else find_yaml(source)
    if described is None and (source / "obj.data").is_file():
        described = source / "obj.data"
    if described is None:
        return _from_folder(source, wanted.images)
    layout = (_from_darknet if described.suffix == ".data" else _from_yaml)(described, wanted.images is None)
    if not layout.parts:  # names alone, as labelling tools write it
        layout.parts = _from_folder(layout.root, wanted.images).parts
    return layout


class _Reader:
    """Reads label files.

    Args:
        names: categories by class number.
        keypoints: numbers behind each box.
    """

    def __init__(self, names: list[str], keypoints: int) -> None:
        self.names, self.keypoints = names, keypoints

    def read(self, path: Path, image: LabelledImage) -> None:
        """Fill an image with the shapes of a label file; raises UserError where it cannot be read."""
        seen: set[tuple[str, ...]] = set()
        for line, text in enumerate(read_text(path).splitlines(), start=1):
            words = tuple(text.split())
            if not words:
                continue
            if words in seen:
                image.left_out["lines that repeat another one of their file left out"] += 1
                continue
            seen.add(words)
            try:
                image.shapes.append(self._shape(words, f"line {line}", image.left_out))
            except UserError as error:
                image.faults.append(f"line {line}: {error}")

    def _shape(self, words: tuple[str, ...], where: str, counts: Counter[str]) -> Shape:
        name = self._name(words[0])
        values = [number(word, f"number {place} of {len(words)}") for place, word in enumerate(words[1:], start=2)]
        counts["lines with decimal commas"] += any("," in word for word in words)
        if self.keypoints and len(values) == 4 + self.keypoints:
            counts["keypoints left out, of objects"] += 1
            values = values[:4]
        if len(values) == 5:
            raise UserError("6 numbers, as of predictions with a score; expected class x y width height, or an outline")
        if len(values) < 4 or (len(values) > 4 and (len(values) % 2 or len(values) < 6)):
            raise UserError(f"{len(words)} numbers, expected class x y width height, or class and 3 or more points")
        for value in values:
            if not -LEEWAY <= value <= 1 + LEEWAY:
                hint = "; are these pixels?" if max(values) > 2 else ""
                raise UserError(f"{value:g} is beyond 0..1, the fractions of width and height{hint}")
        if len(values) > 4:
            points = list(zip(values[::2], values[1::2], strict=True))
            return Shape(name, where, "polygon", points)
        x, y, width, height = values
        if width < 0 or height < 0:
            raise UserError(f"width and height are {width:g} and {height:g}, expected 0 or more")
        corners = [(x - width / 2, y - height / 2), (x + width / 2, y + height / 2)]
        return Shape(name, where, "box", corners)

    def _name(self, word: str) -> str:
        try:
            place = int(word) if "_" not in word else -1
        except ValueError:
            try:
                value = float(word)
            except ValueError:
                value = -0.5
            place = int(value) if value.is_integer() else -1
            if place < 0:
                raise UserError(f"the class is {word!r:.40}, expected a number") from None
        if not 0 <= place < len(self.names):
            raise UserError(f"the class is {word}, but there are {len(self.names)} names: 0 to {len(self.names) - 1}")
        return self.names[place]


def read_yolo(wanted: Wanted) -> LabelSet:
    """A set of YOLO labels.

    Args:
        wanted: a folder, its data.yaml or obj.data.

    Raises:
        UserError: the description is wrong, or there are no names of classes.
    """
    layout = _layout(wanted)
    names = list(wanted.names) if wanted.names is not None else layout.names
    if names is None:
        known = ", ".join(("data.yaml", *NAME_FILES[:2]))
        raise UserError(f"{wanted.source}: no names of the classes ({known}); give --categories FILE, a name a line")
    result = LabelSet([], names, notes=layout.notes, whole=True)
    if layout.said_by:
        result.notes.insert(0, f"names of {len(names)} classes: {layout.said_by if wanted.names is None else 'given'}")
    reader = _Reader(names, layout.keypoints)
    used: dict[tuple[str, Path], Path] = {}  # image by part and label file
    folders: dict[Path, str] = {}
    for part, images in layout.parts.items():
        for path in dict.fromkeys(Path(os.path.normpath(image)) for image in images):
            place = _label_of(path, wanted)
            folders.setdefault(place.parent, part)
            image = LabelledImage(wanted.relative(place), path.name, [], path, unit="fraction", split=part)
            if not path.is_file():
                result.faults.append(FileFault("missing_image", wanted.relative(path), "no such file", part))
            elif not place.is_file():
                image.where = wanted.relative(path)
                result.unlabelled.append(image)
            elif (first := used.setdefault((part, place), path)) != path:
                text = f"its label file {place.name} is that of {first.name} too"
                result.faults.append(FileFault("image_labelled_twice", wanted.relative(path), text, part))
            else:
                try:
                    reader.read(place, image)
                    result.images.append(image)
                except UserError as error:
                    result.faults.append(FileFault("bad_file", image.where, str(error), part))
    result.faults += _orphans(folders, {place for _, place in used}, wanted)
    return result


def _label_of(image: Path, wanted: Wanted) -> Path:
    """The label file of an image: as Ultralytics looks for it, else beside the image, else below the source."""
    places = [label_path(image), image.with_suffix(".txt")]
    top = wanted.images or wanted.root
    inside = (image.relative_to(top) if image.is_relative_to(top) else Path(image.name)).with_suffix(".txt")
    if wanted.annotations is not None:
        places = [wanted.annotations / inside, wanted.annotations / inside.name]
    elif wanted.images is not None:
        places += [wanted.root / "labels" / inside, wanted.root / inside]
    return next((place for place in places if place.is_file()), places[0])


def _orphans(folders: dict[Path, str], used: set[Path], wanted: Wanted) -> list[FileFault]:
    """Label files of no image."""
    faults = []
    for folder, part in folders.items():
        for path in sorted(folder.glob("*.txt")) if folder.is_dir() else ():
            if path not in used and path.name not in NAME_FILES:
                lines = [line.split() for line in _peek(path).splitlines() if line.strip()]
                if all(len(words) >= 5 and words[0].isdigit() for words in lines[:1]):
                    where, text = wanted.relative(path), "no image of its name"
                    faults.append(FileFault("missing_image", where, text, part, 1, len(lines)))
    return faults
