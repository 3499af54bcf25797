"""Feature pyramid networks (Lin et al., CVPR 2017) over a backbone's stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import (
    ExtraFPNBlock,
    FeaturePyramidNetwork,
    LastLevelMaxPool,
    LastLevelP6P7,
)

from megdet_hpc.config import COARSEST_OF_REGIONS
from megdet_hpc.layers.norm import NormLayer
from megdet_hpc.models.backbones.base import Backbone, Stage

FINEST = 2
"""Number of a backbone's finest level: P2, of stride 4."""


class OneConvolvedLevel(ExtraFPNBlock):
    """One level on top in place of RetinaNet's two: P7 of a backbone whose own stages reach P6, or P6 alone.

    Args:
        in_channels, out_channels: channels of the level that it is made from, and its own.
        from_level: make it from the level before; False: from the backbone's last stage.
        number: 6 or 7, which names its layer.
    """

    def __init__(self, in_channels: int, out_channels: int, from_level: bool, number: int) -> None:
        super().__init__()
        self.from_level, self.name = from_level, f"p{number}"
        convolution = nn.Conv2d(in_channels, out_channels, 3, 2, 1)
        nn.init.kaiming_uniform_(convolution.weight, a=1)
        nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
        self.add_module(self.name, convolution)

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """The levels with one more, of which each side is half that of the one before, rounded up."""
        made = self.get_submodule(self.name)((results if self.from_level else x)[-1])
        return [*results, made], [*names, self.name]


class Pyramid(nn.Module):
    """A backbone and its FPN. Its state dict has the keys of torchvision's BackboneWithFPN.

    Attributes:
        body: backbone.
        fpn: feature pyramid network.
        levels: levels of the features that `forward` returns, finest first.
        of_regions: levels from which regions take their features, finest first.

    Args:
        inputs: names of the backbone's stages that the FPN takes, finest first.
        first: number of the finest level.
    """

    def __init__(
        self, body: Backbone, fpn: nn.Module, levels: Sequence[Stage], inputs: Sequence[str], first: int
    ) -> None:
        super().__init__()
        self.body, self.fpn, self.levels, self.inputs = body, fpn, tuple(levels), tuple(inputs)
        self.of_regions = self.levels[: COARSEST_OF_REGIONS - first + 1]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) -> for each level (N, channels, H / stride, W / stride), sizes rounded up."""
        stages = self.body(images)
        found: dict[str, Tensor] = self.fpn({name: stages[name] for name in self.inputs})
        return found


def build_fpn(body: Backbone, channels: int, norm: NormLayer | None, levels: tuple[int, int] = (2, 6)) -> Pyramid:
    """A backbone with an FPN: one level for each stage. One level more is `pool`, at twice the last stride.

    A stage with the stride of the stage before, such as DetNet's last two, is added to it as it is.

    Args:
        body: backbone.
        channels: width of every level.
        norm: constructor of the FPN's normalization layers; None: it has none.
        levels: numbers of the first and the last level.
    """
    first, last = levels
    taken = body.stages[first - FINEST :]
    pooled = last - first + 1 > len(taken)
    fpn = FeaturePyramidNetwork(
        [stage.channels for stage in taken],
        channels,
        extra_blocks=LastLevelMaxPool() if pooled else None,
        norm_layer=norm,
    )
    found = [Stage(stage.name, channels, stage.stride) for stage in taken]
    if pooled:
        found.append(Stage("pool", channels, 2 * taken[-1].stride))
    return Pyramid(body, fpn, found, [stage.name for stage in taken], first)


def build_retina_fpn(
    body: Backbone,
    channels: int,
    norm: NormLayer | None,
    p6_from: Literal["p5", "c5"],
    levels: tuple[int, int] = (3, 7),
) -> Pyramid:
    """RetinaNet's pyramid (Lin et al., ICCV 2017, section 4): no level for the finest stage, two convolved ones on top.

    Five stages, such as DetNet's, have one convolved level on top.

    Args:
        body: backbone.
        channels: width of every level.
        norm: constructor of the FPN's normalization layers, which the ones on top have not; None: it has none.
        p6_from: input of the first on top: the level before, or the backbone's last stage.
        levels: numbers of the first and the last level.
    """
    finest, last = levels
    taken = body.stages[finest - FINEST :]
    before = channels if p6_from == "p5" else taken[-1].channels
    first = len(taken) + finest  # number of the first level on top
    top: ExtraFPNBlock | None = None
    if first == last:
        top = OneConvolvedLevel(before, channels, p6_from == "p5", last)
    elif first < last:
        top = LastLevelP6P7(before, channels)
        top.use_P5 = p6_from == "p5"  # where both are equally wide, torchvision would always take the level
    fpn = FeaturePyramidNetwork([stage.channels for stage in taken], channels, extra_blocks=top, norm_layer=norm)
    own = [Stage(stage.name, channels, stage.stride) for stage in taken]
    coarsest = [Stage(f"p{i}", channels, own[-1].stride * 2 ** (i - first + 1)) for i in range(first, last + 1)]
    return Pyramid(body, fpn, [*own, *coarsest], [stage.name for stage in taken], finest)
