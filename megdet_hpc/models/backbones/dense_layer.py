"""Dense layers (Huang et al., DenseNet, CVPR 2017) that can do with less memory (Pleiss et al., arXiv 1707.06990)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megdet_hpc.layers.norm import NormLayer
from megdet_hpc.layers.recompute import normalized, recomputed


class DenseLayer(nn.Module):
    """A dense layer: normalization, ReLU and 1 x 1 convolution, then the same with 3 x 3. Its keys are torchvision's.

    Args:
        channels: channels of all maps before.
        bottleneck: width of the 1 x 1 convolution [channels].
        growth: channels of the new map.
        norm: constructor of the normalization layers.
        memory_efficient: keep the maps before and the 1 x 1 convolution's output for the backward pass, which computes
            what lies between again. Layers one after the other would otherwise keep the square of their number.
    """

    def __init__(self, channels: int, bottleneck: int, growth: int, norm: NormLayer, memory_efficient: bool) -> None:
        super().__init__()
        self.norm1 = norm(channels)
        self.conv1 = nn.Conv2d(channels, bottleneck, 1, bias=False)
        self.norm2 = norm(bottleneck)
        self.conv2 = nn.Conv2d(bottleneck, growth, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.memory_efficient = memory_efficient

    @classmethod
    def efficient(cls, layer: Any) -> DenseLayer:
        """A torchvision dense layer as a memory-efficient one, with its modules and no dropout.

        torchvision's own runs normalization a second time as if it were the first: running statistics move twice.
        """
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        for name in ("norm1", "conv1", "norm2", "conv2"):
            setattr(made, name, getattr(layer, name))
        made.relu, made.memory_efficient = nn.ReLU(inplace=True), True
        return made.train(layer.training)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """The maps before, (N, *, H, W) -> the new map, (N, growth, H, W)."""
        again = self.memory_efficient and self.training
        narrow = recomputed(self._narrow, *maps) if again else self._narrow(*maps)
        found: Tensor = self.conv2(self.relu(self.norm2(narrow)))
        return found

    def _narrow(self, *maps: Tensor) -> Tensor:
        found: Tensor = self.conv1(self.relu(normalized(self.norm1, torch.cat(maps, dim=1))))
        return found


class DenseBlock(nn.ModuleList):
    """Dense layers, each of which sees the maps of all before it.

    Args:
        layers: number of layers.
        channels: channels of the input.
        bottleneck, growth, norm, memory_efficient: the same as in `DenseLayer`.
    """

    def __init__(
        self, layers: int, channels: int, bottleneck: int, growth: int, norm: NormLayer, memory_efficient: bool
    ) -> None:
        widths = (channels + layer * growth for layer in range(layers))
        super().__init__(DenseLayer(width, bottleneck, growth, norm, memory_efficient) for width in widths)

    def forward(self, features: Tensor) -> Tensor:
        """(N, channels, H, W) -> (N, channels + layers * growth, H, W)."""
        maps = [features]
        for layer in self:
            maps.append(layer(maps))
        return torch.cat(maps, dim=1)
