"""The local arithmetic of cross-GPU batch normalization: the fewest passes that torch's own operators allow.

Shape legend: x, dy (N, C, *); vectors (C,). Sums leave here in float64, which costs a few kilobytes a message.

CPU. torch's training batch norm spends most of its time in its statistics, so they are made of other operators:
one `sum` gives the mean; one subtraction gives c = x - mean; one reduction gives sum(c^2), namely the weight
gradient that batch norm's *evaluation* backward defines, sum(dy * (x - running_mean)) / sqrt(running_var + eps), at
dy = x = c, running_mean 0, running_var 1, eps 0. Its forward and backward in evaluation form also normalize in one
pass and make the two sums of the backward in one pass. c is kept instead of x, so nothing is subtracted twice and
nothing cancels, however large the mean.

CUDA. The fused kernels behind nn.SyncBatchNorm read x once: `batch_norm_stats` gives the local mean and variance,
and sum((x - m)^2) = M2 + n (m_local - m)^2 gives the second stage without another pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_batch_norm = torch.ops.aten.native_batch_norm.default
_batch_norm_backward = torch.ops.aten.native_batch_norm_backward.default


@dataclass(frozen=True)
class Centred:
    """A tensor from which the group's mean has been, or still has to be, subtracted.

    Attributes:
        base: (N, C, *).
        shift: (C,); the centred values are base - shift.
    """

    base: Tensor
    shift: Tensor


def dense(x: Tensor) -> Tensor:
    """x itself if it is contiguous or channels_last, else a contiguous copy: the kernels need one of both."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def values_per_channel(x: Tensor) -> int:
    """Elements of x divided by its channels."""
    return x.numel() // x.shape[1] if x.shape[1] else 0


def _constants(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])


def local_mean(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """This rank's mean, and on CUDA its variance, which the same pass gives.

    Returns:
        mean (C,) float64; 0 for an empty batch. variance (C,) float64, biased, or None where it needs a pass.
    """
    n = values_per_channel(x)
    if n == 0:
        zero = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
        return zero, zero
    if x.is_cuda:
        mean, inv_std = torch.batch_norm_stats(x, 0.0)
        return mean.double(), inv_std.double().pow_(-2)  # a constant channel: 1 / infinity^2 = 0
    axes = [axis for axis in range(x.dim()) if axis != 1]
    return x.sum(axes).double() / n, None


def centre(x: Tensor, mean: Tensor) -> tuple[Centred, Tensor]:
    """Subtract a mean on the CPU and sum the squares.

    Args:
        x: (N, C, *).
        mean: (C,) float64.

    Returns:
        x - mean, and sum((x - mean)^2) per channel, (C,) float64.
    """
    zero, one = _constants(x)
    base = x - mean.to(x.dtype).view(1, -1, *[1] * (x.dim() - 2))
    if base.numel() == 0:
        return Centred(base, zero), zero.double()
    squares = _batch_norm_backward(base, base, None, zero, one, None, None, False, 0.0, [False, True, False])[1]
    return Centred(base, zero), squares.double()


def normalize(x: Centred, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias in one pass; (N, C, *)."""
    if x.base.numel() == 0:
        return torch.zeros_like(x.base)
    if x.base.is_cuda:
        return torch.batch_norm_elemt(x.base, weight, bias, x.shift, (var + eps).rsqrt(), eps)
    y: Tensor = _batch_norm(x.base, weight, bias, x.shift, var, False, 0.0, eps)[0]
    return y


def gradient_sums(dy: Tensor, x: Centred) -> tuple[Tensor, Tensor]:
    """sum(dy) and sum(dy * (x - mean)) per channel in one pass; (C,) float64 each."""
    zero, one = torch.zeros_like(x.shift), torch.ones_like(x.shift)
    if dy.numel() == 0:
        return zero.double(), zero.double()
    if dy.is_cuda:
        sum_dy, sum_dy_centred, _, _ = torch.batch_norm_backward_reduce(
            dy, x.base, x.shift, one, None, True, False, False
        )
        return sum_dy.double(), sum_dy_centred.double()
    mask = [False, True, True]
    _, sum_dy_centred, sum_dy = _batch_norm_backward(dy, x.base, None, x.shift, one, None, None, False, 0.0, mask)
    return sum_dy.double(), sum_dy_centred.double()


def input_gradient(
    dy: Tensor, x: Centred, weight: Tensor, inv_std: Tensor, sum_dy: Tensor, sum_dy_centred: Tensor, n: Tensor
) -> Tensor:
    """weight * inv_std * (dy - sum_dy / n - (x - mean) * inv_std^2 * sum_dy_centred / n); (N, C, *).

    Args:
        dy, x: as in the forward.
        weight, inv_std: (C,).
        sum_dy, sum_dy_centred: (C,) float64, over the group.
        n: values per channel over the group, a float64 scalar tensor.
    """
    if dy.numel() == 0:
        return torch.zeros_like(dy)
    if dy.is_cuda:
        sums = (sum_dy.to(inv_std.dtype), sum_dy_centred.to(inv_std.dtype))
        counts = n.to(torch.int32).view(1)
        return torch.batch_norm_backward_elemt(dy, x.base, x.shift, inv_std, weight, *sums, counts)
    zero, one = _constants(dy)
    scale = weight * inv_std
    slope = scale * inv_std.square() * (sum_dy_centred / n).to(scale.dtype)
    constant = slope * x.shift - scale * (sum_dy / n).to(scale.dtype)
    dx: Tensor = _batch_norm(dy, scale, constant, zero, one, False, 0.0, 0.0)[0]
    return dx.addcmul_(x.base, slope.neg_().view(1, -1, *[1] * (dy.dim() - 2)))
