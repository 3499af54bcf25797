"""megdet_hpc/data/pixels.py and image_header.py: one rule for every pixel format and orientation, on both decoders."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from data_prep.image_files import ImageRules, check_image
from megdet_hpc.data.decode import decode_rgb, decode_with_pillow, turn
from megdet_hpc.data.gpu_decode import decode_batch
from megdet_hpc.data.image_header import read_header
from megdet_hpc.data.pixels import rgb_pixels, turned

GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6
SAMPLES = np.array([0, 127, 128, 12000, 42000, 60000, 65408, 65535])
REDUCED = [0, 0, 1, 47, 164, 234, 255, 255]  # (v + 128) // 256, at most 255: by hand


def png(samples: NDArray[np.generic], bits: int, colour: int, *chunks: tuple[bytes, bytes], late: bytes = b"") -> bytes:
    """A PNG written by hand: samples (H, W, channels), those of fewer than 8 bits packed; `late` is EXIF data."""
    height, width = samples.shape[:2]

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = samples.astype(">u2" if bits == 16 else np.uint8)
    if bits < 8:
        rows = np.packbits(np.unpackbits(rows, axis=2)[..., -bits:].reshape(height, -1), axis=1)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *(chunk(*entry) for entry in chunks), chunk(b"IDAT", zlib.compress(data))]
    if late:
        parts.append(chunk(b"eXIf", late))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def exif(orientation: int, order: str = "<") -> bytes:
    """EXIF data with an orientation alone, as a TIFF file."""
    start = b"II*\0" if order == "<" else b"MM\0*"
    return start + struct.pack(f"{order}IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)


def encode(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(mode: str = "RGB") -> Image.Image:
    y, x = np.mgrid[0:24, 0:40]
    return Image.fromarray(np.stack([x * 6, y * 10, 255 - x - y], axis=-1).astype(np.uint8)).convert(mode)


@pytest.mark.parametrize("colour", [GREY, RGB, GREY_ALPHA, RGB_ALPHA])
def test_sixteen_bits_are_reduced_alike(colour: int) -> None:
    channels = {GREY: 1, RGB: 3, GREY_ALPHA: 2, RGB_ALPHA: 4}[colour]
    samples = np.repeat(SAMPLES[None, :, None], channels, axis=2)
    if colour in (GREY_ALPHA, RGB_ALPHA):
        samples[..., -1] = 65535
    pixels = rgb_pixels(png(samples, 16, colour))
    assert pixels.tolist() == [[[value] * 3 for value in REDUCED]]


def test_sixteen_bit_colours_keep_their_channels() -> None:
    samples = np.array([[[12000, 42000, 60000], [65535, 0, 255]]])
    assert rgb_pixels(png(samples, 16, RGB)).tolist() == [[[47, 164, 234], [255, 0, 1]]]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_of_few_bits_fills_the_range(bits: int) -> None:
    most = 2**bits - 1
    samples = np.array([[[0], [most], [1], [0]] * 2])
    expected = [0, 255, 255 // most, 0] * 2
    assert rgb_pixels(png(samples, bits, GREY))[0, :, 0].tolist() == expected


def test_interlaced_sixteen_bits() -> None:
    """Four pixels in Adam7's passes 1, 6 and 7."""
    passes = [[12000, 42000, 60000]], [[1, 128, 65535]], [[300, 400, 500], [40000, 50000, 0]]
    rows = [np.array(row) for row in passes]
    header = struct.pack(">IIBBBBB", 2, 2, 16, RGB, 0, 0, 1)
    data = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows))
    body = b"".join(
        struct.pack(">I", len(part)) + kind + part + struct.pack(">I", zlib.crc32(kind + part))
        for kind, part in ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    )
    assert rgb_pixels(b"\x89PNG\r\n\x1a\n" + body).tolist() == [
        [[47, 164, 234], [0, 1, 255]],
        [[1, 2, 2], [156, 195, 0]],
    ]


WHITE = [255, 255, 255]


