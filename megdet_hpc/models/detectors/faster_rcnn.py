"""Faster R-CNN (Ren et al., NeurIPS 2015) with an FPN, from torchvision's parts."""

from __future__ import annotations

from torch import nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor

from megdet_hpc.config import EvaluationConfig, NormConfig, TwoStageConfig
from megdet_hpc.layers.norm import norm_layer
from megdet_hpc.models.heads.boxes import BOX_HEADS, RegionHeads, build_roi_heads, roi_pool
from megdet_hpc.models.losses import Number
from megdet_hpc.models.sampling import SeededSampler
from megdet_hpc.models.two_stage import TwoStage, build_trunk
from megdet_hpc.parallel.communicator import Communicator


class FasterRcnn(TwoStage):
    """The two-stage detector. Its state dict has the keys of torchvision's FasterRCNN.

    Args:
        backbone: backbone with the levels of its FPN.
        rpn, roi_heads: torchvision's parts; both samplers are `SeededSampler`.
        large_kernels: see `TwoStage`.
    """

    roi_heads: RegionHeads

    def region_samplers(self) -> list[SeededSampler]:
        return [self.roi_heads.fg_bg_sampler]

    def region_count(self, loss: str) -> Number:
        return self.region_samplers()[0].num_sampled

    def box_stages(self) -> list[nn.Module]:
        return [self.roi_heads]

    def class_layers(self) -> dict[str, tuple[int, int]]:
        boxes = {"roi_heads.box_predictor.cls_score": (1, 1), "roi_heads.box_predictor.bbox_pred": (1, 4)}
        return boxes | super().class_layers()


def build_faster_rcnn(
    config: TwoStageConfig,
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
    pyramid, rpn, large_kernels = build_trunk(config, norm, group)
    parts = (
        roi_pool(pyramid.of_regions, config),
        BOX_HEADS[config.box_head](config, norm_layer(norm, "heads", group)),
        FastRCNNPredictor(config.box_head_channels, num_labels),
    )
    return FasterRcnn(pyramid, rpn, build_roi_heads(config, evaluation, parts), large_kernels)
