"""The arithmetic of cross-GPU batch normalization on GPUs, from the fused kernels of nn.SyncBatchNorm.

They read x once, half precision included, and keep the mean as one float32 number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megdet_hpc.layers.kernels import LocalBatch, Statistics, values_per_channel, vector_type


@dataclass(frozen=True)
class CudaCentre:
    """The mean, (C,) float32; float64 if x is float64."""

    mean: Tensor

    def gradient_sums(self, dy: Tensor, x: Tensor) -> Tensor:
        """sum(dy) and sum(dy * (x - mean)) of this rank, in one pass; (2C,) float64."""
        sum_dy, sum_dy_c, _, _ = torch.batch_norm_backward_reduce(
            grad_out=dy,
            input=x,
            mean=self.mean,
            invstd=torch.ones_like(self.mean),
            weight=None,
            input_g=True,
            weight_g=False,
            bias_g=False,
        )
        return torch.cat([sum_dy, sum_dy_c]).double()

    def input_gradient(
        self, dy: Tensor, x: Tensor, *, weight: Tensor | None, inv_std: Tensor, sums: Tensor, n: Tensor
    ) -> Tensor:
        """The gradient of x in one pass (see `Centre`)."""
        dtype = self.mean.dtype
        sum_dy, sum_dy_c = sums.to(dtype).chunk(2)
        return torch.batch_norm_backward_elemt(
            grad_out=dy,
            input=x,
            mean=self.mean,
            invstd=inv_std.to(dtype),
            weight=weight,
            sum_dy=sum_dy,
            sum_dy_xmu=sum_dy_c,
            count=n.to(torch.int32).view(1),
        )


class CudaBatch(LocalBatch):
    """A batch on a GPU. x (N, C, *) is dense: float64, float32 or half precision. Nothing waits for the GPU."""

    def __init__(self, x: Tensor) -> None:
        self._x, self.num_values = x, values_per_channel(x)
        if not x.numel():
            self.own_mean = self.own_var = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
            return
        mean, inv_std = torch.batch_norm_stats(input=x, eps=0.0)
        self.own_mean = mean.double()
        self.own_var = inv_std.double().pow_(-2)  # a constant channel: 1 / infinity^2 = 0

    def statistics(self, mean: Tensor, var: Tensor, n: Tensor) -> Statistics:
        """The statistics of the group, from the merged moments of all ranks."""
        return Statistics(mean, var, n, CudaCentre(mean.to(vector_type(self._x))))

    def normalize(self, stats: Statistics, *, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        """(x - mean) / sqrt(var + eps) * weight + bias in one pass; (N, C, *). The last call for a batch."""
        dtype = vector_type(self._x)
        return torch.batch_norm_elemt(
            input=self._x,
            weight=weight,
            bias=bias,
            mean=stats.mean.to(dtype),
            invstd=(stats.var + eps).rsqrt().to(dtype),
            eps=eps,
        )
