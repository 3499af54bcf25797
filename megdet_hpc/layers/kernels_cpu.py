"""The arithmetic of cross-GPU batch normalization on CPUs, from torch's operators for batch norm in *evaluation* mode.

docs/cgbn.md ("Which operators, and why") derives the sums. Everywhere x - mean is (x - origin) - shift.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megdet_hpc.layers.kernels import LocalBatch, Statistics, values_per_channel, vector_type

NEAR = 4.0  # |mean| / standard deviation up to which x itself may be summed and scaled

_batch_norm = torch.native_batch_norm
_batch_norm_out = torch.ops.aten.native_batch_norm.out
_batch_norm_backward = torch.ops.aten.native_batch_norm_backward.default

Vector = npt.NDArray[np.float64]  # (C,); an operation of numpy takes a third of the time of torch's at these sizes


def _per_channel(vector: Tensor, x: Tensor) -> Tensor:
    """A vector (C,) as (C, 1, 1), which broadcasts along N."""
    return vector.view(-1, *[1] * (x.dim() - 2))


def _mean_of_some(x: Tensor) -> Tensor:
    """The mean of a few pixels in the middle of one image, (C,) in `vector_type`. x (N, C, *) is dense, not empty."""
    if x.dim() == 2:
        return x.mean(0, dtype=vector_type(x))
    images, channels = x.shape[:2]
    pixels = x.numel() // (images * channels)
    some, start = min(max(pixels // 64, 32), pixels - pixels // 2), pixels // 2
    steps = (pixels, 1) if x.is_contiguous() else (1, channels)  # strides of an axis of size 1 may be any number
    offset = x.storage_offset() + images // 2 * channels * pixels + start * steps[1]
    return x.as_strided((channels, some), steps, offset).mean(1, dtype=vector_type(x))


def _scaled(
    x: Tensor, *, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float = 0.0
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias; (N, C, *)."""
    return _batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0]


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


def _sums_of_products(dy: Tensor, x: Tensor, place: Tensor) -> tuple[Vector, Vector]:
    """sum(dy) and sum(dy * (x - place)) in one pass; (C,) each."""
    one = torch.ones_like(place)  # its type is that of the sums
    # grad_out, input, weight, running mean and variance, saved mean and variance, train, eps, which gradients
    _, products, sums = _batch_norm_backward(dy, x, one, place, one, None, None, False, 0.0, [False, True, True])
    return _vector(sums).astype(np.float64), _vector(products).astype(np.float64)


def _factors(weight: Tensor | None, inv_std: Tensor, sums: Tensor, n: Tensor) -> tuple[Vector, Vector, Vector]:
    """scale, slope and constant of dx = scale * dy + slope * (x - mean) + constant; (C,) each (see `Centre`)."""
    inverse = _vector(inv_std)
    scale = inverse if weight is None else inverse * _vector(weight)
    over_n = scale * (-1.0 / n.item())
    sum_dy, sum_dy_c = _vector(sums.view(2, -1))
    return scale, over_n * sum_dy_c * inverse * inverse, over_n * sum_dy


def _vector(tensor: Tensor) -> Any:
    """A tensor's numbers for numpy, in its own memory on CPUs."""
    return tensor.cpu().numpy()


def _tensor(vector: Vector, like: Tensor) -> Tensor:
    """A vector in the type and on the device of a tensor."""
    return torch.from_numpy(vector).to(like)


def _double(vector: Vector, like: Tensor) -> Tensor:
    """A vector in float64 on the device of a tensor."""
    return torch.from_numpy(vector).to(like.device)


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

    def gradient_sums(self, dy: Tensor, x: Tensor) -> Tensor:
        """sum(dy) and sum(dy * (x - mean)) of this rank, in one pass; (2C,) float64."""
        sum_dy, products = _sums_of_products(dy, x, self.origin)
        return _double(np.concatenate([sum_dy, products - _vector(self.shift) * sum_dy]), x)

    def input_gradient(
        self, dy: Tensor, x: Tensor, *, weight: Tensor | None, inv_std: Tensor, sums: Tensor, n: Tensor
    ) -> Tensor:
        """The gradient of x as scale * dy + slope * (x - origin) + constant, in two passes (see `Centre`)."""
        scale, slope, constant = _factors(weight, inv_std, sums, n)
        constant -= slope * _vector(self.shift)
        tilt, offset = _tensor(slope, x), _tensor(constant, x)
        one = torch.ones_like(tilt)
        if self.near:
            dx = _scaled(x, weight=tilt, bias=offset, mean=self.origin, var=one)
        else:
            deviations = x - _per_channel(self.origin, x)
            dx = _scaled_in_place(deviations, weight=tilt, bias=offset, mean=torch.zeros_like(tilt), var=one)
        return dx.addcmul_(dy, _per_channel(_tensor(scale, x), x))


