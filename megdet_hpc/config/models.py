"""Keys of the detector: some that all families have, and those of each family."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import ClassVar, Literal

from megdet_hpc.config.geometry import Geometry
from megdet_hpc.config.ranges import AT_LEAST_1, Accepted, ranged, require
from megdet_hpc.errors import UserError


@dataclass(frozen=True)
class ModelConfig:
    """Keys that every detector family has."""

    geometry: ClassVar[Geometry] = Geometry()
    """Sizes of the images that the family takes. This is no key."""
    needs_masks: ClassVar[bool] = False
    """Whether the family trains on masks, which are read from the pack for such a family only. This is no key."""

    detector: str = ""
    """Detector family. It decides which other keys `model` has."""
    backbone: str = ""
    """Feature extractor."""
    backbone_weights: str | None = "auto"
    """First weights of the backbone. auto: weights/BACKBONE.pth, which python -m megdet_hpc.fetch_backbone writes;
    without that file the backbone starts from scratch, with a warning. null: from scratch. Or a file of ImageNet
    weights in torchvision's format."""
    backbone_sha256: str | None = None
    """SHA-256 that the file of backbone_weights must have. A run fills it in. null: any."""
    weights: str | None = None
    """Detector that the run begins with: a checkpoint, a run's folder (its best checkpoint, else its newest), or the
    state dict of a torchvision detector. What fits is loaded. Classes are matched by name. null: none."""
    weights_sha256: str | None = None
    """SHA-256 that the file of weights must have. A run fills it in. null: any."""
    fixed_from_scratch: bool = False
    """Accept frozen stages and fixed statistics on random weights. They are refused otherwise."""
    frozen_stages: int = ranged(0, Accepted("0 to 5", lambda stages: 0 <= stages <= 5))
    """Backbone stages that keep the weights they begin with. 0: none; 1: the stem; 2: stem and layer1; up to 5
    [stages]."""

    def check(self) -> None:
        """Check that the keys of a family fit each other. Raises UserError."""


@dataclass(frozen=True)
class FasterRcnnConfig(ModelConfig):
    """Faster R-CNN with an FPN."""

    detector: Literal["faster_rcnn"] = "faster_rcnn"
    """Detector family."""
    backbone: Literal["resnet10", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"] = "resnet50"
    """Feature extractor. resnet10 has one basic block in each stage; the others are torchvision's."""
    neck: Literal["fpn"] = "fpn"
    """Neck, which joins the levels of the backbone."""
    neck_channels: int = ranged(256, AT_LEAST_1)
    """Width of every neck level [channels]."""
    box_head: Literal["2fc", "4conv1fc"] = "2fc"
    """Box head. 2fc: two fully connected layers; 4conv1fc: four convolutions, normalized if norm.where has heads, and
    one fully connected layer."""
    box_head_channels: int = ranged(1024, AT_LEAST_1)
    """Width of the box head's fully connected layers [channels]."""
    anchor_sizes: tuple[int, ...] = ranged((32, 64, 128, 256, 512), AT_LEAST_1.each())
    """Side of the anchors of each pyramid level, finest level first [pixels of the resized image]."""
    rpn_pre_nms_top_n: int = ranged(2000, AT_LEAST_1)
    """Proposals kept per level before NMS in training. Evaluation keeps half as many [boxes]."""
    rpn_post_nms_top_n: int = ranged(2000, AT_LEAST_1)
    """Proposals kept per image after NMS in training. Evaluation keeps half as many [boxes]."""
    rpn_samples_per_image: int = ranged(256, AT_LEAST_1)
    """Anchors per image in the RPN's loss [boxes]."""
    roi_samples_per_image: int = ranged(512, AT_LEAST_1)
    """Proposals per image in the box head's loss [boxes]."""

    def check(self) -> None:
        require(len(self.anchor_sizes) == 5, "model.anchor_sizes", self.anchor_sizes, "five sizes, one per FPN level")


DEFAULT_DETECTOR = "faster_rcnn"
DETECTORS: dict[str, type[ModelConfig]] = {DEFAULT_DETECTOR: FasterRcnnConfig}
"""The keys of each detector family."""


def detector_family(name: str) -> type[ModelConfig]:
    """The keys of a detector family.

    Raises:
        UserError: there is no family of this name; the nearest name is suggested.
    """
    if name not in DETECTORS:
        near = difflib.get_close_matches(str(name), DETECTORS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"model.detector is {name!r}; accepted: {', '.join(DETECTORS)}{hint}")
    return DETECTORS[name]
