"""Finds the file of each image record, even if its name was written on another system."""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from data_prep.coco_source import SourceImage
from data_prep.image_faults import add_image_fault, printable
from data_prep.skips import Skips
from megdet_hpc.errors import UserError

STAT_CHUNK = 64  # files per task of a thread, since a task costs more than a local stat
_DRIVE = re.compile("[a-z]:")
MOST_FILES = 100_000  # plus four times the images; a folder with more is not searched on, since it may be a home folder
SAMPLE = 50  # number of missing files in which a likely cause is searched


def find_images(images: list[SourceImage], folder: Path, skips: Skips) -> str:
    """Fill in path, size and change time of every image's file; they stay 0 for a missing file.

    A missing name is searched in other spellings: backslashes for slashes, upper for lower case, %20 for a blank,
    composed for decomposed umlauts. Leading folders may be left out: those with which the image folder's own path ends,
    and those with which all absolute names of another machine begin. A file is taken if only this file fits and no
    other record has it.

    Args:
        images: the set's images. Images whose name leaves the folder are removed.
        folder: image folder.
        skips: gets the names that leave the folder, and the number of files found in another spelling. If many files
            are missing for one likely cause and are not skipped, it gets these too. Otherwise their shards report them.

    Returns:
        The likely cause, or empty.

    Raises:
        UserError: `folder` is no folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such image folder")
    number, outside = len(images), set()
    for image in images:
        image.path = image.record["file_name"]
        if _leaves(image.path, folder):
            outside.add(id(image))
    absent = _stat([image for image in images if id(image) not in outside], folder)
    absent += [image for image in images if id(image) in outside]
    if absent:
        skips.repaired("images", ["name_respelt"] * _search(absent, images, folder))
    absent = [image for image in absent if image.file_mtime_ns == 0]
    outside &= {id(image) for image in absent}
    likely_cause = _likely_cause(absent, number, folder) if absent else ""
    for image in absent:
        if id(image) in outside:
            _add(skips, "outside_folder", image, "its file_name leaves the image folder")
        elif likely_cause and not skips.skip:
            is_folder = _is(Path.is_dir, folder / image.path)
            _add(skips, "missing_image", image, "is a folder, expected a file" if is_folder else "no such file")
    images[:] = [image for image in images if id(image) not in outside]
    return likely_cause


def _add(skips: Skips, reason: str, image: SourceImage, text: str) -> None:
    add_image_fault(skips, reason, image.path, image.record["id"], text, image.num_annotations)


def _stat(images: Sequence[SourceImage], folder: Path) -> list[SourceImage]:
    """Stat all files. Returns the images without one."""

    def ask(first: int) -> list[SourceImage]:
        absent = []
        for image in images[first : first + STAT_CHUNK]:
            try:
                status = os.stat(os.path.join(folder, image.path))
            except (OSError, ValueError):  # no such file; a name that is too long or that the system cannot have
                absent.append(image)
                continue
            if stat.S_ISDIR(status.st_mode):
                absent.append(image)
                continue
            image.file_bytes, image.file_mtime_ns = status.st_size, status.st_mtime_ns or 1
        return absent

    # A parallel file system answers a stat in about a millisecond, but many at once.
    with ThreadPoolExecutor(16) as pool:
        return [image for part in pool.map(ask, range(0, len(images), STAT_CHUNK)) for image in part]


def _leaves(name: str, folder: Path) -> bool:
    """Whether a name itself points out of the folder. Links in the folder may do so."""
    if ".." not in name and not name.startswith("/") and name.strip("./"):
        return False
    root = os.path.abspath(folder)
    path = os.path.normpath(os.path.join(root, name))
    return os.path.commonpath([root, path]) != root or path == root


def _search(absent: Sequence[SourceImage], images: Sequence[SourceImage], folder: Path) -> int:
    """Give absent images the only file that fits another spelling of their name. Returns the number found."""
    files: dict[str, list[str]] = defaultdict(list)
    for path in islice(_walk(folder), MOST_FILES + 4 * len(images)):
        files[_key(path)].append(path)
    own = PurePosixPath(_key(os.path.abspath(folder)))
    root = _foreign_root((image.record["file_name"] for image in images), own.name)
    taken = Counter(os.path.normpath(image.path) for image in images if image.file_mtime_ns)
    found: dict[str, list[SourceImage]] = defaultdict(list)
    for image in absent:
        fits = next((files[key] for key in _spellings(image.record["file_name"], own.parts, root) if key in files), [])
        if len(fits) == 1 and not taken[fits[0]]:
            found[fits[0]].append(image)
    respelt = []
    for path, claimed_by in found.items():
        if len({image.record["file_name"] for image in claimed_by}) == 1:  # records of the same name may share a file
            respelt += claimed_by
            for image in claimed_by:
                image.path = path
    return len(respelt) - len(_stat(respelt, folder))


def _walk(folder: Path) -> Iterator[str]:
    """Paths of all files below a folder, relative to it."""
    for parent, _, names in os.walk(folder):
        inner = os.path.relpath(parent, folder)
        yield from (name if inner == "." else os.path.join(inner, name) for name in names)


def _key(name: str) -> str:
    """A name in a form that is equal on all systems."""
    return os.path.normpath(unicodedata.normalize("NFC", name).replace("\\", "/")).casefold()


def _spellings(name: str, of_folder: tuple[str, ...], root: tuple[str, ...] | None) -> Iterator[str]:
    """Keys of the files that a record may mean, the most likely first.

    Args:
        name: the record's file_name.
        of_folder: parts of the image folder's path; "train/1.jpg" may be "1.jpg" of .../train.
        root: folder on another machine with which all absolute names begin, or None.
    """
    for text in dict.fromkeys((name, unquote(name))):
        key = _key(text)
        yield key
        parts = PurePosixPath(key).parts
        if root and parts[: len(root)] == root:
            yield "/".join(parts[len(root) :])
        for number in range(len(parts) - 1, 0, -1):
            front = tuple(part for part in parts[:number] if part != "..")
            if front and of_folder[-len(front) :] == front:
                yield "/".join(parts[number:])


def _foreign_root(names: Iterator[str], own_name: str) -> tuple[str, ...] | None:
    """The parts with which all absolute names begin, up to the image folder's own name; None if they differ."""
    roots = set()
    for name in names:
        parts = PurePosixPath(_key(name)).parts
        if parts[:1] == ("/",) or _DRIVE.match(parts[0] if parts else ""):
            places = [place for place, part in enumerate(parts[:-1]) if part == own_name]
            roots.add(parts[: places[-1] + 1] if places else ())
    return roots.pop() if len(roots) == 1 else None


