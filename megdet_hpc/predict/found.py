"""The detections of one picture, with the picture itself."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megdet_hpc.data.masks import decode_masks
from megdet_hpc.evaluation.detections import DetectionTable
from megdet_hpc.evaluation.results import result_rows
from megdet_hpc.predict.drawing import drawn


@dataclass(frozen=True)
class Found:
    """m objects found in a picture, best first.

    Attributes:
        name: file of the picture; "" where pixels were given.
        pixels: (H, W, 3) uint8 RGB, as the detector saw them before it resized them.
        table: detections as a table, its image ids 0.
        category_names: names of all categories of the detector by their ids.
    """

    name: str
    pixels: NDArray[np.uint8]
    table: DetectionTable
    category_names: dict[int, str]

    def __len__(self) -> int:
        """Number of objects."""
        return len(self.table)

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in Counter(self.names).most_common())
        return f"{self.name or 'picture'}: {counts or 'nothing found'}"

    @property
    def boxes(self) -> NDArray[np.float64]:
        """(m, 4) xyxy in pixels of the picture."""
        xywh = self.table.boxes_xywh
        return np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)

    @property
    def scores(self) -> NDArray[np.float64]:
        """(m,) 0 to 1."""
        return self.table.scores

    @property
    def labels(self) -> NDArray[np.int64]:
        """(m,) category ids of the training set."""
        return self.table.category_ids

    @property
    def names(self) -> list[str]:
        """The category name of each object."""
        return [self.category_names[label] for label in self.labels.tolist()]

    @property
    def masks(self) -> NDArray[np.bool_] | None:
        """(m, H, W); None of a detector that finds boxes alone."""
        if self.table.masks is None:
            return None
        return decode_masks(list(self.table.masks), *self.pixels.shape[:2])

    def to_coco(self, image_id: int = 0) -> list[dict[str, Any]]:
        """The rows of a COCO results file."""
        return [{**row, "image_id": image_id} for row in result_rows(self.table)]

    def plot(self, path: str | Path | None = None) -> Image.Image:
        """The picture with its boxes; a notebook shows what is returned.

        Args:
            path: file to write it to as well.
        """
        texts = [f"{name} {score:.2f}" for name, score in zip(self.names, self.scores, strict=True)]
        colours = [list(self.category_names).index(label) for label in self.labels.tolist()]
        picture = Image.fromarray(drawn(self.pixels, self.boxes, texts, colours, self.masks))
        if path is not None:
            picture.save(path, quality=90)
        return picture
