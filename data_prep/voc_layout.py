"""Finds the XML files and the images of a Pascal VOC set, in VOC's own folders or in others."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from data_prep.voc_xml import read_voc_xml
from megdet_hpc.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")  # in lower case, the preferred one first
OTHER_SUFFIXES = (".bmp", ".tif", ".tiff", ".webp", ".gif")
ANNOTATION_WORDS = ("annot", "label", "xml")  # in the name of a folder whose subfolders all belong to one set
TRIED_FILES = 50  # approximate number of XML files that are tried to find their folder of images
LISTED = 6


def _walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """`folder` and every folder below it, in order, with its files. Links are followed, and each folder comes once."""
    seen = set()
    for name, folders, files in os.walk(folder, followlinks=True):
        place = os.path.realpath(name)
        folders[:] = sorted(f for f in folders if not f.startswith(".")) if place not in seen else []
        if place not in seen:
            seen.add(place)
            yield Path(name), sorted(file for file in files if not file.startswith("."))


def files_below(folder: Path, suffixes: Sequence[str]) -> list[PurePosixPath]:
    """Files of a folder and those below it, relative to it, by their suffix in any case."""
    found = []
    for place, files in _walk(folder):
        inside = place.relative_to(folder).as_posix()
        found += [PurePosixPath(inside, file) for file in files if PurePosixPath(file).suffix.lower() in suffixes]
    return found


@dataclass(frozen=True)
class VocLayout:
    """The folders of a set.

    Attributes:
        root: folder that holds ImageSets, if there is one.
        annotations: folder of the XML files, which may lie in folders below it.
        images: folder of the images, likewise.
    """

    root: Path
    annotations: Path
    images: Path

    def xml_files(self) -> dict[str, Path]:
        """The XML files by their path below `annotations`, without suffix; sorted by that.

        Raises:
            UserError: there is none.
        """
        found = files_below(self.annotations, (".xml",))
        stems = {str(path.with_suffix("")): self.annotations / path for path in found}
        if not stems:
            raise UserError(f"{self.annotations}: no annotation file *.xml; name their folder by --annotations")
        return dict(sorted(stems.items()))


class ImageFolder:
    """The image files of a folder and of those below it, found by the names that XML files give them.

    Args:
        folder: image folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = files_below(folder, IMAGE_SUFFIXES + OTHER_SUFFIXES)
        self._by_stem: dict[str, list[PurePosixPath]] = {}  # by the path below the folder, and by the name alone
        for path in sorted(self.files, key=lambda path: (IMAGE_SUFFIXES + OTHER_SUFFIXES).index(path.suffix.lower())):
            for key in {str(path.with_suffix("")), f"*/{path.stem}"}:
                self._by_stem.setdefault(key, []).append(path)

    def find(self, stem: str, filename: str) -> PurePosixPath:
        """The image with the XML file's own name, else the one that its `filename` names.

        Args:
            stem: path of the XML file below its folder, without suffix.
            filename: the name in the XML file, with or without a suffix; may be "".

        Returns:
            A path below the folder.

        Raises:
            UserError: there is none, there are several, or it is of a format that cannot be packed.
        """
        own = PurePosixPath(stem)
        said = PurePosixPath(filename)
        said_stem = said.stem if said.suffix.lower() in IMAGE_SUFFIXES + OTHER_SUFFIXES else filename
        beside = str(own.with_name(said_stem)) if said_stem else ""
        for key in (stem, beside, f"*/{own.name}", f"*/{said_stem}"):
            found = self._by_stem.get(key, [])
            if found:
                return self._choose(found, filename)
        raise UserError(f"no image {self.folder / stem}.jpg (nor .jpeg, .png), and its filename is {filename!r}")

    def _choose(self, found: list[PurePosixPath], filename: str) -> PurePosixPath:
        named = [path for path in found if path.name == filename] or found
        if len({path.parent for path in named}) > 1:
            raise UserError(f"several images have its name: {', '.join(map(str, named[:LISTED]))}")
        if named[0].suffix.lower() in OTHER_SUFFIXES:
            raise UserError(f"its image {named[0]} is neither JPEG nor PNG: convert it")
        return named[0]


