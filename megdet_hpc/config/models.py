"""Keys of the detector: some that all families have, and those of each family."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from megdet_hpc.config.geometry import Geometry
from megdet_hpc.config.norm import NormConfig
from megdet_hpc.config.ranges import ABOVE_0, AT_LEAST_0, AT_LEAST_1, Accepted, ranged, require
from megdet_hpc.errors import UserError

_RESNETS = ("resnet", "resnext", "wide_resnet")
# Dai et al. (ICCV 2017) deform C3 to C5 at most; Qiao et al. (arXiv 1903.10520) standardize every convolution.
_FIRST_STAGE = {"weight_standardized": 1, "deformable": 3}
# Regions take their features from the levels up to P5 (Lin et al., Feature Pyramid Networks, section 4.2).
COARSEST_OF_REGIONS = 5


def _are_levels(values: Sequence[int] | None) -> bool:
    return values is None or len(values) == 2


_LEVELS = Accepted("the numbers of two levels, or null", _are_levels)


def _are_ious(values: Sequence[float]) -> bool:
    return 2 <= len(values) <= 4 and all(0 < value < 1 for value in values)


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
    """First weights of the backbone. auto: the file of the variable MEGDET_BACKBONE, if it is set, else
    weights/BACKBONE.pth, which python -m megdet_hpc.fetch_backbone writes; without that file the backbone starts from
    scratch, with a warning. null: from scratch. Or a file of ImageNet weights in torchvision's format."""
    backbone_sha256: str | None = None
    """SHA-256 that the file of backbone_weights must have. A run fills it in. null: any."""
    weights: str | None = None
    """Detector that the run begins with: a checkpoint, a run's folder (its best checkpoint, else its newest), or the
    state dict of a torchvision detector. What fits is loaded. Classes are matched by name. null: none."""
    weights_sha256: str | None = None
    """SHA-256 that the file of weights must have. A run fills it in. null: any."""
    fixed_from_scratch: bool = False
    """Accept frozen stages and fixed statistics on random weights. They are refused otherwise."""
    frozen_stages: int = ranged(0, Accepted("0 to 5, with detnet59 to 6", lambda stages: 0 <= stages <= 6))
    """Backbone stages that keep the weights they begin with. 0: none; 1: the stem; 2: stem and layer1; up to 5, with
    detnet59 6 [stages]."""
    memory_format: Literal["contiguous", "channels_last"] = "contiguous"
    """Layout of the images, which all feature maps follow. channels_last keeps the channels of a pixel together, which
    convolutions in half precision prefer. The results differ by rounding. Weights and checkpoints keep their layout."""
    compile: bool = False
    """Compile backbone and neck by torch.compile, in training. Needs a C++ compiler, or on GPUs Triton, and pays where
    shapes are few, as with data.padding fixed."""

    @property
    def num_stages(self) -> int:
        """The stages of the backbone, the stem counted."""
        return 5

    def check(self) -> None:
        """Check that the keys of a family fit each other. Raises UserError."""

    def check_norm(self, norm: NormConfig) -> None:
        """Check that the keys of a family fit those of the normalization. Raises UserError."""


