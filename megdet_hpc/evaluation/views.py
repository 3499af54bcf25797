"""Views of an image at test time, several scales and the flip, and one list of detections of them all.

Shapes: k detections of a view, M x M the grid of a mask on its box. Boxes are xyxy in pixels of the image as it is
stored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import box_iou

from megdet_hpc.config import DataConfig, EvaluationConfig
from megdet_hpc.data.augmentation import Augmentation
from megdet_hpc.data.batch import Batch
from megdet_hpc.data.categories import LabelIds
from megdet_hpc.data.masks import Rle, encode_masks
from megdet_hpc.data.transforms import HorizontalFlip
from megdet_hpc.evaluation.detections import DetectionTable, objects, on_host
from megdet_hpc.evaluation.merging import Kept, hard_nms, soft_nms
from megdet_hpc.models.detector import Detections, Detector
from megdet_hpc.models.heads.masks import THRESHOLD, pasted


@dataclass(frozen=True)
class View:
    """A way to see an image.

    Attributes:
        augmentation: its resize, and its flip.
        flipped: whether left and right are exchanged.
    """

    augmentation: Augmentation
    flipped: bool


def views_of(data: DataConfig, evaluation: EvaluationConfig, *, square: bool) -> tuple[View, ...]:
    """The views of a configuration; without scales and flip the image as the evaluation resizes it.

    Args:
        data: sides of the evaluation.
        evaluation: scales and flip.
        square: whether the detector takes squares (Geometry.square).
    """
    views = []
    for side in evaluation.scales or (data.val_short_side,):
        longest = max(round(data.max_side * side / data.val_short_side), side)
        own = dataclasses.replace(data, val_short_side=side, max_side=longest)
        plain = Augmentation.of(own, training=False, square=square)
        views.append(View(plain, flipped=False))
        if evaluation.flip:
            views.append(View(Augmentation([*plain.transforms, HorizontalFlip(1.0)]), flipped=True))
    return tuple(views)


def what_is_merged(data: DataConfig, evaluation: EvaluationConfig) -> list[str]:
    """A sentence on the views and on soft-NMS; none where the detections are the detector's own."""
    if not evaluation.merges:
        return []
    sides = ", ".join(map(str, evaluation.scales or (data.val_short_side,)))
    number = len(views_of(data, evaluation, square=False))
    views = f"{number} views" if number > 1 else "1 view"
    flip = ", each flipped too" if evaluation.flip else ""
    kinds = {"none": "NMS", "linear": "linear soft-NMS", "gaussian": "gaussian soft-NMS"}
    return [f"{views} of each image: short sides {sides}{flip}; detections are merged by {kinds[evaluation.soft_nms]}"]


@dataclass(frozen=True)
class Seen:
    """What a detector found in a view of an image.

    Attributes:
        boxes: (k, 4) float64.
        scores: (k,) float64.
        labels: (k,) int64, 1 and up.
        masks: (k, 1, M, M) float32, the probability of each cell of the box; None of a detector of boxes.
    """

    boxes: NDArray[np.float64]
    scores: NDArray[np.float64]
    labels: NDArray[np.int64]
    masks: Tensor | None


@torch.no_grad()
def see(model: Detector, batch: Batch, device: torch.device, *, flipped: bool) -> list[Seen]:
    """What the detector finds in each image of a batch.

    Args:
        model: detector in evaluation mode.
        batch: images in one view, on the CPU.
        device: device of the model.
        flipped: whether the view is flipped; boxes and masks are flipped back.
    """
    found = model.found(batch.to(device))
    ends = np.cumsum([len(image["scores"]) for image in found])[:-1]
    columns = [np.split(column, ends) for column in on_host([Detections.of(image) for image in found])]
    every = []
    for image, boxes, scores, labels, (_, width), scale in zip(found, *columns, batch.sizes, batch.scales, strict=True):
        masks = image["masks"].float().cpu() if "masks" in image else None
        if flipped:
            boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)
            masks = None if masks is None else masks.flip(3)
        every.append(Seen(boxes / np.tile(scale, 2), scores, labels, masks))
    return every


def merged(
    views: Sequence[Seen], image_id: int, size: tuple[int, int], evaluation: EvaluationConfig, labels: LabelIds
) -> DetectionTable:
    """The detections of an image from all its views.

    Args:
        views: what was found in each.
        image_id: id of the image.
        size: height and width of the image as it is stored [pixels].
        evaluation: how, and how many are kept.
        labels: category ids by the model's labels; what it has no id for is left out.
    """
    boxes = np.concatenate([view.boxes for view in views])
    label = np.concatenate([view.labels for view in views])
    kept, scores = _kept(boxes, np.concatenate([view.scores for view in views]), label, evaluation)
    kept, scores = kept[: evaluation.max_detections], scores[: evaluation.max_detections]
    boxes, label = boxes[kept], label[kept]
    masks = None
    if all(view.masks is not None for view in views):
        masks = objects([_mean_mask(views, *own, size, evaluation.nms_iou) for own in zip(boxes, label, strict=True)])
    boxes_xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    image_ids = np.full(len(kept), image_id, np.int64)
    return DetectionTable(image_ids, boxes_xywh, scores, labels.ids[label], masks).rows(labels.present[label])


def merged_batch(
    seen: Sequence[Sequence[Seen]], batch: Batch, evaluation: EvaluationConfig, labels: LabelIds
) -> list[DetectionTable]:
    """The detections of each image of a batch from all its views.

    Args:
        seen: what each view saw, image by image.
        batch: the images in one of the views.
        evaluation: how, and how many are kept.
        labels: category ids by the model's labels; what it has no id for is left out.
    """
    images = zip(zip(*seen, strict=True), batch.image_ids, batch.own_sizes, strict=True)
    return [merged(views, image_id, size, evaluation, labels) for views, image_id, size in images]


def _kept(
    boxes: NDArray[np.float64], scores: NDArray[np.float64], labels: NDArray[np.int64], evaluation: EvaluationConfig
) -> Kept:
    if evaluation.soft_nms == "none":
        kept = hard_nms(boxes, scores, labels, evaluation.nms_iou)
        return kept, scores[kept]
    return soft_nms(
        boxes,
        scores,
        labels,
        kind=evaluation.soft_nms,
        iou=evaluation.nms_iou,
        sigma=evaluation.soft_nms_sigma,
        least_score=evaluation.soft_nms_score,
    )


def _mean_mask(
    views: Sequence[Seen], box: NDArray[np.float64], label: np.int64, size: tuple[int, int], iou: float
) -> Rle:
    """The mean of the masks of an object, one of each view that sees it.

    A view's mask is that of its detection of the same class with the highest IoU with the object's box, if that is
    above `iou`. The view that the box is from has its own.
    """
    total, count = torch.zeros(size), 0
    for view in views:
        rows = np.flatnonzero(view.labels == label)
        overlaps = box_iou(torch.from_numpy(box[None]), torch.from_numpy(view.boxes[rows]))[0].numpy()
        if view.masks is None or not len(rows) or not (overlaps.max() > iou or (overlaps == 1).any()):
            continue
        best = rows[np.argmax(overlaps)]
        total += pasted(view.masks[best], torch.from_numpy(view.boxes[best]).float(), size)
        count += 1
    return encode_masks((total / max(count, 1) > THRESHOLD).numpy()[None])[0]
