"""PeleeNet (Wang, Li and Ling, Pelee, NeurIPS 2018): a small dense network of plain convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from megdet_hpc.layers.norm import NormLayer
from megdet_hpc.layers.recompute import Result, normalized, recomputed
from megdet_hpc.models.backbones.base import Backbone, Stage

_LAYERS = (3, 4, 8, 6)
_GROWTH = 32  # channels that a dense layer adds
_STEM_WIDTH = 32
# Width of the bottlenecks of each stage, in halves of the growth: the first stages have few channels to shrink.
_BOTTLENECKS = (1, 2, 4, 4)
_FIRST_STRIDE = 4  # of the first stage; each further stage doubles it


class PeleeStem(nn.Module):
    """The first layers: a convolution, then max pooling beside convolutions.

    Args:
        width: channels of the result.
        norm: constructor of the normalization layers.
    """

    def __init__(self, width: int, norm: NormLayer) -> None:
        super().__init__()
        self.first = Conv2dNormActivation(3, width, 3, 2, norm_layer=norm)
        self.convolved = nn.Sequential(
            Conv2dNormActivation(width, width // 2, 1, norm_layer=norm),
            Conv2dNormActivation(width // 2, width, 3, 2, norm_layer=norm),
        )
        self.pooled = nn.MaxPool2d(2, ceil_mode=True)
        self.last = Conv2dNormActivation(2 * width, width, 1, norm_layer=norm)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, width, H / 4, W / 4), sizes rounded up."""
        x = self.first(images)
        joined: Tensor = self.last(torch.cat([self.pooled(x), self.convolved(x)], dim=1))
        return joined


class TwoWayDenseLayer(nn.Module):
    """A dense layer with two branches, of one and of two 3 x 3 convolutions, each behind its own bottleneck.

    Args:
        channels: channels of the input.
        bottleneck: width between the 1 x 1 and the 3 x 3 convolution.
        growth: channels that the layer adds, half of them from each branch.
        norm: constructor of the normalization layers.
        memory_efficient: keep the maps before and the convolutions' outputs alone for the backward pass, which joins
            the maps, normalizes and cuts at 0 again.
    """

    def __init__(
        self, channels: int, bottleneck: int, growth: int, norm: NormLayer, memory_efficient: bool = False
    ) -> None:
        super().__init__()
        half = growth // 2
        self.branch1 = nn.Sequential(
            Conv2dNormActivation(channels, bottleneck, 1, norm_layer=norm),
            Conv2dNormActivation(bottleneck, half, 3, norm_layer=norm),
        )
        self.branch2 = nn.Sequential(
            Conv2dNormActivation(channels, bottleneck, 1, norm_layer=norm),
            Conv2dNormActivation(bottleneck, half, 3, norm_layer=norm),
            Conv2dNormActivation(half, half, 3, norm_layer=norm),
        )
        self.memory_efficient = memory_efficient

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The maps before, (N, *, H, W) -> the two new ones, (N, growth / 2, H, W) each."""
        branches: list[Any] = [self.branch1, self.branch2]

        def narrow(*maps: Tensor) -> tuple[Tensor, ...]:
            joined = maps[0] if len(maps) == 1 else torch.cat(maps, dim=1)
            return tuple(branch[0][0](joined) for branch in branches)

        found = []
        for branch, x in zip(branches, self._run(narrow, *maps), strict=True):
            for (_, norm, relu), (conv, *_) in pairwise(branch):

                def behind(x: Tensor, norm: Any = norm, relu: Any = relu, conv: Any = conv) -> Tensor:
                    result: Tensor = conv(relu(normalized(norm, x)))
                    return result

                x = self._run(behind, x)
            _, norm, relu = branch[-1]
            found.append(relu(norm(x)))
        return found

    def _run(self, run: Callable[..., Result], *inputs: Tensor) -> Result:
        return recomputed(run, *inputs) if self.memory_efficient and self.training else run(*inputs)


class PeleeStage(nn.Sequential):
    """Dense layers, each of which sees the maps of all before it, and the 1 x 1 convolution behind them."""

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        *layers, transition = self
        for layer in layers:
            maps += layer(maps)
        found: Tensor = transition(torch.cat(maps, dim=1))
        return found


class PeleeNetBackbone(Backbone):
    """PeleeNet without its classifier.

    A stage is a dense block and the 1 x 1 convolution behind it, which keeps the number of channels. Average pooling
    follows all stages but the last and rounds sizes up, as in Caffe; the authors' PyTorch class rounds them down.

    Args:
        norm: constructor of the normalization layers.
        layers: dense layers of each stage.
        growth: channels that a dense layer adds; a multiple of 8.
        stem_width: channels of the stem.
        memory_efficient: the same as in `TwoWayDenseLayer`.
    """

    def __init__(
        self, norm: NormLayer, layers: tuple[int, ...], growth: int, stem_width: int, memory_efficient: bool = False
    ) -> None:
        super().__init__()
        self.stem = PeleeStem(stem_width, norm)
        self.pool = nn.AvgPool2d(2, ceil_mode=True)
        channels, widths = stem_width, []
        for i, (number, factor) in enumerate(zip(layers, _BOTTLENECKS, strict=True)):
            bottleneck = growth // 2 * factor // 4 * 4
            each = (channels + j * growth for j in range(number))
            dense = [TwoWayDenseLayer(width, bottleneck, growth, norm, memory_efficient) for width in each]
            channels += number * growth
            widths.append(channels)
            transition = Conv2dNormActivation(channels, channels, 1, norm_layer=norm)
            self.add_module(f"stage{i + 1}", PeleeStage(*dense, transition))
        self.stages = tuple(Stage(str(i), width, _FIRST_STRIDE * 2**i) for i, width in enumerate(widths))
        self.modules_by_stage = (("stem",), *((f"stage{i + 1}",) for i in range(len(layers))))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x: Tensor = self.stem(images)
        found: dict[str, Tensor] = {}
        for stage, (path,) in zip(self.stages, self.modules_by_stage[1:], strict=True):
            x = found[stage.name] = self.get_submodule(path)(self.pool(x) if found else x)
        return found


def build_peleenet(
    norm: NormLayer | None,
    layers: tuple[int, int, int, int] = _LAYERS,
    growth: int = _GROWTH,
    stem_width: int = _STEM_WIDTH,
    memory_efficient: bool = False,
) -> PeleeNetBackbone:
    """A PeleeNet; by default the published one.

    Args:
        norm: constructor of the normalization layers; None: nn.BatchNorm2d.
        layers: dense layers of each stage.
        growth: channels that a dense layer adds; a multiple of 8.
        stem_width: channels of the stem.
        memory_efficient: the same as in `TwoWayDenseLayer`.
    """
    return PeleeNetBackbone(norm or nn.BatchNorm2d, layers, growth, stem_width, memory_efficient)
