"""The interface of a detector, which is the same for every family.

Shapes: N images in a batch, H x W their padded size, m boxes of an image. Boxes are xyxy in pixels of the resized
image. Label 0 is background.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megdet_hpc.data.batch import Batch
from megdet_hpc.data.masks import Rle
from megdet_hpc.data.sample import Target
from megdet_hpc.models.losses import Losses
from megdet_hpc.seeds import derived_seed

# Mean and deviation of ImageNet's channels, with which torchvision's backbones were trained.
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Draws:
    """The source of random choices in a training pass. They depend on the run, the update and the image alone."""

    seed: int
    step: int

    def seed_of(self, salt: str, image_id: int) -> int:
        """The seed of an image's draws for one purpose, which `salt` names."""
        return derived_seed(salt, self.seed, self.step, image_id)


@dataclass(frozen=True)
class Detections:
    """The objects found in an image, best first.

    Attributes:
        boxes: (m, 4) float32.
        scores: (m,) float32, 0 to 1.
        labels: (m,) int64, 1 and up.
        masks: m masks on the image's own size (Batch.own_sizes); None where the detector finds boxes alone.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Sequence[Rle] | None = None

    @classmethod
    def of(cls, found: Mapping[str, Tensor]) -> Detections:
        """The objects in a dict that torchvision's detectors give for an image."""
        return cls(found["boxes"], found["scores"], found["labels"])


def torchvision_targets(targets: Sequence[Target], *, crowds: bool = False) -> list[dict[str, Tensor]]:
    """The targets as torchvision's detectors take them: a dict for each image, without crowd regions.

    Args:
        targets: targets of a batch.
        crowds: add the crowd regions' boxes, as `crowds`.
    """
    found = [
        {"boxes": target.boxes, "labels": target.labels} | ({} if target.masks is None else {"masks": target.masks})
        for target in (own.without_crowds() for own in targets)
    ]
    if crowds:
        found = [one | {"crowds": own.rows(own.crowd).boxes} for one, own in zip(found, targets, strict=True)]
    return found


class Detector(nn.Module, ABC):
    """A detector. Its batches come from the loader resized and padded.

    A family is one subclass, which joins backbone, neck and heads. The trainer, the evaluation and the planner use
    these methods only. No method is a collective of the world: each loss carries its count, and the trainer divides by
    the counts of all ranks (losses.py). Normalization layers exchange statistics within their group.
    """

    regions_per_image = 0
    """Number of boxes of an image on which a second stage trains."""

    has_masks = False
    """Whether `found` has masks."""

    memory_format = torch.contiguous_format
    """Layout of the images, which the feature maps follow (model.memory_format)."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self) -> None:
        super().__init__()
        # not persistent, so that state dicts have torchvision's keys
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD).view(1, 3, 1, 1) * 255, persistent=False)

    @abstractmethod
    def losses(self, batch: Batch, draws: Draws) -> Losses:
        """The losses of a training pass, each with its own count. Every rank has the same keys in the same order.

        Args:
            batch: one or more images, on the model's device.
            draws: seeds of every random choice; those for an image do not depend on the images beside it.
        """

    @abstractmethod
    def detect(self, batch: Batch) -> list[Detections]:
        """The objects of each image, in evaluation mode. Of the batch they depend on the padded size alone."""

    def found(self, batch: Batch) -> list[dict[str, Tensor]]:
        """The objects of each image as tensors alone, which a graph of the detector can hold (export).

        Returns:
            For each image `boxes`, `scores` and `labels` as in `Detections`; from a detector of masks `masks` too, (m,
            1, M, M), the probability of each cell of the object's box.
        """
        return [{"boxes": d.boxes, "scores": d.scores, "labels": d.labels} for d in self.detect(batch)]

    @abstractmethod
    def parts(self) -> dict[str, list[nn.Parameter]]:
        """All parameters by part; the first part is `backbone`.

        The variance probe measures each part. AGVM scales the rates of the other parts.
        """

    @abstractmethod
    def class_layers(self) -> dict[str, tuple[int, int]]:
        """Layers with outputs per class, by path, so that a detector can begin with one of other classes.

        Returns:
            For each layer (before, after): its outputs are (before, labels, after) in a row, label 0 the background.
        """

    @abstractmethod
    def coordinate_modules(self) -> list[nn.Module]:
        """Modules whose outputs become coordinates or scores, which must stay float32 under autocast."""

    @abstractmethod
    def dense(self, images: Tensor) -> list[Tensor]:
        """The outputs of all layers with weights that a training pass uses. No boxes are needed.

        Their shapes depend on the shape of the input alone, so the planner can run this on torch's meta device.

        Args:
            images: (N, 3, H, W) float32.
        """

    def normalized(self, batch: Batch) -> Tensor:
        """The pixels of a batch with ImageNet's mean and deviation taken out, (N, 3, H, W). Padding is 0."""
        pixels = (batch.images.to(self.pixel_mean.dtype) - self.pixel_mean) / self.pixel_std
        for pixel, (height, width) in zip(pixels, batch.sizes, strict=True):
            pixel[:, height:, :] = 0
            pixel[:, :, width:] = 0
        return pixels.contiguous(memory_format=self.memory_format)


def parts_by_name(model: nn.Module, part_of: Callable[[str], str]) -> dict[str, list[nn.Parameter]]:
    """The parameters of a model by part; `part_of` gives the part from a parameter's path."""
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        parts.setdefault(part_of(name), []).append(parameter)
    return parts
