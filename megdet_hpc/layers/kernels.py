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

    def gradient_sums(self, dy: Tensor, x: Tensor) -> Tensor:
        """sum(dy) and sum(dy * (x - mean)) of this rank, in one pass; (2C,) float64."""

    def input_gradient(
        self, dy: Tensor, x: Tensor, *, weight: Tensor | None, inv_std: Tensor, sums: Tensor, n: Tensor
    ) -> Tensor:
        """weight * inv_std * (dy - sum_dy / n - (x - mean) * inv_std^2 * sum_dy_c / n); (N, C, *).

        Args:
            dy, x: dense tensors that are not empty.
            weight: (C,) without gradient; None for 1.
            inv_std: (C,) float64.
            sums: sum_dy and sum_dy_c, which are `gradient_sums` over the group; (2C,) float64.
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
    """The values x of this rank in one forward pass: their moments at once, then `statistics`, and `normalize` last.

    No message needs the values again. All but `normalize` take an empty batch too.

    Attributes:
        num_values: values per channel on this rank.
        own_mean, own_var: mean and biased variance of this rank's values, (C,) float64; 0 without values.
    """

    num_values: int
    own_mean: Tensor
    own_var: Tensor

    def statistics(self, mean: Tensor, var: Tensor, n: Tensor) -> Statistics:
        """The statistics of the group, from the merged moments of all ranks."""

    def normalize(self, stats: Statistics, *, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        """(x - mean) / sqrt(var + eps) * weight + bias in one pass; (N, C, *). The last call for a batch."""


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


def vector_type(x: Tensor) -> torch.dtype:
    """The type in which a device keeps vectors of x's channels: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
