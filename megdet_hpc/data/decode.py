"""Image files to tensors. One function, so that the decoder is chosen in one place.

Pillow, since torchvision has deprecated its own decoders (0.29). EXIF orientation is ignored: COCO's boxes are
in the pixels as stored.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def decode_rgb(encoded: bytes) -> Tensor:
    """Decode a JPEG or PNG.

    Args:
        encoded: the file's bytes.

    Returns:
        (3, H, W) uint8; greyscale, palette and CMYK images are converted to RGB.

    Raises:
        OSError: not an image, or cut off.
    """
    with Image.open(io.BytesIO(encoded)) as image:
        pixels = np.array(image.convert("RGB"))  # (H, W, 3), a copy that may be written to
    return torch.from_numpy(pixels).permute(2, 0, 1)
