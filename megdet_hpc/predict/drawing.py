"""Pictures with boxes, names and masks.

Boxes are Pillow's, since torchvision 0.19 writes names on the objects themselves, without a ground to be read on.
"""

from __future__ import annotations

import colorsys
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torchvision.utils import draw_segmentation_masks

from megdet_hpc.log.terminal import warn

_TURN = 0.618034  # golden section: hues of successive categories lie far apart, however many there are
_LINE_SHARE = 1 / 400  # width of a line as a share of the long side
_FONT_SHARE = 1 / 45  # height of the letters, likewise
_LEAST_FONT = 10  # pixels


def colour_of(category: int) -> tuple[int, int, int]:
    """The RGB of a category's boxes; the same place in the list of categories has the same colour everywhere."""
    red, green, blue = colorsys.hsv_to_rgb((0.02 + category * _TURN) % 1, 0.9, 0.85)
    return round(255 * red), round(255 * green), round(255 * blue)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font that comes with matplotlib, which has the letters of most scripts; without it Pillow's own."""
    file = _font_file()
    if file is None:
        return ImageFont.load_default(size)
    return ImageFont.truetype(file, size)


@cache
def _font_file() -> str | None:
    """The file of matplotlib's font; None where it cannot be loaded, which the first call warns of."""
    try:
        import matplotlib
    except ImportError as error:
        warn(f"names on pictures have Pillow's font, of Latin letters alone; matplotlib's was not found ({error})")
        return None
    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


def drawn(
    pixels: NDArray[np.uint8],
    boxes: NDArray[np.float64],
    texts: list[str],
    categories: list[int],
    masks: NDArray[np.bool_] | None = None,
) -> NDArray[np.uint8]:
    """A picture (H, W, 3) with what was found in it; the best is drawn last, on top of the others.

    Args:
        pixels: (H, W, 3) RGB.
        boxes: (m, 4) xyxy in its pixels, best first.
        texts: text at each box.
        categories: place of each box's category in the list of categories.
        masks: (m, H, W), or None.
    """
    if not len(boxes):
        return pixels
    colours = [colour_of(category) for category in categories]
    if masks is not None:
        image = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
        shown = draw_segmentation_masks(image, torch.from_numpy(masks[::-1].copy()), alpha=0.4, colors=colours[::-1])
        pixels = shown.permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels)
    draw = ImageDraw.Draw(picture)
    longest = max(picture.size)
    font = _font(max(_LEAST_FONT, round(longest * _FONT_SHARE)))
    width = max(1, round(longest * _LINE_SHARE))
    rows = list(zip(boxes.tolist(), texts, colours, strict=True))[::-1]
    for box, _, colour in rows:
        draw.rectangle(box, outline=colour, width=width)
    for box, text, colour in rows:
        _label(draw, (box[0], box[1]), text, colour, font)
    return np.asarray(picture)


def _label(
    draw: ImageDraw.ImageDraw,
    corner: tuple[float, float],
    text: str,
    colour: tuple[int, int, int],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    """Write white on the category's colour above a box, or as near to that as the picture allows."""
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height = right - left + 2, bottom - top + 2
    x = max(0, min(corner[0], draw.im.size[0] - width))
    y = max(0, corner[1] - height)
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    draw.text((x + 1 - left, y + 1 - top), text, fill="white", font=font)
