"""What a detector found: boxes with whole-number ids beside float columns, since float64 holds no id above 2^53."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Detections:
    """k boxes in a packed set; row i of each array is one box."""

    image_ids: NDArray[np.int64]  # [k] as in the set
    boxes_xywh: NDArray[np.float64]  # [k, 4] x, y, width, height in pixels of the image as the pack has it
    scores: NDArray[np.float64]  # [k]
    category_ids: NDArray[np.int64]  # [k] as in the set

    def __len__(self) -> int:
        """Number of boxes."""
        return len(self.scores)

    def rows(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> Detections:
        """The boxes at some positions, or where a mask is true."""
        return Detections(
            self.image_ids[chosen], self.boxes_xywh[chosen], self.scores[chosen], self.category_ids[chosen]
        )

    def of_image(self, image_id: int) -> Detections:
        """The boxes of one image."""
        return self.rows(self.image_ids == image_id)

    @classmethod
    def joined(cls, parts: Sequence[Detections]) -> Detections:
        """The boxes of several, one after the other; none of no parts."""
        return cls(
            np.concatenate([np.zeros(0, np.int64), *(part.image_ids for part in parts)]),
            np.concatenate([np.zeros((0, 4)), *(part.boxes_xywh for part in parts)]),
            np.concatenate([np.zeros(0), *(part.scores for part in parts)]),
            np.concatenate([np.zeros(0, np.int64), *(part.category_ids for part in parts)]),
        )

    @classmethod
    def of(cls, found: Detections | NDArray[np.float64]) -> Detections:
        """Detections as they are, or from pycocotools' array.

        Args:
            found: detections, or (k, 7) float64: image id, x, y, width, height, score, category id. Such an array
                holds ids up to 2^53.
        """
        if isinstance(found, Detections):
            return found
        rows = np.asarray(found, dtype=np.float64).reshape(-1, 7)
        return cls(rows[:, 0].astype(np.int64), rows[:, 1:5], rows[:, 5], rows[:, 6].astype(np.int64))
