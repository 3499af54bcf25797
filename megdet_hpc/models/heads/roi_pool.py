"""Ways to take a region's features from the levels of a pyramid, by torchvision's operators.

Shapes: R regions of the batch, S the side of a region's features.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign, roi_align, roi_pool


class PoolOverLevels(MultiScaleRoIAlign):
    """An operator over levels; it takes the place of torchvision's MultiScaleRoIAlign.

    A region takes its features from the same level as there. `scales` and `map_levels` must be set.
    """

    @abstractmethod
    def pooled(self, features: Tensor, regions: Tensor, scale: float) -> Tensor:
        """Features of the regions of one level, (r, C, S, S).

        Args:
            features: (N, C, H, W).
            regions: (r, 5), the position of the image in the batch and xyxy.
            scale: 1 / stride of the level.
        """

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Features of each region, (R, C, S, S).

        Args:
            x: levels of the pyramid by name, (N, C, H, W) each.
            boxes: regions of each image, xyxy in pixels of the resized image.
            image_shapes: sizes of the images, which are not used.
        """
        assert self.scales is not None and self.map_levels is not None
        levels = self.map_levels(boxes)
        images = torch.cat([torch.full_like(own[:, :1], image) for image, own in enumerate(boxes)])
        regions = torch.cat([images, torch.cat(boxes)], dim=1)
        pooled, order = [], []
        for level, (name, scale) in enumerate(zip(self.featmap_names, self.scales, strict=True)):
            index = torch.where(levels == level)[0]
            pooled.append(self.pooled(x[name], regions[index], scale))
            order.append(index)
        return torch.cat(pooled)[torch.cat(order).argsort()]


class MultiScaleRoIPool(PoolOverLevels):
    """RoIPool (Girshick, Fast R-CNN, ICCV 2015): the largest value of each bin of whole cells.

    A region's corners, divided by the level's stride, are rounded to the nearest cell, halves away from zero, and the
    last cell belongs to it. Its bins begin and end at whole cells too, so neighbours can share one. A bin without a
    cell is 0. `sampling_ratio` has no effect.
    """

    def pooled(self, features: Tensor, regions: Tensor, scale: float) -> Tensor:
        return roi_pool(features, regions, self.output_size, scale)


class AlignedMultiScaleRoIAlign(PoolOverLevels):
    """RoIAlign with regions moved by half a cell, for which torchvision's class has no parameter."""

    def pooled(self, features: Tensor, regions: Tensor, scale: float) -> Tensor:
        return roi_align(features, regions, self.output_size, scale, self.sampling_ratio, aligned=True)
