"""Unpacks the ZIP files that labelling tools export."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from data_prep.voc_layout import IMAGE_SUFFIXES, OTHER_SUFFIXES
from megdet_hpc.errors import UserError

MOST_BYTES = 2**30  # of labels that are unpacked into a temporary folder


def _members(archive: zipfile.ZipFile, path: Path) -> list[zipfile.ZipInfo]:
    """The files of an archive; raises UserError for a name that leaves the folder it is unpacked to."""
    members = [member for member in archive.infolist() if not member.is_dir()]
    for member in members:
        parts = PurePosixPath(member.filename.replace("\\", "/")).parts
        if ".." in parts or parts[:1] == ("/",) or (parts and ":" in parts[0]):
            raise UserError(f"{path}: holds a file {member.filename!r}, which leaves the folder that it is unpacked to")
    return members


def _is_image(member: zipfile.ZipInfo) -> bool:
    return PurePosixPath(member.filename).suffix.lower() in IMAGE_SUFFIXES + OTHER_SUFFIXES


def _crc32(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(2**20):
            crc = zlib.crc32(block, crc)
    return crc


def _is_unpacked(members: list[zipfile.ZipInfo], folder: Path) -> bool:
    """Whether a folder holds the files of an archive, byte for byte, and no other, as an earlier run leaves them."""
    known = {member.filename: member for member in members}
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not path.is_dir()}
    return paths.keys() == known.keys() and all(
        path.stat().st_size == known[name].file_size and _crc32(path) == known[name].CRC for name, path in paths.items()
    )


def _unpack(archive: zipfile.ZipFile, members: list[zipfile.ZipInfo], folder: Path) -> None:
    """Unpack into an empty or a new folder; one that an earlier run has filled is left as it is.

    Raises:
        UserError: it holds other files.
    """
    existed = folder.exists()
    if existed and any(folder.iterdir()):
        if _is_unpacked(members, folder):
            return
        raise UserError(f"{folder}: holds other files than the archive; give a new folder to --unpack")
    try:
        archive.extractall(folder, members)
    except BaseException:  # a part of it would be in the way of the next try
        shutil.rmtree(folder, ignore_errors=True)
        if existed:
            folder.mkdir(exist_ok=True)
        raise


@contextmanager
def unpacked(path: Path, folder: Path | None, images: Path | None) -> Iterator[Path]:
    """A folder with the files of an archive.

    Args:
        path: ZIP file.
        folder: folder to keep, new or filled by an earlier run; None unpacks the labels alone, while they are read.
        images: folder of the images, which are needed outside of the archive.

    Raises:
        UserError: damaged, or its images would be nowhere, or `folder` holds other files.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = _members(archive, path)
            if folder is not None:
                _unpack(archive, members, folder)
                yield folder
                return
            if images is None:
                what = "holds images" if any(map(_is_image, members)) else "holds no images"
                hint = "--unpack DIR unpacks it, " if what == "holds images" else ""
                raise UserError(f"{path}: {what}: {hint}--images DIR names a folder that has them")
            labels = [member for member in members if not _is_image(member)]
            if (size := sum(member.file_size for member in labels)) > MOST_BYTES:
                raise UserError(f"{path}: holds {size / 2**30:.1f} GiB of labels: unpack it by --unpack DIR")
            with tempfile.TemporaryDirectory() as temporary:
                archive.extractall(temporary, labels)
                yield Path(temporary)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be unpacked ({error}); copy it again") from error
