"""ScratchDet (Zhu et al., CVPR 2019): SSD on a Root-ResNet, trained from random weights with normalization."""

from __future__ import annotations

from torch import Tensor

from megdet_hpc.config import EvaluationConfig, NormConfig, ScratchDetConfig
from megdet_hpc.layers.norm import norm_layer
from megdet_hpc.models.backbones.base import Backbone
from megdet_hpc.models.backbones.root_resnet import build_root_resnet
from megdet_hpc.models.ssd import SSD300_RATIOS, Ssd, SsdFeatures, build_ssd
from megdet_hpc.parallel.communicator import Communicator


class ScratchDetFeatures(SsdFeatures):
    """The levels of a Root-ResNet, as they are: ScratchDet has no L2 normalization on the first.

    Args:
        body: backbone with six levels.
    """

    def __init__(self, body: Backbone) -> None:
        super().__init__()
        self.body = body
        self.channels = tuple(stage.channels for stage in body.stages)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        return list(self.body(pixels).values())


def build_scratchdet(
    config: ScratchDetConfig, norm: NormConfig, evaluation: EvaluationConfig, num_labels: int, group: Communicator
) -> Ssd:
    """The detector of a configuration.

    Args:
        config: keys of the model.
        norm: kind and parts of the normalization layers.
        evaluation: limits of the boxes that are kept.
        num_labels: number of categories, the background included.
        group: ranks that share batch statistics.
    """
    make = norm_layer(norm, "backbone", group)
    body = build_root_resnet(config.backbone, make, config.root, config.block_order, config.root_channels)
    return build_ssd(ScratchDetFeatures(body), SSD300_RATIOS, config, norm, evaluation, num_labels, group)
