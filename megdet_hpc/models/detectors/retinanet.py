"""RetinaNet (Lin et al., Focal Loss for Dense Object Detection, ICCV 2017), from torchvision's parts.

Shapes: N images, A anchors of an image on all levels, K labels, of which label 0 stays unused.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import box_iou

from megdet_hpc.config import EvaluationConfig, NormConfig, RetinaNetConfig
from megdet_hpc.data.batch import Batch
from megdet_hpc.layers.norm import count_levels, level_norms, norm_layer
from megdet_hpc.models.backbones.configured import build_backbone
from megdet_hpc.models.detector import Detections, Detector, Draws, parts_by_name, torchvision_targets
from megdet_hpc.models.heads.anchors import WideAnchors
from megdet_hpc.models.heads.crowds import ignore_crowds
from megdet_hpc.models.losses import Loss, Losses
from megdet_hpc.models.necks.fpn import Pyramid, build_retina_fpn
from megdet_hpc.models.two_stage import part_of
from megdet_hpc.parallel.communicator import Communicator

# Section 4 of the paper: three ratios; an anchor takes part from IoU 0.5 on, and is background below 0.4.
_ASPECT_RATIOS = (0.5, 1.0, 2.0)
_POSITIVE_IOU, _NEGATIVE_IOU = 0.5, 0.4


class RetinaNet(Detector):
    """The one-stage detector. Its state dict has the keys of torchvision's RetinaNet.

    Two things differ from torchvision, whose functions compute the rest:

    - Both losses are sums over all images, divided by the anchors with an object on all ranks together (the paper,
      section 4.1). torchvision divides each image's sum by its own anchors with an object, or by 1, and averages over
      images. So there an image without objects can outweigh all others, and the mean depends on who has which image.
    - Label 0 is never found. torchvision has outputs for it too, which are trained to be 0.

    As in torchvision, the distance of anchors is the padded side divided by the cells of the level, rounded down. So it
    is less than 64 and 128 pixels on the last levels of images whose sides these do not divide.

    Args:
        backbone: backbone with the levels P3 to P7.
        head: both heads, shared by all levels.
        anchors: makes the anchors of each level.
        evaluation: limits of the boxes that are kept.
        candidates: detections that are kept of each level before NMS.
        reads_crowds: leave anchors without an object that are within a crowd region out of the loss.
    """

    def __init__(
        self,
        backbone: Pyramid,
        head: RetinaNetHead,
        anchors: WideAnchors,
        evaluation: EvaluationConfig,
        candidates: int,
        reads_crowds: bool,
    ) -> None:
        super().__init__()
        self.backbone, self.anchor_generator, self.head = backbone, anchors, head
        self.proposal_matcher = Matcher(_POSITIVE_IOU, _NEGATIVE_IOU, allow_low_quality_matches=True)
        self.reads_crowds = reads_crowds
        # what torchvision's methods read
        self.box_coder = BoxCoder(weights=(1.0, 1.0, 1.0, 1.0))
        self.score_thresh, self.nms_thresh = evaluation.score_threshold, evaluation.nms_iou
        self.detections_per_img, self.topk_candidates = evaluation.max_detections, candidates

    def losses(self, batch: Batch, draws: Draws) -> Losses:
        outputs, anchors, _ = self._run(batch)
        sums: dict[str, list[Tensor]] = {"classification": [], "bbox_regression": []}
        counts = []
        for image, target in enumerate(torchvision_targets(batch.targets, crowds=self.reads_crowds)):
            matched = self._matched(target, anchors[image])
            own = {key: value[image : image + 1] for key, value in outputs.items()}
            found = self.head.compute_loss([target], own, [anchors[image]], [matched])
            counts.append((matched >= 0).sum())
            for key, value in found.items():
                sums[key].append(value * counts[-1].clamp(min=1))  # torchvision has divided by it
        count = torch.stack(counts).sum()
        names = {"classification": "loss_classifier", "bbox_regression": "loss_box_reg"}
        return {names[key]: Loss(torch.stack(values).sum(), count) for key, values in sums.items()}

    def _matched(self, target: dict[str, Tensor], anchors: Tensor) -> Tensor:
        """The object of each anchor, (A,) int64; -1 is background, -2 not in the loss."""
        boxes = target["boxes"]
        if len(boxes):
            matched: Tensor = self.proposal_matcher(box_iou(boxes.to(anchors.dtype), anchors))
        else:
            matched = torch.full((len(anchors),), Matcher.BELOW_LOW_THRESHOLD, device=anchors.device)
        names = {"background": Matcher.BELOW_LOW_THRESHOLD, "ignored": Matcher.BETWEEN_THRESHOLDS}
        return ignore_crowds([matched], [anchors], [target], **names)[0]

    def found(self, batch: Batch) -> list[dict[str, Tensor]]:
        outputs, anchors, cells = self._run(batch)
        outputs["cls_logits"] = torch.cat(
            [torch.full_like(outputs["cls_logits"][..., :1], -math.inf), outputs["cls_logits"][..., 1:]], dim=-1
        )
        per_level = {key: list(value.split(cells, dim=1)) for key, value in outputs.items()}
        found: list[dict[str, Tensor]] = TorchvisionRetinaNet.postprocess_detections(
            self, per_level, [list(own.split(cells)) for own in anchors], batch.sizes
        )
        return found

    def detect(self, batch: Batch) -> list[Detections]:
        return [Detections.of(image) for image in self.found(batch)]

    def _run(self, batch: Batch) -> tuple[dict[str, Tensor], list[Tensor], list[int]]:
        """The heads' outputs (N, A, K) and (N, A, 4), the anchors (A, 4) of each image, and how many a level has."""
        pixels = self.normalized(batch)
        levels = list(self.backbone(pixels).values())
        anchors = self.anchor_generator(ImageList(pixels, batch.sizes), levels)
        each = self.anchor_generator.num_anchors_per_location()
        cells = [level.shape[2] * level.shape[3] * number for level, number in zip(levels, each, strict=True)]
        return self.head(levels), anchors, cells

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """All parameters by part: backbone, fpn and heads."""
        return parts_by_name(self, part_of)

    def class_layers(self) -> dict[str, tuple[int, int]]:
        return {"head.classification_head.cls_logits": (self.head.classification_head.num_anchors, 1)}

    def coordinate_modules(self) -> list[nn.Module]:
        return [self.head]

    def dense(self, images: Tensor) -> list[Tensor]:
        levels = list(self.backbone(images).values())
        return [*levels, *self.head(levels).values()]


