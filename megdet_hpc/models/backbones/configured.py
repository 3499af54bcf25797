"""The backbone of a configuration: its kind of convolution, frozen stages and loaded weights."""

from __future__ import annotations

from megdet_hpc.config import BackboneConfig
from megdet_hpc.layers.norm import NormLayer
from megdet_hpc.models.backbones.base import Backbone
from megdet_hpc.models.backbones.densenet import build_densenet
from megdet_hpc.models.backbones.detnet import build_detnet
from megdet_hpc.models.backbones.peleenet import build_peleenet
from megdet_hpc.models.backbones.resnet import ResNetBackbone, build_resnet
from megdet_hpc.models.weights import find_weights


def build_backbone(config: BackboneConfig, norm: NormLayer | None) -> Backbone:
    """The backbone that a family's keys name.

    Args:
        config: keys of the model.
        norm: constructor of its normalization layers.

    Raises:
        UserError: the file of its weights is missing or another network's.
    """
    backbone = _plain(config, norm)
    if config.conv != "standard":
        backbone.use_convs(config.conv, config.stages_of_conv())
    if config.squeeze_excitation and isinstance(backbone, ResNetBackbone):
        backbone.squeeze()
    backbone.freeze(config.frozen_stages)
    if file := find_weights(config):
        backbone.load(str(file))
    return backbone


def _plain(config: BackboneConfig, norm: NormLayer | None) -> Backbone:
    if config.backbone == "detnet59":
        return build_detnet(norm)
    if config.backbone == "peleenet":
        return build_peleenet(norm, memory_efficient=config.memory_efficient)
    if config.backbone.startswith("densenet"):
        return build_densenet(config.backbone, norm, config.memory_efficient)
    return build_resnet(config.backbone, norm, config.dilated_c5)