@pytest.mark.parametrize(
    ("encoded", "expected"),
    [
        # half transparent 100: (100 * 128 + 255 * 127 + 127) // 255
        (png(np.array([[[9, 9, 9, 0], [100, 0, 200, 128], [7, 8, 9, 255]]]), 8, RGB_ALPHA), [177, 127, 227]),
        (png(np.array([[[9, 0], [100, 128], [7, 255]]]), 8, GREY_ALPHA), [177, 177, 177]),
        (png(np.array([[[9] * 3 + [0], [25700, 0, 51200, 32768], [0, 0, 0, 65535]]]), 16, RGB_ALPHA), [177, 127, 227]),
        (png(np.array([[[9, 0], [25700, 32768], [0, 65535]]]), 16, GREY_ALPHA), [177, 177, 177]),
    ],
    ids=["RGBA", "grey and alpha", "RGBA of 16 bits", "grey and alpha of 16 bits"],
)
def test_transparent_pixels_are_on_white(encoded: bytes, expected: list[int]) -> None:
    first, second, third = rgb_pixels(encoded)[0].tolist()
    assert first == WHITE, "the colour behind a transparent pixel is not seen"
    assert second == expected
    assert third != WHITE


@pytest.mark.parametrize(
    ("samples", "bits", "colour", "transparent", "expected"),
    [
        ([[[3], [5], [3]]], 8, GREY, (3,), [WHITE, [5] * 3, WHITE]),
        ([[[3], [5], [3], [0]]], 4, GREY, (3,), [WHITE, [85] * 3, WHITE, [0] * 3]),
        ([[[0, 0, 1], [0, 0, 2]]], 8, RGB, (0, 0, 1), [WHITE, [0, 0, 2]]),
        ([[[768], [769]]], 16, GREY, (768,), [WHITE, [3] * 3]),
        ([[[768, 0, 0], [769, 0, 0]]], 16, RGB, (768, 0, 0), [WHITE, [3, 0, 0]]),
    ],
    ids=["grey", "grey of 4 bits", "RGB", "grey of 16 bits", "RGB of 16 bits"],
)
def test_one_transparent_colour(
    samples: list[object], bits: int, colour: int, transparent: tuple[int, ...], expected: list[list[int]]
) -> None:
    """In 16 bits its neighbours, the same once reduced, are not transparent."""
    chunk = b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)
    assert rgb_pixels(png(np.array(samples), bits, colour, chunk))[0].tolist() == expected


def test_transparent_entries_of_a_palette() -> None:
    palette = (b"PLTE", bytes([10, 20, 30, 40, 50, 60])), (b"tRNS", bytes([0, 255]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = rgb_pixels(png(np.array([[[0], [1]]]), 8, PALETTE, *palette))
    assert pixels[0].tolist() == [WHITE, [40, 50, 60]]


def test_an_image_that_is_nowhere_visible_is_taken_without_its_alpha() -> None:
    """Programs that render training images leave alpha at 0 throughout."""
    pixels = rgb_pixels(png(np.array([[[9, 8, 7, 0], [1, 2, 3, 0]]]), 8, RGB_ALPHA))
    assert pixels[0].tolist() == [[9, 8, 7], [1, 2, 3]]


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_jpegs_are_the_same_by_both_decoders(mode: str) -> None:
    encoded = encode(picture(mode))
    assert (decode_rgb(encoded) == decode_with_pillow(encoded)).all()
    close = np.abs(rgb_pixels(encoded).astype(int) - np.array(picture(mode).convert("RGB")))
    assert close.mean() < 6, "a negative would be far off"
    assert read_header(encoded).plain == (mode == "L"), "CMYK is left to Pillow"


def test_values_without_a_known_range_are_refused() -> None:
    encoded = encode(Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)), "TIFF")
    with pytest.raises(OSError, match="TIFF with pixels of mode 'F'"):
        rgb_pixels(encoded)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_orientation_is_that_of_other_programs(kind: str, orientation: int, order: str) -> None:
    tiff = exif(orientation, order)
    if kind == "JPEG":
        encoded = encode(picture(), exif=b"Exif\0\0" + tiff)
    else:
        encoded = png(np.array(picture()), 8, RGB, late=tiff)
    assert read_header(encoded).orientation == orientation
    with Image.open(io.BytesIO(encoded)) as image:
        image.load()
        expected = np.array(ImageOps.exif_transpose(image))
    assert np.array_equal(rgb_pixels(encoded, upright=True), expected)
    upright = decode_rgb(encoded, upright=True)
    assert np.array_equal(upright.permute(1, 2, 0).numpy(), expected)
    stored = decode_rgb(encoded)
    assert (turn(stored, orientation) == upright).all()
    assert (decode_batch([encoded], torch.device("cpu"), upright=True)[0] == upright).all()
    assert np.array_equal(turned(stored.permute(1, 2, 0).numpy(), orientation), expected)