def build_retinanet(
    config: RetinaNetConfig, norm: NormConfig, evaluation: EvaluationConfig, num_labels: int, group: Communicator
) -> RetinaNet:
    """The detector of a configuration.

    Args:
        config: keys of the model.
        norm: kind and parts of the normalization layers; `heads` are those of all levels.
        evaluation: limits of the boxes that are kept.
        num_labels: number of categories, the background included.
        group: ranks that share batch statistics.
    """
    body = build_backbone(config, norm_layer(norm, "backbone", group))
    fpn_norm = norm_layer(norm, "fpn", group)
    pyramid = build_retina_fpn(body, config.neck_channels, fpn_norm, config.p6_from, config.levels)
    sizes = tuple(
        tuple(int(size * 2 ** (step / config.anchor_scales)) for step in range(config.anchor_scales))
        for size in config.anchor_sizes
    )
    anchors = WideAnchors(sizes, (_ASPECT_RATIOS,) * len(sizes))
    head_norm = norm_layer(norm, "heads", group)
    head = RetinaNetHead(
        config.neck_channels,
        anchors.num_anchors_per_location()[0],
        num_labels,
        norm_layer=None if head_norm is None else level_norms(head_norm, len(pyramid.levels)),
    )
    count_levels(head.classification_head)
    count_levels(head.regression_head)
    return RetinaNet(
        pyramid, head, anchors, evaluation, config.candidates_per_level, reads_crowds=config.crowds == "ignore"
    )
