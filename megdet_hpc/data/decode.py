"""Image files to tensors. One function, so that the decoder is chosen in one place.

simplejpeg (libjpeg-turbo, the `fast` extra) decodes JPEGs where it is installed. Pillow decodes all else and each file
that simplejpeg refuses; its word on a damaged file is final. Both give the same pixels (docs/benchmarks.md).
The rule for each pixel format is in pixels.py. EXIF orientation is applied only where a pack says so, since COCO's
boxes are in the pixels as stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megdet_hpc.data.image_header import read_header
from megdet_hpc.data.pixels import flips, rgb_pixels, swaps_sides, turned

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

DECODER = "simplejpeg" if simplejpeg else "Pillow"


def decode_rgb(encoded: bytes | memoryview, upright: bool = False) -> Tensor:
    """Decode a JPEG or PNG.

    Args:
        encoded: the file's bytes.
        upright: turn the picture by its EXIF orientation, as PackedCoco.upright says.

    Returns:
        (3, H, W) uint8 RGB of its own memory, the channels of a pixel side by side in it. Other pixel formats are
        converted (`pixels.rgb_pixels`).

    Raises:
        OSError: not an image, cut off, or of a format whose values have no known range.
    """
    header = read_header(encoded)
    if simplejpeg and header.plain:
        try:
            pixels = simplejpeg.decode_jpeg(encoded, "RGB")
        except ValueError:
            pass  # a file with a blemish
        else:
            return torch.from_numpy(turned(pixels, header.orientation) if upright else pixels).permute(2, 0, 1)
    return decode_with_pillow(encoded, upright)


def decode_with_pillow(encoded: bytes | memoryview, upright: bool = False) -> Tensor:
    """decode_rgb by Pillow alone."""
    return torch.from_numpy(rgb_pixels(encoded, upright)).permute(2, 0, 1)


def turn(image: Tensor, orientation: int) -> Tensor:
    """`pixels.turned` of a decoded image (3, H, W), on its device."""
    if swaps_sides(orientation):
        image = image.transpose(1, 2)
    axes = [axis for axis, flip in zip((1, 2), flips(orientation), strict=True) if flip]
    return image.flip(axes) if axes else image
