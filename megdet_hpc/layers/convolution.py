"""Convolution layers by kind: each is made from a plain convolution, whose weights and geometry it takes over.

Shapes: x (N, C, H, W), weight (O, C / groups, kh, kw).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.ops import DeformConv2d

from megdet_hpc.layers.replace import take_over

ConvKind = Literal["standard", "weight_standardized", "deformable"]
ConvLayer = Callable[[nn.Conv2d], nn.Module]
"""Maker of a layer from a plain convolution, whose place and state dict keys it takes."""


class WeightStandardizedConv2d(nn.Conv2d):
    """Convolution whose weights have mean 0 and variance 1 per output channel (Qiao et al., arXiv 1903.10520).

    They are (w - mean) / sqrt(variance + eps) over the C / groups x kh x kw weights of a channel. A
    normalization layer follows, which sets the scale of its output. Half-precision weights are standardized in float32.

    Raises:
        ValueError: one weight per output channel, which would always become 0.
    """

    eps = 1e-5

    def standardized(self) -> Tensor:
        """The weights that the convolution uses, (O, C / groups, kh, kw), float32 or wider."""
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        variance, mean = torch.var_mean(weight, dim=(1, 2, 3), correction=0, keepdim=True)
        return (weight - mean) * torch.rsqrt(variance + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, O, H', W')."""
        return self._conv_forward(x, self.standardized().to(self.weight.dtype), self.bias)


class DeformableConv2d(DeformConv2d):
    """Convolution whose taps move by offsets that a second convolution finds (Dai et al., ICCV 2017).

    The second convolution, `offset`, begins with zeros, so the layer begins as the plain convolution.
    Both compute in the type of the weights, float32 under autocast.

    Args:
        conv: gives channels, kernel, stride, padding, dilation, groups and whether there is a bias; not its weights.
        modulated: weigh each tap too (Zhu et al., CVPR 2019), from 0 to 2 and 1 at first. The paper's weights go from
            0 to 1 and begin at 0.5, which halves what the plain convolution would give.

    Raises:
        ValueError: padding that is named by a word or filled with anything but zeros.
    """

    def __init__(self, conv: nn.Conv2d, modulated: bool = False) -> None:
        if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
            raise ValueError(
                f"padding of a deformable convolution is {conv.padding!r}, mode {conv.padding_mode}; accepted: pixels, "
                "mode zeros"
            )
        geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
        super().__init__(conv.in_channels, conv.out_channels, *geometry, conv.groups, conv.bias is not None)
        self.modulated = modulated
        taps = conv.kernel_size[0] * conv.kernel_size[1]
        self.offset = nn.Conv2d(conv.in_channels, (3 if modulated else 2) * taps, *geometry)  # type: ignore[arg-type]
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, O, H', W')."""
        # offsets are coordinates, and torchvision's operator knows no autocast on CPUs; the meta device has none at all
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            y = self._moved(x.to(self.weight.dtype))
        return y.to(x.dtype)

    def _moved(self, x: Tensor) -> Tensor:
        found = self.offset(x)  # (N, 2 taps or 3 taps, H', W')
        taps = self.weight[0, 0].numel()
        weights = 2 * found[:, 2 * taps :].sigmoid() if self.modulated else None
        y: Tensor = super().forward(x, found[:, : 2 * taps], weights)
        return y


def _weight_standardized(conv: nn.Conv2d) -> nn.Module:
    if conv.weight[0].numel() < 2:
        raise ValueError(f"{conv} has one weight per output channel, which weight standardization would make 0")
    return take_over(
        WeightStandardizedConv2d(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
        ),
        conv,
    )


def _deformable(conv: nn.Conv2d) -> nn.Module:
    return take_over(DeformableConv2d(conv), conv)


_MAKERS: dict[ConvKind, ConvLayer] = {
    "standard": lambda conv: conv,
    "weight_standardized": _weight_standardized,
    "deformable": _deformable,
}


def conv_layer(kind: ConvKind) -> ConvLayer:
    """The maker of a kind's layers, for new convolutions and for `replace.replace_convs`."""
    return _MAKERS[kind]


def is_3x3(path: str, conv: nn.Module) -> bool:
    """Whether a convolution has a 3 x 3 kernel, as those of residual blocks and heads have."""
    return getattr(conv, "kernel_size", None) == (3, 3)
