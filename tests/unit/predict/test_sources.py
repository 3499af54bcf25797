"""Which files the words of a command line mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from megdet_hpc.errors import UserError
from megdet_hpc.predict.sources import find_sources


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in (
        "set/b.JPG",
        "set/a.png",
        "set/more/a.png",
        "set/a.jpg",
        "set/notes.txt",
        "set/.hidden/c.jpg",
        "x [1].jpg",
    ):
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path


def found(*words: str, output: str = "out") -> dict[str, str]:
    return {str(source.path): str(source.drawing) for source in find_sources(words, Path(output))}


def test_a_folder_means_the_pictures_below_it(folder: Path) -> None:
    assert found("set") == {
        "set/a.jpg": "a.jpg",
        "set/a.png": "a-2.jpg",
        "set/b.JPG": "b.jpg",
        "set/more/a.png": "more/a.jpg",
    }


def test_earlier_results_in_the_folder_are_no_input(folder: Path) -> None:
    assert list(found("set", output="set/more")) == ["set/a.jpg", "set/a.png", "set/b.JPG"]


def test_a_file_comes_once_and_its_name_is_no_pattern_where_it_is_there(folder: Path) -> None:
    assert list(found("x [1].jpg", "set/a.*", "set/a.png", "set/notes.txt")) == [
        "x [1].jpg",
        "set/a.jpg",
        "set/a.png",
        "set/notes.txt",
    ]


def test_a_missing_file_stays_to_be_reported(folder: Path) -> None:
    assert found("set/none.jpg") == {"set/none.jpg": "none.jpg"}


def test_a_link_to_nothing_stays_to_be_reported(folder: Path) -> None:
    Path("set/more/dead.jpg").symlink_to("/nowhere/dead.jpg")
    assert list(found("set/more")) == list(found("set/more/*")) == ["set/more/a.png", "set/more/dead.jpg"]


def test_a_folder_that_is_the_output_says_so(folder: Path) -> None:
    with pytest.raises(UserError, match="set/more: lies in --output set, where nothing is read"):
        found("set/more", output="set")
    for word in ("set/a.jpg", "set/*.jpg"):
        with pytest.raises(UserError, match="lies in --output set, where nothing is read"):
            found(word, output="set")


def test_videos_are_drawn_as_mp4(folder: Path) -> None:
    (source,) = find_sources(["clip.MOV"], Path("out"))
    assert source.is_video and source.drawing == Path("clip.mp4")
