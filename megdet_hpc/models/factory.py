"""Detectors built from a configuration: each family is one entry of one table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megdet_hpc.config import Config, EvaluationConfig, NormConfig
from megdet_hpc.data.categories import Categories
from megdet_hpc.errors import UserError
from megdet_hpc.layers.cgbn import name_layers, share_out
from megdet_hpc.layers.norm import norm_parameters
from megdet_hpc.models.detector import Detector
from megdet_hpc.models.detectors.cascade_rcnn import build_cascade_rcnn
from megdet_hpc.models.detectors.dsod import build_dsod
from megdet_hpc.models.detectors.faster_rcnn import build_faster_rcnn
from megdet_hpc.models.detectors.mask_rcnn import build_mask_rcnn
from megdet_hpc.models.detectors.pelee import build_pelee
from megdet_hpc.models.detectors.retinanet import build_retinanet
from megdet_hpc.models.detectors.scratchdet import build_scratchdet
from megdet_hpc.models.transfer import Transfer, read_source, transfer
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.seeds import derived_seed

Build = Callable[[Any, NormConfig, EvaluationConfig, int, Communicator], Detector]
BUILDERS: dict[str, Build] = {
    "faster_rcnn": build_faster_rcnn,
    "mask_rcnn": build_mask_rcnn,
    "cascade_rcnn": build_cascade_rcnn,
    "cascade_mask_rcnn": build_cascade_rcnn,
    "retinanet": build_retinanet,
    "scratchdet": build_scratchdet,
    "pelee": build_pelee,
    "dsod": build_dsod,
}
"""Builders by family. Each takes the family's keys, those of normalization and evaluation, the number of labels and the
BN group."""


def build_detector(config: Config, *, num_categories: int, group: Communicator, pretrained: bool = True) -> Detector:
    """The detector of a configuration, its weights drawn from config.seed.

    Args:
        config: configuration of the run.
        num_categories: categories of the data set, without background.
        group: ranks that share batch statistics.
        pretrained: load model.backbone_weights. False: a checkpoint brings all weights, and that file may be gone.

    Returns:
        The model in training mode on the CPU, its cross-GPU layers named by their paths.
    """
    parts = config.model if pretrained else dataclasses.replace(config.model, backbone_weights=None, weights=None)
    limits = config.evaluation.of_detector()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed("weights", config.seed))
        model = BUILDERS[config.model.detector](parts, config.norm, limits, num_categories + 1, group)
    if config.norm.parameters == "frozen":
        for parameter in norm_parameters(model):
            parameter.requires_grad_(False)
    if config.model.memory_format == "channels_last":
        model.memory_format = torch.channels_last
    name_layers(model)
    if config.norm.kind == "cgbn":
        share_out(model, config.norm.images(config.data.images_per_rank), config.data.images_per_rank)
    return model


def restored_detector(
    config: Config, weights: dict[str, Tensor], source: str, *, num_categories: int, group: Communicator
) -> Detector:
    """The detector of a configuration with the weights of a checkpoint.

    Args:
        config: configuration of the checkpoint.
        weights: its state dict.
        source: name of the checkpoint in messages.
        num_categories: categories that it was trained on, without background.
        group: ranks that share batch statistics.

    Raises:
        UserError: the weights are another model's.
    """
    model = build_detector(config, num_categories=num_categories, group=group, pretrained=False)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"checkpoint {source} does not fit the configured model: {str(error)[:500]}") from error
    return model


def first_detector(config: Config, categories: Categories, group: Communicator) -> tuple[Detector, Transfer | None]:
    """The detector with which a run begins, and what it took from model.weights, if that names a file.

    Args:
        config: configuration of the run.
        categories: categories of the data set.
        group: ranks that share batch statistics.

    Raises:
        UserError: a file of weights is missing, damaged or another detector's.
    """
    model = build_detector(config, num_categories=len(categories), group=group)
    if not config.model.weights:
        return model, None
    return model, transfer(model, read_source(Path(config.model.weights)), categories.names)
