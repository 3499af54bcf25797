"""Anchors whose coordinates keep their digits when the features are in half precision."""

from __future__ import annotations

from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList


class WideAnchors(AnchorGenerator):
    """torchvision's anchors, in the type of the pixels.

    torchvision makes them in the type of the features. bfloat16 has 8 bits, so coordinates beyond 1,024 px would come
    in steps of 8.
    """

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """The anchors of each image, (A, 4) xyxy, finest level first.

        Args:
            image_list: (N, 3, H, W), and the size of each image before padding.
            feature_maps: levels; their sizes count.
        """
        pixels: Tensor = image_list.tensors
        if feature_maps[0].dtype != pixels.dtype:
            feature_maps = [pixels.new_empty(level.shape[-2:]) for level in feature_maps]
        anchors: list[Tensor] = super().forward(image_list, feature_maps)
        return anchors
