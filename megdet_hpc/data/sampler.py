"""Which rank sees which image when: a pure function of (seed, epoch), the same on every rank.

An epoch is a list of micro-batches (the images of one forward pass of one rank). Update `s` of an epoch takes
the next ranks x accumulate of them, so every rank takes the same number of steps by construction. The list is
filled up from its own start to a whole number of updates: no image is left out, few come twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from megdet_hpc.errors import UserError


@dataclass(frozen=True)
class EpochPlan:
    """The order of a training set's images over epochs, ranks and passes.

    Attributes:
        portrait: (images,) bool, True where the image is higher than wide; all False turns grouping off.
        images_per_rank: images of a micro-batch.
        num_ranks: ranks of the world.
        accumulate: micro-batches of a rank in one update.
        seed: of the order.
    """

    portrait: NDArray[np.bool_]
    images_per_rank: int
    num_ranks: int
    accumulate: int
    seed: int

    def __post_init__(self) -> None:
        if len(self.portrait) == 0:
            raise UserError("the training set has no images")

    @property
    def num_images(self) -> int:
        return len(self.portrait)

    @property
    def global_batch(self) -> int:
        """Images of one update."""
        return self.images_per_rank * self.num_ranks * self.accumulate

    @property
    def steps_per_epoch(self) -> int:
        """Updates of one epoch."""
        counts = np.bincount(self.portrait.astype(np.int64), minlength=2)
        batches = sum(-(-int(count) // self.images_per_rank) for count in counts)
        return -(-batches // (self.num_ranks * self.accumulate))

    def epoch(self, epoch: int) -> NDArray[np.int64]:
        """The image indices of an epoch: (steps, accumulate, ranks, images_per_rank)."""
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(self.num_images)
        batches = []
        for portrait in (False, True):
            images = order[self.portrait[order] == portrait]
            if len(images):
                whole = -(-len(images) // self.images_per_rank) * self.images_per_rank
                batches.append(np.resize(images, whole).reshape(-1, self.images_per_rank))
        shuffled = generator.permutation(np.concatenate(batches))
        shape = (self.steps_per_epoch, self.accumulate, self.num_ranks, self.images_per_rank)
        return np.resize(shuffled, shape)


class RankSampler:
    """The (epoch, image index) pairs of one rank's micro-batches, from one update to another.

    A batch sampler for torch's DataLoader. The epoch travels with the index because augmentation depends on it.
    """

    def __init__(self, plan: EpochPlan, rank: int, first_step: int, last_step: int) -> None:
        self.plan, self.rank = plan, rank
        self.first_step, self.last_step = first_step, last_step

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.plan.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch_of = lru_cache(maxsize=1)(self.plan.epoch)
        for step in range(self.first_step, self.last_step):
            epoch, position = divmod(step, self.plan.steps_per_epoch)
            for images in epoch_of(epoch)[position, :, self.rank]:
                yield [(epoch, int(index)) for index in images]
