"""Segmentations as COCO writes them, by pycocotools' mask functions behind checks; imports no torch.

pycocotools believes its input. Runs that do not fill the image make it read memory that is not the mask's, and an
outline of huge coordinates takes all of the machine's. So each segmentation is checked here, before it goes there.

Shape legend: H x W pixels of an image, k masks of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rle = dict[str, Any]
"""A mask as compressed run lengths: `size` is [height, width], `counts` is bytes, as pycocotools has it."""

_LEAST_NUMBERS = 6  # of a polygon: pycocotools takes a list of four for a box
_FURTHEST = 1e5  # pixels from the image's corner; drawing takes memory in proportion to an outline's length


def rle_of(segmentation: Any, height: int, width: int) -> Rle | None:
    """A segmentation of COCO as run lengths.

    Args:
        segmentation: polygons, or run lengths, compressed or not.
        height, width: size of the image [pixels].

    Returns:
        The mask; None where there is nothing: no segmentation, or an empty list of polygons.

    Raises:
        ValueError: says what is wrong with it.
    """
    from pycocotools import mask  # reading a pack for boxes does without

    if segmentation is None or segmentation == []:
        return None
    if isinstance(segmentation, list):
        for polygon in segmentation:
            _check_polygon(polygon)
        return dict(mask.merge(mask.frPyObjects(segmentation, height, width)))
    if not isinstance(segmentation, dict):
        raise ValueError(f"is a {type(segmentation).__name__}, expected polygons or an RLE")
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if size != [height, width]:
        raise ValueError(f"has the size {size!r}, the image {[height, width]}")
    if isinstance(counts, list):
        if not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError("has counts that are not all whole numbers of 0 or more")
        _check_sum(sum(counts), height, width)
        return dict(mask.frPyObjects({"size": size, "counts": counts}, height, width))
    if not isinstance(counts, str | bytes):
        raise ValueError(f"has the counts {counts!r:.40}, expected a list or a text")
    try:
        encoded = counts.encode("ascii") if isinstance(counts, str) else counts
    except UnicodeEncodeError as error:
        raise ValueError("has counts that are no run lengths") from error
    _check_sum(_sum_of_runs(encoded), height, width)
    return {"size": [height, width], "counts": encoded}


def _check_polygon(polygon: Any) -> None:
    if not isinstance(polygon, list) or len(polygon) < _LEAST_NUMBERS or len(polygon) % 2:
        raise ValueError(f"has the polygon {polygon!r:.60}, expected x, y of three points or more")
    for value in polygon:
        if type(value) not in (int, float) or not abs(value) <= _FURTHEST:  # NaN fails the comparison
            raise ValueError(f"has a polygon with {value!r:.40}, expected pixels up to {_FURTHEST:g}")


def _check_sum(pixels: int, height: int, width: int) -> None:
    if pixels != height * width:
        raise ValueError(f"has runs of {pixels} pixels, the image {height} x {width} = {height * width}")


def _sum_of_runs(encoded: bytes) -> int:
    """Pixels of compressed run lengths.

    COCO's encoding (maskApi.c, rleToString): a number is a row of characters from '0' on, each with five bits, lowest
    first, and a sixth that says whether more follow. From the fourth number on, what is written is the difference to
    the run two before.

    Raises:
        ValueError: there is another character, an unfinished number or a run below 0.
    """
    codes = np.frombuffer(encoded, np.uint8).astype(np.int64) - 48
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise ValueError("has counts that are no run lengths")
    last = np.flatnonzero(codes & 32 == 0)  # of each number
    first = np.concatenate([[0], last[:-1] + 1])
    digit = np.arange(len(codes)) - np.repeat(first, last - first + 1)
    if digit.max() > 7:
        raise ValueError("has counts that are no run lengths")
    written = np.add.reduceat((codes & 31) << (5 * digit), first)
    written -= np.where(codes[last] & 16, 1 << (5 * (digit[last] + 1)), 0)  # the fifth bit is the sign
    runs = written.copy()
    runs[1::2], runs[2::2] = np.cumsum(written[1::2]), np.cumsum(written[2::2])
    if runs.min() < 0:
        raise ValueError("has counts that are no run lengths")
    return int(runs.sum())


def box_mask(box: Sequence[float], height: int, width: int) -> Rle:
    """The mask that fills a box, as far as it lies in the image.

    Args:
        box: x, y, width, height [pixels].
        height, width: size of the image [pixels].
    """
    x, y, right, bottom = box[0], box[1], box[0] + box[2], box[1] + box[3]
    rows = slice(max(math.floor(y), 0), max(math.ceil(bottom), 0))
    columns = slice(max(math.floor(x), 0), max(math.ceil(right), 0))
    filled = np.zeros((1, height, width), np.bool_)
    filled[0, rows, columns] = True
    return encode_masks(filled)[0]


def decode_masks(rles: Sequence[Rle], height: int, width: int) -> NDArray[np.bool_]:
    """Masks of one image as pixels.

    Args:
        rles: masks that `rle_of` gave, so that they fill the image.
        height, width: size of the image; needed where there is no mask.

    Returns:
        (k, H, W), of its own memory.
    """
    from pycocotools import mask

    if not rles:
        return np.zeros((0, height, width), np.bool_)
    # pycocotools has the masks last and runs down the columns
    return np.ascontiguousarray(np.asarray(mask.decode(list(rles))).transpose(2, 0, 1)).astype(np.bool_)


def encode_masks(masks: NDArray[np.bool_]) -> list[Rle]:
    """Run lengths of masks (k, H, W)."""
    from pycocotools import mask

    if not len(masks):
        return []
    return [dict(rle) for rle in mask.encode(np.asfortranarray(masks.transpose(1, 2, 0), np.uint8))]


def mask_areas(rles: Sequence[Rle]) -> NDArray[np.float64]:
    """Pixels of each mask."""
    from pycocotools import mask

    # one by one: of 256 masks and more pycocotools 2.0.11 makes an OverflowError under numpy 2
    return np.array([mask.area(rle) for rle in rles], np.float64)


def mask_box(rle: Rle) -> list[float]:
    """x, y, width, height of the box around a mask [pixels]; zeros for an empty one."""
    from pycocotools import mask

    return [float(value) for value in mask.toBbox(rle)]
