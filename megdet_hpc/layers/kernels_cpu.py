"""The arithmetic of cross-GPU batch normalization on CPUs, from torch's operators for batch norm in *evaluation* mode.

docs/cgbn.md ("Which operators, and why") derives the sums. Everywhere x - mean is (x - origin) - shift.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from megdet_hpc.layers.kernels import MomentBatch, Statistics, sum_per_channel, values_per_channel, vector_type

NEAR = 4.0  # |mean| / standard deviation up to which x itself may be summed and scaled

_batch_norm = torch.ops.aten.native_batch_norm.default
_batch_norm_out = torch.ops.aten.native_batch_norm.out
_batch_norm_backward = torch.ops.aten.native_batch_norm_backward.default


def _per_channel(vector: Tensor, x: Tensor) -> Tensor:
    """A vector (C,) as (C, 1, 1), which broadcasts along N."""
    return vector.view(-1, *[1] * (x.dim() - 2))


def _scaled(
    x: Tensor, *, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float = 0.0
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias; (N, C, *)."""
    found = _batch_norm(
        input=x,
        weight=weight,
        bias=bias,
        running_mean=mean,
        running_var=var,
        training=False,
        momentum=0.0,
        eps=eps,
    )
    return cast(Tensor, found[0])


def _scaled_in_place(
    x: Tensor, *, weight: Tensor | None, bias: Tensor | None, var: Tensor, mean: Tensor, eps: float = 0.0
) -> Tensor:
    """The same as `_scaled`, written over x: new pages of memory cost more than the arithmetic."""
    unused = x.new_empty(0)
    _batch_norm_out(
        input=x,
        weight=weight,
        bias=bias,
        running_mean=mean,
        running_var=var,
        training=False,
        momentum=0.0,
        eps=eps,
        out=x,
        save_mean=unused,
        save_invstd=unused,
    )
    return x


def _sums_of_products(dy: Tensor, x: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """sum(dy) and sum(dy * (x - place)) in one pass; (C,) float64 each."""
    _, products, sums = _batch_norm_backward(
        grad_out=dy,
        input=x,
        weight=torch.ones_like(place),  # its type is that of the sums
        running_mean=place,
        running_var=torch.ones_like(place),
        save_mean=None,
        save_invstd=None,
        train=False,
        eps=0.0,
        output_mask=[False, True, True],
    )
    return sums.double(), products.double()


@dataclass(frozen=True)
class CpuCentre:
    """The mean as the sum of two numbers, since one float32 number cannot hold it.

    Attributes:
        origin: number near the mean, (C,) in the type of x.
        shift: mean minus origin, (C,) in the type of x.
        near: whether the mean of every channel is so near 0 that x - origin is not needed.
    """

    origin: Tensor
    shift: Tensor
    near: bool

    def gradient_sums(self, dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """sum(dy) and sum(dy * (x - mean)) of this rank, in one pass; (C,) float64 each."""
        sum_dy, sum_dy_c = _sums_of_products(dy, x, self.origin)
        return sum_dy, sum_dy_c - self.shift * sum_dy

    def input_gradient(
        self,
        dy: Tensor,
        x: Tensor,
        *,
        weight: Tensor | None,
        inv_std: Tensor,
        sum_dy: Tensor,
        sum_dy_c: Tensor,
        n: Tensor,
    ) -> Tensor:
        """The gradient of x as scale * dy + slope * (x - origin) + constant, in two passes (see `Centre`)."""
        scale = inv_std if weight is None else weight * inv_std
        slope = scale * inv_std.square() * sum_dy_c / n
        constant = slope * self.shift - scale * sum_dy / n
        slope, constant = slope.neg_().to(x.dtype), constant.to(x.dtype)
        zero, one = x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])
        if self.near:
            dx = _scaled(x, weight=slope, bias=constant, mean=self.origin, var=one)
        else:
            deviations = x - _per_channel(self.origin, x)
            dx = _scaled_in_place(deviations, weight=slope, bias=constant, mean=zero, var=one)
        return dx.addcmul_(dy, _per_channel(scale.to(x.dtype), x))


