"""Images and texts of any kind on a page of pictures, drawn the same way in show_pack.py and predictions.png."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_MOST_STRETCHED = 50  # of long to short side; a longer image would be thinner than a line, so it is widened
_MOST_PIXELS = 2000  # of a side that is drawn, several times what a cell of the page shows


def draw_pixels(axes: Any, pixels: NDArray[np.uint8], left: float = 0.0) -> None:
    """Draw an image (H, W, 3) in its own coordinates, from `left` on. A large one is thinned to some rows and columns.

    COCO's boxes count from the corner of a pixel, so the image begins there.
    """
    height, width = pixels.shape[:2]
    step = max(1, max(height, width) // _MOST_PIXELS)  # matplotlib would take 16 bytes for each pixel
    axes.imshow(pixels[::step, ::step], extent=(left, left + width, height, 0))


def plain(text: str) -> str:
    """A name or path as matplotlib draws it letter by letter.

    What stands between two dollars would be mathematics, and a formula that cannot be read would end the program. A
    name that begins with an underscore would be left out of the legend, so a space without width precedes it.
    """
    return ("\u200b" if text.startswith("_") else "") + text.replace("$", r"\$")


def widen_line(axes: Any, height: int, width: int) -> bool:
    """Let a very long or very tall image fill its cell. Returns whether it is one."""
    if max(height, width) <= _MOST_STRETCHED * min(height, width):
        return False
    axes.set_aspect("auto")
    return True
