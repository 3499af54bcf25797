"""The statistics of cross-GPU batch normalization over a group of ranks, and their gradient (paper, section 3.3).

Shape legend: x (N, C, *) this rank's values; n, mean, var of a channel over every rank of the group.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megdet_hpc.layers import kernels
from megdet_hpc.layers.kernels import Centred
from megdet_hpc.parallel.communicator import Communicator

Exchange = Literal["two_stage", "packed"]


def group_statistics(
    x: Tensor, group: Communicator, name: str, exchange: Exchange
) -> tuple[Centred, Tensor, Tensor, Tensor]:
    """Mean and biased variance of each channel over every rank of the group.

    Counts weight the ranks, so uneven and empty batches are exact, and since E[x^2] - E[x]^2 is never formed,
    nothing cancels however large the mean.

    Args:
        x: (N, C, *) float32 or float64, dense; N may be 0 on some ranks.
        group: ranks that share statistics. Each must call this, also with an empty batch.
        name: of the layer; starts the messages' names.
        exchange: two_stage is the paper's: one message for the sums, which give the mean, one for the squared
            deviations from it. packed is one message of (n, mean, M2) per rank, merged by Chan's formula
            (Chan, Golub, LeVeque 1979): M2 = sum_r M2_r + n_r (mean_r - mean)^2; for networks of high latency.

    Returns:
        The centred values; mean (C,) and var (C,), float64; n, a float64 scalar tensor.
    """
    own_mean, own_var = kernels.local_mean(x)
    own_n = kernels.values_per_channel(x)
    if exchange == "packed":
        return _packed(x, own_n, own_mean, own_var, group, name)
    message = torch.cat([own_mean * own_n, own_mean.new_full((1,), own_n)])
    group.allreduce_sum_(message, name=f"{name}.mean")
    n = message[-1]
    mean = message[:-1] / n.clamp(min=1)
    if own_var is None:
        centred, squares = kernels.centre(x, mean)
    else:
        centred = Centred(x, mean.to(torch.float32))
        squares = own_n * (own_var + (own_mean - mean).square())
    group.allreduce_sum_(squares, name=f"{name}.var")
    return centred, mean, squares / n.clamp(min=1), n


def _packed(
    x: Tensor, own_n: int, own_mean: Tensor, own_var: Tensor | None, group: Communicator, name: str
) -> tuple[Centred, Tensor, Tensor, Tensor]:
    if own_var is None:
        centred, squares = kernels.centre(x, own_mean)
    else:
        centred, squares = Centred(x, own_mean), own_n * own_var
    message = torch.cat([own_mean.new_full((1,), own_n), own_mean, squares])
    counts, means, parts = group.allgather_tensor(message, name=f"{name}.packed").split([1, *[x.shape[1]] * 2], dim=1)
    n = counts.sum()  # counts (ranks, 1), means and parts (ranks, C)
    mean = (counts * means).sum(0) / n.clamp(min=1)
    var = (parts + counts * (means - mean).square()).sum(0) / n.clamp(min=1)
    # the base already lacks this rank's own mean (CPU) or nothing (CUDA)
    shift = mean - own_mean if own_var is None else mean
    return Centred(centred.base, shift.to(torch.float32 if own_var is not None else x.dtype)), mean, var, n


class CrossGpuBatchNormFunction(torch.autograd.Function):
    """y = (x - mean) * inv_std * weight + bias, with the group's statistics as functions of x.

    With g = dy * weight and sums over the group's n values of a channel, the chain rule through mean and
    variance gives dx = inv_std * (g - sum(g) / n - (x - mean) * inv_std^2 * sum(g * (x - mean)) / n):
    backward needs one message, of sum(dy) and sum(dy * (x - mean)). The gradients of weight and bias are this
    rank's part only; the gradient allreduce adds the ranks' parts, as for every other parameter.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        centred: Centred,
        var: Tensor,
        n: Tensor,
        eps: float,
        group: Communicator,
        name: str,
    ) -> Tensor:
        """x is the input that the gradient belongs to; its values come from `centred`."""
        var = var.to(centred.shift.dtype)
        ctx.save_for_backward(centred.base, centred.shift, weight, (var + eps).rsqrt(), n)
        ctx.group, ctx.name = group, name
        return kernels.normalize(centred, var, weight, bias, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        base, shift, weight, inv_std, n = ctx.saved_tensors
        dy = kernels.dense(grads[0])
        x = Centred(base, shift)
        sum_dy, sum_dy_centred = kernels.gradient_sums(dy, x)
        d_weight = (sum_dy_centred * inv_std).to(inv_std.dtype) if ctx.needs_input_grad[1] else None
        d_bias = sum_dy.to(inv_std.dtype) if ctx.needs_input_grad[2] else None
        message = torch.cat([sum_dy, sum_dy_centred])
        ctx.group.allreduce_sum_(message, name=f"{ctx.name}.backward")
        dx = None
        if ctx.needs_input_grad[0]:
            scale = torch.ones_like(inv_std) if weight is None else weight
            group_dy, group_dy_centred = message.chunk(2)
            dx = kernels.input_gradient(dy, x, scale, inv_std, group_dy, group_dy_centred, n)
        return dx, d_weight, d_bias, None, None, None, None, None, None
