"""Online hard example mining (Shrivastava et al., CVPR 2016): the box head trains on the regions of highest loss.

Shapes: K labels, background included; r regions of an image, R of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import batched_nms

from megdet_hpc.models.heads.regions import matched_regions
from megdet_hpc.models.sampling import SeededSampler

HARD_IOU = 0.7
"""IoU from which on the region of lower loss is left out; OHEM_NMS_THRESH of the authors' code."""


class HardSampler(SeededSampler):
    """The regions of highest loss of each image, after NMS among those of one label. Nothing is drawn.

    The choice for an image does not depend on the images beside it, so it is the same on every number of ranks.
    `rate_regions` gives the losses of the next call. Positives have no upper bound.

    Args:
        num_samples: regions per image; fewer where NMS leaves fewer.
        salt: text of the sampler, as SeededSampler has it.
    """

    def __init__(self, num_samples: int, salt: str) -> None:
        super().__init__(num_samples, 1.0, salt)
        self.rated: list[tuple[Tensor, Tensor]] = []

    def rate(self, boxes: Sequence[Tensor], losses: Sequence[Tensor]) -> None:
        """Set the regions (r, 4) of each image in the next call, and their losses (r,)."""
        self.rated = list(zip(boxes, losses, strict=True))

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Boolean masks of the chosen positives and negatives of each image. A region with label -1 is never chosen."""
        assert len(self.rated) == len(matched_idxs), "rate() must have every image of the batch"
        positives, negatives = [], []
        for labels, (boxes, losses) in zip(matched_idxs, self.rated, strict=True):
            usable = torch.where(labels >= 0)[0]
            kept = batched_nms(boxes[usable], losses[usable].to(boxes.dtype), labels[usable], HARD_IOU)
            chosen = torch.zeros_like(labels, dtype=torch.bool)
            chosen[usable[kept[: self.batch_size_per_image]]] = True
            positives.append(chosen & (labels > 0))
            negatives.append(chosen & (labels == 0))
        self.rated = []
        self.num_sampled = torch.cat([*positives, *negatives]).sum()
        self.num_positive = torch.cat(positives).sum()
        return positives, negatives


@torch.no_grad()
def rate_regions(
    stage: RoIHeads,
    features: dict[str, Tensor],
    proposals: Sequence[Tensor],
    sizes: list[tuple[int, int]],
    targets: Sequence[dict[str, Tensor]],
    beta: float = 1 / 9,
) -> None:
    """Give a HardSampler the loss of every region: of the proposals and of the objects' own boxes.

    With another sampler nothing happens. No gradient is kept. Normalization layers of the box head use their running
    statistics, so they send no messages and do not change, and a region's loss does not depend on other images.

    Args:
        stage: pooling, box head, predictor and matcher.
        features: levels of the pyramid by name.
        proposals: (r, 4) boxes of each image.
        sizes: (height, width) of each image [pixels].
        targets: targets in torchvision's form.
        beta: error below which the loss of boxes is quadratic.
    """
    sampler = stage.fg_bg_sampler
    if not isinstance(sampler, HardSampler):
        return
    every = matched_regions(stage, proposals, targets)
    kind = proposals[0].device.type
    # Until 2.10 torch keeps the weights that it shortens here for the training pass too, where they have no gradient.
    unkept = torch.autocast(
        kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
    )
    with _evaluating(stage.box_head), _evaluating(stage.box_predictor), unkept:
        logits, moves = stage.box_predictor(stage.box_head(stage.box_roi_pool(features, every.boxes, sizes)))
    losses = region_losses(logits, moves, torch.cat(every.labels), torch.cat(every.wanted), beta)
    sampler.rate(every.boxes, losses.split([len(own) for own in every.boxes]))


def region_losses(logits: Tensor, moves: Tensor, labels: Tensor, wanted: Tensor, beta: float = 1 / 9) -> Tensor:
    """The loss of each region, (R,); their mean is the sum of the two losses of torchvision's fastrcnn_loss.

    Args:
        logits: (R, K).
        moves: (R, 4 K) differences of the boxes, or (R, 4) for all classes.
        labels: (R,) int64, 0 for the background; less for a region without one.
        wanted: (R, 4) differences to the object.
        beta: error below which the loss of boxes is quadratic.
    """
    known = labels.clamp(min=0)
    by_class = moves.reshape(len(moves), -1, 4)
    own = by_class[torch.arange(len(moves), device=moves.device), known if by_class.shape[1] > 1 else 0]
    boxes = F.smooth_l1_loss(own, wanted, beta=beta, reduction="none").sum(1)
    return F.cross_entropy(logits, known, reduction="none") + torch.where(labels > 0, boxes, 0)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """A module in evaluation mode until the block ends."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