def _likely_cause(absent: Sequence[SourceImage], number: int, folder: Path) -> str:
    """The cause of the missing files and a remedy, if more than half of a sample have the same cause."""
    step = max(1, len(absent) // SAMPLE)
    names = [image.record["file_name"].replace("\\", "/") for image in absent[::step][:SAMPLE]]
    share = f"{len(absent):,} of {number:,} images are missing"
    half = len(names) / 2
    absolute = [name for name in names if name.startswith("/") and _is(Path.is_file, Path(name))]
    names = [name for name in names if not name.startswith("/")] or [PurePosixPath(name).name for name in names]
    if len(absolute) > half:
        common = os.path.commonpath([os.path.dirname(name) for name in absolute])
        return f"{share}; they lie elsewhere: give a folder that holds them all as --images, such as {common}"
    try:
        folders = [folder.resolve().parent, *sorted(path for path in folder.iterdir() if path.is_dir())]
        for other in folders[:SAMPLE]:
            if sum(_is(Path.is_file, other / name) for name in names) > half:
                return f"{share}; they are in {other}: give it as --images"
        if sum(_is(Path.is_file, folder / PurePosixPath(name).name) for name in names) > half:
            inner = PurePosixPath(absent[0].record["file_name"].replace("\\", "/")).parent.name
            return (
                f"{share}; files of these names without their folder are in {folder}: if it is the right one, give it "
                f"as --images by a link whose path ends in {printable(inner, 120)!r}"
            )
        first = next(_walk(folder), None)
        stems = {os.path.splitext(path)[0]: path for path in islice(_walk(folder), MOST_FILES + 4 * number)}
    except OSError:
        return share
    if first is None:
        return f"{share}; {folder} holds no file"
    other_ends = [stems[stem] for name in names if (stem := os.path.splitext(name)[0]) in stems]
    if len(other_ends) > half:
        return f"{share}; {folder} holds files that differ from their names in the end alone, as {other_ends[0]!r}"
    if len(absent) * 2 > number:
        return f"{share}; {folder} holds other files, as {printable(first, 120)!r}: is it the right folder?"
    return ""


def _is(kind: Callable[[Path], bool], path: Path) -> bool:
    try:
        return kind(path)
    except OSError:  # a name that is too long
        return False
