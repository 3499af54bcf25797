"""Which rank sees which image when: a pure function of (seed, epoch) and the split, the same on every rank.

An epoch is a list of micro-batches (the images of one forward pass of one rank). Update `s` of an epoch takes
the next ranks x accumulate of them, so every rank takes the same number of steps by construction. The list is
filled up from its own start to a whole number of updates: no image is left out, few come twice. From some epoch on the
updates may be of more passes (`growth`). The order of an epoch's micro-batches does not depend on that.

A run that goes on under another split has a plan of `data/continuation.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from megdet_hpc.config import DataConfig
from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.data.shard_local import ShardLocal, shard_local_batches
from megdet_hpc.errors import UserError


def aspect_groups(pack: PackedCoco, config: DataConfig) -> NDArray[np.bool_]:
    """(images,) True where an image is higher than wide; all False where batches may hold both kinds."""
    portrait: NDArray[np.bool_] = pack.heights > pack.widths
    return portrait if config.group_by_aspect_ratio else np.zeros_like(portrait)


@dataclass(frozen=True)
class BatchStage:
    """Epochs whose updates have the same number of images.

    Attributes:
        epoch: first epoch.
        step: first update, counted in updates of the plan's split.
        factor: passes of an update over the plan's `accumulate`.
        steps_per_epoch: updates of an epoch.
    """

    epoch: int
    step: int
    factor: int
    steps_per_epoch: int


@dataclass(frozen=True)
class EpochPlan:
    """The order of a training set's images over epochs, ranks and passes.

    Attributes:
        portrait: (images,) bool, True where the image is higher than wide; all False turns grouping off.
        images_per_rank: images of a micro-batch.
        num_ranks: ranks of the world.
        accumulate: micro-batches of a rank in one update.
        seed: seed of the order.
        local: nodes and shards of shard-local sampling; None: uniform, every order of the images equally likely.
        growth: epochs in rising order, each with the factor of `accumulate` from there on.
    """

    portrait: NDArray[np.bool_]
    images_per_rank: int
    num_ranks: int
    accumulate: int
    seed: int
    local: ShardLocal | None = None
    growth: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if len(self.portrait) == 0:
            raise UserError("the training set has no images")
        if self.local:
            self.local.check(num_images=self.num_images, num_ranks=self.num_ranks)

    @property
    def num_images(self) -> int:
        return len(self.portrait)

    @property
    def global_batch(self) -> int:
        """Images of one update; the first ones where they grow."""
        return self.images_per_rank * self.num_ranks * self.accumulate

    @cached_property
    def steps_per_epoch(self) -> int:
        """Updates of a whole epoch; of the first one where updates grow."""
        return self.num_steps(np.ones(self.num_images, np.bool_), 0)

    @cached_property
    def stages(self) -> tuple[BatchStage, ...]:
        """The parts of the run between which updates grow; one where they do not."""
        whole = np.ones(self.num_images, np.bool_)
        found = [BatchStage(0, 0, self._factor(0), self.steps_per_epoch)]
        for epoch, factor in self.growth:
            if epoch > 0:
                before = found[-1]
                step = before.step + (epoch - before.epoch) * before.steps_per_epoch
                found.append(BatchStage(epoch, step, factor, self.num_steps(whole, epoch)))
        return tuple(found)

    def _factor(self, epoch: int) -> int:
        """Passes of an update of an epoch over `accumulate`."""
        return next((factor for first, factor in reversed(self.growth) if first <= epoch), 1)

    def stage_of(self, step: int) -> BatchStage:
        """The stage of update `step`."""
        return self.stage_at(self.position(step))

    def stage_at(self, position: int) -> BatchStage:
        """The stage of a place in the schedule, see `position`."""
        return next((one for one in reversed(self.stages) if one.step <= position), self.stages[0])

    def passes_at(self, step: int) -> int:
        """Micro-batches of a rank in update `step`."""
        return self.accumulate * self.stage_of(step).factor

    def images_at(self, step: int) -> int:
        """Images of update `step`."""
        return self.global_batch * self.stage_of(step).factor

    def steps_of(self, epochs: float) -> int:
        """Updates of a number of epochs from the first one on."""
        stage = next(one for one in reversed(self.stages) if one.epoch <= epochs or one.epoch == 0)
        return stage.step + round((epochs - stage.epoch) * stage.steps_per_epoch)

    def epochs_of(self, position: int) -> float:
        """The epochs that lie before a place in the schedule; the inverse of `steps_of`."""
        stage = self.stage_at(position)
        return stage.epoch + (position - stage.step) / stage.steps_per_epoch

    def position(self, step: int) -> int:
        """The place of update `step` in the schedule, counted in updates of this plan's split."""
        return step

    def place(self, step: int) -> tuple[int, int]:
        """The epoch of update `step`, and the update's row in what `epoch` gives for it."""
        stage = self.stage_of(step)
        epochs, row = divmod(self.position(step) - stage.step, stage.steps_per_epoch)
        return stage.epoch + epochs, row

    def epoch(self, epoch: int) -> NDArray[np.int64]:
        """The image indices of an epoch: (steps, accumulate, ranks, images_per_rank)."""
        return self.order(epoch, np.ones(self.num_images, np.bool_))

    def num_steps(self, left: NDArray[np.bool_], epoch: int) -> int:
        """Updates that the images marked in `left` need in an epoch; (images,) bool."""
        counts = np.bincount(self.portrait[left].astype(np.int64), minlength=2)
        batches = sum(-(-int(count) // self.images_per_rank) for count in counts)
        return -(-batches // (self.num_ranks * self.accumulate * self._factor(epoch)))

    def order(self, epoch: int, left: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The images marked in `left`, in an epoch's order and in the shape that `epoch` gives.

        Images of one group fill micro-batches, the last one from the group's start. The micro-batches of both groups
        are shuffled, and the list of them is filled up from its start.
        """
        generator = np.random.default_rng([self.seed, epoch])
        passes = self.accumulate * self._factor(epoch)
        shape = (self.num_steps(left, epoch), passes, self.num_ranks, self.images_per_rank)
        if self.local:
            return shard_local_batches(self.local, self.portrait, left, generator, shape)
        order = generator.permutation(self.num_images)
        order = order[left[order]]
        batches = []
        for portrait in (False, True):
            images = order[self.portrait[order] == portrait]
            if len(images):
                whole = -(-len(images) // self.images_per_rank) * self.images_per_rank
                batches.append(np.resize(images, whole).reshape(-1, self.images_per_rank))  # repeats from the start
        if not batches:
            return np.empty(shape, np.int64)
        return np.resize(generator.permutation(np.concatenate(batches)), shape)


class RankSampler:
    """The (epoch, image index) pairs of the micro-batches of some ranks, from one update to another.

    A batch sampler for torch's DataLoader. The epoch travels with the index because augmentation depends on it.

    Args:
        plan: order of all ranks' images.
        ranks: this process's own rank, or several. Their micro-batches come pass by pass, in a pass rank by rank.
        first_step, last_step: the updates, the last one left out.
    """

    def __init__(self, plan: EpochPlan, ranks: Sequence[int], first_step: int, last_step: int) -> None:
        self.plan, self.ranks = plan, ranks
        self.first_step, self.last_step = first_step, last_step

    def __len__(self) -> int:
        return sum(map(self.plan.passes_at, range(self.first_step, self.last_step))) * len(self.ranks)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order_of = lru_cache(maxsize=1)(self.plan.epoch)
        for step in range(self.first_step, self.last_step):
            epoch, row = self.plan.place(step)
            for one_pass in order_of(epoch)[row]:  # (ranks, images_per_rank)
                for rank in self.ranks:
                    yield [(epoch, int(index)) for index in one_pass[rank]]
