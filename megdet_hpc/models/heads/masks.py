"""The mask of each object: torchvision's mask head, and its grids pasted into the image.

Shapes: m objects of an image, M x M the grid of a mask on its box.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import paste_masks_in_image

from megdet_hpc.config import CascadeMaskRcnnConfig, MaskRcnnConfig
from megdet_hpc.data.batch import Batch
from megdet_hpc.data.masks import Rle, encode_masks
from megdet_hpc.layers.norm import NormLayer
from megdet_hpc.models.backbones.base import Stage
from megdet_hpc.models.detector import Detections
from megdet_hpc.models.heads.boxes import roi_pool

# He et al., Mask R-CNN (ICCV 2017), figure 4: four convolutions on 14 x 14 features, masks of 28 x 28.
_ROI_SIZE = 14
_NUM_CONVS = 4
THRESHOLD = 0.5
"""Probability above which a pixel belongs to a mask; ibid., section 3.1."""


def add_mask_branch(
    heads: nn.Module,
    levels: Sequence[Stage],
    config: MaskRcnnConfig | CascadeMaskRcnnConfig,
    num_labels: int,
    norm: NormLayer | None,
) -> None:
    """Give heads torchvision's `mask_roi_pool`, `mask_head` and `mask_predictor`.

    Args:
        heads: changed in place.
        levels: levels of the pyramid from which regions take their features.
        config: keys of the model.
        num_labels: number of categories, the background included.
        norm: constructor of the head's normalization layers; None: it has none.
    """
    channels = config.mask_head_channels
    heads.mask_roi_pool = roi_pool(levels, config, _ROI_SIZE)
    heads.mask_head = MaskRCNNHeads(levels[0].channels, [channels] * _NUM_CONVS, 1, norm_layer=norm)
    heads.mask_predictor = MaskRCNNPredictor(channels, channels, num_labels)


def dense_masks(heads: nn.Module, features: Tensor, num_positive: int) -> Tensor:
    """The output of the mask branch for as many regions as can have an object; for the planner.

    Args:
        heads: heads with a mask branch.
        features: a level of the pyramid, (N, C, H, W).
        num_positive: most regions of the batch with an object.
    """
    channels, most = features.shape[1], max(num_positive, 1)
    regions = torch.zeros(most, channels, _ROI_SIZE, _ROI_SIZE, device=features.device).requires_grad_()
    masks: Tensor = heads.get_submodule("mask_predictor")(heads.get_submodule("mask_head")(regions))
    return masks


def detections_of(found: Sequence[Mapping[str, Tensor]], batch: Batch) -> list[Detections]:
    """The objects of each image, masks on the image's own size where there are any.

    Args:
        found: dicts of torchvision's heads: boxes in pixels of the resized image, and `masks` (m, 1, M, M), the
            probability of each cell of the box.
        batch: images that they were found in.
    """
    every = []
    for image, scale, size in zip(found, batch.scales, batch.own_sizes, strict=True):
        plain = Detections.of(image)
        if "masks" not in image:
            every.append(plain)
            continue
        boxes = plain.boxes.cpu() / plain.boxes.new_tensor(scale, device="cpu").repeat(2)
        masks = _pasted(image["masks"].float().cpu(), boxes, size)
        every.append(Detections(plain.boxes, plain.scores, plain.labels, masks))
    return every


def pasted(mask: Tensor, box: Tensor, size: tuple[int, int]) -> Tensor:
    """The probability of each pixel of an image of a size (height, width) that it belongs to an object.

    Args:
        mask: (1, M, M) probability of each cell of the box.
        box: (4,) xyxy in pixels of the image.
        size: height and width of the image [pixels].
    """
    whole: Tensor = paste_masks_in_image(mask[None], box[None], size)[0, 0]
    return whole


def _pasted(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> list[Rle]:
    """Masks in an image of a size, one at a time: a hundred of a large image would take gigabytes."""
    rles = []
    for mask, box in zip(masks, boxes, strict=True):
        rles += encode_masks((pasted(mask, box, size)[None] > THRESHOLD).numpy())
    return rles
