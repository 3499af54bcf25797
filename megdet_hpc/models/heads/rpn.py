"""The region proposal network (Ren et al., NeurIPS 2015) over the levels of a pyramid, from torchvision's parts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from megdet_hpc.config import TwoStageConfig
from megdet_hpc.layers.convolution import is_3x3
from megdet_hpc.layers.norm import NormLayer, count_levels, level_norms
from megdet_hpc.layers.replace import add_norms
from megdet_hpc.models.heads.anchors import WideAnchors
from megdet_hpc.models.heads.crowds import ignore_crowds
from megdet_hpc.models.sampling import SeededSampler

_ASPECT_RATIOS = (0.5, 1.0, 2.0)  # Lin et al., Feature Pyramid Networks (CVPR 2017), section 4.1


class ConfiguredRpn(RegionProposalNetwork):
    """torchvision's RPN, which has smooth L1's beta and the anchors in crowd regions as parameters.

    Attributes:
        box_beta: error below which the loss of boxes is quadratic.
        reads_crowds: whether targets need `crowds`, here and behind the RPN.
    """

    box_beta = 1 / 9
    reads_crowds = False

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Labels 1, 0 and -1 (not in the loss) of each image's anchors, and the box of the object of each."""
        labels, boxes = super().assign_targets_to_anchors(anchors, targets)
        return ignore_crowds(labels, anchors, targets), boxes

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The loss of objectness and that of boxes, as torchvision computes them; 0 without any sampled anchor."""
        chosen = self.fg_bg_sampler(labels)
        positive, negative = (torch.where(torch.cat(masks))[0] for masks in chosen)
        sampled = torch.cat([positive, negative])
        wanted = torch.cat(regression_targets)[positive]
        boxes = F.smooth_l1_loss(pred_bbox_deltas[positive], wanted, beta=self.box_beta, reduction="sum")
        logits = objectness.flatten()[sampled]
        if not len(sampled):  # crowd regions hold every anchor: a mean would be 0 / 0
            return logits.sum(), boxes
        return F.binary_cross_entropy_with_logits(logits, torch.cat(labels)[sampled]), boxes / sampled.numel()


def build_rpn(config: TwoStageConfig, num_levels: int, norm: NormLayer | None) -> ConfiguredRpn:
    """The RPN of a configuration, its sampler seeded.

    Args:
        config: keys of the model.
        num_levels: levels of the pyramid, which share the head.
        norm: constructor of normalization layers behind the head's convolution, one for each level; None: it has none.
    """
    anchors = WideAnchors(tuple((size,) for size in config.anchor_sizes), (_ASPECT_RATIOS,) * num_levels)
    head = RPNHead(config.neck_channels, anchors.num_anchors_per_location()[0])
    if norm is not None:
        add_norms(head, level_norms(norm, num_levels), is_3x3)
        count_levels(head)
    rpn = ConfiguredRpn(
        anchors,
        head,
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=config.rpn_samples_per_image,
        positive_fraction=0.5,
        pre_nms_top_n=_top_n(config.rpn_pre_nms_top_n),
        post_nms_top_n=_top_n(config.rpn_post_nms_top_n, config.rpn_eval_post_nms_top_n),
        nms_thresh=0.7,
    )
    rpn.fg_bg_sampler = SeededSampler(config.rpn_samples_per_image, 0.5, "rpn")
    rpn.box_beta, rpn.reads_crowds = config.rpn_box_beta, config.crowds == "ignore"
    return rpn


def _top_n(training: int, testing: int | None = None) -> dict[str, int]:
    return {"training": training, "testing": testing or max(training // 2, 1)}