@dataclass(frozen=True)
class HalfCentre:
    """The mean beside values of 8 bits, whose own error is far above that of one float32 number.

    Attributes:
        mean: (C,) float32.
        near: whether the mean of every channel is so near 0 that x - mean is not needed.
    """

    mean: Tensor
    near: bool

    def gradient_sums(self, dy: Tensor, x: Tensor) -> Tensor:
        """sum(dy) and sum(dy * (x - mean)) of this rank, in one pass; (2C,) float64."""
        return _double(np.concatenate(_sums_of_products(dy, x, self.mean)), x)

    def input_gradient(
        self, dy: Tensor, x: Tensor, *, weight: Tensor | None, inv_std: Tensor, sums: Tensor, n: Tensor
    ) -> Tensor:
        """The gradient of x as (scale * dy + constant) + slope * x, in two passes (see `Centre`).

        scale and constant are float32, for an error would change every value of its channel alike. The slope is
        bfloat16, since it belongs to the small part of dx. A third pass forms x - mean where the mean is far from 0.
        """
        scale, slope, constant = _factors(weight, inv_std, sums, n)
        zero, one = torch.zeros_like(self.mean), torch.ones_like(self.mean)
        tilt = _tensor(slope, x if self.near else one)
        if self.near:
            constant -= _vector(tilt.float()) * _vector(self.mean)
        dx = _scaled(dy, weight=_tensor(scale, one), bias=_tensor(constant, one), mean=zero, var=one)
        if self.near:
            return dx.addcmul_(x, _per_channel(tilt, x))
        return dx.add_(_scaled(x, weight=tilt, bias=zero, mean=self.mean, var=one))


class CpuBatch(LocalBatch):
    """A batch on the CPU. x (N, C, *) is dense, float32, float64 or bfloat16; torch's operators compute in float32.

    Other devices without kernels of their own compute by it too, which is untried.

    One pass gives both sums about a place near the mean, which a few pixels guess. Where that place turns out to
    be far from the mean of some channel, or the mean far from 0, further passes follow.

    Attributes:
        near: whether no channel needs x - mean; its mean is then within 1.5 times `NEAR` standard deviations of 0.
    """

    def __init__(self, x: Tensor) -> None:
        self.num_values = values_per_channel(x)
        self.near = True
        self._values = x  # or x - origin
        if not x.numel():
            self._origin = torch.zeros(x.shape[1], dtype=vector_type(x), device=x.device)
            self.own_mean = self.own_var = self._origin.double()
            return
        self._origin = _mean_of_some(x)
        shift, var = self._about(self._origin)
        if self._lose_digits(2 * shift, var):  # (1 + 2^2) squares where the place is 2 deviations off
            shift, var = self._exactly(_vector(self._origin) + shift)
        self.own_mean, self.own_var = _double(_vector(self._origin) + shift, x), _double(var, x)

    def _about(self, place: Tensor) -> tuple[Vector, Vector]:
        """Mean minus `place`, and biased variance, from sums about it in one pass; (C,) each."""
        sums, products = _sums_of_products(self._values, self._values, place)
        origin = _vector(place)
        with np.errstate(invalid="ignore", over="ignore"):  # the loss will say that it is not finite
            left = sums - self.num_values * origin.astype(np.float64)
            shift = left / self.num_values
            # the squares of x - place, not x (x - place)
            return shift, np.maximum((products - origin * left) / self.num_values - shift * shift, 0.0)

    def _lose_digits(self, shift: Vector, var: Vector) -> bool:
        """Whether the origin or `shift` exceeds `NEAR` standard deviations in some channel."""
        offset = np.maximum(np.abs(_vector(self._origin)), np.abs(shift))
        return bool((offset * offset > NEAR**2 * var).any())

    def _exactly(self, mean: Vector) -> tuple[Vector, Vector]:
        """The same about the mean itself, which becomes the origin; and about x - mean if that is far from 0."""
        self._origin = origin = _tensor(mean, self._origin)
        shift, var = self._about(origin)
        self.near = not self._lose_digits(shift, var)
        if self.near or self._values.dtype == torch.bfloat16:  # whose own error is above what these sums lose
            return shift, var
        self._values = self._values - _per_channel(origin, self._values)
        return self._about(torch.zeros_like(origin))

    def statistics(self, mean: Tensor, var: Tensor, n: Tensor) -> Statistics:
        """The statistics of the group. Each rank keeps its own origin."""
        if self._values.dtype == torch.bfloat16:
            return Statistics(mean, var, n, HalfCentre(mean.float(), self.near))
        shift = (mean - self._origin).to(self._origin.dtype)
        return Statistics(mean, var, n, CpuCentre(self._origin, shift, self.near))

    def normalize(self, stats: Statistics, *, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        """(x - mean) / sqrt(var + eps) * weight + bias in one pass; (N, C, *). The last call for a batch."""
        values, dtype = self._values, self._origin.dtype
        var = stats.var.to(dtype)
        if values.dtype == torch.bfloat16:  # the operator wants all vectors in float32, or none
            weight = torch.ones_like(var) if weight is None else weight
            bias = torch.zeros_like(var) if bias is None else bias
        elif not self.near:
            shift = cast(CpuCentre, stats.centre).shift
            return _scaled_in_place(values, weight=weight, bias=bias, mean=shift, var=var, eps=eps)
        return _scaled(values, weight=weight, bias=bias, mean=stats.mean.to(dtype), var=var, eps=eps)
