"""Batch normalization with constant statistics, scale and offset, in the type of its input."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d


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
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