@dataclass(frozen=True)
class BackboneConfig(ModelConfig):
    """Keys of the families that take any of the package's backbones."""

    backbone: Literal[
        "resnet10", "resnet10_w16", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
        "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2",
        "densenet121", "densenet169", "detnet59", "peleenet",
    ] = "resnet50"  # fmt: skip
    """Feature extractor. resnet10 has one basic block in each stage, resnet10_w16 a quarter of its channels; detnet59
    keeps stride 16 in its last three stages; peleenet is a small dense network; the others are torchvision's.
    docs/detectors.md compares them."""
    conv: Literal["standard", "weight_standardized", "deformable"] = "standard"
    """Kind of the backbone's convolutions. weight_standardized: weights with mean 0 and variance 1, for norm.kind gn;
    deformable: 3 x 3 convolutions whose taps move."""
    conv_stages: tuple[int, ...] | None = None
    """Stages with convolutions of this kind, counted as by frozen_stages: 1 is the stem, 3 to 5 are C3 to C5. null: all
    with weight_standardized, from 3 on with deformable [stages]."""
    dilated_c5: bool = False
    """Take the stride out of a ResNet's last stage and dilate its 3 x 3 convolutions by 2 (atrous). C5 is then as fine
    as C4."""
    squeeze_excitation: bool = False
    """Weigh the channels of each residual block of a ResNet by the mean of its features (squeeze and excitation)."""
    memory_efficient: bool = False
    """Compute the wide part of each dense layer of a DenseNet or PeleeNet again in the backward pass. The gradients are
    the same bits; memory shrinks, and a step takes longer (docs/detectors.md)."""

    @property
    def num_stages(self) -> int:
        return 6 if self.backbone == "detnet59" else 5

    def check_levels(self, levels: tuple[int, int], most: int, sizes: Sequence[int]) -> None:
        """Check the levels of a pyramid and that each has a size of anchors.

        Args:
            levels: numbers of the first and the last.
            most: number of the coarsest that the family can have.
            sizes: model.anchor_sizes.
        """
        (first, last), own = levels, self.num_stages
        coarsest = str(own) if own >= most else f"{own} to {most}"
        accepted = f"null, or a first level from 2 to {COARSEST_OF_REGIONS} and the last level {coarsest}"
        fits = 2 <= first <= COARSEST_OF_REGIONS and own <= last <= most
        require(fits, "model.fpn_levels", levels, f"{accepted} with {self.backbone}")
        number = last - first + 1
        words = f"{number} size(s), one per FPN level, P{first} to P{last}"
        require(len(sizes) == number, "model.anchor_sizes", sizes, words)

    def stages_of_conv(self) -> tuple[int, ...]:
        """The stages whose convolutions are of the kind of `conv`."""
        if self.conv == "standard":
            return ()
        return self.conv_stages or tuple(range(_FIRST_STAGE[self.conv], self.num_stages + 1))

    def check(self) -> None:
        last, stages = self.num_stages, self.conv_stages
        which = f"with {self.backbone}"
        require(self.frozen_stages <= last, "model.frozen_stages", self.frozen_stages, f"0 to {last} {which}")
        for key in ("dilated_c5", "squeeze_excitation"):
            possible = self.backbone.startswith(_RESNETS) or not getattr(self, key)
            require(possible, f"model.{key}", True, f"false {which}, which is no ResNet")
        dense = self.backbone.startswith("densenet") or self.backbone == "peleenet"
        accepted = f"false {which}, which has no dense layers"
        require(dense or not self.memory_efficient, "model.memory_efficient", True, accepted)
        # the new layers begin with random weights, and would keep them
        constant = self.squeeze_excitation and self.frozen_stages > 1 and not self.weights
        require(not constant, "model.frozen_stages", self.frozen_stages, "0 or 1 with model.squeeze_excitation true")
        if stages is not None:
            require(self.conv != "standard", "model.conv_stages", stages, "null with model.conv standard")
            first = 2 if self.conv == "deformable" else 1
            fits = len(stages) == len({*stages}) > 0 and all(first <= stage <= last for stage in stages)
            stem = ", since the stem has no 3 x 3 convolution" if first == 2 else ""
            require(fits, "model.conv_stages", stages, f"different stages from {first} to {last} {which}{stem}")
        if self.conv == "deformable" and not self.weights:
            # offsets begin at zero, and would stay there
            first = self.frozen_stages + 1
            accepted = f"stages from {first} on with model.frozen_stages {self.frozen_stages}"
            require(min(self.stages_of_conv()) >= first, "model.conv_stages", self.stages_of_conv(), accepted)

    def check_norm(self, norm: NormConfig) -> None:
        if self.conv != "weight_standardized" or self.weights:
            return
        fixed = norm.kind == "frozen" or "backbone" not in norm.where
        if fixed or (norm.kind != "gn" and min(self.stages_of_conv()) <= self.frozen_stages):
            raise UserError(
                "model.conv is weight_standardized where the backbone keeps its statistics ("
                + (f"norm.kind {norm.kind}, norm.where {list(norm.where)}" if fixed else "")
                + ("" if fixed else f"model.frozen_stages {self.frozen_stages}")
                + "), which belong to weights that are not standardized; accepted: standard or deformable, or a "
                "detector that was trained so in model.weights"
            )


