"""Sorts annotations by how training treats them. The packer counts them, and verify_pack.py counts them again.

Shape legend: m annotations. Boxes are x, y, width, height in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.annotation_table import Annotations
from data_prep.coco_source import SourceImage, places

OUTSIDE_TOLERANCE = 0.01  # pixels; COCO rounds boxes to hundredths
LEAST_SIDE = 1.0  # pixels; training drops boxes that are thinner after its resize (megdet_hpc/data/dataset.py)

Mask = NDArray[np.bool_]


def num_distinct(values: NDArray[np.int64]) -> int:
    """The number of different values. np.unique without counts would hash them, in 15 times the time (numpy 2.4)."""
    return len(np.unique(values, return_counts=True)[0])


class Boxes(NamedTuple):
    """The annotations of a set, or of a part of it."""

    bbox: NDArray[np.float64]  # [m, 4]
    size: NDArray[np.int64]  # [m, 2] width and height of each annotation's image
    crowd: Mask  # [m]
    category_id: NDArray[np.int64]  # [m]
    area: NDArray[np.float64]  # [m] square pixels, as the file gives it; NaN if it does not
    image: NDArray[np.int64]  # [m] index of each annotation's image, below `num_images`
    num_images: int

    @classmethod
    def of(cls, images: Sequence[SourceImage], annotations: Annotations) -> Boxes:
        """The annotations of some images that the packer has checked.

        Args:
            images: the images, in the source's order.
            annotations: their annotations, and perhaps others.
        """
        own, counts = annotations.of(places(images))
        place = np.repeat(np.arange(len(images)), counts)
        sides = chain.from_iterable((image.record["width"], image.record["height"]) for image in images)
        rows = own.rows
        return cls(
            rows["bbox"],
            np.fromiter(sides, np.int64).reshape(-1, 2)[place],
            rows["iscrowd"] == 1,
            rows["category_id"],
            rows["area"],
            place,
            len(images),
        )

    def every(self, step: int) -> Boxes:
        """Those of every so manieth image."""
        kept = self.image % step == 0
        image, num_images = self.image[kept] // step, -(-self.num_images // step)
        bbox, size, crowd, category_id, area = (column[kept] for column in self[:5])
        return Boxes(bbox, size, crowd, category_id, area, image, num_images)

    @classmethod
    def joined(cls, parts: Sequence[Boxes]) -> Boxes:
        """The annotations of several parts of a set."""
        first = np.cumsum([0, *(part.num_images for part in parts)])
        image = np.concatenate([part.image + begin for part, begin in zip(parts, first[:-1], strict=True)])
        bbox, size, crowd, category_id, area = map(np.concatenate, list(zip(*parts, strict=True))[:5])
        return cls(bbox, size, crowd, category_id, area, image, int(first[-1]))


class Sorted(NamedTuple):
    """Kinds of annotations. Each annotation is in exactly one of the first five; all are [m]."""

    crowd: Mask
    zero_size: Mask  # width or height is 0
    outside: Mask  # no part of the box is inside its image
    thin: Mask  # the part inside is thinner than LEAST_SIDE in the stored image
    trainable: Mask
    partly_outside: Mask  # of thin and trainable: leaves the image by more than OUTSIDE_TOLERANCE


def sort_boxes(boxes: Boxes) -> Sorted:
    """Sort annotations by how training treats them at the stored size of their image: it cuts boxes at the edge."""
    near, far = boxes.bbox[:, :2], boxes.bbox[:, :2] + boxes.bbox[:, 2:]
    crowd = boxes.crowd
    zero = ~crowd & (boxes.bbox[:, 2:] <= 0).any(axis=1)
    outside = ~crowd & ~zero & ((far <= 0) | (near >= boxes.size)).any(axis=1)
    # in float32, as training computes: a side of one pixel may round to less
    corner = boxes.bbox.astype(np.float32)
    size = boxes.size.astype(np.float32)
    inside = np.clip(corner[:, :2] + corner[:, 2:], 0, size) - np.clip(corner[:, :2], 0, size)
    rest = ~crowd & ~zero & ~outside
    trainable = rest & (inside >= LEAST_SIDE).all(axis=1)
    partly = rest & (np.maximum(-near, far - boxes.size) > OUTSIDE_TOLERANCE).any(axis=1)
    return Sorted(crowd, zero, outside, rest & ~trainable, trainable, partly)


def count_boxes(boxes: Boxes, kind: Sorted) -> dict[str, int]:
    """The manifest's summary of a set's annotations."""

    def without(chosen: Mask) -> int:
        has_one = np.zeros(boxes.num_images, np.bool_)
        has_one[boxes.image[chosen]] = True
        return boxes.num_images - int(has_one.sum())

    return {
        "images_without_annotations": without(np.ones(len(boxes.bbox), np.bool_)),
        "images_without_trainable_box": without(kind.trainable),
        "trainable_boxes": int(kind.trainable.sum()),
        "crowd": int(kind.crowd.sum()),
        "zero_size_boxes": int(kind.zero_size.sum()),
        "thin_boxes": int(kind.thin.sum()),
        "boxes_outside": int(kind.outside.sum()),
        "boxes_partly_outside": int(kind.partly_outside.sum()),
    }
