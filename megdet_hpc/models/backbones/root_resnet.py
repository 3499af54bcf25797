"""Root-ResNets (Zhu et al., ScratchDet, CVPR 2019): ResNets whose first layers keep the detail of small images.

Three networks go by the name. The paper's own last maps are 3 x 3 and 1 x 1. The authors' Caffe network has blocks with
normalization before each convolution, and ends in 5 x 5, 5 x 5; their MMDetection network has a ResNet's usual blocks
and ends in 3 x 3, 3 x 3 (all for images of 300 pixels). The last two are here, as `order` pre and post.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from torchvision.ops import Conv2dNormActivation

from megdet_hpc.layers.norm import NormLayer
from megdet_hpc.models.backbones.base import Backbone, Stage

Root = Literal["root", "a", "b", "original"]
Order = Literal["post", "pre"]

BLOCKS = {"root_resnet10": (1, 1, 1, 1), "root_resnet18": (2, 2, 2, 2), "root_resnet34": (3, 4, 6, 3)}
"""Blocks of the four layers that a ResNet has, by name of the backbone."""
_WIDTH = 64
_ROOT_STRIDE: dict[Root, int] = {"root": 2, "a": 2, "b": 2, "original": 4}
# Strides of the six levels. An image of 300 pixels has 38, 19, 10, 5, 3, 3 cells on a side, or 38, 19, 10, 5, 5, 5.
_LEVELS: dict[Order, tuple[int, ...]] = {"post": (8, 16, 32, 64, 128, 128), "pre": (8, 16, 32, 64, 64, 64)}


class PreActivationBlock(nn.Module):
    """Two 3 x 3 convolutions with normalization and ReLU before each (He et al., ECCV 2016).

    Where the shape changes, a 1 x 1 convolution without normalization carries the normalized input past them.

    Args:
        channels: channels of the input.
        width: channels of the output.
        stride: stride of the first convolution.
        norm: constructor of the normalization layers.
        activated: the input is normalized already, by the root.
    """

    def __init__(self, channels: int, width: int, stride: int, norm: NormLayer, activated: bool) -> None:
        super().__init__()
        self.before = nn.Identity() if activated else nn.Sequential(norm(channels), nn.ReLU(inplace=True))
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.between = nn.Sequential(norm(width), nn.ReLU(inplace=True))
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        same = stride == 1 and channels == width
        self.shortcut = None if same else nn.Conv2d(channels, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, channels, H, W) -> the sum (N, width, H / stride, W / stride), and the last convolution's part of it."""
        active = self.before(x)
        branch: Tensor = self.conv2(self.between(self.conv1(active)))
        return branch + (x if self.shortcut is None else self.shortcut(active)), branch


class RootResNetBackbone(Backbone):
    """A Root-ResNet: the root, a ResNet's four layers, and further layers of one block each.

    Levels are those from stride 8 on. With `pre` a level is the output of its layer's last convolution, before the
    sum, as in the authors' Caffe network; with `post` it is what goes on to the next layer.

    Args:
        root: first layers.
        layers: residual blocks of each layer.
        stages: channels and stride of each layer.
    """

    def __init__(self, root: nn.Module, layers: Sequence[nn.Sequential], stages: Sequence[Stage]) -> None:
        super().__init__()
        self.root = root
        for i, layer in enumerate(layers, start=1):
            self.add_module(f"layer{i}", layer)
        self.stages = tuple(stage for stage in stages if stage.stride >= _LEVELS["post"][0])
        self._num_fine = len(stages) - len(self.stages)
        self.modules_by_stage = (("root",), *((f"layer{i + 1}",) for i in range(len(layers))))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x, levels = self.root(images), []
        for (path,) in self.modules_by_stage[1:]:
            for block in self.get_submodule(path).children():
                out = block(x)
                x, level = out if isinstance(out, tuple) else (out, out)
            levels.append(level)
        return {stage.name: level for stage, level in zip(self.stages, levels[self._num_fine :], strict=True)}


def build_root_resnet(
    name: str, norm: NormLayer | None, root: Root = "root", order: Order = "post", width: int = _WIDTH
) -> RootResNetBackbone:
    """The Root-ResNet of a name. root_resnet10 has one block in each layer.

    Args:
        name: name in BLOCKS.
        norm: constructor of the normalization layers; None: nn.BatchNorm2d.
        root: first layers, as in the paper's comparison. original: a ResNet's, a 7 x 7 convolution of stride 2 and max
            pooling; a: without the pooling; b: the convolution without stride; root: three 3 x 3 convolutions without
            stride in its place.
        order: place of the normalization, behind (post) or before (pre) the convolutions of a block.
        width: channels of the root.
    """
    make: NormLayer = norm or nn.BatchNorm2d
    blocks = BLOCKS[name]
    strides = [stride for stride in (2, 4) if stride >= _ROOT_STRIDE[root]] + [*_LEVELS[order]]
    widths = [width * 2**i for i in range(len(blocks))] + [2 * width] * (len(strides) - len(blocks))
    numbers = [*blocks] + [1] * (len(strides) - len(blocks))
    channels, before, layers = width, _ROOT_STRIDE[root], []
    for i, (own, stride, number) in enumerate(zip(widths, strides, numbers, strict=True)):
        first = _block(channels, own, stride // before, make, order, activated=i == 0)
        layers.append(nn.Sequential(first, *(_block(own, own, 1, make, order) for _ in range(number - 1))))
        channels, before = own, stride
    stages = [Stage(str(i), *each) for i, each in enumerate(zip(widths, strides, strict=True))]
    body = RootResNetBackbone(_root(root, width, make), layers, stages)
    for module in body.modules():
        if isinstance(module, nn.Conv2d) and order == "pre":
            nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return body


def _root(root: Root, width: int, norm: NormLayer) -> nn.Sequential:
    if root == "root":
        convs = [Conv2dNormActivation(3 if i == 0 else width, width, 3, norm_layer=norm) for i in range(3)]
        return nn.Sequential(*convs, nn.MaxPool2d(2, ceil_mode=True))
    conv = Conv2dNormActivation(3, width, 7, 1 if root == "b" else 2, norm_layer=norm)
    return nn.Sequential(conv, *([] if root == "a" else [nn.MaxPool2d(3, 2, 1)]))


def _block(channels: int, width: int, stride: int, norm: NormLayer, order: Order, activated: bool = False) -> nn.Module:
    if order == "pre":
        return PreActivationBlock(channels, width, stride, norm, activated)
    same = stride == 1 and channels == width
    shortcut = None if same else nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), norm(width))
    return BasicBlock(channels, width, stride, shortcut, norm_layer=norm)