@dataclass(frozen=True)
class TwoStageConfig(BackboneConfig):
    """Keys of the families that find regions first: an FPN, an RPN and heads that look at each region."""

    neck: Literal["fpn"] = "fpn"
    """Neck, which joins the levels of the backbone."""
    neck_channels: int = ranged(256, AT_LEAST_1)
    """Width of every neck level [channels]."""
    fpn_levels: tuple[int, ...] | None = ranged(None, _LEVELS)
    """First and last level of the FPN, on which anchors lie: 2 is P2, of stride 4. Regions take their features from
    those up to P5. A last level 6 is P5 pooled. null: 2 and 6."""
    roi_pool: Literal["align", "pool"] = "align"
    """Way in which a region takes its features, for boxes and masks. align: RoIAlign, values between the cells; pool:
    RoIPool, the largest value of whole cells, corners rounded to cells."""
    large_kernels: int = ranged(
        0, Accepted("0, or an odd number from 3 on", lambda length: length == 0 or (length >= 3 and length % 2 == 1))
    )
    """Length k of large separable convolutions, k x 1 with 1 x k, between the FPN and the pooling of regions. 0: none
    [cells]."""
    large_kernel_channels: int = ranged(64, AT_LEAST_1)
    """Width between the two parts of a large separable convolution [channels]."""
    global_context: bool = False
    """Add a feature of the whole image to the features of each region in the box head."""
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
    """Proposals kept per image after NMS in training [boxes]."""
    rpn_eval_post_nms_top_n: int | None = ranged(None, AT_LEAST_1.or_null())
    """Proposals kept per image after NMS in evaluation. null: half of rpn_post_nms_top_n [boxes]."""
    rpn_samples_per_image: int = ranged(256, AT_LEAST_1)
    """Anchors per image in the RPN's loss [boxes]."""
    roi_samples_per_image: int = ranged(512, AT_LEAST_1)
    """Proposals per image in the box head's loss [boxes]."""
    sampler: Literal["random", "ohem"] = "random"
    """Choice of these proposals. random: drawn, at most a quarter with an object; ohem: those of highest loss, after
    NMS among them (online hard example mining)."""
    rpn_box_beta: float = ranged(1 / 9, AT_LEAST_0)
    """Error below which the RPN's loss of boxes is quadratic (smooth L1's beta), in its differences. 0: L1."""
    box_beta: float = ranged(1 / 9, AT_LEAST_0)
    """Error below which the box head's loss of boxes is quadratic, in its differences times 10, 10, 5, 5. 0: L1."""
    roi_aligned: bool = False
    """Move regions by half a cell in RoIAlign, so that features and pixels line up, as in detectron2's ROIAlignV2."""
    roi_sampling_ratio: int = ranged(2, AT_LEAST_0)
    """Points of RoIAlign along each side of an output cell. 0: as many as the region has cells there. pool has none."""
    crowds: Literal["background", "ignore"] = "background"
    """Anchors and proposals without an object that lie in a crowd region. background: they train as background; ignore:
    they are not in the loss (docs/semantics.md)."""

    @property
    def levels(self) -> tuple[int, int]:
        """First and last level of the FPN."""
        first, last = self.fpn_levels or (2, 6)
        return first, last

    def check(self) -> None:
        super().check()
        self.check_levels(self.levels, 6, self.anchor_sizes)
        aligned = self.roi_aligned and self.roi_pool == "pool"
        require(not aligned, "model.roi_aligned", True, "false with model.roi_pool pool, which rounds to whole cells")


@dataclass(frozen=True)
class FasterRcnnConfig(TwoStageConfig):
    """Faster R-CNN with an FPN."""

    detector: Literal["faster_rcnn"] = "faster_rcnn"
    """Detector family."""


@dataclass(frozen=True)
class MaskRcnnConfig(TwoStageConfig):
    """Mask R-CNN with an FPN: Faster R-CNN and a mask of each object."""

    needs_masks: ClassVar[bool] = True

    detector: Literal["mask_rcnn"] = "mask_rcnn"
    """Detector family."""
    mask_head_channels: int = ranged(256, AT_LEAST_1)
    """Width of the mask head's four convolutions and of its upsampling [channels]."""


