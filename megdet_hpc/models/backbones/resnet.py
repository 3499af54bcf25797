"""ResNets (He et al., CVPR 2016) from torchvision, with a normalization layer of choice."""

from __future__ import annotations

import torchvision
from torch import Tensor
from torchvision.models.resnet import BasicBlock, ResNet

from megdet_hpc.layers.norm import NormLayer
from megdet_hpc.models.backbones.base import Backbone, Stage, frozen

_STEM = ("conv1", "bn1", "relu", "maxpool")
_LAYERS = ("layer1", "layer2", "layer3", "layer4")
# stages as model.frozen_stages counts them
_FROZEN_TOGETHER = (_STEM, *((layer,) for layer in _LAYERS))
_FIRST_STRIDE = 4  # stride of layer1; each further layer doubles it


class ResNetBackbone(Backbone):
    """torchvision's ResNet without its classifier. Its state dict has torchvision's keys.

    Args:
        resnet: network whose modules become this backbone's.
    """

    def __init__(self, resnet: ResNet) -> None:
        super().__init__()
        for name in (*_STEM, *_LAYERS):
            self.add_module(name, getattr(resnet, name))
        last = len(_LAYERS) - 1
        self.stages = tuple(
            Stage(str(i), resnet.inplanes // 2 ** (last - i), _FIRST_STRIDE * 2**i) for i in range(last + 1)
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x, found = images, {}
        for name in _STEM:
            x = self.get_submodule(name)(x)
        for stage, layer in zip(self.stages, _LAYERS, strict=True):
            x = found[stage.name] = self.get_submodule(layer)(x)
        return found

    def freeze(self, num_stages: int) -> None:
        for stage in _FROZEN_TOGETHER[:num_stages]:
            for name in stage:
                setattr(self, name, frozen(self.get_submodule(name)))


def build_resnet(name: str, norm: NormLayer | None) -> ResNetBackbone:
    """The ResNet of a name. resnet10 has one basic block in each stage; the others are torchvision's."""
    if name == "resnet10":
        return ResNetBackbone(ResNet(BasicBlock, [1, 1, 1, 1], norm_layer=norm))
    return ResNetBackbone(torchvision.models.get_model(name, weights=None, norm_layer=norm))
