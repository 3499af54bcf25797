"""The statistics of cross-GPU batch normalization over a group of ranks, and their gradient (paper, section 3.3).

Shapes: x (N, C, *) the values of this rank; n, mean, var of each channel over every rank of the group.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megdet_hpc.layers.kernels import LocalBatch, Statistics, dense, vector_type
from megdet_hpc.layers.kernels_cpu import CpuBatch, HalfBatch
from megdet_hpc.layers.kernels_cuda import CudaBatch
from megdet_hpc.layers.recompute import Messages
from megdet_hpc.parallel.communicator import Communicator

Exchange = Literal["two_stage", "packed"]


def local_batch(x: Tensor) -> LocalBatch:
    """The values of this rank with the arithmetic of their device.

    Args:
        x: (N, C, *) float32, float64 or bfloat16, on CUDA also float16; dense, without gradient. N may be 0.
    """
    if x.is_cuda:
        return CudaBatch(x)
    return HalfBatch(x) if x.dtype == torch.bfloat16 else CpuBatch(x)


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
    message = torch.constant_pad_nd(batch.sums, (0, 1), batch.num_values)
    group.allreduce_sum_(message, name=f"{name}.mean")
    n = message[-1]
    mean = message[:-1] / n.clamp(min=1)
    second_sums = batch.second_sums(mean)
    group.allreduce_sum_(second_sums, name=f"{name}.var")
    return batch.two_stage(mean, second_sums, n)


def _packed(batch: LocalBatch, group: Messages, name: str) -> Statistics:
    own_mean, own_squares = batch.moments()
    channels = len(own_mean)
    message = torch.constant_pad_nd(torch.cat([own_mean, own_squares]), (1, 0), batch.num_values)
    # counts (ranks, 1), means and squares (ranks, C)
    counts, means, squares = group.allgather_tensor(message, name=f"{name}.packed").split(
        [1, channels, channels], dim=1
    )
    n = counts.sum()
    mean = (counts * means).sum(0) / n.clamp(min=1)
    var = (squares + counts * (means - mean).square()).sum(0) / n.clamp(min=1)
    return batch.packed(mean, var, n)


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
        if x.numel():
            sum_dy, sum_dy_c = ctx.centre.gradient_sums(dy, x)
        else:
            sum_dy = sum_dy_c = torch.zeros_like(inv_std)
        vector = vector_type(x)
        d_weight = (sum_dy_c * inv_std).to(vector) if ctx.needs_input_grad[1] else None
        d_bias = sum_dy.to(vector) if ctx.needs_input_grad[2] else None
        message = torch.cat([sum_dy, sum_dy_c])
        ctx.group.allreduce_sum_(message, name=f"{ctx.name}.backward")
        dx = None
        if ctx.needs_input_grad[0] and x.numel():
            group_dy, group_dy_c = message.chunk(2)
            dx = ctx.centre.input_gradient(
                dy, x, weight=weight, inv_std=inv_std, sum_dy=group_dy, sum_dy_c=group_dy_c, n=n
            )
        elif ctx.needs_input_grad[0]:
            dx = torch.zeros_like(dy)
        return dx, d_weight, d_bias, None, None, None, None, None
