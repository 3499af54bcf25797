"""The optimizer of a configuration."""

from __future__ import annotations

import torch
from torch import nn

from megdet_hpc.config import SolverConfig
from megdet_hpc.models.norm import norm_parameters


def build_optimizer(model: nn.Module, config: SolverConfig, *, decay_norm: bool) -> torch.optim.Optimizer:
    """SGD with momentum over the trained parameters; the loop sets the rate before each step.

    Args:
        model: parameters with requires_grad are trained.
        config: momentum and weight decay.
        decay_norm: whether the decay also pulls the normalization layers' scales and offsets to 0.
    """
    norm = {id(parameter) for parameter in norm_parameters(model)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in norm], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if id(p) in norm], "weight_decay": config.weight_decay if decay_norm else 0.0},
    ]
    return torch.optim.SGD([group for group in groups if group["params"]], lr=0.0, momentum=config.momentum)
