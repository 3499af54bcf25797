"""Normalization layers of a configuration: one factory for backbone, neck and heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from megdet_hpc.config import NormConfig
from megdet_hpc.errors import UserError
from megdet_hpc.layers.cgbn import CrossGpuBatchNorm2d
from megdet_hpc.layers.frozen import FrozenNorm
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
        part: backbone, fpn, rpn or heads.
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
    return lambda channels: FrozenNorm(channels, eps=config.eps)


class LevelNorms(nn.ModuleList):
    """Batch normalization behind a convolution that all levels of a pyramid share: one layer for each level.

    Levels have other statistics, and a layer that mixed them in its running statistics would normalize otherwise in
    evaluation than in training (Wu and Johnson, Rethinking "Batch" in BatchNorm, arXiv 2105.07576, section 5.2). Scale
    and offset are each level's own, as in MMDetection's RetinaSepBNHead.

    A pass calls the module once for each level, in their order. `count_levels` starts anew in each pass.
    """

    position = 0

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, H, W) of the next level -> the same shape.

        Raises:
            UserError: the level has one value in all, whose variance is undefined.
        """
        level, self.position = self.position, self.position + 1
        try:
            normalized: Tensor = self[level](features)
        except ValueError as error:
            height, width = features.shape[2:]
            raise UserError(
                f"norm.where has a head that all levels share; level {level + 1} of {len(self)} is {height} x {width} "
                f"cells of {len(features)} image(s): {error}; give larger images or more of them, or norm.kind gn"
            ) from error
        return normalized


def level_norms(make: NormLayer, num_levels: int) -> NormLayer:
    """The constructor of a shared head's normalization layers; `count_levels` must know the head.

    Args:
        make: constructor of one layer.
        num_levels: levels that share the head.

    Returns:
        A constructor of LevelNorms. It is `make` itself where layers have no statistics of batches.
    """
    # constant statistics are those of a detector that was trained with batches'
    if not isinstance(make(1), (nn.BatchNorm2d, FrozenNorm)):
        return make
    return lambda channels: LevelNorms(make(channels) for _ in range(num_levels))


def count_levels(head: nn.Module) -> None:
    """Let the LevelNorms in a head begin with the first level in each pass. The head is changed in place."""
    head.register_forward_pre_hook(_first_level)


def _first_level(head: nn.Module, _inputs: Any) -> None:
    for module in head.modules():
        if isinstance(module, LevelNorms):
            module.position = 0


def norm_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Scales and offsets of all normalization layers of a model."""
    kinds = (nn.BatchNorm2d, nn.GroupNorm)
    return [p for module in model.modules() if isinstance(module, kinds) for p in module.parameters(recurse=False)]
