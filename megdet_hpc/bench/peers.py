"""Batch norm across ranks in a common simple form, for comparison."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as _SyncBatchNormFunction


def _mean_over_ranks(value: Tensor, group: Any) -> Tensor:
    result = value.clone()
    if group is None:
        return result
    dist.all_reduce(result, group=group)
    return result / dist.get_world_size(group)


class _MeanOverRanks(torch.autograd.Function):
    """The mean over the ranks. Its backward pass is the mean of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _mean_over_ranks(value, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _mean_over_ranks(grads[0], ctx.group), None


class OnePassBatchNorm2d(nn.BatchNorm2d):
    """Batch norm from the mean and the mean square, each averaged over the ranks with equal weights.

    Autograd differentiates it. It differs from batch norm on the whole batch in two ways: ranks with fewer values count
    as much as ranks with more, and E[x^2] - E[x]^2 cancels where the mean is large.

    Args:
        num_features: C of the (N, C, H, W) input.
        process_group: process group of torch.distributed; None for this rank alone.
    """

    def __init__(self, num_features: int, *, process_group: Any = None) -> None:
        super().__init__(num_features)
        self.process_group = process_group

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W). In training a collective of the process group, forward and backward."""
        if not self.training:
            return super().forward(input)
        x = input.float()
        moments = torch.cat([x.mean((0, 2, 3)), x.square().mean((0, 2, 3))])
        mean, mean_square = _MeanOverRanks.apply(moments, self.process_group).chunk(2)
        var = mean_square - mean.square()
        if self.running_mean is not None and self.running_var is not None and self.momentum is not None:
            self.running_mean.lerp_(mean.detach(), self.momentum)
            self.running_var.lerp_(var.detach(), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        offset = self.bias - mean * scale
        y = x * scale.view(1, -1, 1, 1) + offset.view(1, -1, 1, 1)
        return y.to(input.dtype)


class AloneSyncBatchNorm(nn.SyncBatchNorm):
    """nn.SyncBatchNorm that uses its synchronizing kernels on one rank too, instead of plain batch norm."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) on CUDA -> (N, C, H, W); needs torch.distributed started."""
        y: Tensor = _SyncBatchNormFunction.apply(
            *(input, self.weight, self.bias, self.running_mean, self.running_var),
            *(self.eps, self.momentum, dist.group.WORLD, dist.get_world_size()),
        )
        return y
