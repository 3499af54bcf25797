"""megdet_hpc/data/masks.py: every form that COCO has, and none of what would take pycocotools down."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megdet_hpc.data.masks import box_mask, decode_masks, encode_masks, mask_areas, mask_box, rle_of

H, W = 24, 32
SQUARE = [2, 2, 10, 2, 10, 8, 2, 8]
OTHER = [14.5, 4, 20, 4, 20, 9.25, 14.5, 9.25]


def test_polygons_and_both_kinds_of_run_lengths() -> None:
    several = rle_of([SQUARE, OTHER], H, W)
    one, other = rle_of([SQUARE], H, W), rle_of([OTHER], H, W)
    assert one is not None and other is not None and several is not None
    masks = decode_masks([one, other, several], H, W)
    assert masks.dtype == np.bool_ and masks.shape == (3, H, W)
    assert (masks[0] | masks[1] == masks[2]).all() and masks[0].sum() == 8 * 6
    assert mask_areas([one, several]).tolist() == masks[[0, 2]].sum(axis=(1, 2)).tolist()
    assert mask_areas([one] * 300).tolist() == [48.0] * 300  # pycocotools' own function refuses so many at once
    assert mask_box(one) == [2, 2, 8, 6]
    flat = masks[2].ravel(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *changes, flat.size]).tolist()
    assert rle_of({"size": [H, W], "counts": counts}, H, W) == several
    assert rle_of({"size": [H, W], "counts": several["counts"].decode()}, H, W) == several
    assert encode_masks(masks) == [one, other, several]


@pytest.mark.parametrize("segmentation", [None, []])
def test_no_segmentation(segmentation: Any) -> None:
    assert rle_of(segmentation, H, W) is None
    assert decode_masks([], H, W).shape == (0, H, W) and encode_masks(np.zeros((0, H, W), np.bool_)) == []


def test_a_box_is_filled_inside_the_image() -> None:
    assert mask_box(box_mask([-3, 2.5, 8, 100], H, W)) == [0, 2, 5, 22]
    assert mask_areas([box_mask([100, 100, 5, 5], H, W)]).tolist() == [0]


def test_the_pixels_of_compressed_runs_are_counted_as_pycocotools_counts_them() -> None:
    generator = np.random.default_rng(0)
    for density in (0.0, 0.01, 0.5, 0.99, 1.0):
        (rle,) = encode_masks(generator.random((1, 400, 300)) < density)
        assert rle_of(rle, 400, 300) == rle
        with pytest.raises(ValueError, match=r"has runs of 120000 pixels, the image 400 x 301"):
            rle_of({**rle, "size": [400, 301]}, 400, 301)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[1, 1, 3, 1]], r"polygon \[1, 1, 3, 1\], expected x, y of three points"),
        ([[1, 1, 3, 1, 2, 3, 4]], "expected x, y of three points"),
        ([[1, 1, 3, float("nan"), 2, 3]], "polygon with nan"),
        ([[1, 1, 1e12, 1, 2, 3]], r"polygon with 1000000000000.0, expected pixels up to 100000"),
        ([["a", 1, 3, 1, 2, 3]], "polygon with 'a'"),
        (["abcdef"], "polygon 'abcdef'"),
        ("text", "is a str"),
        ({"counts": "abc"}, r"has the size None, the image \[24, 32\]"),
        ({"size": [H, W], "counts": [5, 5]}, r"has runs of 10 pixels, the image 24 x 32 = 768"),
        ({"size": [H, W], "counts": [-5, 773]}, "not all whole numbers"),
        ({"size": [H, W], "counts": 5}, "has the counts 5"),
        ({"size": [H, W], "counts": "5"}, "has runs of 5 pixels"),
        ({"size": [H, W], "counts": ""}, "no run lengths"),
        ({"size": [H, W], "counts": "n"}, "no run lengths"),
        ({"size": [H, W], "counts": "oooooooooooo0"}, "no run lengths"),
        ({"size": [H, W], "counts": "\u00fc"}, "no run lengths"),
    ],
)
def test_what_is_none_is_refused(segmentation: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rle_of(segmentation, H, W)
