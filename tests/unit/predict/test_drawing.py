"""Pictures of what was found."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from megdet_hpc.predict import drawing


def test_without_matplotlib_names_are_written_in_another_font(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    caches = (drawing._font, drawing._font_file)
    for cached in caches:
        cached.cache_clear()
    try:
        for side in (96, 960):
            blank = np.zeros((side, side, 3), np.uint8)
            picture = drawing.drawn(blank, np.array([[20.0, 40, 80, 80]]), ["circle 0.9"], [0])
            assert (picture.min(axis=2) > 128).sum() > 5  # letters are white, all else has a dark channel
    finally:
        for cached in caches:
            cached.cache_clear()
    said = capsys.readouterr().err
    assert said.count("warning: names on pictures have Pillow's font") == 1
