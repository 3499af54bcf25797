"""Image files to RGB by Pillow: the one rule for every pixel format and orientation (docs/data_format.md, "Pixels").

Shared by the packer's tools, which have no torch, and by `decode.py`. Pillow's own conversion clips 16-bit grey at
255, uncovers the colours behind transparent pixels and warns of an attack by a large picture.
"""

from __future__ import annotations

import io
import warnings
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from megdet_hpc.data.image_header import JPEG_START, UPRIGHT, ImageHeader, read_header, without_metadata

# Limits and warnings of a library that takes files from strangers; the packer has a limit that the user can set.
warnings.filterwarnings("ignore", module=r"PIL\.")  # of broken EXIF data, once for each process
Image.MAX_IMAGE_PIXELS = None
PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # bytes, some programs keep their project in a PNG's texts
PngImagePlugin.MAX_TEXT_MEMORY = 2**28

BACKGROUND = 255  # white, on which browsers and labelling tools show transparent pixels
_FLIPS = ((False, False), (False, True), (True, True), (True, False))  # top to bottom, left to right
_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")


def rgb_pixels(encoded: bytes | memoryview, upright: bool = False) -> NDArray[np.uint8]:
    """Decode an image file.

    Args:
        encoded: the file's bytes.
        upright: turn the picture by its EXIF orientation.

    Returns:
        (H, W, 3), memory of its own. 16-bit samples v become (v + 128) // 256, at most 255; transparent pixels lie
        on white; grey, palette and CMYK become RGB.

    Raises:
        OSError: no image, cut off, damaged, or of a format whose values have no known range.
    """
    header = read_header(encoded)
    try:
        with open_image(encoded) as image:
            pixels = _deep_rgb(image, encoded, header) if header.bits == 16 else _rgb(image, header)
    except (MemoryError, OSError):
        raise
    except Exception as error:  # decoders raise SyntaxError, ValueError, struct.error, zlib.error and more
        raise OSError(str(error) or type(error).__name__) from error
    return turned(pixels, header.orientation) if upright else pixels


def open_image(encoded: bytes | memoryview, formats: tuple[str, ...] | None = None) -> Image.Image:
    """Open an image file by Pillow. Damage in a JPEG's segments beside the picture is no obstacle.

    Raises:
        UnidentifiedImageError: no image, or of none of the formats; other errors for damage in the header.
    """
    with suppress(UnidentifiedImageError):
        return Image.open(io.BytesIO(encoded), formats=formats)
    if encoded[: len(JPEG_START)] == JPEG_START:
        with suppress(UnidentifiedImageError):
            return Image.open(io.BytesIO(without_metadata(encoded)), formats=formats)
    # Pillow's own message would show the memory that the file is read from
    raise UnidentifiedImageError("no image, or of a format that Pillow does not read")


def _rgb(image: Image.Image, header: ImageHeader) -> NDArray[np.uint8]:
    """An image of 8 bits or fewer a sample, or a format other than JPEG and PNG."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise OSError(f"{image.format} with pixels of mode {image.mode!r}, of unknown range; convert it to 8 bits")
    if header.transparent is not None:
        image.info.pop("transparency", None)  # Pillow compares it with samples that it has scaled
    elif image.mode in _WITH_ALPHA or "transparency" in image.info:
        rgba = np.array(image.convert("RGBA"))
        return _on_background(rgba[..., :3], rgba[..., 3])
    pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))  # copies, so that it may be written to
    if header.transparent is None:
        return pixels
    scaled = [value * 255 // (2**header.bits - 1) for value in header.transparent]
    return _on_background(pixels, _opaque(pixels, scaled))


def _deep_rgb(image: Image.Image, encoded: bytes | memoryview, header: ImageHeader) -> NDArray[np.uint8]:
    """A PNG of 16 bits a sample. Pillow gives such colours by their high byte only, so the low one is read too."""
    if header.channels == 1:
        samples = np.asarray(image).astype(np.uint16)[..., None]  # mode I;16, or I in an older Pillow
    elif header.channels == 2:
        samples = _with_raw_mode(image, "RGBA").view(">u2")  # two samples are four bytes
    else:
        kind = "RGB" if header.channels == 3 else "RGBA"
        high = _with_raw_mode(image, f"{kind};16B")
        with open_image(encoded) as again:
            low = _with_raw_mode(again, f"{kind};16L")
        samples = high.astype(np.uint16) * 256 + low
    alpha = None
    if header.channels in (2, 4):
        alpha = _reduced(samples[..., -1])
    elif header.transparent is not None:
        alpha = _opaque(samples, header.transparent)
    colours = _reduced(samples[..., :1] if header.channels < 3 else samples[..., :3])
    pixels = np.repeat(colours, 3, axis=2) if header.channels < 3 else colours
    return pixels if alpha is None else _on_background(pixels, alpha)


def _with_raw_mode(image: Image.Image, raw_mode: str) -> NDArray[np.uint8]:
    """The pixels of an image just opened, with its bytes read in another of Pillow's raw modes."""
    (tile,) = image.tile  # type: ignore[attr-defined]
    image.tile = [(*tile[:3], raw_mode)]  # type: ignore[attr-defined]
    return np.array(image)


def _reduced(samples: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """16-bit samples as 8-bit ones, rounded; 65535 becomes 255."""
    return np.minimum((samples.astype(np.uint32) + 128) >> 8, 255).astype(np.uint8)


def _opaque(samples: NDArray[np.generic], transparent: tuple[int, ...] | list[int]) -> NDArray[np.uint8]:
    """Alpha of an image in which one colour is transparent: (H, W), 0 there and 255 elsewhere."""
    same: NDArray[np.bool_] = (samples == np.array(transparent)).all(axis=-1)
    return np.where(same, 0, 255).astype(np.uint8)


def _on_background(pixels: NDArray[np.uint8], alpha: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Lay pixels (H, W, 3) with their alpha (H, W) on the background. An image that is nowhere visible stays as it is.

    Programs that render training images often leave alpha at 0 throughout.
    """
    if (alpha == 255).all() or not alpha.any():
        return np.ascontiguousarray(pixels)
    weight = alpha[..., None].astype(np.uint16)
    mixed = pixels * weight + BACKGROUND * (255 - weight)  # at most 255 * 255
    return ((mixed + 127) // 255).astype(np.uint8)


def turned(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Pixels (H, W, ...) as seen, from those stored with an EXIF orientation of 1 to 8; from 5 on H and W swap."""
    if orientation == UPRIGHT:
        return pixels
    if swaps_sides(orientation):
        pixels = pixels.swapaxes(0, 1)
    vertical, horizontal = flips(orientation)
    pixels = pixels[::-1] if vertical else pixels
    pixels = pixels[:, ::-1] if horizontal else pixels
    return np.ascontiguousarray(pixels)


def swaps_sides(orientation: int) -> bool:
    """Whether width and height of the picture as seen are those stored, swapped."""
    return orientation >= 5


def flips(orientation: int) -> tuple[bool, bool]:
    """Whether to flip top to bottom and left to right, after sides were swapped."""
    return _FLIPS[(orientation - 1) % 4]
