"""Feature pyramid networks (Lin et al., CVPR 2017) over a backbone's stages."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from megdet_hpc.layers.norm import NormLayer
from megdet_hpc.models.backbones.base import Backbone, Stage


class Pyramid(nn.Module):
    """A backbone and its FPN. Its state dict has the keys of torchvision's BackboneWithFPN.

    Attributes:
        body: backbone.
        fpn: feature pyramid network.
        levels: levels of the features that `forward` returns, finest first.
    """

    def __init__(self, body: Backbone, fpn: nn.Module, levels: Sequence[Stage]) -> None:
        super().__init__()
        self.body, self.fpn, self.levels = body, fpn, tuple(levels)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) -> for each level (N, channels, H / stride, W / stride), sizes rounded up."""
        found: dict[str, Tensor] = self.fpn(self.body(images))
        return found


def build_fpn(body: Backbone, channels: int, norm: NormLayer | None) -> Pyramid:
    """A backbone with an FPN: one level for each stage, and `pool` at twice the last stride.

    Args:
        body: backbone.
        channels: width of every level.
        norm: constructor of the FPN's normalization layers; None: it has none.
    """
    fpn = FeaturePyramidNetwork(
        [stage.channels for stage in body.stages], channels, extra_blocks=LastLevelMaxPool(), norm_layer=norm
    )
    levels = [Stage(stage.name, channels, stage.stride) for stage in body.stages]
    return Pyramid(body, fpn, [*levels, Stage("pool", channels, 2 * body.stages[-1].stride)])
