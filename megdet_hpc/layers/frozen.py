"""Batch normalization with constant statistics, scale and offset, in the type of its input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d


class _Frozen(torch.autograd.Function):
    """torch's evaluation kernel, which alone would keep its whole input for gradients of constants."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(weight * (var + eps).rsqrt())
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = ctx.saved_tensors
        zero, one = torch.zeros_like(scale), torch.ones_like(scale)
        return F.batch_norm(grads[0], zero, one, scale, zero, False, 0.0, 0.0), None, None, None, None, None


class FrozenNorm(FrozenBatchNorm2d):
    """torchvision's layer, whose state dict it has, with one kernel and without a change of type.

    torchvision multiplies by float32 vectors, so half precision becomes float32 there: under autocast each such layer
    writes twice the bytes, the sum behind a residual block is float32 too, and the next convolution converts it back.
    torch's evaluation kernel computes in float32 and rounds its result once. float32 on a CPU keeps torchvision's two
    operators and their bits.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same shape and type."""
        if x.device.type == "cpu" and x.dtype == self.weight.dtype:
            plain: Tensor = super().forward(x)
            return plain
        if torch.is_grad_enabled() and x.requires_grad:
            found: Tensor = _Frozen.apply(x, self.running_mean, self.running_var, self.weight, self.bias, self.eps)
            return found
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
