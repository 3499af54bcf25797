"""One image with its target, before it joins a batch.

Shape legend: H x W pixels of the image, k annotations of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Target:
    """The annotations of one image, crowd regions among them. Row i of each tensor is one annotation.

    The flags stay on the CPU wherever the rest goes: what is chosen by them then waits for no device.

    Attributes:
        boxes: (k, 4) float32 xyxy in pixels of the image.
        labels: (k,) int64, 1 and up.
        crowd: (k,) bool; the annotation is a region of many objects (COCO's `iscrowd`).
        difficult: (k,) bool; Pascal VOC's flag, False where the set has none.
        masks: (k, H, W) bool, or None where the detector does not ask for them.
    """

    boxes: Tensor
    labels: Tensor
    crowd: Tensor
    difficult: Tensor
    masks: Tensor | None = None

    @classmethod
    def ordinary(cls, boxes: Tensor, labels: Tensor, masks: Tensor | None = None) -> Target:
        """A target of annotations that are neither crowd regions nor difficult."""
        no = torch.zeros(len(labels), dtype=torch.bool)
        return cls(boxes, labels, no, no, masks)

    def __len__(self) -> int:
        """Number of annotations."""
        return len(self.labels)

    def rows(self, keep: Tensor) -> Target:
        """The annotations where a mask is true.

        Args:
            keep: (k,) bool on the CPU.
        """
        if keep.all():
            return self
        index = keep.nonzero().squeeze(1).to(self.boxes.device, non_blocking=True)
        masks = None if self.masks is None else self.masks[index]
        return Target(self.boxes[index], self.labels[index], self.crowd[keep], self.difficult[keep], masks)

    def without_crowds(self) -> Target:
        """The annotations of single objects."""
        return self.rows(~self.crowd)

    def to(self, device: torch.device) -> Target:
        """The target on a device, its flags left on the CPU; pinned memory is copied without blocking."""
        boxes, labels = (own.to(device, non_blocking=True) for own in (self.boxes, self.labels))
        masks = None if self.masks is None else self.masks.to(device, non_blocking=True)
        return replace(self, boxes=boxes, labels=labels, masks=masks)

    def pin_memory(self) -> Target:
        """The target with boxes, labels and masks in pinned memory."""
        masks = None if self.masks is None else self.masks.pin_memory()
        return replace(self, boxes=self.boxes.pin_memory(), labels=self.labels.pin_memory(), masks=masks)


@dataclass(frozen=True)
class Sample:
    """One image and its target after augmentation.

    Attributes:
        image: (3, H, W) uint8 RGB.
        scale: (x, y) factors from the image as the pack has it to this one.
        image_id: COCO image id.
        target: its annotations, in pixels of this image.
    """

    image: Tensor
    scale: tuple[float, float]
    image_id: int
    target: Target
