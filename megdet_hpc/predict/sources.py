"""The pictures and videos that a command line names: files, folders and patterns."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megdet_hpc.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
"""Names that are taken for pictures in a folder. A file that is named itself may have any name."""
VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv")


@dataclass(frozen=True)
class InputFile:
    """A picture or a video.

    Attributes:
        path: file, as it was named or found. It may be missing.
        drawing: path of what is drawn of it, below the folder of pictures.
    """

    path: Path
    drawing: Path

    @property
    def is_video(self) -> bool:
        """Whether it is decoded as a video, by its name."""
        return self.path.suffix.lower() in VIDEO_SUFFIXES


def find_sources(words: Sequence[str], output: Path) -> list[InputFile]:
    """The files that some words mean, each once, in the order of the words; those of a folder by name.

    Args:
        words: files, folders (with all below them) and patterns with *, ? or [].
        output: folder of the results, in which nothing is looked for.

    Raises:
        UserError: a folder without a picture, a pattern that fits nothing, or a pack.
    """
    found: dict[Path, Path] = {}
    for word in words:
        for path, place in _meant(word, output):
            found.setdefault(path, place)
    sources: list[InputFile] = []
    taken: set[Path] = set()
    for path, place in found.items():
        suffix = ".mp4" if path.suffix.lower() in VIDEO_SUFFIXES else ".jpg"
        drawing, number = place.with_name(place.name + suffix), 1
        while drawing in taken:
            number += 1
            drawing = place.with_name(f"{place.name}-{number}{suffix}")
        taken.add(drawing)
        sources.append(InputFile(path, drawing))
    return sources


def _meant(word: str, output: Path) -> Iterator[tuple[Path, Path]]:
    """The files that a word means, and the place of each among the drawings, without a suffix."""
    path = Path(word)
    if path.is_dir():
        if (path / "manifest.json").is_file():
            raise UserError(f"{path} is a packed set: megdet evaluate scores it; name a folder of pictures")
        files = _outside(_below(path), word, output)
        if not files:
            known = ", ".join((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES))
            raise UserError(f"{path}: no picture or video in this folder; known by {known}")
        yield from ((file, file.relative_to(path).with_suffix("")) for file in files)
    elif path.exists() or not glob.has_magic(word):
        yield from ((file, Path(file.stem)) for file in _outside([path], word, output))
    else:
        names = sorted(glob.glob(word, recursive=True))
        files = _outside([Path(name) for name in names if not Path(name).is_dir()], word, output)
        if not files:
            raise UserError(f"{word}: no file fits this pattern")
        yield from ((file, Path(file.stem)) for file in files)


def _outside(files: list[Path], word: str, output: Path) -> list[Path]:
    """The files that do not lie in the output folder; raises UserError where all of them do."""
    outside = [file for file in files if not file.absolute().is_relative_to(output.absolute())]
    outside = [file for file in outside if not file.resolve().is_relative_to(output.resolve())]
    if files and not outside:
        raise UserError(f"{word}: lies in --output {output}, where nothing is read; name another folder")
    return outside


def _below(folder: Path) -> list[Path]:
    """The pictures and videos in a folder and below it, by path; hidden ones are left out, links to nothing are not."""
    known = (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)
    files = (file for file in folder.rglob("*") if file.suffix.lower() in known and not file.is_dir())
    return sorted(file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts))
