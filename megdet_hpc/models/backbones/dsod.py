"""DSOD's network (Shen et al., DSOD: Learning Deeply Supervised Object Detectors from Scratch, ICCV 2017).

Sizes in comments are those of 300 x 300 pixels and of DS/64-192-48-1. Where the authors' code and their paper differ,
this is the code: the last map has 2 x 2 cells, and the third transition 1,184 channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megdet_hpc.config import DsodConfig
from megdet_hpc.layers.l2_norm import L2Norm
from megdet_hpc.layers.norm import NormLayer
from megdet_hpc.models.backbones.dense_layer import DenseBlock
from megdet_hpc.models.ssd import SsdFeatures


def halving_pool() -> nn.MaxPool2d:
    """A pooling that halves sides and rounds up, as Caffe does: 75, 38, 19, 10, 5, 3, 2."""
    return nn.MaxPool2d(2, 2, ceil_mode=True)


def _first(in_channels: int, out_channels: int, stride: int, norm: NormLayer) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, norm(out_channels), nn.ReLU(inplace=True))


def _conv(in_channels: int, out_channels: int, norm: NormLayer, kernel: int = 1, stride: int = 1) -> nn.Sequential:
    """Normalization, ReLU, convolution."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(norm(in_channels), nn.ReLU(), conv)


class DenseMap(nn.Module):
    """A map of half the sides: one half of its channels learned, the other pooled from the map before.

    Args:
        channels: channels of the map before.
        half: channels of each half.
        norm: constructor of the normalization layers.
    """

    def __init__(self, channels: int, half: int, norm: NormLayer) -> None:
        super().__init__()
        self.learn = nn.Sequential(_conv(channels, half, norm), _conv(half, half, norm, kernel=3, stride=2))
        self.reuse = nn.Sequential(halving_pool(), _conv(channels, half, norm))

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, 2 * half, H / 2, W / 2), rounded up."""
        return torch.cat([self.reuse(features), self.learn(features)], dim=1)


class DsodFeatures(SsdFeatures):
    """Stem, four dense blocks and six maps, each with L2 normalization of its cells (dense prediction).

    Args:
        config: widths and numbers of layers.
        norm: constructor of the normalization layers.
    """

    def __init__(self, config: DsodConfig, norm: NormLayer) -> None:
        super().__init__()
        width, halves = config.first_channels, config.map_channels
        self.stem = nn.Sequential(
            _first(3, width, 2, norm), _first(width, width, 1, norm), _first(width, 2 * width, 1, norm), halving_pool()
        )
        channels, blocks, widths = 2 * width, [], []
        for layers in config.block_layers:
            blocks.append(
                DenseBlock(layers, channels, config.bottleneck_channels, config.growth, norm, config.memory_efficient)
            )
            channels += layers * config.growth
            widths.append(channels)
        self.blocks = nn.ModuleList(blocks)
        outputs = (*widths[:3], halves[0])
        self.transitions = nn.ModuleList(_conv(own, out, norm) for own, out in zip(widths, outputs, strict=True))
        self.pool = halving_pool()
        self.reuse = nn.Sequential(halving_pool(), _conv(widths[1], halves[0], norm))
        self.channels = (widths[1], *(2 * half for half in halves))
        self.maps = nn.ModuleList(
            DenseMap(before, half, norm) for before, half in zip(self.channels[1:], halves[1:], strict=False)
        )
        self.norms = nn.ModuleList(map(L2Norm, self.channels))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """(N, 3, H, W) -> six maps, 38, 19, 10, 5, 3 and 2 cells wide."""
        block = [*zip(self.blocks, self.transitions, strict=True)]
        x = self.stem(pixels)  # 75
        first = self._through(block[1], self.pool(self._through(block[0], x)))  # 38
        x = self._through(block[3], self._through(block[2], self.pool(first)))  # 19
        maps = [first, torch.cat([self.reuse(first), x], dim=1)]
        for module in self.maps:
            maps.append(module(maps[-1]))
        return [norm(level) for norm, level in zip(self.norms, maps, strict=True)]

    @staticmethod
    def _through(modules: tuple[nn.Module, nn.Module], x: Tensor) -> Tensor:
        for module in modules:
            x = module(x)
        return x
