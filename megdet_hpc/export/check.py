"""Whether a graph finds what its detector finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_iou

from megdet_hpc.export.graph import Found, Run

_PAIR_IOU = 0.5  # of two boxes that may be one


@dataclass(frozen=True)
class Difference:
    """What two runs of one image differ in.

    Attributes:
        size: (height, width) of the image [pixels].
        counts: objects that the detector and the graph found.
        boxes: largest difference of a coordinate [pixels].
        scores: largest difference of a score, and of a cell of a mask where there are masks.
        unpaired: scores of objects that only one of them found, those at the edge of being kept left out.
    """

    size: tuple[int, int]
    counts: tuple[int, int]
    boxes: float
    scores: float
    unpaired: list[float]

    def within(self, boxes: float, scores: float) -> bool:
        """Whether both found the same, to these tolerances."""
        return not self.unpaired and self.boxes <= boxes and self.scores <= scores

    def line(self) -> str:
        """Text for a user."""
        height, width = self.size
        text = f"{height} x {width} pixels: {self.counts[0]} objects, the graph {self.counts[1]}; "
        text += f"largest difference {self.boxes:.2g} pixels, {self.scores:.2g} of a score"
        if self.unpaired:
            scores = ", ".join(f"{score:.4f}" for score in self.unpaired[:5])
            text += f"; {len(self.unpaired)} found by one alone, of score {scores}"
        return text


@torch.no_grad()
def compare(
    detector: Run, graph: Run, images: Sequence[Tensor], *, threshold: float, limit: int, edge: float
) -> list[Difference]:
    """Run both on images and pair their objects by label and place.

    Args:
        detector, graph: functions of an image (3, H, W) uint8 that give its objects.
        images: images of several sizes.
        threshold: score from which objects are kept.
        limit: objects that are kept of an image.
        edge: an object whose score is so near to the threshold, or to the last of `limit` objects, may be missing on
            one side, since rounding decides there.
    """
    found = []
    for image in images:
        expected, got = detector(image), graph(image)
        found.append(_difference(image, expected, got, threshold, limit, edge))
    return found


def _difference(image: Tensor, expected: Found, got: Found, threshold: float, limit: int, edge: float) -> Difference:
    pairs = _pairs(expected, got)
    first, second = ([pair[side] for pair in pairs] for side in (0, 1))
    boxes = (expected[0][first] - got[0][second]).abs()
    # scores, and masks where there are any
    scores = torch.cat(
        [(expected[i][first] - got[i][second]).abs().flatten() for i in range(len(expected)) if i not in (0, 2)]
    )
    edges = [threshold]
    for side in (expected, got):
        if len(side[1]) == limit:
            edges.append(float(side[1].min()))
    left = [
        float(score)
        for side, taken in ((expected, set(first)), (got, set(second)))
        for index, score in enumerate(side[1])
        if index not in taken and all(abs(float(score) - at) > edge for at in edges)
    ]
    height, width = image.shape[1:]
    return Difference(
        (height, width),
        (len(expected[0]), len(got[0])),
        float(boxes.max()) if len(boxes) else 0.0,
        float(scores.max()) if len(scores) else 0.0,
        left,
    )


def _pairs(expected: Found, got: Found) -> list[tuple[int, int]]:
    """Indices of objects of one label whose boxes overlap most, each in one pair, best scores first."""
    # a pixel more, so that a box without area, as of SSD's detectors, overlaps itself
    wider = torch.tensor([0.0, 0.0, 1.0, 1.0])
    overlap = box_iou(expected[0] + wider, got[0] + wider) * (expected[2][:, None] == got[2][None])
    pairs = []
    for index in range(len(expected[0])):
        if overlap.shape[1] == 0 or (best := int(overlap[index].argmax())) < 0:
            break
        if float(overlap[index, best]) > _PAIR_IOU:
            pairs.append((index, best))
            overlap[:, best] = 0
    return pairs
