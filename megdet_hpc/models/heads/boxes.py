"""The heads that look at each region: pooling over a pyramid, box heads, and torchvision's RoIHeads around them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_loss
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper

from megdet_hpc.config import EvaluationConfig, TwoStageConfig
from megdet_hpc.layers.norm import NormLayer
from megdet_hpc.models.backbones.base import Stage
from megdet_hpc.models.heads.context import ContextPool
from megdet_hpc.models.heads.hard_examples import HardSampler, rate_regions
from megdet_hpc.models.heads.regions import TrainingRegions, matched_regions
from megdet_hpc.models.heads.roi_pool import AlignedMultiScaleRoIAlign, MultiScaleRoIPool
from megdet_hpc.models.sampling import SeededSampler

ROI_SIZE = 7
"""Side of the features of a region; Lin et al., Feature Pyramid Networks (CVPR 2017), section 4.2."""
POSITIVE_FRACTION = 0.25
"""Upper bound of the share of regions with an object among those that are sampled."""


def _two_fc(config: TwoStageConfig, norm: NormLayer | None) -> nn.Module:
    return TwoMLPHead(config.neck_channels * ROI_SIZE**2, config.box_head_channels)


def _four_conv_one_fc(config: TwoStageConfig, norm: NormLayer | None) -> nn.Module:
    channels = config.neck_channels
    return FastRCNNConvFCHead(
        (channels, ROI_SIZE, ROI_SIZE), [channels] * 4, [config.box_head_channels], norm_layer=norm
    )


BOX_HEADS: dict[str, Callable[[TwoStageConfig, NormLayer | None], nn.Module]] = {
    "2fc": _two_fc,
    "4conv1fc": _four_conv_one_fc,
}
"""Box heads by the value of model.box_head."""


def box_losses(
    logits: Tensor, moves: Tensor, labels: Sequence[Tensor], wanted: Sequence[Tensor], beta: float
) -> tuple[Tensor, Tensor]:
    """The losses of classes and boxes, means over all regions, as torchvision's fastrcnn_loss; 0 without any region.

    Args:
        logits: (R, K) of the regions of a batch, for K labels.
        moves: (R, 4 K) differences of the boxes.
        labels, wanted: (r,) and (r, 4) of the r regions of each image.
        beta: error below which the loss of boxes is quadratic (torchvision has 1 / 9 for all).
    """
    classes = torch.cat(list(labels))
    found = torch.where(classes > 0)[0]
    own = moves.reshape(len(classes), moves.shape[1] // 4, 4)[found, classes[found]]
    boxes = F.smooth_l1_loss(own, torch.cat(list(wanted))[found], beta=beta, reduction="sum")
    if not len(classes):  # crowd regions hold every proposal: a mean would be 0 / 0
        return logits.sum(), boxes
    return F.cross_entropy(logits, classes), boxes / classes.numel()


class RegionHeads(RoIHeads):
    """torchvision's RoIHeads with more choices: smooth L1's beta, crowd regions, a sampler that needs all losses.

    Attributes:
        box_beta: error below which the loss of boxes is quadratic.
    """

    box_beta = 1 / 9

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections in evaluation, losses in training."""
        if not self.training or targets is None:
            found: tuple[list[dict[str, Tensor]], dict[str, Tensor]]
            found = super().forward(features, proposals, image_shapes, targets)
            return found
        rate_regions(self, features, proposals, image_shapes, targets, self.box_beta)
        regions = matched_regions(self, proposals, targets, sample=True)
        logits, moves = self.box_predictor(self.box_head(self.box_roi_pool(features, regions.boxes, image_shapes)))
        classes, boxes = box_losses(logits, moves, regions.labels, regions.wanted, self.box_beta)
        losses = {"loss_classifier": classes, "loss_box_reg": boxes}
        if self.has_mask():
            losses["loss_mask"] = mask_loss(self, features, regions, image_shapes, targets)
        return [], losses


