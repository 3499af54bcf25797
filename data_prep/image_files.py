"""Reads image files ahead of their use and checks them: header and end, or all of their coded data."""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.coco_source import SourceImage
from megdet_hpc.data.image_header import JPEG_START, PNG_START, UPRIGHT, read_header
from megdet_hpc.data.pixels import open_image, swaps_sides
from megdet_hpc.data.shard_format import ENCODINGS

READ_AHEAD = 32  # files; 5 MB of COCO, and far below the usual limit of 1024 open ones
JPEG_END = b"\xff\xd9"
JPEG_SCAN = b"\xff\xda"
PNG_END = b"IEND\xaeB`\x82"
DEFAULT_MEGAPIXELS = 179.0  # the limit of Pillow, whose images decode to 0.5 GB
TOO_LARGE = "too_large_image"
"""Reason of an image that `ImageRules.max_pixels` leaves out."""
BYTES_PER_PIXEL = 12  # at the peak of decoding and resizing, measured on 225 megapixels
_NO_IMAGES = {
    b"<!doctype html": "an HTML page, as a failed download leaves",
    b"<html": "an HTML page, as a failed download leaves",
    b"version https://git-lfs": "a Git LFS pointer; git lfs pull gets the image",
}


class BadImageError(Exception):
    """An image that cannot be packed.

    Args:
        reason: word by which skipped images are counted.
        text: what is wrong, for the message.
    """

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(reason, text)
        self.reason, self.text = reason, text


@dataclass(frozen=True)
class ImageRules:
    """Requirements for an image file.

    Args:
        decode: whether to decode it too.
        orientation: one of `shard_format.ORIENTATIONS`: the annotations' sizes are those of the stored pixels, or
            those of the picture turned by its EXIF orientation.
        max_pixels: width times height that is accepted.
    """

    decode: bool = False
    orientation: str = "stored"
    max_pixels: int = int(DEFAULT_MEGAPIXELS * 1e6)


def check_image(data: bytes, width: int, height: int, rules: ImageRules) -> int:
    """Check an image file: format, number of components, size, and that it is not cut off.

    Without decoding, a JPEG's coded data are not checked, but the end marker must follow them. A PNG's chunks are
    compared with their checksums. With decoding, a JPEG is decoded at an eighth of its size and without colour, which
    still reads all of its coded data (934 images/s on one core against 542 in full, COCO images). libjpeg pads over
    damage inside coded data without an error, so only what it refuses is found.

    Args:
        data: the file's bytes.
        width, height: pixels that the annotation file gives.
        rules: requirements for the file.

    Returns:
        Index into `shard_format.ENCODINGS`.

    Raises:
        BadImageError: unknown format, truncated or undecodable, too large, or another size than given.
    """
    try:
        with open_image(data, ENCODINGS) as image:
            encoding = "PNG" if image.format == "PNG" else "JPEG"  # an MPO file is a JPEG followed by a second one
            size = image.size
            _check_pixels(*size, rules.max_pixels)
            if rules.decode:
                image.draft("L", (1, 1))
                image.load()
            elif encoding == "PNG":
                image.verify()
    except Image.UnidentifiedImageError as error:
        raise unidentified(data) from error
    except (MemoryError, BadImageError):
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error and more
        raise BadImageError("unreadable_image", f"does not decode ({error})") from error
    # Pillow takes some JPEGs whose tail is zeroed or missing; torchvision does not. FF D9 ends an image and
    # never occurs in coded data, so it must follow the last start of scan; bytes behind it do no harm.
    if encoding == "PNG":
        whole = PNG_END in data
    else:
        whole = data.endswith(JPEG_END) or data.rfind(JPEG_END) > data.rfind(JPEG_SCAN)
    if not whole:
        raise BadImageError("unreadable_image", "is truncated (no end-of-image marker)")
    _check_size(data, size, (width, height), rules.orientation)
    return ENCODINGS.index(encoding)


def _check_pixels(width: int, height: int, most: int) -> None:
    if width * height > most:
        megapixels = width * height / 1e6
        raise BadImageError(
            TOO_LARGE,
            f"is {width} x {height} pixels, {megapixels:,.1f} megapixels, and at most {most / 1e6:,.1f} are accepted; "
            f"cut it into tiles, or give --max-megapixels {-(-width * height // 10**6)} (training on it then "
            f"needs about {BYTES_PER_PIXEL * megapixels / 1e3:.1f} GB a process, and small objects vanish)",
        )


def _check_size(data: bytes, stored: tuple[int, int], given: tuple[int, int], orientation: str) -> None:
    """Compare width and height in the annotations with those of the file.

    Raises:
        BadImageError: they differ. The message says if the other orientation would fit.
    """
    exif = read_header(data).orientation
    seen = stored[::-1] if swaps_sides(exif) else stored
    expected = seen if orientation == "upright" else stored
    if expected == given:
        return
    text = f"is {expected[0]} x {expected[1]} pixels, the annotations say {given[0]} x {given[1]}"
    if orientation == "stored" and seen == given:
        text += (
            f": its size once its EXIF orientation {exif} is applied; if sizes and boxes are those of the pictures as "
            "seen, pack with --orientation upright"
        )
    elif stored == given:
        text = (
            f"is {expected[0]} x {expected[1]} pixels once its EXIF orientation {exif} is applied, the annotations say "
            f"{given[0]} x {given[1]}, the size of its stored pixels; if boxes are in those, pack with --orientation "
            "stored"
        )
    raise BadImageError("wrong_image_size", text)


