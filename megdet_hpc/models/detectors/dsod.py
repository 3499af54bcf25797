"""DSOD (Shen et al., ICCV 2017): SSD's heads on dense blocks, trained from scratch."""

from __future__ import annotations

from megdet_hpc.config import DsodConfig, EvaluationConfig, NormConfig
from megdet_hpc.layers.norm import norm_layer
from megdet_hpc.models.backbones.dsod import DsodFeatures
from megdet_hpc.models.ssd import SSD300_RATIOS, Ssd, build_ssd
from megdet_hpc.parallel.communicator import Communicator


def build_dsod(
    config: DsodConfig, norm: NormConfig, evaluation: EvaluationConfig, num_labels: int, group: Communicator
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
    assert make is not None  # the backbone always has some kind
    return build_ssd(DsodFeatures(config, make), SSD300_RATIOS, config, norm, evaluation, num_labels, group)
