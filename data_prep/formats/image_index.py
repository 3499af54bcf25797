"""Finds the image files that labels speak of, also under names of another system, and reads their headers."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from data_prep.image_files import BadImageError
from data_prep.image_sizes import image_size
from data_prep.voc_layout import IMAGE_SUFFIXES, OTHER_SUFFIXES, files_below
from megdet_hpc.data.image_header import JPEG_START, read_header
from megdet_hpc.data.pixels import swaps_sides
from megdet_hpc.errors import UserError

HEAD_BYTES = 2**18  # of a JPEG, in which its EXIF data and frame header nearly always lie
_DRIVE = re.compile("^[A-Za-z]:")


def _key(name: str) -> str:
    """A name without the differences between systems."""
    return unicodedata.normalize("NFC", name).casefold()


def plain_name(name: str) -> str:
    """A file's name with slashes, without drive and without dots that lead nowhere."""
    text = _DRIVE.sub("", name.strip().replace("\\", "/"))
    return os.path.normpath(text).lstrip("/") if text else ""


class ImageIndex:
    """The image files below a folder.

    Args:
        folder: image folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder of images")
        self.files = files_below(folder, IMAGE_SUFFIXES + OTHER_SUFFIXES)
        self._exact = {str(path) for path in self.files}
        self._tails: dict[str, list[PurePosixPath]] = defaultdict(list)
        self._stems: dict[str, list[PurePosixPath]] = defaultdict(list)
        for path in self.files:
            for start in range(len(path.parts)):
                tail = PurePosixPath(*path.parts[start:])
                self._tails[_key(str(tail))].append(path)
                self._stems[_key(str(tail.with_suffix("")))].append(path)

    def find(self, name: str) -> tuple[Path, bool]:
        """The file that a name means.

        A name is looked for as it is; then with Windows' separators, %20 for a blank and other spellings of umlauts
        and capitals; then without its first folders; and last with another suffix. A name may be without one.

        Args:
            name: relative or absolute, from any system.

        Returns:
            The path, and whether the name is another.

        Raises:
            UserError: there is none, or there are several.
        """
        if name in self._exact:
            return self.folder / name, False
        for text in dict.fromkeys((name, unquote(name))):
            parts = PurePosixPath(plain_name(text)).parts
            while parts and parts[0] == "..":
                parts = parts[1:]
            for start in range(len(parts)):
                tail = "/".join(parts[start:])
                if found := self._tails.get(_key(tail), []):
                    path = self._only(found, tail)
                    return self.folder / path, not f"/{path}".endswith(f"/{name}")
        last = PurePosixPath(plain_name(name)).name
        known = PurePosixPath(last).suffix.lower() in IMAGE_SUFFIXES + OTHER_SUFFIXES
        if found := self._stems.get(_key(PurePosixPath(last).stem if known else last), []):
            return self.folder / self._only(found, name), known
        raise UserError(f"no image {name!r} in {self.folder}")

    def _only(self, found: list[PurePosixPath], name: str) -> PurePosixPath:
        best = [path for path in found if str(path) == name] or [p for p in found if str(p).endswith(name)] or found
        if len(best) > 1:
            shown = ", ".join(map(str, best[:4]))
            raise UserError(f"several images may be {name!r}: {shown}")
        return best[0]


@dataclass(frozen=True)
class ImageFacts:
    """The header of an image file: its sides as stored [pixels] and its EXIF orientation."""

    width: int
    height: int
    orientation: int

    def size(self, upright: bool) -> tuple[int, int]:
        """Width and height as stored, or as the picture is seen."""
        return (self.height, self.width) if upright and swaps_sides(self.orientation) else (self.width, self.height)


def _facts(path: Path) -> ImageFacts | BadImageError:
    if path.suffix.lower() in OTHER_SUFFIXES:
        return BadImageError("unsupported_image", "is neither JPEG nor PNG: convert it")
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
            header = read_header(head)
            if not (head.startswith(JPEG_START) and header.channels):
                header = read_header(head + file.read())
        return ImageFacts(*image_size(path, "stored"), header.orientation)
    except BadImageError as error:
        return error
    except OSError as error:
        return BadImageError("bad_image", f"cannot be read ({error.strerror or error})")


def read_facts(paths: Sequence[Path]) -> dict[Path, ImageFacts | BadImageError]:
    """Headers of many files, or why there is none."""
    paths = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(16) as pool:  # a parallel file system answers slowly, but many at once
        return dict(zip(paths, pool.map(_facts, paths, chunksize=64), strict=True))


def told_orientation(
    labelled: Iterable[tuple[tuple[float | None, float | None] | None, ImageFacts | BadImageError]], usual: str
) -> str:
    """Whose pixels labels are of, "stored" or "upright", by the sizes that they name.

    Args:
        labelled: width and height in the label, None where it names none, and the header of its image.
        usual: answer where the sizes do not tell.
    """
    fits: Counter[str] = Counter()
    for size, known in labelled:
        if isinstance(known, ImageFacts) and known.width != known.height and swaps_sides(known.orientation):
            fits["upright"] += size == known.size(True)
            fits["stored"] += size == known.size(False)
    told = [name for name, fitting in fits.items() if fitting]
    return told[0] if len(told) == 1 else usual
