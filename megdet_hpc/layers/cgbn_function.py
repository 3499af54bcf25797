"""The two-stage statistics of cross-GPU batch normalization and their gradient (paper, section 3.3, figure 3).

Shape legend: N images of this rank, C channels, * any spatial axes, n values per channel over the whole group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megdet_hpc.parallel.communicator import Communicator


def per_channel(vector: Tensor, like: Tensor) -> Tensor:
    """View (C,) so that it broadcasts over (N, C, *)."""
    return vector.view(1, -1, *[1] * (like.dim() - 2))


def _sum_per_channel(values: Tensor) -> Tensor:
    """(N, C, *) -> (C,) in float64: a message of a few kilobytes, exact to the last bit of float32."""
    return values.sum([axis for axis in range(values.dim()) if axis != 1]).double()


def group_statistics(x: Tensor, group: Communicator, name: str) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance of each channel over every rank of the group.

    Two messages. First the sums and the count give the mean; then the squared deviations from that mean give
    the variance. Counts weight the ranks, so uneven and empty batches are exact, and since no E[x^2] - E[x]^2
    is formed, nothing cancels however large the mean.

    Args:
        x: (N, C, *) float32 or float64; N may be 0 on some ranks.
        group: ranks that share statistics. Each must call this, also with an empty batch.
        name: of the layer; the messages are `name.mean` and `name.var`.

    Returns:
        mean (C,) and var (C,) in x's type, and n, the number of values per channel over the group.
    """
    count = x.numel() // x.shape[1] if x.shape[1] else 0
    message = torch.cat([_sum_per_channel(x), torch.tensor([count], dtype=torch.float64, device=x.device)])
    group.allreduce_sum_(message, name=f"{name}.mean")
    n = int(message[-1])
    mean = message[:-1] / max(n, 1)
    squares = _sum_per_channel((x - per_channel(mean.to(x.dtype), x)).square_())
    group.allreduce_sum_(squares, name=f"{name}.var")
    return mean.to(x.dtype), (squares / max(n, 1)).to(x.dtype), n


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
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        var: Tensor,
        n: int,
        eps: float,
        group: Communicator,
        name: str,
    ) -> Tensor:
        inv_std = (var + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, inv_std)
        ctx.n, ctx.group, ctx.name = n, group, name
        scale = inv_std * weight
        return (x - per_channel(mean, x)).mul_(per_channel(scale, x)).add_(per_channel(bias, x))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, weight, mean, inv_std = ctx.saved_tensors
        centred = x - per_channel(mean, x)
        sum_dy = _sum_per_channel(dy)
        sum_dy_centred = _sum_per_channel(dy * centred)
        d_weight = (sum_dy_centred * inv_std).to(weight.dtype)
        d_bias = sum_dy.to(weight.dtype)
        message = torch.cat([sum_dy, sum_dy_centred])
        ctx.group.allreduce_sum_(message, name=f"{ctx.name}.backward")
        mean_dy, mean_dy_centred = (message / max(ctx.n, 1)).to(x.dtype).chunk(2)
        slope = mean_dy_centred * inv_std.square()
        dx = (dy - per_channel(mean_dy, x)).sub_(centred.mul_(per_channel(slope, x)))
        dx.mul_(per_channel(inv_std * weight, x))
        return dx, d_weight, d_bias, None, None, None, None, None, None