def mask_logits(
    heads: nn.Module, features: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]
) -> Tensor:
    """The output of the mask branch (`masks.add_mask_branch`) on some boxes of each image."""
    pool, head, predictor = (heads.get_submodule(f"mask_{part}") for part in ("roi_pool", "head", "predictor"))
    logits: Tensor = predictor(head(pool(features, boxes, sizes)))
    return logits


def mask_loss(
    heads: nn.Module,
    features: dict[str, Tensor],
    regions: TrainingRegions,
    sizes: list[tuple[int, int]],
    targets: Sequence[dict[str, Tensor]],
) -> Tensor:
    """The mean over the sampled regions with an object.

    Args:
        heads: heads with a mask branch.
        features: levels of the pyramid by name.
        regions: sample of the first stage.
        sizes: (height, width) of each image [pixels].
        targets: targets in torchvision's form, with masks.
    """
    chosen = [own > 0 for own in regions.labels]
    boxes, matched = (
        [own[some] for own, some in zip(column, chosen, strict=True)] for column in (regions.boxes, regions.objects)
    )
    masks, classes = ([target[key] for target in targets] for key in ("masks", "labels"))
    loss: Tensor = maskrcnn_loss(mask_logits(heads, features, boxes, sizes), boxes, masks, classes, matched)
    return loss


SAMPLERS: dict[str, Callable[[int, str], SeededSampler]] = {
    "random": lambda num_samples, salt: SeededSampler(num_samples, POSITIVE_FRACTION, salt),
    "ohem": HardSampler,
}
"""Samplers of regions by the value of model.sampler."""


def build_roi_heads(
    config: TwoStageConfig,
    evaluation: EvaluationConfig,
    parts: tuple[nn.Module, nn.Module, nn.Module],
    *,
    iou: float = 0.5,
    box_weights: tuple[float, float, float, float] | None = None,
    salt: str = "roi",
) -> RegionHeads:
    """The heads of a stage, with a sampler of the package.

    Args:
        config: keys of the model.
        evaluation: limits of the boxes that are kept.
        parts: pooling of the features, box head, and the predictor behind it.
        iou: least IoU of a region with an object.
        box_weights: factors of the differences of x, y, width and height; None: torchvision's 10, 10, 5, 5.
        salt: text that makes the sampler's draws differ from those of other samplers.
    """
    pool, box_head, predictor = parts
    heads = RegionHeads(
        ContextPool(pool, config.neck_channels) if config.global_context else pool,
        box_head,
        predictor,
        fg_iou_thresh=iou,
        bg_iou_thresh=iou,
        batch_size_per_image=config.roi_samples_per_image,
        positive_fraction=POSITIVE_FRACTION,
        bbox_reg_weights=box_weights,
        score_thresh=evaluation.score_threshold,
        nms_thresh=evaluation.nms_iou,
        detections_per_img=evaluation.max_detections,
    )
    heads.fg_bg_sampler = SAMPLERS[config.sampler](config.roi_samples_per_image, salt)
    heads.box_beta = config.box_beta
    return heads


def roi_pool(levels: Sequence[Stage], config: TwoStageConfig, size: int = ROI_SIZE) -> MultiScaleRoIAlign:
    """Pooling of regions over levels of the pyramid with their true strides.

    torchvision would infer the strides once, from the unpadded height of the first batch. Where that height is less
    than 0.71 of the padded height, the strides would be wrong by a factor of two for the whole run.

    Args:
        levels: levels from which regions take their features, finest first.
        config: keys of the model.
        size: side of the features of a region.
    """
    names = [level.name for level in levels]
    align = AlignedMultiScaleRoIAlign if config.roi_aligned else MultiScaleRoIAlign
    kind = MultiScaleRoIPool if config.roi_pool == "pool" else align
    pool = kind(featmap_names=names, output_size=size, sampling_ratio=config.roi_sampling_ratio)
    pool.scales = [1 / level.stride for level in levels]
    # a level for each octave of a region's size, though levels may have one stride: DetNet's P4 and P5 have 16
    finest = int(math.log2(levels[0].stride))
    last = finest + len(levels) - 1
    pool.map_levels = LevelMapper(finest, last, pool.canonical_scale, pool.canonical_level)
    return pool
