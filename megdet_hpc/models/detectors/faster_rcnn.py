"""Faster R-CNN (Ren et al., NeurIPS 2015) with an FPN, from torchvision's parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper

from megdet_hpc.config import EvaluationConfig, FasterRcnnConfig, NormConfig
from megdet_hpc.data.batch import Batch
from megdet_hpc.layers.norm import NormLayer, norm_layer
from megdet_hpc.models.backbones.base import Backbone, Stage
from megdet_hpc.models.backbones.resnet import build_resnet
from megdet_hpc.models.detector import Detections, Detector, Draws, parts_by_name, torchvision_targets
from megdet_hpc.models.losses import Loss, Losses
from megdet_hpc.models.necks.fpn import Pyramid, build_fpn
from megdet_hpc.models.sampling import SeededSampler
from megdet_hpc.models.weights import find_weights
from megdet_hpc.parallel.communicator import Communicator


def part_of(name: str) -> str:
    """The part to which a parameter belongs, by its path: backbone, fpn, rpn or heads."""
    if name.startswith("backbone.fpn."):
        return "fpn"
    first = name.split(".")[0]
    return first if first in ("backbone", "rpn") else "heads"


class FasterRcnn(Detector):
    """The two-stage detector. Its state dict has the keys of torchvision's FasterRCNN.

    torchvision divides each loss by the number of boxes that its own process sampled. That number is the loss's count.

    Args:
        backbone, rpn, roi_heads: torchvision's parts; both samplers are `SeededSampler`.
    """

    def __init__(self, backbone: nn.Module, rpn: RegionProposalNetwork, roi_heads: RoIHeads) -> None:
        super().__init__()
        self.backbone, self.rpn, self.roi_heads = backbone, rpn, roi_heads
        self.regions_per_image = roi_heads.fg_bg_sampler.batch_size_per_image

    def losses(self, batch: Batch, draws: Draws) -> Losses:
        anchors, proposals = self._samplers()
        for sampler in (anchors, proposals):
            sampler.prepare(draws, batch.image_ids)
        _, rpn_losses, roi_losses = self._run(batch, torchvision_targets(batch.targets))
        rpn = {key: Loss.mean(value, anchors.num_sampled) for key, value in rpn_losses.items()}
        return rpn | {key: Loss.mean(value, proposals.num_sampled) for key, value in roi_losses.items()}

    def detect(self, batch: Batch) -> list[Detections]:
        found, _, _ = self._run(batch, None)
        return [Detections.of(image) for image in found]

    def _run(
        self, batch: Batch, targets: list[dict[str, Tensor]] | None
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor], dict[str, Tensor]]:
        """Detections, RPN losses and box head losses. Training has no detections, evaluation has no losses."""
        pixels = self.normalized(batch)
        features = self.backbone(pixels)
        proposals, rpn_losses = self.rpn(ImageList(pixels, batch.sizes), features, targets)
        found, roi_losses = self.roi_heads(features, proposals, batch.sizes, targets)
        return found, rpn_losses, roi_losses

    def _samplers(self) -> tuple[SeededSampler, SeededSampler]:
        return self.rpn.fg_bg_sampler, self.roi_heads.fg_bg_sampler

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """All parameters by part: backbone, fpn, rpn and heads."""
        return parts_by_name(self, part_of)

    def class_layers(self) -> dict[str, tuple[int, int]]:
        return {"roi_heads.box_predictor.cls_score": (1, 1), "roi_heads.box_predictor.bbox_pred": (1, 4)}

    def coordinate_modules(self) -> list[nn.Module]:
        return [self.backbone, self.rpn.head, self.roi_heads.box_predictor]

    def dense(self, images: Tensor) -> list[Tensor]:
        levels = list(self.backbone(images).values())
        scores, boxes = self.rpn.head(levels)
        side = self.roi_heads.box_roi_pool.output_size[0]
        features = torch.empty(
            len(images) * self.regions_per_image, levels[0].shape[1], side, side, device=images.device
        ).requires_grad_()
        return [*levels, *scores, *boxes, *self.roi_heads.box_predictor(self.roi_heads.box_head(features))]


_ROI_SIZE = 7  # Lin et al., Feature Pyramid Networks (CVPR 2017), section 4.2: 7 x 7 RoI features
_ASPECT_RATIOS = (0.5, 1.0, 2.0)  # the same paper, section 4.1


def _two_fc(config: FasterRcnnConfig, norm: NormLayer | None) -> nn.Module:
    return TwoMLPHead(config.neck_channels * _ROI_SIZE**2, config.box_head_channels)


def _four_conv_one_fc(config: FasterRcnnConfig, norm: NormLayer | None) -> nn.Module:
    channels = config.neck_channels
    return FastRCNNConvFCHead(
        (channels, _ROI_SIZE, _ROI_SIZE), [channels] * 4, [config.box_head_channels], norm_layer=norm
    )


_NECKS: dict[str, Callable[[Backbone, int, NormLayer | None], Pyramid]] = {"fpn": build_fpn}
_BOX_HEADS: dict[str, Callable[[FasterRcnnConfig, NormLayer | None], nn.Module]] = {
    "2fc": _two_fc,
    "4conv1fc": _four_conv_one_fc,
}


def build_faster_rcnn(
    config: FasterRcnnConfig,
    norm: NormConfig,
    evaluation: EvaluationConfig,
    num_labels: int,
    group: Communicator,
) -> FasterRcnn:
    """The detector of a configuration.

    Args:
        config: keys of the model.
        norm: kind and parts of the normalization layers.
        evaluation: limits of the boxes that are kept.
        num_labels: number of categories, the background included.
        group: ranks that share batch statistics.
    """
    body = _backbone(config, norm_layer(norm, "backbone", group))
    pyramid = _NECKS[config.neck](body, config.neck_channels, norm_layer(norm, "fpn", group))
    anchors = AnchorGenerator(tuple((size,) for size in config.anchor_sizes), (_ASPECT_RATIOS,) * len(pyramid.levels))
    rpn = RegionProposalNetwork(
        anchors,
        RPNHead(config.neck_channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=config.rpn_samples_per_image,
        positive_fraction=0.5,
        pre_nms_top_n=_top_n(config.rpn_pre_nms_top_n),
        post_nms_top_n=_top_n(config.rpn_post_nms_top_n),
        nms_thresh=0.7,
    )
    rpn.fg_bg_sampler = SeededSampler(config.rpn_samples_per_image, 0.5, "rpn")
    roi_heads = RoIHeads(
        _roi_pool(pyramid.levels[:-1]),  # the coarsest level is for the RPN alone
        _BOX_HEADS[config.box_head](config, norm_layer(norm, "heads", group)),
        FastRCNNPredictor(config.box_head_channels, num_labels),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=config.roi_samples_per_image,
        positive_fraction=0.25,
        bbox_reg_weights=None,
        score_thresh=evaluation.score_threshold,
        nms_thresh=evaluation.nms_iou,
        detections_per_img=evaluation.max_detections,
    )
    roi_heads.fg_bg_sampler = SeededSampler(config.roi_samples_per_image, 0.25, "roi")
    return FasterRcnn(pyramid, rpn, roi_heads)


def _backbone(config: FasterRcnnConfig, norm: NormLayer | None) -> Backbone:
    """The backbone of a configuration, with frozen stages and loaded weights."""
    backbone = build_resnet(config.backbone, norm)
    backbone.freeze(config.frozen_stages)
    if file := find_weights(config):
        backbone.load(str(file))
    return backbone


def _roi_pool(levels: Sequence[Stage]) -> MultiScaleRoIAlign:
    """RoIAlign over levels of the pyramid with their true strides.

    torchvision would infer the strides once, from the unpadded height of the first batch. Where that height is less
    than 0.71 of the padded height, the strides would be wrong by a factor of two for the whole run.
    """
    names = [level.name for level in levels]
    pool = MultiScaleRoIAlign(featmap_names=names, output_size=_ROI_SIZE, sampling_ratio=2)
    pool.scales = [1 / level.stride for level in levels]
    finest, coarsest = (int(math.log2(level.stride)) for level in (levels[0], levels[-1]))
    pool.map_levels = LevelMapper(finest, coarsest, pool.canonical_scale, pool.canonical_level)
    return pool


def _top_n(training: int) -> dict[str, int]:
    return {"training": training, "testing": max(training // 2, 1)}
