"""ResNets (He et al., CVPR 2016), ResNeXts and wide ResNets from torchvision, with a normalization layer of choice."""

from __future__ import annotations

from collections.abc import Sequence

import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops import SqueezeExcitation

from megdet_hpc.layers.norm import NormLayer
from megdet_hpc.models.backbones.base import Backbone, Stage

_STEM = ("conv1", "bn1", "relu", "maxpool")
_STRIDES = (4, 8, 16, 32)
_WIDTH = 64  # channels of torchvision's first stage
_REDUCTION = 16  # Hu et al., Squeeze-and-Excitation Networks (CVPR 2018), section 4


class ResNetBackbone(Backbone):
    """torchvision's ResNet without its classifier. Its state dict has torchvision's keys.

    Args:
        resnet: network whose modules become this backbone's: the stem's, then layer1, layer2 and so on.
        strides: stride of each of these layers [pixels].
        channels: channels of each of these layers; None: each has twice those of the layer before.
    """

    def __init__(
        self, resnet: ResNet, strides: Sequence[int] = _STRIDES, channels: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self._squeezed: set[str] = set()
        layers = [f"layer{i + 1}" for i in range(len(strides))]
        for name in (*_STEM, *layers):
            self.add_module(name, getattr(resnet, name))
        widths = channels or [resnet.inplanes // 2 ** (len(layers) - 1 - i) for i in range(len(layers))]
        self.stages = tuple(Stage(str(i), *each) for i, each in enumerate(zip(widths, strides, strict=True)))
        self.modules_by_stage = (_STEM, *((layer,) for layer in layers))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x, found = images, {}
        for name in _STEM:
            x = self.get_submodule(name)(x)
        for stage, (layer,) in zip(self.stages, self.modules_by_stage[1:], strict=True):
            x = found[stage.name] = self.get_submodule(layer)(x)
        return found

    def squeeze(self) -> None:
        """Put squeeze and excitation (Hu et al., CVPR 2018) behind each residual block's last normalization.

        That normalization's path gets `.0` at its end. Called before `freeze` and `load`, and after `use_convs`, since
        the new layers are not followed by normalization.
        """
        blocks = [(path, block) for path, block in self.named_modules() if isinstance(block, BasicBlock | Bottleneck)]
        for path, block in blocks:
            last = "bn3" if isinstance(block, Bottleneck) else "bn2"
            channels = block.get_submodule(last.replace("bn", "conv")).weight.shape[0]
            gate = SqueezeExcitation(channels, max(channels // _REDUCTION, 1))
            setattr(block, last, nn.Sequential(block.get_submodule(last), gate))
            self._squeezed.add(f"{path}.{last}")

    def renamed(self, key: str) -> str:
        path, _, name = key.rpartition(".")
        return f"{path}.0.{name}" if path in self._squeezed else key


class _NarrowResNet(ResNet):
    """torchvision's ResNet with `width` channels in its stem and first stage, and all others in proportion.

    Args:
        blocks: number of basic blocks of each stage.
        width: channels of the first stage.
        norm: constructor of the normalization layers.
    """

    def __init__(self, blocks: Sequence[int], width: int, norm: NormLayer | None) -> None:
        self._first = width
        super().__init__(BasicBlock, list(blocks), norm_layer=norm)
        self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's
        self.bn1 = self._norm_layer(width)

    def _make_layer(
        self, block: type[BasicBlock | Bottleneck], planes: int, blocks: int, stride: int = 1, dilate: bool = False
    ) -> nn.Sequential:
        if planes == _WIDTH:
            self.inplanes = self._first
        return super()._make_layer(block, planes * self._first // _WIDTH, blocks, stride, dilate)


def build_resnet(name: str, norm: NormLayer | None, dilated_c5: bool = False) -> ResNetBackbone:
    """The ResNet of a name. resnet10 and resnet10_w16 have one basic block in each stage; the others are torchvision's.

    Args:
        name: resnet10, resnet10_w16 of a quarter of its channels, or a name of torchvision's.
        norm: constructor of the normalization layers.
        dilated_c5: give the last stage the stride of the stage before; see `dilate`.
    """
    if name == "resnet10":
        resnet = ResNet(BasicBlock, [1, 1, 1, 1], norm_layer=norm)
    elif name == "resnet10_w16":
        resnet = _NarrowResNet([1, 1, 1, 1], 16, norm)
    else:
        resnet = torchvision.models.get_model(name, weights=None, norm_layer=norm)
    if not dilated_c5:
        return ResNetBackbone(resnet)
    dilate(resnet.layer4)
    return ResNetBackbone(resnet, (*_STRIDES[:-1], _STRIDES[-2]))


def dilate(layer: nn.Module) -> None:
    """Take the stride out of a stage, and dilate the convolutions behind it by 2 (atrous convolution).

    At even positions the stage then computes what it did with the stride, from the same weights. torchvision's
    `replace_stride_with_dilation` makes the same of bottlenecks and refuses basic blocks.

    Args:
        layer: stage whose first block has the stride; changed in place.
    """
    for conv in (module for module in layer.modules() if isinstance(module, nn.Conv2d)):
        if conv.stride == (2, 2):
            conv.stride = (1, 1)
        elif conv.kernel_size == (3, 3):
            conv.dilation = conv.padding = (2, 2)
