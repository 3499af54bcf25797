"""Changes of colour in training, as SSD has them (Liu et al., ECCV 2016, and the authors' code).

Shape legend: image (3, H, W) uint8 RGB.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from megdet_hpc.config import AugmentationConfig
from megdet_hpc.data.sample import Target
from megdet_hpc.data.transforms import Transform
from megdet_hpc.devices import is_gpu

_LEVELS = 256
_TURN = 360.0  # degrees
_NUM_DRAWS = 9  # for each of four changes whether and how much, and the place of the contrast


class PhotometricDistort(Transform):
    """Changes brightness, contrast, saturation and hue, each with one probability; contrast first or last by even odds.

    Brightness is added and contrast multiplied, as in SSD's code; torchvision's functions of these names multiply, and
    mix with the mean grey. Saturation and hue are torchvision's.
    """

    stream = "photometric"

    def __init__(self, config: AugmentationConfig) -> None:
        self.config = config

    def __call__(self, image: Tensor, target: Target, generator: torch.Generator) -> tuple[Tensor, Target]:
        draws = torch.rand(_NUM_DRAWS, generator=generator).tolist()
        strengths = (self.config.brightness, self.config.contrast, self.config.saturation, self.config.hue)
        made = [draw < self.config.photometric and most > 0 for draw, most in zip(draws[:4], strengths, strict=True)]
        added, *amounts = (2 * draw - 1 for draw in draws[4:8])  # -1 to 1
        contrast = 1 + self.config.contrast * amounts[0] if made[1] else 1.0
        first = draws[8] < 0.5
        brightness = round(self.config.brightness * added) if made[0] else 0
        image = _levels(image, brightness, contrast if first else 1.0)
        if made[2] or made[3]:
            image = image.contiguous()  # torchvision's arithmetic on the planes of colour is quicker
        if made[2]:
            image = F.adjust_saturation_image(image, 1 + self.config.saturation * amounts[1])
        if made[3]:
            image = F.adjust_hue_image(image, self.config.hue / _TURN * amounts[2])
        return _levels(image, 0, 1.0 if first else contrast), target


def _levels(image: Tensor, added: int, factor: float) -> Tensor:
    """Pixels to which a number was added and which were then multiplied, both times held to 0 to 255."""
    if added == 0 and factor == 1.0:
        return image
    table = (torch.arange(_LEVELS) + added).clamp(0, _LEVELS - 1) * factor
    levels = table.round().clamp(0, _LEVELS - 1).to(torch.uint8)
    if is_gpu(image.device):
        return levels.to(image.device)[image.long()]
    return torch.from_numpy(levels.numpy()[image.numpy()])  # several times as fast as torch's
