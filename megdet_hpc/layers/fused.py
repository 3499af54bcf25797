"""Cross-GPU batch normalization on CUDA in one message: nn.SyncBatchNorm's kernels from end to end.

The forward pass is `batch_norm_stats`, one allgather of (mean, 1 / sqrt(var + eps), n) in float32,
`batch_norm_gather_stats_with_counts`, which moves the running statistics too, and `batch_norm_elemt`. The backward pass
is `batch_norm_backward_reduce`, one allreduce and `batch_norm_backward_elemt`. In three things it differs from
nn.SyncBatchNorm: the host does not wait to find out which ranks are empty, the mean keeps its digits where it is large,
and a layer that runs again for activation checkpointing sends nothing.

Shapes: x, dy (N, C, *); P ranks of the group; a row (2C + 1,): C means, C inverse deviations and the count of a rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megdet_hpc.layers.kernels import dense, values_per_channel, vector_type
from megdet_hpc.parallel.communicator import Communicator

_NOTHING = 1e-30
"""Count of a rank without values. With 0 torch's kernel divides 0 by 0 where such a rank comes first, so
nn.SyncBatchNorm leaves these rows out, for which the host waits. This count loses itself in rounding: the kernel's own
sum of counts is whole, and a row of mean 0 adds 1e-30 of its square."""


@dataclass(frozen=True)
class FusedStatistics:
    """The statistics of each channel over a group, as the kernels take them.

    Attributes:
        mean, inv_std: (C,) float32; float64 if x is float64.
        counts: (P,) int32, values per channel of each rank.
    """

    mean: Tensor
    inv_std: Tensor
    counts: Tensor


def has_kernels(x: Tensor) -> bool:
    """Whether x is where the kernels are."""
    return x.is_cuda


def own_row(x: Tensor, eps: float) -> Tensor:
    """What this rank sends: mean, 1 / sqrt(var + eps) and number of its values; (2C + 1,).

    Args:
        x: dense values; may be empty.
        eps: the layer's. A constant channel then has a finite inverse deviation.
    """
    if not x.numel():
        row = torch.ones(2 * x.shape[1] + 1, dtype=vector_type(x), device=x.device)
        row[: x.shape[1]], row[-1] = 0, _NOTHING
        return row
    mean, inv_std = torch.batch_norm_stats(input=x, eps=eps)
    return torch.cat([mean, inv_std, mean.new_full((1,), values_per_channel(x))])


def merged(rows: Tensor, eps: float, running: tuple[Tensor, Tensor] | None, momentum: float) -> FusedStatistics:
    """The statistics of the group from the rows of its ranks. Nothing waits for the GPU.

    The kernel adds up means in float32. At mean 1e4 and deviation 1 a simulation of it was wrong by 6e-3 on 128 ranks.
    So all means are taken about the first rank's, which leaves the one rounding of the result.

    Args:
        rows: (P, 2C + 1), `own_row` of each rank. The group has no value per channel, or two or more.
        eps: the layer's.
        running: running mean and variance, moved in place; None: they stay.
        momentum: weight of this batch in them.
    """
    channels = rows.shape[1] // 2
    means, inv_stds, counts = rows[:, :channels], rows[:, channels:-1], rows[:, -1]
    first = means[0]
    about, var = (running[0] - first, running[1]) if running else (None, None)
    # the kernel asks its first argument for the type alone: that of counts, where there are no running statistics
    mean, inv_std = torch.batch_norm_gather_stats_with_counts(
        means, means - first, inv_stds, about, var, momentum, eps, counts
    )
    if running and about is not None:
        torch.add(about, first, out=running[0])
    return FusedStatistics(mean + first, inv_std, counts.to(torch.int32))


class FusedBatchNormFunction(torch.autograd.Function):
    """The same function as `CrossGpuBatchNormFunction`, with its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        stats: FusedStatistics,
        eps: float,
        group: Communicator,
        name: str,
    ) -> Tensor:
        """Normalize x by the group's statistics; (N, C, *)."""
        ctx.save_for_backward(x, weight, stats.mean, stats.inv_std, stats.counts)
        ctx.group, ctx.name = group, name
        if not x.numel():
            return torch.zeros_like(x)
        return torch.batch_norm_elemt(input=x, weight=weight, bias=bias, mean=stats.mean, invstd=stats.inv_std, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias. Collective of the group; blocks; name NAME.backward."""
        x, weight, mean, inv_std, counts = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dy = dense(grads[0])
        if x.numel():
            sum_dy, sum_dy_c, d_weight, d_bias = torch.batch_norm_backward_reduce(
                grad_out=dy,
                input=x,
                mean=mean,
                invstd=inv_std,
                weight=weight,
                input_g=True,
                weight_g=needs_weight,
                bias_g=needs_bias,
            )
            message = torch.cat([sum_dy, sum_dy_c])
        else:
            message = mean.new_zeros(2 * len(mean))
            d_weight, d_bias = torch.zeros_like(mean), torch.zeros_like(mean)
        ctx.group.allreduce_sum_(message, name=f"{ctx.name}.backward")
        dx = None
        if needs_x and x.numel():
            sum_dy, sum_dy_c = message.chunk(2)
            dx = torch.batch_norm_backward_elemt(
                grad_out=dy,
                input=x,
                mean=mean,
                invstd=inv_std,
                weight=weight,
                sum_dy=sum_dy,
                sum_dy_xmu=sum_dy_c,
                count=counts,
            )
        elif needs_x:
            dx = torch.zeros_like(dy)
        return dx, d_weight if needs_weight else None, d_bias if needs_bias else None, None, None, None, None
