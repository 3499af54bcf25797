"""The one-stage detector of Liu et al., SSD (ECCV 2016), for any maps: DSOD, ScratchDet and Pelee bring theirs.

Shapes: N images, A default boxes of an image on all maps, K labels, label 0 the background.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD as TorchvisionSSD

from megdet_hpc.config import EvaluationConfig, NormConfig, SsdConfig
from megdet_hpc.data.batch import Batch
from megdet_hpc.errors import UserError
from megdet_hpc.layers.norm import norm_layer
from megdet_hpc.models.detector import Detections, Detector, Draws, parts_by_name, torchvision_targets
from megdet_hpc.models.heads.default_boxes import BACKGROUND, boxes_of, hardest, match, without_crowds
from megdet_hpc.models.heads.ssd import SsdHead
from megdet_hpc.models.losses import Loss, Losses
from megdet_hpc.models.two_stage import part_of
from megdet_hpc.parallel.communicator import Communicator

SSD300_RATIOS = ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,))
"""Long side by short side of the default boxes of each map in SSD300."""
# The authors' variances 0.1, 0.1, 0.2, 0.2 are what offsets are divided by.
_BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)


class SsdFeatures(nn.Module, ABC):
    """The maps on which default boxes lie.

    Attributes:
        channels: channels of each map, finest first.
    """

    channels: tuple[int, ...]

    @abstractmethod
    def forward(self, pixels: Tensor) -> list[Tensor]:
        """(N, 3, H, W) normalized pixels -> the maps, finest first."""


def _objects(matched: Tensor, target: dict[str, Tensor]) -> dict[str, Tensor]:
    """Labels (A,) and boxes (A, 4) of the object of each default box; anything where a box has none."""
    if not len(target["labels"]):
        return {"labels": matched, "boxes": target["boxes"].new_zeros(len(matched), 4)}
    return {key: target[key][matched.clamp(min=0)] for key in ("labels", "boxes")}


class Ssd(Detector):
    """Default boxes on several maps, and a convolution on each map that scores and moves them.

    The loss is cross-entropy, plus smooth L1 of the boxes with an object. The background that is in it are the hardest
    boxes of each image, `negatives` for each box with an object. Both sums are divided by the boxes with an object on
    all ranks together. torchvision divides by those of its process, so its loss depends on which rank has an image.

    Args:
        backbone: maps of an image.
        head: heads of all maps.
        generator: default boxes.
        config: keys of the family.
        evaluation: limits of the boxes that are kept.
    """

    def __init__(
        self,
        backbone: SsdFeatures,
        head: SsdHead,
        generator: DefaultBoxGenerator,
        config: SsdConfig,
        evaluation: EvaluationConfig,
    ) -> None:
        super().__init__()
        self.backbone, self.head, self.generator = backbone, head, generator
        self.reads_crowds, self.negatives = config.crowds == "ignore", config.negatives
        # what torchvision's method reads
        self.box_coder = BoxCoder(weights=_BOX_WEIGHTS)
        self.score_thresh, self.nms_thresh = evaluation.score_threshold, evaluation.nms_iou
        self.detections_per_img, self.topk_candidates = evaluation.max_detections, config.candidates_per_class

    def losses(self, batch: Batch, draws: Draws) -> Losses:
        outputs, boxes = self._run(batch)
        classes, offsets, counts = [], [], []
        targets = torchvision_targets(batch.targets, crowds=self.reads_crowds)
        for target, scores, moves in zip(targets, outputs["cls_logits"], outputs["bbox_regression"], strict=True):
            matched = match(boxes, target["boxes"])
            if self.reads_crowds:
                matched = without_crowds(matched, boxes, target["crowds"])
            # All default boxes of an image take part, and those that do not count are masked: how many there are is
            # known to the device alone, and to ask for it would make the host wait.
            found = matched >= 0
            own = _objects(matched, target)
            labels = torch.where(found, own["labels"], 0)
            each = F.cross_entropy(scores, labels, reduction="none")
            count = found.sum()
            background = hardest(each.detach(), matched == BACKGROUND, self.negatives * count)
            classes.append(torch.where(found | background, each, 0.0).sum())
            wanted = self.box_coder.encode_single(torch.where(found[:, None], own["boxes"].to(boxes), boxes), boxes)
            away = F.smooth_l1_loss(moves, wanted.to(moves), reduction="none")
            offsets.append(torch.where(found[:, None], away, 0.0).sum())
            counts.append(count)
        count = torch.stack(counts).sum()
        return {
            "loss_classifier": Loss(torch.stack(classes).sum(), count),
            "loss_box_reg": Loss(torch.stack(offsets).sum(), count),
        }

    def found(self, batch: Batch) -> list[dict[str, Tensor]]:
        outputs, boxes = self._run(batch)
        found: list[dict[str, Tensor]] = TorchvisionSSD.postprocess_detections(
            self,
            outputs,
            [boxes] * len(batch.sizes),
            batch.sizes,
        )
        return found

    def detect(self, batch: Batch) -> list[Detections]:
        return [Detections.of(image) for image in self.found(batch)]

    def _run(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """The heads' outputs (N, A, K) and (N, A, 4), and the default boxes (A, 4)."""
        pixels = self.normalized(batch)
        try:
            levels = self.backbone(pixels)
            outputs = self.head(levels)
        except ValueError as error:  # the normalization of a map of 1 x 1 cells
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError(
                f"the smallest maps of {tuple(pixels.shape[2:])} pixels have one value in all ({error}); give larger "
                "images or more of them, or norm.kind gn"
            ) from error
        return outputs, boxes_of(self.generator, pixels, levels)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """All parameters by part: backbone and heads."""
        return parts_by_name(self, part_of)

    def class_layers(self) -> dict[str, tuple[int, int]]:
        return {
            f"head.classes.{level}.{layer}": (number, 1)
            for level, number in enumerate(self.head.boxes_per_cell)
            for layer in range(len(self.head.classes[level]))  # type: ignore[arg-type]
        }

    def coordinate_modules(self) -> list[nn.Module]:
        return [self.head]

    def dense(self, images: Tensor) -> list[Tensor]:
        levels = self.backbone(images)
        return [*levels, *self.head(levels).values()]


def build_ssd(
    backbone: SsdFeatures,
    ratios: Sequence[Sequence[int]],
    config: SsdConfig,
    norm: NormConfig,
    evaluation: EvaluationConfig,
    num_labels: int,
    group: Communicator,
    *,
    kernel: int = 3,
) -> Ssd:
    """The detector on given maps.

    Args:
        backbone: maps of an image.
        ratios: long side by short side of the default boxes of each map; each gives two boxes, and two are squares.
        config: keys of the family.
        norm: kind and parts of the normalization layers.
        evaluation: limits of the boxes that are kept.
        num_labels: number of categories, the background included.
        group: ranks that share batch statistics.
        kernel: side of the heads' convolutions.
    """
    steps = None if config.box_steps is None else list(config.box_steps)
    generator = DefaultBoxGenerator(
        [list(own) for own in ratios], scales=list(config.box_scales), steps=steps, clip=False
    )
    number = generator.num_anchors_per_location()
    head = SsdHead(backbone.channels, number, num_labels, norm_layer(norm, "heads", group), kernel)
    return Ssd(backbone, head, generator, config, evaluation)