def _named(folder: Path | None, directory: Path) -> Path | None:
    """A folder of the command line, as typed or below the set's folder; raises UserError if there is neither."""
    if folder is None:
        return None
    for path in (folder, directory / folder):
        if path.is_dir():
            return path
    raise UserError(f"{folder}: no such folder, neither here nor in {directory}")


def _show(folders: Sequence[Path]) -> str:
    return ", ".join(map(str, folders[:LISTED])) + (", ..." if len(folders) > LISTED else "")


def _find_annotations(directory: Path) -> Path:
    """VOC's own folder of XML files, or the only one. A folder that holds all others counts as the only one.

    Raises:
        UserError: there is none or there are several.
    """
    own = directory / "Annotations"
    if own.is_dir() and files_below(own, (".xml",)):
        return own
    found = [place for place, files in _walk(directory) if any(file.lower().endswith(".xml") for file in files)]
    if not found:
        raise UserError(f"{directory}: no annotation file *.xml in it or below it; expected a Pascal VOC set")
    common = Path(os.path.commonpath(found))
    if common in found or any(word in common.name.lower() for word in ANNOTATION_WORDS):
        return common
    raise UserError(f"{directory}: XML files in several folders ({_show(found)}): name one, or --annotations for all")


def _filename(path: Path) -> str:
    """The image's name in an XML file; "" if there is none or the file is bad."""
    try:
        return read_voc_xml(path).filename
    except UserError:
        return ""


def _find_images(directory: Path, annotations: Path) -> Path:
    """VOC's own folder of images, or the one with the images of the first XML files.

    Raises:
        UserError: there is none or there are several.
    """
    for own in (directory / "JPEGImages", annotations.parent / "JPEGImages"):
        if own.is_dir():
            return own
    xml = files_below(annotations, (".xml",))
    if xml and any((annotations / xml[0].with_suffix(suffix)).is_file() for suffix in IMAGE_SUFFIXES):
        return annotations  # side by side
    found = [
        place
        for place, files in _walk(directory)
        if any(PurePosixPath(file).suffix.lower() in IMAGE_SUFFIXES + OTHER_SUFFIXES for file in files)
    ]
    if not found:
        raise UserError(f"{directory}: no image in it or below it; name their folder by --images")
    if len(found) == 1:
        return found[0]
    tried = xml[:: max(1, len(xml) // TRIED_FILES)]
    stems = {path.stem for path in tried}
    fitting = [place for place in found if any(PurePosixPath(file).stem in stems for file in os.listdir(place))]
    if len(fitting) > 1:  # for example masks with the same names, whose suffix differs from the one in the XML
        names = {name for path in tried if (name := _filename(annotations / path))}
        exact = [place for place in fitting if names.intersection(os.listdir(place))]
        fitting = exact or fitting
    common = Path(os.path.commonpath(fitting or found))
    if len(fitting) == 1 or common in fitting:
        return common
    if common != directory and len(fitting) > 1:
        return common
    raise UserError(f"{directory}: images in several folders ({_show(found)}): name theirs by --images")


def find_layout(directory: Path, annotations: Path | None = None, images: Path | None = None) -> VocLayout:
    """The folders of a VOC set.

    Args:
        directory: the set's folder.
        annotations: folder of the XML files, as typed or below `directory`; None: it is looked for.
        images: folder of the images, likewise.

    Raises:
        UserError: a folder is missing, or there is more than one that may be meant.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such folder")
    found = _named(annotations, directory) or _find_annotations(directory)
    root = next((place for place in (directory, found.parent) if (place / "ImageSets").is_dir()), directory)
    return VocLayout(root, found, _named(images, directory) or _find_images(directory, found))
