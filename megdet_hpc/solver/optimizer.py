"""The optimizer of a configuration."""

from __future__ import annotations

import torch
from torch import nn

from megdet_hpc.config import SolverConfig


def build_optimizer(model: nn.Module, config: SolverConfig) -> torch.optim.Optimizer:
    """SGD with momentum over the trained parameters; the loop sets the rate before each step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.SGD(trained, lr=0.0, momentum=config.momentum, weight_decay=config.weight_decay)
