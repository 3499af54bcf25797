"""DenseNets (Huang et al., CVPR 2017) from torchvision, with a normalization layer of choice."""

from __future__ import annotations

import re

import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models import DenseNet
from torchvision.models.densenet import _DenseLayer

from megdet_hpc.layers.norm import NormLayer
from megdet_hpc.layers.replace import replace_layers, replace_norms
from megdet_hpc.models.backbones.base import Backbone, Stage
from megdet_hpc.models.backbones.dense_layer import DenseLayer

_STEM = ("conv0", "norm0", "relu0", "pool0")
_NUM_BLOCKS = 4
_FIRST_STRIDE = 4  # of the first block; each further block doubles it
# torchvision's published files still have the names that its dense layers had at first
_OLD_NAME = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")


class DenseNetBackbone(Backbone):
    """torchvision's DenseNet without its classifier. Its state dict has torchvision's keys.

    A stage is a dense block and the normalization and ReLU behind it, which in the network belong to the transition
    to the next block; behind the last block they are what the classifier gets. So every level is normalized and 0 or
    more, as a ResNet's is. The transitions' average pooling rounds sizes down; the sides of a batch are divisible by
    32, where nothing is rounded.

    Args:
        densenet: network whose modules become this backbone's.
        norm: constructor of the normalization layers; None: torchvision's.
        memory_efficient: compute the wide part of each dense layer again in the backward pass.
    """

    def __init__(self, densenet: DenseNet, norm: NormLayer | None, memory_efficient: bool = False) -> None:
        super().__init__()
        self.features = densenet.features
        if norm is not None:
            replace_norms(self.features, norm, keep_settings=False)
        if memory_efficient:
            replace_layers(self.features, _DenseLayer, lambda _, layer: DenseLayer.efficient(layer))
        last = f"norm{_NUM_BLOCKS + 1}"
        behind = [*(f"transition{i}" for i in range(1, _NUM_BLOCKS)), last]
        self._blocks = [(f"denseblock{i}", name) for i, name in enumerate(behind, start=1)]
        widths = [self._width(name) for name in behind]
        self.stages = tuple(Stage(str(i), width, _FIRST_STRIDE * 2**i) for i, width in enumerate(widths))
        self.modules_by_stage = tuple(tuple(f"features.{name}" for name in names) for names in (_STEM, *self._blocks))

    def _width(self, name: str) -> int:
        """The channels behind a dense block, from the normalization that follows."""
        layer = self.features.get_submodule(name)
        (weight,) = (value for key, value in layer.state_dict().items() if key in ("norm.weight", "weight"))
        return len(weight)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x, found = images, {}
        for name in _STEM:
            x = self.features.get_submodule(name)(x)
        for stage, (block, behind) in zip(self.stages, self._blocks, strict=True):
            x = self.features.get_submodule(block)(x)
            after = self.features.get_submodule(behind)
            if not isinstance(after, nn.Sequential):  # the last normalization
                found[stage.name] = F.relu(after(x), inplace=True)
                break
            x = found[stage.name] = after.get_submodule("relu")(after.get_submodule("norm")(x))
            x = after.get_submodule("pool")(after.get_submodule("conv")(x))
        return found

    def renamed(self, key: str) -> str:
        return _OLD_NAME.sub(r"\1\2", key)


def build_densenet(name: str, norm: NormLayer | None, memory_efficient: bool = False) -> DenseNetBackbone:
    """The DenseNet of torchvision's name, such as densenet121."""
    return DenseNetBackbone(torchvision.models.get_model(name, weights=None), norm, memory_efficient)
