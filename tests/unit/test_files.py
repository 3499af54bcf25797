"""megdet_hpc/files.py: what the error of a full disk names. The limit of a file's size stands for the disk."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.make_shapes import main as make_shapes
from megdet_hpc.files import atomic_write


@pytest.fixture
def full() -> Iterator[None]:
    """A disk on which no file may have more than 200 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("full")
def test_the_error_of_a_full_disk_names_the_file_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "detector.ts"
    with pytest.raises(OSError) as caught, atomic_write(path) as file:
        file.write(bytes(1000))
    assert caught.value.filename == str(path) and str(path) in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("full")
def test_an_error_within_a_folder_names_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = make_shapes(["--output", str(tmp_path / "shapes"), "--train", "1", "--val", "1"])
    assert status == 1
    assert f"File too large: '{tmp_path}/" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_error_of_something_else_stays_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"^truncated$") as caught, atomic_write(tmp_path / "a.png"):
        raise OSError("truncated")
    assert caught.value.filename is None
