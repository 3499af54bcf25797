"""What the header of a JPEG or PNG says, read from its bytes alone: depth, transparency, orientation.

No imaging library is used, so the packer, the loader and the GPU's decoder agree, whichever decodes. Reading a header
is cheap enough for every image.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

JPEG_START = b"\xff\xd8\xff"
PNG_START = b"\x89PNG\r\n\x1a\n"
UPRIGHT = 1  # EXIF's orientation of a picture that is stored as it is seen
_ORIENTATION_TAG = 0x0112
_EXIF_START = b"Exif\0\0"
_ADOBE_START = b"Adobe"
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15
_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD9)}
_SCAN_OR_END = {0xDA, 0xD9}
_ADOBE = 0xEE  # APP14
_ADOBE_BYTES = 16  # of its segment
_METADATA = {*range(0xE0, 0xF0), 0xFE}  # APP0 to APP15, comment
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
_PNG_PALETTE = 3


class ImageHeader(NamedTuple):
    """A JPEG's or PNG's header; zeros where the file is neither or is damaged."""

    bits: int = 0  # of a sample
    channels: int = 0  # as stored: 1 is grey or a palette, 4 is CMYK in a JPEG and RGBA in a PNG
    alpha: bool = False  # pixels may be transparent
    transparent: tuple[int, ...] | None = None  # a PNG's one colour that is, in samples as stored
    plain: bool = False  # a JPEG that every decoder takes for grey or YCbCr, so that none needs a second look
    orientation: int = UPRIGHT  # EXIF's, 1 to 8; 1 where there is none or it cannot be read


def read_header(encoded: bytes | memoryview) -> ImageHeader:
    """The header of an image file; raises nothing, however damaged it is.

    Args:
        encoded: the file's bytes.
    """
    try:
        if encoded[: len(JPEG_START)] == JPEG_START:
            return _read_jpeg(encoded)
        if encoded[: len(PNG_START)] == PNG_START:
            return _read_png(encoded)
    except (struct.error, IndexError, KeyError):
        pass
    return ImageHeader()


def _segments(encoded: bytes | memoryview) -> Iterator[tuple[int, int, int]]:
    """Marker, begin and end of each of a JPEG's segments before its first scan, and of that scan to the file's end."""
    position, end = 2, len(encoded)
    while position + 4 <= end:
        if encoded[position] != 0xFF or encoded[position + 1] in (0x00, 0xFF):
            position += 1  # padding, or what a wrong length left: decoders look for the next marker too
            continue
        marker = encoded[position + 1]
        if marker in _SCAN_OR_END:
            yield marker, position, end
            return
        if marker in _WITHOUT_LENGTH:
            position += 2
            continue
        (length,) = struct.unpack_from(">H", encoded, position + 2)
        yield marker, position, position + 2 + max(length, 2)
        position += 2 + max(length, 2)


def _read_jpeg(encoded: bytes | memoryview) -> ImageHeader:
    bits = channels = 0
    orientation, transform, names = None, None, b""
    for marker, begin, end in _segments(encoded):
        if marker in _SCAN_OR_END:
            break
        body = bytes(encoded[begin + 4 : end])
        if marker in _FRAMES and len(body) >= 6:
            bits, channels = body[0], body[5]
            names = body[6::3][:channels]
        elif marker == 0xE1 and orientation is None and body.startswith(_EXIF_START):
            orientation = _tiff_orientation(body[len(_EXIF_START) :])
        elif marker == _ADOBE and body.startswith(_ADOBE_START) and len(body) >= 12:
            transform = body[11]
    stored_rgb = channels == 3 and (transform == 0 or names == b"RGB")
    plain = bits == 8 and channels in (1, 3) and not stored_rgb
    return ImageHeader(bits, channels, plain=plain, orientation=orientation or UPRIGHT)


def without_metadata(encoded: bytes | memoryview) -> bytes:
    """A JPEG without what its segments say beside the picture, and without bytes between them.

    Pillow refuses a file if a segment beside the picture is damaged. Other programs pass over it.
    """
    parts = [encoded[:2]]
    for marker, begin, end in _segments(encoded):
        is_adobe = marker == _ADOBE and end - begin >= _ADOBE_BYTES  # says how colours are coded
        if is_adobe or marker not in _METADATA:
            parts.append(encoded[begin:end])
    return b"".join(parts)


def _read_png(encoded: bytes | memoryview) -> ImageHeader:
    """Go through the chunks to the end: EXIF data may lie behind the pixels."""
    bits = colour = 0
    transparent: tuple[int, ...] | None = None
    alpha, orientation = False, None
    position, end = len(PNG_START), len(encoded)
    while position + 12 <= end:
        (length,) = struct.unpack_from(">I", encoded, position)
        kind, begin = bytes(encoded[position + 4 : position + 8]), position + 8
        if kind == b"IHDR":
            bits, colour = encoded[begin + 8], encoded[begin + 9]
            alpha = colour in (4, 6)
        elif kind == b"tRNS":
            alpha = True
            if colour != _PNG_PALETTE:
                transparent = struct.unpack_from(">3H" if colour == 2 else ">H", encoded, begin)
        elif kind == b"eXIf" and orientation is None:
            body = bytes(encoded[begin : begin + length])
            orientation = _tiff_orientation(body.removeprefix(_EXIF_START))
        elif kind == b"IEND":
            break
        position = begin + length + 4
    return ImageHeader(bits, _PNG_CHANNELS[colour], alpha, transparent, orientation=orientation or UPRIGHT)


def _tiff_orientation(tiff: bytes) -> int | None:
    """The orientation in EXIF data, which have the form of a TIFF file; None where it is absent or out of range."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return None
    try:
        (position,) = struct.unpack_from(f"{order}I", tiff, 4)
        (entries,) = struct.unpack_from(f"{order}H", tiff, position)
        for entry in range(position + 2, position + 2 + 12 * entries, 12):
            tag, kind, count = struct.unpack_from(f"{order}HHI", tiff, entry)
            if tag == _ORIENTATION_TAG:
                form = {1: "B", 3: "H", 4: "I"}.get(kind)  # BYTE and LONG occur beside EXIF's SHORT
                (value,) = struct.unpack_from(f"{order}{form}", tiff, entry + 8) if form and count == 1 else (0,)
                return value if 1 <= value <= 8 else None
    except struct.error:
        pass
    return None
