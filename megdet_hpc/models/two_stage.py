"""What the detectors that find regions first have in common: an RPN, then heads that look at each region."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from megdet_hpc.config import NormConfig, TwoStageConfig
from megdet_hpc.data.batch import Batch
from megdet_hpc.layers.norm import norm_layer
from megdet_hpc.models.backbones.configured import build_backbone
from megdet_hpc.models.detector import Detections, Detector, Draws, parts_by_name, torchvision_targets
from megdet_hpc.models.heads.boxes import ROI_SIZE
from megdet_hpc.models.heads.context import LargeKernels, build_large_kernels
from megdet_hpc.models.heads.masks import dense_masks, detections_of
from megdet_hpc.models.heads.rpn import ConfiguredRpn, build_rpn
from megdet_hpc.models.losses import Loss, Losses, Number
from megdet_hpc.models.necks.fpn import Pyramid, build_fpn
from megdet_hpc.models.sampling import SeededSampler
from megdet_hpc.parallel.communicator import Communicator


def part_of(name: str) -> str:
    """The part to which a parameter belongs, by its path: backbone, fpn, rpn or heads."""
    if name.startswith("backbone.fpn."):
        return "fpn"
    first = name.split(".")[0]
    return first if first in ("backbone", "rpn") else "heads"


def build_trunk(
    config: TwoStageConfig, norm: NormConfig, group: Communicator
) -> tuple[Pyramid, ConfiguredRpn, LargeKernels | None]:
    """The backbone with its FPN, the RPN on all of its levels, and what model.large_kernels puts before the heads.

    Args:
        config: keys of the model.
        norm: kind and parts of the normalization layers.
        group: ranks that share batch statistics.
    """
    body = build_backbone(config, norm_layer(norm, "backbone", group))
    pyramid = build_fpn(body, config.neck_channels, norm_layer(norm, "fpn", group), config.levels)
    rpn = build_rpn(config, len(pyramid.levels), norm_layer(norm, "rpn", group))
    return pyramid, rpn, build_large_kernels(config, pyramid.of_regions, norm_layer(norm, "heads", group))


class TwoStage(Detector):
    """A detector of two stages or more.

    torchvision divides each loss by the number of boxes that its own process sampled. That number is the loss's count.

    Args:
        backbone: backbone with the levels of its FPN.
        rpn: RPN with a `SeededSampler`.
        roi_heads: heads with the call of torchvision's RoIHeads; with `mask_head` they find masks too.
        large_kernels: convolutions of the levels behind the RPN; None: the heads take the levels as they are.
    """

    backbone: Pyramid
    rpn: ConfiguredRpn

    def __init__(
        self, backbone: Pyramid, rpn: ConfiguredRpn, roi_heads: nn.Module, large_kernels: LargeKernels | None = None
    ) -> None:
        super().__init__()
        self.backbone, self.rpn, self.roi_heads = backbone, rpn, roi_heads
        self.large_kernels = large_kernels
        self.has_masks = getattr(roi_heads, "mask_head", None) is not None
        self.regions_per_image = sum(sampler.batch_size_per_image for sampler in self.region_samplers())

    @abstractmethod
    def region_samplers(self) -> list[SeededSampler]:
        """The sampler of each stage behind the RPN."""

    @abstractmethod
    def region_count(self, loss: str) -> Number:
        """The number of samples over which a loss of the heads is a mean, after a training pass."""

    @abstractmethod
    def box_stages(self) -> list[nn.Module]:
        """The modules with `box_head` and `box_predictor`, a module for each stage."""

    def losses(self, batch: Batch, draws: Draws) -> Losses:
        anchors = self.rpn.fg_bg_sampler
        for sampler in (anchors, *self.region_samplers()):
            sampler.prepare(draws, batch.image_ids)
        targets = torchvision_targets(batch.targets, crowds=self.rpn.reads_crowds)
        _, rpn_losses, roi_losses = self._run(batch, targets)
        rpn = {key: Loss.mean(value, anchors.num_sampled) for key, value in rpn_losses.items()}
        return rpn | {key: Loss.mean(value, self.region_count(key)) for key, value in roi_losses.items()}

    def detect(self, batch: Batch) -> list[Detections]:
        return detections_of(self.found(batch), batch)

    def found(self, batch: Batch) -> list[dict[str, Tensor]]:
        found, _, _ = self._run(batch, None)
        return found

    def _run(
        self, batch: Batch, targets: list[dict[str, Tensor]] | None
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor], dict[str, Tensor]]:
        """Detections, RPN losses and losses of the heads. Training has no detections, evaluation has no losses."""
        pixels = self.normalized(batch)
        features = self.backbone(pixels)
        proposals, rpn_losses = self.rpn(ImageList(pixels, batch.sizes), features, targets)
        seen = features if self.large_kernels is None else self.large_kernels(features)
        # RoIAlign has no bfloat16, and converts anew for each head; float32 features stay as they are
        seen = {name: level.to(pixels.dtype) for name, level in seen.items()}
        found, roi_losses = self.roi_heads(seen, proposals, batch.sizes, targets)
        return found, rpn_losses, roi_losses

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """All parameters by part: backbone, fpn, rpn and heads."""
        return parts_by_name(self, part_of)

    def class_layers(self) -> dict[str, tuple[int, int]]:
        return {"roi_heads.mask_predictor.mask_fcn_logits": (1, 1)} if self.has_masks else {}

    def coordinate_modules(self) -> list[nn.Module]:
        predictors = [stage.get_submodule("box_predictor") for stage in self.box_stages()]
        masks = [self.roi_heads.get_submodule("mask_predictor")] if self.has_masks else []
        return [self.rpn.head, *predictors, *masks]

    def dense(self, images: Tensor) -> list[Tensor]:
        features = self.backbone(images)
        levels = list(features.values())
        scores, boxes = self.rpn.head(levels)
        found = [*levels, *scores, *boxes]
        if self.large_kernels is not None:
            found += self.large_kernels(features).values()
        for stage, sampler in zip(self.box_stages(), self.region_samplers(), strict=True):
            features = torch.zeros(
                len(images) * sampler.batch_size_per_image, levels[0].shape[1], ROI_SIZE, ROI_SIZE, device=images.device
            ).requires_grad_()
            found += stage.get_submodule("box_predictor")(stage.get_submodule("box_head")(features))
        if self.has_masks:
            first = self.region_samplers()[0]
            most = int(len(images) * first.batch_size_per_image * first.positive_fraction)
            found.append(dense_masks(self.roi_heads, levels[0], most))
        return found
