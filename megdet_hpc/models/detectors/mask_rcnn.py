"""Mask R-CNN (He et al., ICCV 2017) with an FPN: Faster R-CNN and a mask of each object, from torchvision's parts."""

from __future__ import annotations

from megdet_hpc.config import EvaluationConfig, MaskRcnnConfig, NormConfig
from megdet_hpc.layers.norm import norm_layer
from megdet_hpc.models.detectors.faster_rcnn import FasterRcnn, build_faster_rcnn
from megdet_hpc.models.heads.masks import add_mask_branch
from megdet_hpc.models.losses import Number
from megdet_hpc.parallel.communicator import Communicator


class MaskRcnn(FasterRcnn):
    """The detector of boxes and masks. Its state dict has the keys of torchvision's MaskRCNN.

    The loss of masks is the mean over the regions with an object, whose number over all ranks is its count.
    """

    def region_count(self, loss: str) -> Number:
        return self.region_samplers()[0].num_positive if loss == "loss_mask" else super().region_count(loss)


def build_mask_rcnn(
    config: MaskRcnnConfig, norm: NormConfig, evaluation: EvaluationConfig, num_labels: int, group: Communicator
) -> MaskRcnn:
    """The detector of a configuration; see `build_faster_rcnn`."""
    boxes = build_faster_rcnn(config, norm, evaluation, num_labels, group)
    levels = boxes.backbone.of_regions
    add_mask_branch(boxes.roi_heads, levels, config, num_labels, norm_layer(norm, "heads", group))
    return MaskRcnn(boxes.backbone, boxes.rpn, boxes.roi_heads, boxes.large_kernels)
