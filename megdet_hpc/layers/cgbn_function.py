"""The statistics of cross-GPU batch normalization over a group of ranks, and their gradient (paper, section 3.3).

Shapes: x (N, C, *) the values of this rank; n, mean, var of each channel over every rank of the group.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megdet_hpc.layers.kernels import LocalBatch, Statistics, dense, vector_type
from megdet_hpc.layers.kernels_cpu import CpuBatch
from megdet_hpc.layers.kernels_cuda import CudaBatch
from megdet_hpc.layers.recompute import Messages
from megdet_hpc.parallel.communicator import Communicator

Exchange = Literal["two_stage", "packed"]


def local_batch(x: Tensor) -> LocalBatch:
    """The values of this rank with the arithmetic of their device.

    Args:
        x: (N, C, *) float32, float64 or bfloat16, on CUDA also float16; dense, without gradient. N may be 0.
    """
    return CudaBatch(x) if x.is_cuda else CpuBatch(x)


def group_statistics(batch: LocalBatch, group: Messages, name: str, exchange: Exchange) -> Statistics:
    """Mean and biased variance of each channel over every rank of the group.

    Each rank counts by its number of values, so uneven and empty batches are exact. E[x^2] - E[x]^2 is never formed, so
    nothing cancels, however large the mean is. Collective of the group; blocks; at size 1 nothing is sent.

    Args:
        batch: values of this rank.
        group: ranks that share statistics. Each rank must call this, even with an empty batch.
        name: name of the layer, with which the messages' names start.
        exchange: two_stage or packed. two_stage is the paper's: one message for the sums, which give the mean, and one
            for the squared deviations from it. packed is for networks of high latency: each rank sends (n, mean, M2) in
            one message, and Chan's formula merges them: M2 = sum_r M2_r + n_r (mean_r - mean)^2 (Chan, Golub, LeVeque
            1979).
    """
    if exchange == "packed":
        return _packed(batch, group, name)
    own_n, own_mean = batch.num_values, batch.own_mean
    message = torch.constant_pad_nd(own_mean * own_n, (0, 1), own_n)
    group.allreduce_sum_(message, name=f"{name}.mean")
    n = message[-1]
    divisor = n.clamp(min=1)
    mean = message[:-1] / divisor
    # sum((x - mean)^2) of this rank, without another pass over its values
    squares = (own_mean - mean).square_().add_(batch.own_var).mul_(own_n)
    group.allreduce_sum_(squares, name=f"{name}.var")
    return batch.statistics(mean, squares / divisor, n)


def _packed(batch: LocalBatch, group: Messages, name: str) -> Statistics:
    channels = len(batch.own_mean)
    own_squares = batch.own_var * batch.num_values
    message = torch.constant_pad_nd(torch.cat([batch.own_mean, own_squares]), (1, 0), batch.num_values)
    # counts (ranks, 1), means and squares (ranks, C)
    counts, means, squares = group.allgather_tensor(message, name=f"{name}.packed").split(
        [1, channels, channels], dim=1
    )
    n = counts.sum()
    divisor = n.clamp(min=1)
    mean = (counts * means).sum(0) / divisor
    var = (squares + counts * (means - mean).square()).sum(0) / divisor
    return batch.statistics(mean, var, n)


class CrossGpuBatchNormFunction(torch.autograd.Function):
    """y = (x - mean) * inv_std * weight + bias, with the group's statistics as functions of x.

    Let g = dy * weight, with sums over the group's n values of a channel. The chain rule through mean and variance
    gives dx = inv_std * (g - sum(g) / n - (x - mean) * inv_std^2 * sum(g * (x - mean)) / n). So the backward pass needs
    one message, of sum(dy) and sum(dy * (x - mean)). The gradients of weight and bias are this rank's part; the
    gradient allreduce adds the parts of all ranks, as for every other parameter.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        batch: LocalBatch,
        stats: Statistics,
        eps: float,
        group: Communicator,
        name: str,
    ) -> Tensor:
        """Normalize x by the statistics that `group_statistics` made of `batch`, which holds the values of x."""
        ctx.save_for_backward(x, weight, (stats.var + eps).rsqrt(), stats.n)
        ctx.centre, ctx.group, ctx.name = stats.centre, group, name
        if x.numel() == 0:
            return torch.zeros_like(x)
        return batch.normalize(stats, weight=weight, bias=bias, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias. Collective of the group; blocks; name NAME.backward."""
        x, weight, inv_std, n = ctx.saved_tensors
        dy = dense(grads[0])
        channels = len(inv_std)
        sums = ctx.centre.gradient_sums(dy, x) if x.numel() else inv_std.new_zeros(2 * channels)
        vector = vector_type(x)
        d_weight = (sums[channels:] * inv_std).to(vector) if ctx.needs_input_grad[1] else None
        d_bias = sums[:channels].to(vector, copy=True) if ctx.needs_input_grad[2] else None
        ctx.group.allreduce_sum_(sums, name=f"{ctx.name}.backward")
        dx = None
        if ctx.needs_input_grad[0] and x.numel():
            weight = None if weight is None else weight.detach()
            dx = ctx.centre.input_gradient(dy, x, weight=weight, inv_std=inv_std, sums=sums, n=n)
        elif ctx.needs_input_grad[0]:
            dx = torch.zeros_like(dy)
        return dx, d_weight, d_bias, None, None, None, None, None