def unidentified(data: bytes) -> BadImageError:
    """The error for a file that is neither a readable JPEG nor a readable PNG."""
    accepted = " or ".join(ENCODINGS)
    if not data:
        return BadImageError("unreadable_image", "is empty (0 bytes)")
    if not data.strip(b"\0"):
        return BadImageError("unreadable_image", f"holds nothing but {len(data):,} zero bytes")
    if data.startswith(JPEG_START) or data.startswith(PNG_START):
        header = read_header(data)
        if header.channels and header.bits not in (1, 2, 4, 8, 16):
            return BadImageError("unsupported_image", f"has {header.bits} bits a sample; convert it to 8 bits")
        return BadImageError("unreadable_image", "begins as a JPEG or PNG, but its header is damaged or cut off")
    for start, name in _NO_IMAGES.items():
        if data[:200].lstrip().lower().startswith(start):
            return BadImageError("unsupported_image", f"is no image but {name}")
    try:
        with Image.open(io.BytesIO(data)) as image:
            kind = image.format
    except Exception:  # decoders of other formats raise any error
        kind = None
    if kind is None or kind in ENCODINGS:
        return BadImageError("unsupported_image", f"not a {accepted} file")
    return BadImageError("unsupported_image", f"not a {accepted} file but {kind}; convert it, without loss to PNG")


def value_changes(data: bytes) -> dict[str, int]:
    """Changes that decoding makes to an image, for the summary: 1 or 0 by the summary's key.

    The keys stand for an EXIF orientation other than 1, CMYK, possible transparency, 16 bits a sample, and 16 bits with
    all samples below a quarter of the range.
    """
    header = read_header(data)
    deep = header.bits == 16
    return {
        "exif_orientation": int(header.orientation != UPRIGHT),
        "cmyk": int(header.channels == 4 and not header.alpha),
        "transparency": int(header.alpha),
        "sixteen_bits": int(deep),
        "sixteen_bits_dark": int(deep and _is_dark(data)),
    }


def _is_dark(data: bytes) -> bool:
    """Whether all samples of a 16-bit PNG are below a quarter of their range, as of a 12-bit camera."""
    try:
        with open_image(data, ENCODINGS) as image:
            extrema = np.array(image.getextrema()).reshape(-1, 2)  # of the high bytes; of whole samples for grey
            colours = extrema[: 3 if image.mode == "RGBA" else None, 1]
            return bool(colours.max() < (2**14 if image.mode.startswith("I") else 2**6))
    except Exception:  # damage inside the pixels, which only decoding finds
        return False


def open_ahead(folder: Path, images: Sequence[SourceImage]) -> Generator[tuple[SourceImage, int | OSError], None, None]:
    """Each image with its open file, or with the error of opening it. `READ_AHEAD` files are opened ahead.

    The system reads opened files ahead. So many files share the latency of a disk or a network.
    """
    opened: deque[tuple[SourceImage, int | OSError]] = deque()
    waiting = iter(images)
    try:
        while True:
            for image in islice(waiting, READ_AHEAD - len(opened)):
                try:
                    descriptor = os.open(os.path.join(folder, image.path), os.O_RDONLY)
                    opened.append((image, descriptor))
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
                except OSError as error:
                    if not opened or opened[-1][0] is not image:  # advice may be refused, as for a pipe
                        opened.append((image, error))
            if not opened:
                return
            yield opened.popleft()
    finally:
        for _, descriptor_or_error in opened:
            if isinstance(descriptor_or_error, int):
                os.close(descriptor_or_error)


def read_image(image: SourceImage, descriptor: int | OSError) -> bytes:
    """Read one image file and close it.

    Raises:
        BadImageError: missing, unreadable, or of another size than when the shards were planned.
    """
    if isinstance(descriptor, FileNotFoundError):
        raise BadImageError("missing_image", "no such file") from descriptor
    if isinstance(descriptor, OSError):
        raise BadImageError("unreadable_image", f"cannot be read ({descriptor.strerror})") from descriptor
    try:
        data = os.read(descriptor, image.file_bytes + 1)
        while len(data) < image.file_bytes and (more := os.read(descriptor, image.file_bytes + 1 - len(data))):
            data += more
    except OSError as error:
        raise BadImageError("unreadable_image", f"cannot be read ({error.strerror})") from error
    finally:
        os.close(descriptor)
    if len(data) != image.file_bytes:
        text = f"changed while it was packed: {image.file_bytes} bytes before, {len(data)} now"
        raise BadImageError("unreadable_image", text)
    return data
