"""Normalization layers of a configuration: one factory for backbone, neck and heads."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from megdet_hpc.config import NormConfig
from megdet_hpc.layers.cgbn import CrossGpuBatchNorm2d
from megdet_hpc.parallel.communicator import Communicator

NormLayer = Callable[[int], nn.Module]

# Wu & He, Group Normalization (ECCV 2018), section 3.1: 32 groups. Narrow layers keep 2 or more channels in a group.
_GN_GROUPS = 32


def _group_norm(num_channels: int, eps: float) -> nn.GroupNorm:
    groups = next(g for g in range(min(_GN_GROUPS, max(num_channels // 2, 1)), 0, -1) if num_channels % g == 0)
    return nn.GroupNorm(groups, num_channels, eps=eps)


def norm_layer(config: NormConfig, part: str, group: Communicator) -> NormLayer | None:
    """The constructor of the normalization layers of one part; it takes a number of channels.

    Args:
        config: kind, size and parts.
        part: backbone, fpn or heads.
        group: ranks that share the statistics of cgbn layers.

    Returns:
        The constructor; None where the part has no normalization. A backbone that norm.where leaves out keeps constant
        batch norm, since its weights were trained with it.
    """
    kind = config.kind
    if part not in config.where:
        if part != "backbone":
            return None
        kind = "frozen"
    if kind == "cgbn":
        return lambda channels: CrossGpuBatchNorm2d(
            channels, group=group, eps=config.eps, momentum=config.momentum, exchange=config.exchange
        )
    if kind == "bn":
        return lambda channels: nn.BatchNorm2d(channels, eps=config.eps, momentum=config.momentum)
    if kind == "gn":
        return lambda channels: _group_norm(channels, config.eps)
    return lambda channels: FrozenBatchNorm2d(channels, eps=config.eps)


def norm_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Scales and offsets of all normalization layers of a model."""
    kinds = (nn.BatchNorm2d, nn.GroupNorm)
    return [p for module in model.modules() if isinstance(module, kinds) for p in module.parameters(recurse=False)]
