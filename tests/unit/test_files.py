"""megdet_hpc/files.py: what the error of a full disk names. The limit of a file's size stands for the disk."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from data_prep.make_shapes import main as make_shapes
from megdet_hpc.files import atomic_write


@contextmanager
def full_disk() -> Iterator[None]:
    """Let no file have more than 200 bytes. The limit is the process's, and pytest's own output may go to a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_the_error_of_a_full_disk_names_the_file_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "detector.ts"
    with full_disk(), pytest.raises(OSError) as caught, atomic_write(path) as file:
        file.write(bytes(1000))
    assert caught.value.filename == str(path) and str(path) in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_error_within_a_folder_names_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with full_disk():
        status = make_shapes(["--output", str(tmp_path / "shapes"), "--train", "1", "--val", "1"])
    assert status == 1
    assert f"File too large: '{tmp_path}/" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_error_of_something_else_stays_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"^truncated$") as caught, atomic_write(tmp_path / "a.png"):
        raise OSError("truncated")
    assert caught.value.filename is None