def test_orientation_beside_other_segments() -> None:
    """A thumbnail with an orientation of its own, a comment and padding before the EXIF data."""
    encoded = encode(picture(), exif=b"Exif\0\0" + exif(6))
    comment = b"\xff\xfe" + struct.pack(">H", 6) + b"\xff\xe1\0\0"
    xmp = b"\xff\xe1" + struct.pack(">H", 20) + b"http://ns.adobe.co"
    assert read_header(encoded[:2] + comment + b"\xff\xff" + xmp + encoded[2:]).orientation == 6


BROKEN = {
    "empty": b"",
    "garbage": b"garbage" * 9,
    "offset": b"II*\0" + b"\xff" * 4,
    "no entries": b"MM\0*" + struct.pack(">IH", 8, 60000),
    "cut off": exif(6)[:-8],
    "out of range": exif(9),
    "zero": exif(0),
    "text": b"II*\0" + struct.pack("<IHHHIII", 8, 1, 0x0112, 2, 1, 6, 0),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_broken_exif_data_count_as_none(kind: str, name: str) -> None:
    if kind == "JPEG":
        plain, encoded = encode(picture()), encode(picture(), exif=b"Exif\0\0" + BROKEN[name])
    else:
        plain, encoded = (png(np.array(picture()), 8, RGB, late=late) for late in (b"", BROKEN[name]))
    assert np.array_equal(rgb_pixels(encoded, upright=True), rgb_pixels(plain))
    assert (decode_rgb(encoded, upright=True) == decode_rgb(plain)).all()


DAMAGED = {
    "short": b"\xff\xe1\0\x0aExif\0\0" + b"behind its end",
    "no length": b"\xff\xe1\0\0Exif\0\0" + exif(6),
    "colour profile": b"\xff\xe2\0\x0eICC_PROFILE\0",
    "Adobe": b"\xff\xee\0\x07Adobe",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_segment_is_passed_over(name: str) -> None:
    """As browsers do; Pillow by itself refuses the last two."""
    plain = encode(picture())
    encoded = plain[:2] + DAMAGED[name] + plain[2:]
    assert (decode_rgb(encoded, upright=True) == decode_rgb(plain)).all()
    assert np.array_equal(rgb_pixels(encoded), rgb_pixels(plain))
    assert check_image(encoded, 40, 24, ImageRules(decode=True)) == 0


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_header_cut_off_anywhere_is_no_error(kind: str) -> None:
    options = {"exif": b"Exif\0\0" + exif(6)}
    encoded = encode(picture(), kind, **options)
    for end in range(0, len(encoded), 3):
        assert read_header(encoded[:end]).orientation in (1, 6)


def test_a_damaged_png_raises_nothing_but_os_error() -> None:
    encoded = bytearray(encode(picture(), "PNG"))
    refused = 0
    for position in range(8, len(encoded)):
        encoded[position] ^= 0xFF
        try:
            decode_rgb(bytes(encoded))
        except OSError:
            refused += 1
        encoded[position] ^= 0xFF
    assert refused > 20


def test_a_large_picture_is_no_attack() -> None:
    """Of 200 megapixels, from a limit of Pillow's at which it refuses; its pixels are not decoded here."""
    with warnings.catch_warnings(record=True) as warned:
        encoded = encode(Image.new("1", (20000, 10000)), "PNG")
        with Image.open(io.BytesIO(encoded)) as image:
            assert image.size == (20000, 10000)
    assert not warned
