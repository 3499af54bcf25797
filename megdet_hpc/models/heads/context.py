"""What a region sees of the image around it: large separable convolutions, and a feature of the whole image.

Shapes: R regions of the batch, S the side of a region's features, C channels of the pyramid, k length of a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megdet_hpc.config import TwoStageConfig
from megdet_hpc.layers.norm import NormLayer, count_levels, level_norms
from megdet_hpc.models.backbones.base import Stage


class LargeKernels(nn.Module):
    """Large separable convolutions (Peng et al., Large Kernel Matters, CVPR 2017; Li et al., Light-Head R-CNN, 2017).

    Two paths, k x 1 then 1 x k, and 1 x k then k x 1, whose sum is normalized and cut at 0. All levels share the
    weights, as they share the heads behind; batch statistics are each level's own (`layers.norm.LevelNorms`).

    Args:
        names: levels that are convolved. Other levels are left out of the output.
        channels: C.
        width: channels between the two parts of a path.
        length: k, an odd number.
        norm: constructor of the normalization; None: there is none.
    """

    def __init__(self, names: Sequence[str], channels: int, width: int, length: int, norm: NormLayer | None) -> None:
        super().__init__()
        self.names = tuple(names)
        tall, wide = (length, 1), (1, length)
        self.tall_first, self.wide_first = (
            nn.Sequential(
                nn.Conv2d(channels, width, first, padding=(first[0] // 2, first[1] // 2)),
                nn.Conv2d(width, channels, second, padding=(second[0] // 2, second[1] // 2), bias=norm is None),
            )
            for first, second in ((tall, wide), (wide, tall))
        )
        for layer in (*self.tall_first, *self.wide_first):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        self.norm = level_norms(norm, len(names))(channels) if norm is not None else nn.Identity()
        count_levels(self)

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Levels (N, C, H, W) by name -> those that are convolved, of the same shapes."""
        return {name: self._level(features[name]) for name in self.names}

    def _level(self, level: Tensor) -> Tensor:
        return F.relu(self.norm(self.tall_first(level) + self.wide_first(level)))


def build_large_kernels(config: TwoStageConfig, levels: Sequence[Stage], norm: NormLayer | None) -> LargeKernels | None:
    """The convolutions of model.large_kernels on the levels of which regions take features; None where it is 0."""
    if not config.large_kernels:
        return None
    names = [level.name for level in levels]
    return LargeKernels(names, config.neck_channels, config.large_kernel_channels, config.large_kernels, norm)


class ContextPool(nn.Module):
    """Pooling of regions that adds a feature of the whole image to each region of it.

    The image is pooled as one more region, over its own size without padding; the mean of its cells passes a linear
    layer. That begins at zero, so a detector begins as the one without it.

    Args:
        pool: pooling over levels, with the call of torchvision's MultiScaleRoIAlign.
        channels: C.
    """

    def __init__(self, pool: nn.Module, channels: int) -> None:
        super().__init__()
        self.pool, self.context = pool, nn.Linear(channels, channels)
        nn.init.zeros_(self.context.weight)
        nn.init.zeros_(self.context.bias)

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]) -> Tensor:
        """Features of each region, (R, C, S, S).

        Args:
            features: levels of the pyramid by name, (N, C, H, W) each.
            boxes: regions of each image, xyxy in pixels of the resized image.
            sizes: (height, width) of each image [pixels].
        """
        images = [_whole(size, own) for size, own in zip(sizes, boxes, strict=True)]
        whole = self.context(self.pool(features, images, sizes).mean((2, 3)))  # (N, C)
        image = torch.cat([torch.full_like(own[:, 0], index).long() for index, own in enumerate(boxes)])
        regions: Tensor = self.pool(features, boxes, sizes)
        return regions + whole[image][:, :, None, None]


def _whole(size: tuple[int, int], like: Tensor) -> Tensor:
    """The box of an image, (1, 4), in the type of its regions. A tracer of the graph follows the size."""
    height, width = (torch.as_tensor(side).to(like) for side in size)
    zero = torch.zeros_like(width)
    return torch.stack([zero, zero, width, height])[None]
