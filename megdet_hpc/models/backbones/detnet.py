"""DetNet (Li et al., ECCV 2018): a ResNet that keeps stride 16 from its fourth stage on."""

from __future__ import annotations

from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

from megdet_hpc.layers.norm import NormLayer
from megdet_hpc.models.backbones.resnet import ResNetBackbone

_BLOCKS = (3, 4, 6, 3, 3)  # DetNet-59: those of ResNet-50, and a sixth stage
_STRIDES = (4, 8, 16, 16, 16)
_CHANNELS = (256, 512, 1024, 1024, 1024)
_PLANES = 256  # width inside the blocks of the last two stages


def build_detnet(norm: NormLayer | None, blocks: tuple[int, int, int, int, int] = _BLOCKS) -> ResNetBackbone:
    """A DetNet; conv1 to layer3 are ResNet-50's, with torchvision's place of the stride in the 3 x 3 convolutions.

    layer4 and layer5 are the paper's stages 5 and 6: bottlenecks of 1024 channels whose 3 x 3 convolutions are dilated
    by 2. The first of each stage has a projection beside it, though its shape does not change.

    Args:
        norm: constructor of the normalization layers.
        blocks: number of blocks of each stage after the stem; by default DetNet-59's.
    """
    resnet = ResNet(Bottleneck, [*blocks[:3], 1], norm_layer=norm)
    make: NormLayer = norm or nn.BatchNorm2d
    resnet.layer4, resnet.layer5 = (_stage(number, make) for number in blocks[3:])
    return ResNetBackbone(resnet, _STRIDES, _CHANNELS)


def _stage(num_blocks: int, norm: NormLayer) -> nn.Sequential:
    channels = _CHANNELS[-1]
    projection = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), norm(channels))
    made = nn.Sequential(
        *(
            Bottleneck(channels, _PLANES, downsample=projection if block == 0 else None, dilation=2, norm_layer=norm)
            for block in range(num_blocks)
        )
    )
    for module in made.modules():
        if isinstance(module, nn.Conv2d):  # as torchvision's ResNet begins
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return made