class CpuBatch:
    """A `LocalBatch` on the CPU. x (N, C, *) is dense, float32 or float64.

    Attributes:
        near: whether the mean of every channel is within `NEAR` standard deviations of 0; known with the origin.
    """

    def __init__(self, x: Tensor) -> None:
        self.num_values, self.sums = values_per_channel(x), sum_per_channel(x)
        self.near = True
        self._values = x  # or x - origin
        self._origin = torch.zeros(0)

    def _centre_on(self, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the origin, near `mean`. Returns sum(c) and sum(c^2) of c = x - origin, (C,) float64 each."""
        x = self._values
        self._origin = origin = mean.to(vector_type(x))
        if x.numel() == 0:
            return torch.zeros(x.shape[1], dtype=torch.float64), torch.zeros(x.shape[1], dtype=torch.float64)
        place = origin.double()
        sums, products = _sums_of_products(x, x, origin)
        left = sums - self.num_values * place  # the rest that rounding the origin left
        squares = products - place * left
        self.near = bool((self.num_values * place.square() <= NEAR**2 * squares).all())
        if self.near:
            return left, squares
        self._values = c = x - _per_channel(origin, x)
        return _sums_of_products(c, c, torch.zeros_like(origin))

    def second_sums(self, mean: Tensor) -> Tensor:
        """sum(x - origin) and sum((x - origin)^2); (2C,) float64."""
        return torch.cat(self._centre_on(mean))

    def two_stage(self, mean: Tensor, second_sums: Tensor, n: Tensor) -> Statistics:
        """The statistics of the group. The origin, the rounded mean, and its shift are more exact than `mean`."""
        shift, mean_square = (second_sums / n.clamp(min=1)).chunk(2)
        centre = CpuCentre(self._origin, shift.to(self._origin.dtype), self.near)
        return Statistics(self._origin + shift, mean_square - shift.square(), n, centre)

    def moments(self) -> tuple[Tensor, Tensor]:
        """The mean of this rank, and the sum of its squared deviations from it; (C,) float64 each."""
        count = max(self.num_values, 1)
        left, squares = self._centre_on(self.sums / count)
        shift = left / count
        return self._origin + shift, squares - left * shift

    def packed(self, mean: Tensor, var: Tensor, n: Tensor) -> Statistics:
        """The statistics of the group. Each rank keeps its own origin."""
        shift = (mean - self._origin).to(self._origin.dtype)
        return Statistics(mean, var, n, CpuCentre(self._origin, shift, self.near))

    def normalize(self, stats: Statistics, *, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        """(x - mean) / sqrt(var + eps) * weight + bias in one pass; (N, C, *). The last call for a batch."""
        values = self._values
        var = stats.var.to(values.dtype)
        if self.near:
            return _scaled(values, weight=weight, bias=bias, mean=stats.mean.to(values.dtype), var=var, eps=eps)
        shift = cast(CpuCentre, stats.centre).shift
        return _scaled_in_place(values, weight=weight, bias=bias, mean=shift, var=var, eps=eps)


@dataclass(frozen=True)
class HalfCentre:
    """The mean, (C,) float32, beside values of 8 bits, whose own error is far above that of one float32 number."""

    mean: Tensor

    def gradient_sums(self, dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """sum(dy) and sum(dy * (x - mean)) of this rank, in one pass; (C,) float64 each."""
        return _sums_of_products(dy, x, self.mean)

    def input_gradient(
        self,
        dy: Tensor,
        x: Tensor,
        *,
        weight: Tensor | None,
        inv_std: Tensor,
        sum_dy: Tensor,
        sum_dy_c: Tensor,
        n: Tensor,
    ) -> Tensor:
        """The gradient of x as (scale * dy + constant) + slope * (x - mean), in three passes (see `Centre`).

        All factors are float32. A factor in the type of x would change every value of its channel alike.
        """
        scale = inv_std if weight is None else weight * inv_std
        slope = scale * inv_std.square() * sum_dy_c / n
        zero, one = torch.zeros_like(self.mean), torch.ones_like(self.mean)
        dx = _scaled(dy, weight=scale.float(), bias=(scale * sum_dy / n).neg_().float(), mean=zero, var=one)
        return dx.add_(_scaled(x, weight=slope.neg_().float(), bias=zero, mean=self.mean, var=one))


class HalfBatch(MomentBatch):
    """A bfloat16 batch on the CPU. x (N, C, *) is dense; torch's operators read it once and compute in float32."""

    def __init__(self, x: Tensor) -> None:
        self._x, self.num_values = x, values_per_channel(x)
        count = max(self.num_values, 1)
        place = torch.zeros(x.shape[1], dtype=torch.float32)
        if x.numel() == 0:
            self.sums = place.double()
            self.own_mean = self.own_var = self.sums
            return
        self.sums, squares = _sums_of_products(x, x, place)
        self.own_mean = self.sums / count
        self.own_var = squares / count - self.own_mean.square()
        if not bool((self.own_mean.square() <= NEAR**2 * self.own_var).all()):
            # the squares about 0 say too little of a variance far below them
            place = self.own_mean.float()
            _, products = _sums_of_products(x, x, place)  # of x (x - place)
            left = self.own_mean - place.double()
            self.own_var = (products / count - place.double() * left - left.square()).clamp_(min=0)

    def packed(self, mean: Tensor, var: Tensor, n: Tensor) -> Statistics:
        """The statistics of the group, from the merged moments of all ranks."""
        return Statistics(mean, var, n, HalfCentre(mean.float()))

    def normalize(self, stats: Statistics, *, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        """(x - mean) / sqrt(var + eps) * weight + bias in one pass; (N, C, *). The last call for a batch."""
        mean = cast(HalfCentre, stats.centre).mean
        one = torch.ones_like(mean)
        weight, bias = one if weight is None else weight, torch.zeros_like(mean) if bias is None else bias
        return _scaled(self._x, weight=weight, bias=bias, mean=mean, var=stats.var.float(), eps=eps)
