"""The masks of a packed set's annotations."""

from __future__ import annotations

import numpy as np

from megdet_hpc.data.masks import Rle, box_mask, rle_of
from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.errors import UserError


def masks_of(pack: PackedCoco, index: int) -> list[Rle | None]:
    """The m masks of image `index`, in the order of `PackedCoco.annotations`.

    A crowd region without a segmentation has its box: it marks where detections do not count, as its box does.

    Returns:
        For each annotation its mask; None for a single object without a segmentation.

    Raises:
        PackError: the segmentations differ from their checksum; names the shard and the image.
        UserError: one of them is none of COCO's forms, or of another size than the image; names image and annotation.
    """
    height, width = int(pack.heights[index]), int(pack.widths[index])
    found, masks = pack.annotations(index), list[Rle | None]()
    for place, segmentation in enumerate(pack.segmentations(index)):
        try:
            mask = rle_of(segmentation, height, width)
        except ValueError as error:
            where = f"{pack.directory}: image id {pack.image_ids[index]}, annotation id {found.ids[place]}"
            raise UserError(f"{where}: its segmentation {error}") from error
        if mask is None and found.iscrowd[place]:
            mask = box_mask(found.boxes_xywh[place].tolist(), height, width)
        masks.append(mask)
    return masks


def lacking_masks(pack: PackedCoco, num_images: int | None = None) -> str:
    """Says which single objects of the first images have no segmentation; "" where all have one."""
    lacking = objects = 0
    first = ""
    for index in range(len(pack) if num_images is None else num_images):
        found = pack.annotations(index)
        without = np.flatnonzero(~found.segmented & ~found.iscrowd)
        objects += int((~found.iscrowd).sum())
        lacking += len(without)
        if len(without) and not first:
            first = f"annotation id {found.ids[without[0]]} of image id {pack.image_ids[index]}"
    return f"{lacking} of {objects} objects have no segmentation, the first is {first}" if lacking else ""
