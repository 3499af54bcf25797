"""Cascade R-CNN (Cai and Vasconcelos, CVPR 2018) with an FPN, with or without masks."""

from __future__ import annotations

from torch import nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor

from megdet_hpc.config import CascadeMaskRcnnConfig, CascadeRcnnConfig, EvaluationConfig, NormConfig
from megdet_hpc.layers.norm import norm_layer
from megdet_hpc.models.heads.boxes import BOX_HEADS, build_roi_heads, roi_pool
from megdet_hpc.models.heads.cascade import CascadeHeads
from megdet_hpc.models.heads.masks import add_mask_branch
from megdet_hpc.models.losses import Number
from megdet_hpc.models.sampling import SeededSampler
from megdet_hpc.models.two_stage import TwoStage, build_trunk
from megdet_hpc.parallel.communicator import Communicator


class CascadeRcnn(TwoStage):
    """The detector whose stages each train on the boxes of the stage before.

    Each stage's losses are means over the regions that all ranks sampled for it. The loss of masks is the mean over the
    first stage's regions with an object.
    """

    roi_heads: CascadeHeads

    def region_samplers(self) -> list[SeededSampler]:
        return [stage.fg_bg_sampler for stage in self.roi_heads.each]

    def region_count(self, loss: str) -> Number:
        if loss == "loss_mask":
            return self.region_samplers()[0].num_positive
        stage = int(loss.rpartition("_")[2])
        return self.region_samplers()[stage - 1].num_sampled

    def box_stages(self) -> list[nn.Module]:
        return list(self.roi_heads.each)

    def class_layers(self) -> dict[str, tuple[int, int]]:
        stages = range(len(self.roi_heads.stages))
        return {f"roi_heads.stages.{i}.box_predictor.cls_score": (1, 1) for i in stages} | super().class_layers()


def stage_box_weights(number: int) -> tuple[float, float, float, float]:
    """Factors of the differences of x, y, width and height in a stage, counted from 1.

    MMDetection's configuration has 10 and 5, 20 and 10, 30 and 15 for three stages; the fourth goes on like that.
    """
    return 10.0 * number, 10.0 * number, 5.0 * number, 5.0 * number


def stage_loss_weight(number: int) -> float:
    """Weight of a stage's losses, counted from 1: 1, 0.5, 0.25 as in MMDetection's configuration, and so on."""
    return 0.5 ** (number - 1)


def build_cascade_rcnn(
    config: CascadeRcnnConfig, norm: NormConfig, evaluation: EvaluationConfig, num_labels: int, group: Communicator
) -> CascadeRcnn:
    """The detector of a configuration.

    Args:
        config: keys of the model; those of CascadeMaskRcnnConfig give it masks.
        norm: kind and parts of the normalization layers.
        evaluation: limits of the boxes that are kept.
        num_labels: number of categories, the background included.
        group: ranks that share batch statistics.
    """
    pyramid, rpn, large_kernels = build_trunk(config, norm, group)
    head_norm, levels = norm_layer(norm, "heads", group), pyramid.of_regions
    pool, stages = roi_pool(levels, config), []
    for number, iou in enumerate(config.stage_ious, start=1):
        predictor = FastRCNNPredictor(config.box_head_channels, num_labels)
        predictor.bbox_pred = nn.Linear(config.box_head_channels, 4)
        parts = (pool, BOX_HEADS[config.box_head](config, head_norm), predictor)
        weights = stage_box_weights(number)
        stages.append(build_roi_heads(config, evaluation, parts, iou=iou, box_weights=weights, salt=f"roi.{number}"))
    heads = CascadeHeads(stages, [stage_loss_weight(number) for number in range(1, len(stages) + 1)])
    if isinstance(config, CascadeMaskRcnnConfig):
        add_mask_branch(heads, levels, config, num_labels, head_norm)
    return CascadeRcnn(pyramid, rpn, heads, large_kernels)
