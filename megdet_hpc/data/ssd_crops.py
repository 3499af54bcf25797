"""Expansion and crops of SSD (Liu et al., ECCV 2016, section 2.2, and the authors' code).

Shape legend: image (3, H, W) uint8; a target's boxes are xyxy in its pixels, its masks are (k, H, W); t trials.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torchvision.ops import box_iou
from torchvision.transforms.v2 import functional as F

from megdet_hpc.data.crops import areas, cut, placed, within
from megdet_hpc.data.sample import Target
from megdet_hpc.data.transforms import Transform, resized

# Values of one plane that an expanded image and its masks may take together; 4 x 4 times a picture of a camera
# would take gigabytes.
_MOST_VALUES = 2**27
_ASPECTS = (0.5, 2.0)  # the crop's width to its height, in shares of the image's sides
_TRIALS = 50


class Expand(Transform):
    """Puts the image somewhere on a larger one, so that objects become small.

    Args:
        probability: how often [0 to 1].
        most: largest ratio of the sides, from 1 on.
    """

    stream = "expand"

    def __init__(self, probability: float, most: float) -> None:
        self.probability, self.most = probability, most

    def __call__(self, image: Tensor, target: Target, generator: torch.Generator) -> tuple[Tensor, Target]:
        made, larger, down, right = torch.rand(4, generator=generator).tolist()
        if made >= self.probability:
            return image, target
        ratio = 1 + (self.most - 1) * larger
        image, target = _small_enough(image, target, ratio)
        height, width = image.shape[1:]
        new = int(height * ratio), int(width * ratio)
        return placed(image, target, int(down * (new[0] - height + 1)), int(right * (new[1] - width + 1)), *new)


def _small_enough(image: Tensor, target: Target, ratio: float) -> tuple[Tensor, Target]:
    """The image, made smaller where it would take too much memory once expanded."""
    height, width = image.shape[1:]
    planes = len(image) + (0 if target.masks is None else len(target))
    scale = math.sqrt(_MOST_VALUES / (planes * height * width)) / ratio
    if scale >= 1:
        return image, target
    size = max(1, int(height * scale)), max(1, int(width * scale))
    return F.resize_image(image, list(size), antialias=True), resized(target, (height, width), size)


class IouCrop(Transform):
    """Takes the whole image, or a crop that holds an object well enough.

    One of these is chosen, each as likely as the others: the whole image, any crop, and a crop whose IoU with some
    object has a least value. 50 crops are tried for each; what none of them fulfils is not among the choices. That is
    the authors' scheme. Theirs may leave no object in the crop; here, as in torchvision, the centre of an object lies
    in every crop, and an image without objects stays whole.

    Objects whose centre lies in the crop are kept, difficult ones among them. Crowd regions decide nothing and stay as
    long as anything of them is left.

    Args:
        ious: least values, from 0 to below 1.
        scales: range of the square root of the crop's share of the image [0 to 1].
    """

    stream = "iou_crop"

    def __init__(self, ious: Sequence[float], scales: tuple[float, float]) -> None:
        self.least = (None, 0.0, *ious)  # the whole image, any crop
        self.scales = scales

    def largest_scale(self, height: int, width: int) -> float:
        return 1 / (self.scales[0] * math.sqrt(_ASPECTS[0]))

    def __call__(self, image: Tensor, target: Target, generator: torch.Generator) -> tuple[Tensor, Target]:
        objects = within(target.boxes, *image.shape[1:]).cpu()[~target.crowd]
        objects = objects[areas(objects) > 0]
        # the first that can be fulfilled, in a random order: each of those as likely as the others
        for choice in torch.randperm(len(self.least), generator=generator).tolist():
            least = self.least[choice]
            if least is None or not len(objects):
                break
            crops = self._crops(image.shape[1], image.shape[2], generator)
            good = (box_iou(crops, objects).amax(dim=1) >= least) & _centres_within(objects, crops).any(dim=1)
            if good.any():
                return _cropped(image, target, crops[good.nonzero()[0, 0]])
        return image, target

    def _crops(self, height: int, width: int, generator: torch.Generator) -> Tensor:
        """(t, 4) windows xyxy of whole pixels."""
        scale, aspect, down, right = torch.rand(4, _TRIALS, generator=generator, dtype=torch.float64)
        scale = self.scales[0] + (self.scales[1] - self.scales[0]) * scale
        low, high = (scale**2).clamp(min=_ASPECTS[0]), (scale**-2).clamp(max=_ASPECTS[1])  # sides are 1 at most
        aspect = low + (high - low) * aspect
        wide = (width * scale * aspect.sqrt()).floor().clamp(1, width)
        tall = (height * scale / aspect.sqrt()).floor().clamp(1, height)
        left, top = (right * (width - wide + 1)).floor(), (down * (height - tall + 1)).floor()
        return torch.stack([left, top, left + wide, top + tall], dim=1).float()


def _centres_within(boxes: Tensor, crops: Tensor) -> Tensor:
    """(t, k) whether the centre of a box (k, 4) lies in a crop (t, 4)."""
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    inside: Tensor = ((centres >= crops[:, None, :2]) & (centres < crops[:, None, 2:])).all(dim=2)
    return inside


def _cropped(image: Tensor, target: Target, crop: Tensor) -> tuple[Tensor, Target]:
    """A crop of whole pixels, the objects whose centre lies in it, and what is left of crowd regions."""
    left, top, right, bottom = (int(value) for value in crop)
    height, width = bottom - top, right - left
    image, target = cut(image, target, top, left, height, width)
    boxes = within(target.boxes, height, width)
    centred = _centres_within(target.boxes, target.boxes.new_tensor([[0, 0, width, height]]))[0]
    keep = (areas(boxes) > 0) & (centred | target.crowd.to(boxes.device))
    if target.masks is not None:
        keep &= target.masks.flatten(1).any(dim=1)
    return image, replace(target, boxes=boxes).rows(keep.cpu())