@dataclass(frozen=True)
class CascadeRcnnConfig(TwoStageConfig):
    """Cascade R-CNN with an FPN: box heads one after the other, each for a higher IoU."""

    detector: Literal["cascade_rcnn"] = "cascade_rcnn"
    """Detector family."""
    stage_ious: tuple[float, ...] = ranged((0.5, 0.6, 0.7), Accepted("2 to 4 IoUs, each over 0 and below 1", _are_ious))
    """Least IoU of a region with an object, for each stage; their number is the number of stages [0 to 1]."""

    def check(self) -> None:
        super().check()
        rising = tuple(sorted(self.stage_ious)) == self.stage_ious
        require(rising, "model.stage_ious", self.stage_ious, "IoUs that rise from stage to stage")


@dataclass(frozen=True)
class CascadeMaskRcnnConfig(CascadeRcnnConfig):
    """Cascade R-CNN with a mask of each object."""

    needs_masks: ClassVar[bool] = True

    detector: Literal["cascade_mask_rcnn"] = "cascade_mask_rcnn"  # type: ignore[assignment]
    """Detector family."""
    mask_head_channels: int = ranged(256, AT_LEAST_1)
    """Width of the mask head's four convolutions and of its upsampling [channels]."""


@dataclass(frozen=True)
class RetinaNetConfig(BackboneConfig):
    """RetinaNet: one stage, every anchor of P3 to P7 in the loss."""

    detector: Literal["retinanet"] = "retinanet"
    """Detector family."""
    neck_channels: int = ranged(256, AT_LEAST_1)
    """Width of every FPN level and of the heads [channels]."""
    fpn_levels: tuple[int, ...] | None = ranged(None, _LEVELS)
    """First and last level of the FPN, on which anchors lie: 2 is P2, of stride 4. Levels beyond the backbone's are
    convolved. null: 3 and 7."""
    p6_from: Literal["p5", "c5"] = "p5"
    """Level from which the FPN's sixth is made. p5: as torchvision's retinanet_resnet50_fpn; c5: the backbone's last
    stage, as in the paper and in torchvision's second version."""
    anchor_sizes: tuple[int, ...] = ranged((32, 64, 128, 256, 512), AT_LEAST_1.each())
    """Side of the smallest anchors of each level, finest level first [pixels of the resized image]."""
    anchor_scales: int = ranged(3, AT_LEAST_1)
    """Sizes of anchors in each octave of every level."""
    candidates_per_level: int = ranged(1000, AT_LEAST_1)
    """Detections kept per level before NMS in evaluation [boxes]."""
    crowds: Literal["background", "ignore"] = "background"
    """Anchors without an object that lie in a crowd region. background: they train as background; ignore: they are not
    in the loss (docs/semantics.md)."""

    @property
    def levels(self) -> tuple[int, int]:
        """First and last level of the FPN."""
        first, last = self.fpn_levels or (3, 7)
        return first, last

    def check(self) -> None:
        super().check()
        self.check_levels(self.levels, 7, self.anchor_sizes)


@dataclass(frozen=True)
class SsdConfig(ModelConfig):
    """Keys of the families with SSD's default boxes, which take squares and have a backbone of their own."""

    geometry: ClassVar[Geometry] = Geometry(divisible=1, square=True)
    num_maps: ClassVar[int] = 6
    """Maps with default boxes. This is no key."""

    backbone_weights: str | None = None
    """First weights of the backbone: null, since these backbones begin from scratch. For a whole detector see
    weights."""
    box_scales: tuple[float, ...] = ranged((0.1, 0.2, 0.37, 0.54, 0.71, 0.88, 1.05), ABOVE_0.each())
    """Side of the smaller square of each map, finest map first, and one number more: the larger square's side is the
    mean of a number and the next one (the root of their product) [of the image's side]."""
    box_steps: tuple[int, ...] | None = ranged(None, AT_LEAST_1.each().or_null())
    """Distance of the boxes' centres on each map [pixels of the resized image]. null: the image's side divided by the
    map's, so that every centre lies in the image."""
    negatives: int = ranged(3, AT_LEAST_0)
    """Boxes of the background in the loss for each box with an object, the hardest of each image [boxes]."""
    candidates_per_class: int = ranged(400, AT_LEAST_1)
    """Boxes of a class that are kept before NMS in evaluation [boxes]."""
    crowds: Literal["background", "ignore"] = "background"
    """Boxes without an object that lie in a crowd region. background: they train as background; ignore: they are not
    in the loss (docs/semantics.md)."""

    def check(self) -> None:
        super().check()
        require(self.backbone_weights is None, "model.backbone_weights", self.backbone_weights, "null")
        require(self.frozen_stages == 0, "model.frozen_stages", self.frozen_stages, f"0 with {self.detector}")
        for key, number in (("box_scales", self.num_maps + 1), ("box_steps", self.num_maps)):
            value = getattr(self, key)
            require(value is None or len(value) == number, f"model.{key}", value, f"{number} numbers")


