"""Files that are whole or not there at all."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, read a MiB at a time."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Flush the entries of a folder to disk, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish_file(temporary: Path, final: Path) -> None:
    """Flush a finished temporary file and give it its final name in the same folder, atomically."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, final)
    sync_folder(final.parent)


def temporary_for(path: Path) -> Path:
    """A name for the unfinished file of a path, in its folder: hidden, ending in .tmp, and no other process's.

    Processes of two hosts that share the folder may have equal numbers.
    """
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let the error of a full disk name what was being written. That of a write names no file by itself.

    Args:
        path: file or folder that the block writes.

    Raises:
        OSError: the block's own; its `filename` is `path` if the disk or quota is full and it had none.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`, and rename it to `path` once it is whole and on disk.

    Raises:
        OSError: the disk is full, or there is no permission. The temporary file is removed; an older file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_for(path)
    try:
        with naming(path):
            with open(temporary, "wb") as file:
                yield file
            publish_file(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal columns as CSV under a line of their names; empty where a value is None.

    Args:
        rows: one or more.
    """
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


def write_json(path: Path, value: Any) -> None:
    """Write indented ASCII JSON atomically."""
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode("ascii"))
