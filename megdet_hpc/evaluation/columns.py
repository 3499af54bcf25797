"""Boxes as columns, which the scorers take: those of a packed set, and those that were found in it.

n: boxes. Images and classes are numbered by their position in the set, so ids of any size are the same to a scorer.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megdet_hpc.data.categories import Categories
from megdet_hpc.data.masks import mask_areas
from megdet_hpc.data.pack_masks import lacking_masks, masks_of
from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.evaluation.detections import DetectionTable


@dataclass(frozen=True)
class Columns:
    """Boxes of the ground truth, or detections.

    Attributes:
        images: (n,) int64, position of each box's image.
        boxes_xywh: (n, 4) float64 x, y, width, height in pixels.
        classes: (n,) int64, position of each box's category among the sorted ids.
        areas: (n,) float64, the number by which the scorer tells small from large; square pixels.
        crowd: (n,) bool, crowd regions of the ground truth.
        scores: (n,) float64; of the ground truth 1.
        masks: n `Rle`; None where boxes are compared.
    """

    images: NDArray[np.int64]
    boxes_xywh: NDArray[np.float64]
    classes: NDArray[np.int64]
    areas: NDArray[np.float64]
    crowd: NDArray[np.bool_]
    scores: NDArray[np.float64]
    masks: list[Any] | None = None

    def __len__(self) -> int:
        """Number of boxes."""
        return len(self.images)

    def rows(self, chosen: NDArray[np.bool_]) -> Columns:
        """The boxes where a mask is true; without their masks."""
        return Columns(
            self.images[chosen],
            self.boxes_xywh[chosen],
            self.classes[chosen],
            self.areas[chosen],
            self.crowd[chosen],
            self.scores[chosen],
        )


class Truth:
    """The ground truth of a packed set's first images, made once for all its evaluations.

    Args:
        pack: the set.
        num_images: number of images; None for all.

    Attributes:
        image_ids: ids of the images.
        sizes: (num_images, 2), height and width of each image in pixels.
        category_ids: ids of the classes, rising.
        names: names of the classes, in the order of the ids.
        boxes: the boxes of the set, crowd regions among them.
        difficult: bool of each box, whether Pascal VOC calls it difficult.
    """

    def __init__(self, pack: PackedCoco, num_images: int | None = None) -> None:
        self.pack = pack
        self.num_images = len(pack) if num_images is None else min(num_images, len(pack))
        self.image_ids = pack.image_ids[: self.num_images]
        self.sizes = np.stack([pack.heights, pack.widths], axis=1)[: self.num_images]
        self.category_ids = np.array(Categories(pack.categories).ids, np.int64)
        self.names = class_names(pack)
        images, own = pack.first_annotations(self.num_images)
        classes = np.searchsorted(self.category_ids, own.category_ids)
        self.boxes = Columns(images, own.boxes_xywh, classes, own.areas, own.iscrowd, np.ones(len(images)))
        self.difficult = own.difficult

    @cached_property
    def lacking_masks(self) -> str:
        """Which single objects have no segmentation; "" where all have one."""
        return lacking_masks(self.pack, self.num_images)

    @cached_property
    def masks(self) -> Columns:
        """The boxes with their masks.

        Raises:
            PackError, UserError: a segmentation is damaged, or none of COCO's.
        """
        return replace(self.boxes, masks=[m for index in range(self.num_images) for m in masks_of(self.pack, index)])

    @cached_property
    def boxes_of_classes(self) -> NDArray[np.int64]:
        """Boxes to find of each class; crowd regions do not count."""
        return np.bincount(self.boxes.classes[~self.boxes.crowd], minlength=len(self.names))

    def found(self, table: DetectionTable, kind: str = "bbox") -> Columns:
        """What was found in these images. Detections in other images or of other categories are left out.

        Args:
            table: detections.
            kind: what is compared, bbox or segm. Sizes go by the area of what is compared.
        """
        images, has_image = _positions(self.image_ids, table.image_ids)
        classes, has_class = _positions(self.category_ids, table.category_ids)
        known = has_image & has_class
        if not known.all():
            table, images, classes = table.rows(known), images[known], classes[known]
        masks = table.masks.tolist() if kind == "segm" and table.masks is not None else None
        areas = mask_areas(masks) if masks is not None else table.boxes_xywh[:, 2] * table.boxes_xywh[:, 3]
        return Columns(images, table.boxes_xywh, classes, areas, np.zeros(len(table), np.bool_), table.scores, masks)


def _positions(ids: NDArray[np.int64], of: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The position of each id among the known ones, and whether it is there."""
    if not len(ids):
        return np.zeros(len(of), np.int64), np.zeros(len(of), np.bool_)
    order = np.argsort(ids, kind="stable")
    position = order[np.minimum(np.searchsorted(ids, of, sorter=order), len(ids) - 1)]
    return position, ids[position] == of


def class_names(pack: PackedCoco) -> list[str]:
    """The name of each category in the order of the ids; one that several have with its id behind it."""
    own = Categories(pack.categories)
    several = {name for name, count in Counter(own.names).items() if count > 1}
    return [f"{name} (id {key})" if name in several else name for key, name in zip(own.ids, own.names, strict=True)]
