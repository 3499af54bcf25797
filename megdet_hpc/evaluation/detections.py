"""The detections of a whole set, as a table of arrays. Ranks send it, files hold it and the scorer reads it.

Ids are whole numbers beside float columns, since float64 holds no id above 2^53.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megdet_hpc.data.categories import LabelIds
from megdet_hpc.models.detector import Detections

Pair = tuple[float, float]


@dataclass(frozen=True)
class DetectionTable:
    """k detections in a packed set. Row i of each array is one of them.

    Attributes:
        image_ids: (k,) int64, as in the set.
        boxes_xywh: (k, 4) float64 x, y, width, height in pixels of the image as the pack has it.
        scores: (k,) float64.
        category_ids: (k,) int64, as in the set.
        masks: (k,) objects, an `Rle` on its image's own size each; None where boxes alone were looked for.
    """

    image_ids: NDArray[np.int64]
    boxes_xywh: NDArray[np.float64]
    scores: NDArray[np.float64]
    category_ids: NDArray[np.int64]
    masks: NDArray[np.object_] | None = None

    def __len__(self) -> int:
        """Number of detections."""
        return len(self.scores)

    def rows(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> DetectionTable:
        """The detections at some positions, or where a mask is true."""
        return DetectionTable(
            self.image_ids[chosen],
            self.boxes_xywh[chosen],
            self.scores[chosen],
            self.category_ids[chosen],
            None if self.masks is None else self.masks[chosen],
        )

    def of_image(self, image_id: int) -> DetectionTable:
        """The detections of one image."""
        return self.rows(self.image_ids == image_id)

    @classmethod
    def joined(cls, parts: Sequence[DetectionTable]) -> DetectionTable:
        """The detections of several, one after the other; none of no parts.

        There are masks where every part with a detection has them: a rank that had no image knows of none.
        """
        filled = [part for part in parts if len(part)] or parts
        masks = [part.masks for part in filled if part.masks is not None]
        with_masks = bool(masks) and (len(masks) == len(filled) or filled is parts)
        return cls(
            np.concatenate([np.zeros(0, np.int64), *(part.image_ids for part in parts)]),
            np.concatenate([np.zeros((0, 4)), *(part.boxes_xywh for part in parts)]),
            np.concatenate([np.zeros(0), *(part.scores for part in parts)]),
            np.concatenate([np.zeros(0, np.int64), *(part.category_ids for part in parts)]),
            np.concatenate(masks) if with_masks else None,
        )

    @classmethod
    def of_detector(
        cls, found: Sequence[Detections], image_ids: Sequence[int], scales: Sequence[Pair], labels: LabelIds
    ) -> DetectionTable:
        """What a detector found in the images of a batch, one image after the other. Waits for the device once.

        Args:
            found: detections of each image, in pixels of the resized one.
            image_ids: ids of the images.
            scales: (x, y) factors of each image, from the image as the pack has it to the resized one.
            labels: the set's category ids by the model's labels; what it has no id for is left out.
        """
        counts = [len(image.scores) for image in found]
        boxes, scores, label = on_host(found)
        boxes = boxes / np.repeat(np.tile(np.asarray(scales, np.float64), (1, 2)), counts, axis=0)
        boxes[:, 2:] -= boxes[:, :2]
        own = np.repeat(np.asarray(image_ids, np.int64), counts)
        masks = [image.masks for image in found if image.masks is not None]
        each = objects([mask for image in masks for mask in image]) if len(masks) == len(found) else None
        return cls(own, boxes, scores, labels.ids[label], each).rows(labels.present[label])

    @classmethod
    def of(cls, found: DetectionTable | NDArray[np.float64]) -> DetectionTable:
        """Detections as they are, or from pycocotools' array.

        Args:
            found: detections, or (k, 7) float64: image id, x, y, width, height, score, category id. Such an array
                holds ids up to 2^53.
        """
        if isinstance(found, DetectionTable):
            return found
        rows = np.asarray(found, dtype=np.float64).reshape(-1, 7)
        return cls(rows[:, 0].astype(np.int64), rows[:, 1:5], rows[:, 5], rows[:, 6].astype(np.int64))


def on_host(found: Sequence[Detections]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Boxes (k, 4), scores (k,) and labels (k,) of all images of a batch, in one transfer from the device."""
    columns = [torch.cat([d.boxes.double(), d.scores.double()[:, None], d.labels.double()[:, None]], 1) for d in found]
    rows = torch.cat(columns).cpu().numpy()
    return rows[:, :4], rows[:, 4], rows[:, 5].astype(np.int64)


def objects(values: Sequence[object]) -> NDArray[np.object_]:
    """A one-dimensional array of Python objects, whatever they are."""
    array = np.empty(len(values), np.object_)
    array[:] = values
    return array
