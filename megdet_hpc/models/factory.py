"""Build a detector from its configuration: each part is one entry of one table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.resnet import ResNet
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import LevelMapper

from megdet_hpc.config import Config, EvaluationConfig, ModelConfig, NormConfig
from megdet_hpc.layers.cgbn import name_layers
from megdet_hpc.models.backbone import build_resnet
from megdet_hpc.models.detector import Detector
from megdet_hpc.models.detectors.faster_rcnn import FasterRcnn
from megdet_hpc.models.norm import NormLayer, norm_layer, norm_parameters
from megdet_hpc.models.sampling import SeededSampler
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.seeds import derived_seed

_ROI_SIZE = 7  # Lin et al., Feature Pyramid Networks (CVPR 2017), section 4.2: 7 x 7 RoI features
_STRIDES = (4, 8, 16, 32)  # of FPN levels 0 to 3 on a ResNet
_ASPECT_RATIOS = (0.5, 1.0, 2.0)  # ibid., section 4.1


def _fpn(resnet: ResNet, config: ModelConfig, norm: NormLayer | None) -> BackboneWithFPN:
    """Levels 0 to 3 (strides 4 to 32) of config.neck_channels, and `pool` (stride 64)."""
    layers = {f"layer{i + 1}": str(i) for i in range(4)}
    widths = [resnet.inplanes // 2**i for i in (3, 2, 1, 0)]
    return BackboneWithFPN(
        resnet, layers, widths, config.neck_channels, extra_blocks=LastLevelMaxPool(), norm_layer=norm
    )


def _two_fc(config: ModelConfig, norm: NormLayer | None) -> nn.Module:
    return TwoMLPHead(config.neck_channels * _ROI_SIZE**2, config.box_head_channels)


def _four_conv_one_fc(config: ModelConfig, norm: NormLayer | None) -> nn.Module:
    channels = config.neck_channels
    return FastRCNNConvFCHead(
        (channels, _ROI_SIZE, _ROI_SIZE), [channels] * 4, [config.box_head_channels], norm_layer=norm
    )


_NECKS: dict[str, Callable[[ResNet, ModelConfig, NormLayer | None], BackboneWithFPN]] = {"fpn": _fpn}
_BOX_HEADS: dict[str, Callable[[ModelConfig, NormLayer | None], nn.Module]] = {
    "2fc": _two_fc,
    "4conv1fc": _four_conv_one_fc,
}


def _faster_rcnn(
    config: ModelConfig,
    norm: NormConfig,
    evaluation: EvaluationConfig,
    num_labels: int,
    group: Communicator,
) -> FasterRcnn:
    resnet = build_resnet(config, norm_layer(norm, "backbone", group))
    backbone = _NECKS[config.neck](resnet, config, norm_layer(norm, "fpn", group))
    anchors = AnchorGenerator(tuple((size,) for size in config.anchor_sizes), (_ASPECT_RATIOS,) * 5)
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
        _roi_pool(),
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
    return FasterRcnn(backbone, rpn, roi_heads)


def _roi_pool() -> MultiScaleRoIAlign:
    """RoIAlign over levels 0 to 3 with their true strides.

    Left alone, torchvision infers the strides once, from the first batch's unpadded height, and is a factor of
    two off for the whole run where that is under 0.71 of the padded height.
    """
    pool = MultiScaleRoIAlign(featmap_names=["0", "1", "2", "3"], output_size=_ROI_SIZE, sampling_ratio=2)
    pool.scales = [1 / stride for stride in _STRIDES]
    finest, coarsest = (int(math.log2(stride)) for stride in (_STRIDES[0], _STRIDES[-1]))
    pool.map_levels = LevelMapper(finest, coarsest, pool.canonical_scale, pool.canonical_level)
    return pool


def _top_n(training: int) -> dict[str, int]:
    return {"training": training, "testing": max(training // 2, 1)}


_DETECTORS = {"faster_rcnn": _faster_rcnn}


def build_detector(config: Config, *, num_categories: int, group: Communicator, pretrained: bool = True) -> Detector:
    """The detector of a configuration, its weights drawn from config.seed.

    Args:
        config: the run's configuration.
        num_categories: of the data set, background not counted.
        group: ranks that share batch statistics.
        pretrained: load model.backbone_weights; False where a checkpoint brings all weights, and that file may be gone.

    Returns:
        The model in training mode on the CPU, its cross-GPU layers named by their paths.
    """
    parts = config.model if pretrained else dataclasses.replace(config.model, backbone_weights=None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed("weights", config.seed))
        model = _DETECTORS[config.model.detector](parts, config.norm, config.evaluation, num_categories + 1, group)
    if config.norm.parameters == "frozen":
        for parameter in norm_parameters(model):
            parameter.requires_grad_(False)
    name_layers(model)
    return model
