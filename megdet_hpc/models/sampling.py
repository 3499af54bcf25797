"""Balanced sampling of anchors and proposals. An image's sample does not depend on the other images of its batch.

torchvision draws from the global generator, so an image's sample depends on every image before it. Here it is seeded by
(run seed, step, image id). It is the same on every number of ranks, and a resumed run repeats it.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from megdet_hpc.devices import is_gpu
from megdet_hpc.models.detector import Draws

# torchvision draws from the process's generator, which virtual ranks in threads share
_GENERATOR = threading.Lock()


class SeededSampler(BalancedPositiveNegativeSampler):
    """torchvision's sampler with one generator for each image. `prepare` names the images of the next call.

    Args:
        num_samples: anchors or proposals per image.
        positive_fraction: upper bound of the positives' share [0 to 1].
        salt: text that makes the draws of the RPN differ from those of the box head.

    Attributes:
        num_sampled, num_positive: number of boxes, and of positive ones among them, that the last call drew from the
            batch, () int64 on the device of the boxes.
    """

    def __init__(self, num_samples: int, positive_fraction: float, salt: str) -> None:
        super().__init__(num_samples, positive_fraction)
        self.salt = salt
        self.seeds: list[int] = []
        self.num_sampled = self.num_positive = torch.zeros((), dtype=torch.int64)

    def prepare(self, draws: Draws, image_ids: list[int]) -> None:
        """Set the images of the next call, in batch order."""
        self.seeds = [draws.seed_of(self.salt, image_id) for image_id in image_ids]

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Boolean masks of the sampled positives and negatives of each image, as torchvision's sampler gives them."""
        assert len(self.seeds) == len(matched_idxs), "prepare() must name every image of the batch"
        positives, negatives = [], []
        for seed, labels in zip(self.seeds, matched_idxs, strict=True):
            device, kind = labels.device, labels.device.type if is_gpu(labels.device) else "cuda"
            with _GENERATOR, torch.random.fork_rng([device] if is_gpu(device) else [], device_type=kind):
                torch.manual_seed(seed)
                positive, negative = super().__call__([labels])
            positives += positive
            negatives += negative
        self.num_sampled = torch.cat([*positives, *negatives]).sum()
        self.num_positive = torch.cat(positives).sum()
        return positives, negatives
