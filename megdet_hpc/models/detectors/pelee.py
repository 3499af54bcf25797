"""Pelee (Wang, Li and Ling, NeurIPS 2018): SSD on PeleeNet, with residual blocks before heads of 1 x 1 convolutions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from megdet_hpc.config import EvaluationConfig, NormConfig, PeleeConfig
from megdet_hpc.layers.norm import NormLayer, norm_layer
from megdet_hpc.models.backbones.peleenet import PeleeNetBackbone, build_peleenet
from megdet_hpc.models.ssd import Ssd, SsdFeatures, build_ssd
from megdet_hpc.parallel.communicator import Communicator

# Long side by short side of the default boxes; the same on all six maps.
_RATIOS = ((2, 3),) * 6
_KERNEL = 3  # of the convolutions that make the coarsest maps


class ResidualPredictionBlock(nn.Module):
    """A residual block of 1 x 1, 3 x 3 and 1 x 1 convolutions between a map and its heads (section 2.2).

    Args:
        channels: channels of the map.
        width: channels of the result, twice those inside.
        norm: constructor of the normalization layers.
    """

    def __init__(self, channels: int, width: int, norm: NormLayer) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            Conv2dNormActivation(channels, width // 2, 1, norm_layer=norm),
            Conv2dNormActivation(width // 2, width // 2, 3, norm_layer=norm),
            Conv2dNormActivation(width // 2, width, 1, norm_layer=norm, activation_layer=None),
        )
        self.shortcut = Conv2dNormActivation(channels, width, 1, norm_layer=norm, activation_layer=None)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) -> (N, width, H, W)."""
        return F.relu(self.shortcut(x) + self.branch(x))


class CoarserMap(nn.Module):
    """A 1 x 1 and a 3 x 3 convolution with biases and without normalization, which make the next map.

    Args:
        channels: channels of the map before.
        inside: channels between the convolutions.
        width: channels of the result.
        stride: 2 halves the map, rounded up; 1 takes two cells from each side's length. A map that has fewer than three
            is then widened by zeros, so that one cell or two stay what they are.
    """

    def __init__(self, channels: int, inside: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inside, 1)
        self.conv2 = nn.Conv2d(inside, width, _KERNEL, stride, padding=1 if stride == 2 else 0)
        self.stride = stride
        for conv in (self.conv1, self.conv2):
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        if self.stride == 1:
            rows, columns = (int(side < _KERNEL) for side in x.shape[2:])
            x = F.pad(x, (columns, columns, rows, rows))
        return F.relu(self.conv2(x))


class PeleeFeatures(SsdFeatures):
    """PeleeNet's last two levels and three coarser maps, each behind a residual block. The first has both heads twice.

    An image of 304 pixels has maps of 19, 19, 10, 5, 3 and 1 cells on a side.

    Args:
        body: backbone.
        width: channels of the maps.
        norm: constructor of the normalization layers of the residual blocks.
    """

    def __init__(self, body: PeleeNetBackbone, width: int, norm: NormLayer) -> None:
        super().__init__()
        self.body = body
        levels = [stage.channels for stage in body.stages[-2:]]
        self.coarser = nn.ModuleList(
            [
                CoarserMap(levels[-1], width, width, 2),
                CoarserMap(width, width // 2, width, 1),
                CoarserMap(width, width // 2, width, 1),
            ]
        )
        inputs = [*levels, *([width] * len(self.coarser))]
        self.blocks = nn.ModuleList(ResidualPredictionBlock(channels, width, norm) for channels in inputs)
        self.channels = (width,) * (len(inputs) + 1)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        levels = list(self.body(pixels).values())[-2:]
        for module in self.coarser:
            levels.append(module(levels[-1]))
        maps = [block(level) for block, level in zip(self.blocks, levels, strict=True)]
        return [maps[0], *maps]


def build_pelee(
    config: PeleeConfig, norm: NormConfig, evaluation: EvaluationConfig, num_labels: int, group: Communicator
) -> Ssd:
    """The detector of a configuration.

    Args:
        config: keys of the model.
        norm: kind and parts of the normalization layers; those of the residual blocks belong to the backbone.
        evaluation: limits of the boxes that are kept.
        num_labels: number of categories, the background included.
        group: ranks that share batch statistics.
    """
    make = norm_layer(norm, "backbone", group) or nn.BatchNorm2d
    body = build_peleenet(
        make, growth=config.growth, stem_width=config.growth, memory_efficient=config.memory_efficient
    )
    features = PeleeFeatures(body, 8 * config.growth, make)  # 256 channels at the published growth of 32
    return build_ssd(features, _RATIOS, config, norm, evaluation, num_labels, group, kernel=config.head_kernel)
