"""The interface of a device's arithmetic for cross-GPU batch normalization (kernels_cpu.py, kernels_cuda.py).

Shapes: x, dy (N, C, *); vectors (C,). docs/cgbn.md names the operators and the reasons. Sums leave a device's code as
float64, which costs a few kilobytes in a message.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Centre(Protocol):
    """The mean of each channel over the group, in the form that a device keeps, and its use in the backward pass."""

    def gradient_sums(self, dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """sum(dy) and sum(dy * (x - mean)) of this rank, in one pass; (C,) float64 each."""

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
        """weight * inv_std * (dy - sum_dy / n - (x - mean) * inv_std^2 * sum_dy_c / n); (N, C, *).

        Args:
            dy, x: dense tensors that are not empty.
            weight: (C,); None for 1.
            inv_std: (C,) float64.
            sum_dy, sum_dy_c: `gradient_sums` over the group, (C,) float64.
            n: values per channel over the group, a float64 scalar.
        """


@dataclass(frozen=True)
class Statistics:
    """The statistics of each channel over a group.

    Attributes:
        mean: (C,) float64.
        var: (C,) float64, biased.
        n: float64 scalar, values per channel over the group.
        centre: mean in the form in which the device subtracts it.
    """

    mean: Tensor
    var: Tensor
    n: Tensor
    centre: Centre


class LocalBatch(Protocol):
    """The values x of this rank in one forward pass: first their sums, then their normalized form.

    The exchange two_stage uses `sums`, `second_sums` and `two_stage`; packed uses `moments` and `packed`. `normalize`
    comes last. All methods except `normalize` take an empty batch too.

    Attributes:
        num_values: values per channel on this rank.
        sums: sum(x), (C,) float64.
    """

    num_values: int
    sums: Tensor

    def second_sums(self, mean: Tensor) -> Tensor:
        """The numbers of the second message, given the mean of the group; float64, equally many on all ranks."""

    def two_stage(self, mean: Tensor, second_sums: Tensor, n: Tensor) -> Statistics:
        """The statistics of the group, from its mean, its second sums and its number of values per channel."""

    def moments(self) -> tuple[Tensor, Tensor]:
        """The mean of this rank, and the sum of its squared deviations from it; (C,) float64 each."""

    def packed(self, mean: Tensor, var: Tensor, n: Tensor) -> Statistics:
        """The statistics of the group, from the merged moments of all ranks."""

    def normalize(self, stats: Statistics, *, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        """(x - mean) / sqrt(var + eps) * weight + bias in one pass; (N, C, *). The last call for a batch."""


class MomentBatch(LocalBatch, Protocol):
    """A `LocalBatch` whose mean and variance are known with its sums, so that no other message needs the values again.

    Attributes:
        own_mean, own_var: mean and biased variance of this rank's values, (C,) float64; 0 without values.
    """

    own_mean: Tensor
    own_var: Tensor

    def second_sums(self, mean: Tensor) -> Tensor:
        """sum((x - mean)^2) = n (own variance + (own mean - mean)^2), without another pass; (C,) float64."""
        return self.num_values * (self.own_var + (self.own_mean - mean).square())

    def two_stage(self, mean: Tensor, second_sums: Tensor, n: Tensor) -> Statistics:
        """The statistics of the group, from its mean, its second sums and its number of values per channel."""
        return self.packed(mean, second_sums / n.clamp(min=1), n)

    def moments(self) -> tuple[Tensor, Tensor]:
        """The mean of this rank, and the sum of its squared deviations from it; (C,) float64 each."""
        return self.own_mean, self.num_values * self.own_var


def dense(x: Tensor) -> Tensor:
    """x itself if it is contiguous or channels_last, else a contiguous copy. The operators need one of the two.

    One image may have any stride from image to image, for torch counts no stride along an axis of size 1. But its
    operators of batch norm on CPUs find wrong gradients of channels_last images where that stride is no image's size
    (torch 2.14.1, nn.BatchNorm2d too).
    """
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        if x.shape[0] != 1 or x.stride(0) == x.numel():
            return x
        return x.clone(memory_format=torch.contiguous_format)
    return x.contiguous()


def values_per_channel(x: Tensor) -> int:
    """The number of elements of x divided by its number of channels."""
    return x.numel() // x.shape[1] if x.shape[1] else 0


def sum_per_channel(x: Tensor) -> Tensor:
    """sum(x) over all axes but the second; (C,) float64."""
    return x.sum([axis for axis in range(x.dim()) if axis != 1]).double()


def vector_type(x: Tensor) -> torch.dtype:
    """The type in which a device keeps vectors of x's channels: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