@dataclass(frozen=True)
class ScratchDetConfig(SsdConfig):
    """ScratchDet: SSD on a Root-ResNet."""

    detector: Literal["scratchdet"] = "scratchdet"
    """Detector family."""
    backbone: Literal["root_resnet10", "root_resnet18", "root_resnet34"] = "root_resnet34"
    """Feature extractor. root_resnet10 has one basic block in each stage."""
    root: Literal["root", "a", "b", "original"] = "root"
    """First layers. original: a ResNet's, of stride 4; a: without its max pooling; b: its convolution without stride;
    root: three 3 x 3 convolutions without stride in its place."""
    block_order: Literal["post", "pre"] = "post"
    """Place of the normalization in a block. post: behind each convolution, as in a ResNet and the authors' MMDetection
    code; pre: before it, maps taken before the sum, as in the authors' Caffe code (docs/detectors.md)."""
    root_channels: int = ranged(64, AT_LEAST_1)
    """Width of the root. Each stage has a fixed multiple of it [channels]."""


@dataclass(frozen=True)
class PeleeConfig(SsdConfig):
    """Pelee: SSD on PeleeNet."""

    detector: Literal["pelee"] = "pelee"
    """Detector family."""
    backbone: Literal["peleenet"] = "peleenet"
    """Feature extractor."""
    growth: int = ranged(32, Accepted("a multiple of 8", lambda growth: growth > 0 and growth % 8 == 0))
    """Width that a dense layer adds. The maps have eight times as many channels [channels]."""
    head_kernel: Literal[1, 3] = 1
    """Side of the heads' convolutions. The paper prefers 1 [cells]."""
    memory_efficient: bool = False
    """Compute the wide part of each dense layer again in the backward pass. The gradients are the same bits; memory
    shrinks, and a step takes longer (docs/detectors.md)."""


@dataclass(frozen=True)
class DsodConfig(SsdConfig):
    """DSOD: dense blocks from scratch, and maps that each take half of their channels from the map before."""

    detector: Literal["dsod"] = "dsod"
    """Detector family."""
    backbone: Literal["dsod"] = "dsod"
    """Feature extractor, DS/A-B-K-1 in the paper: A is first_channels, B bottleneck_channels, K growth."""
    first_channels: int = ranged(64, AT_LEAST_1)
    """Width of the first two convolutions; the third is twice as wide [channels]."""
    bottleneck_channels: int = ranged(192, AT_LEAST_1)
    """Width of the 1 x 1 convolution of each dense layer [channels]."""
    growth: int = ranged(48, AT_LEAST_1)
    """Channels that each dense layer adds."""
    block_layers: tuple[int, ...] = ranged(
        (6, 8, 8, 8), Accepted("four numbers, 1 or more each", lambda values: len(values) == 4 and min(values) >= 1)
    )
    """Layers of each dense block."""
    map_channels: tuple[int, ...] = ranged(
        (256, 256, 128, 128, 128),
        Accepted("five numbers, 1 or more each", lambda values: len(values) == 5 and min(values) >= 1),
    )
    """Width of each half of the second to the sixth map [channels]."""
    memory_efficient: bool = False
    """Compute the wide part of each dense layer again in the backward pass. The gradients are the same bits; memory
    shrinks, and a step takes longer (docs/detectors.md)."""


DEFAULT_DETECTOR = "faster_rcnn"
DETECTORS: dict[str, type[ModelConfig]] = {
    DEFAULT_DETECTOR: FasterRcnnConfig,
    "mask_rcnn": MaskRcnnConfig,
    "cascade_rcnn": CascadeRcnnConfig,
    "cascade_mask_rcnn": CascadeMaskRcnnConfig,
    "retinanet": RetinaNetConfig,
    "scratchdet": ScratchDetConfig,
    "pelee": PeleeConfig,
    "dsod": DsodConfig,
}
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
