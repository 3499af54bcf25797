"""What a device computes for cross-GPU batch normalization, between the messages: `kernels_cpu.py`, `kernels_cuda.py`.

Shape legend: x, dy (N, C, *); vectors (C,). Which operators do it and why: docs/cgbn.md. Sums leave a device's code as
float64, which costs a few kilobytes a message.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Centre(Protocol):
    """The mean of each channel over the group as a device keeps it, and what the backward pass does with it."""

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
            dy, x: dense, with values.
            weight: (C,), or None for 1.
            inv_std: (C,) float64.
            sum_dy, sum_dy_c: `gradient_sums` over the group, (C,) float64.
            n: values per channel over the group, a float64 scalar.
        """


@dataclass(frozen=True)
class Statistics:
    """A group's statistics of each channel.

    Attributes:
        mean: (C,) float64.
        var: (C,) float64, biased.
        n: float64 scalar, values per channel over the group.
        centre: the mean again, in the form in which the device subtracts it.
    """

    mean: Tensor
    var: Tensor
    n: Tensor
    centre: Centre


class LocalBatch(Protocol):
    """This rank's values in one forward pass, x: their sums, then their normalized form.

    With the exchange two_stage: `sums`, `second_sums`, `two_stage`. With packed: `moments`, `packed`. Then `normalize`.
    All but `normalize` take an empty batch too.

    Attributes:
        num_values: values per channel on this rank.
        sums: sum(x), (C,) float64.
    """

    num_values: int
    sums: Tensor

    def second_sums(self, mean: Tensor) -> Tensor:
        """What the second message adds up over the group, given its mean; float64, of one length on all ranks."""

    def two_stage(self, mean: Tensor, second_sums: Tensor, n: Tensor) -> Statistics:
        """The group's statistics from its mean, its second sums and its number of values per channel."""

    def moments(self) -> tuple[Tensor, Tensor]:
        """This rank's mean, and the sum of its squared deviations from that; (C,) float64 each."""

    def packed(self, mean: Tensor, var: Tensor, n: Tensor) -> Statistics:
        """The group's statistics from what was merged of all ranks' moments."""

    def normalize(self, stats: Statistics, *, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        """(x - mean) / sqrt(var + eps) * weight + bias in one pass; (N, C, *). Once, as the last use of the batch."""


def dense(x: Tensor) -> Tensor:
    """x itself if it is contiguous or channels_last, else a contiguous copy: the operators need one of both."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def values_per_channel(x: Tensor) -> int:
    """Elements of x divided by its channels."""
    return x.numel() // x.shape[1] if x.shape[1] else 0


def sum_per_channel(x: Tensor) -> Tensor:
    """sum(x) over all axes but the second; (C,) float64."""
    return x.sum([axis for axis in range(x.dim()) if axis != 1]).double()


def vector_type(x: Tensor) -> torch.dtype:
    """The type in which a device keeps vectors of x's channels: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
