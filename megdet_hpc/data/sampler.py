"""Which rank sees which image when: a pure function of (seed, epoch) and the split, the same on every rank.

An epoch is a list of micro-batches (the images of one forward pass of one rank). Update `s` of an epoch takes
the next ranks x accumulate of them, so every rank takes the same number of steps by construction. The list is
filled up from its own start to a whole number of updates: no image is left out, few come twice.

A run that goes on under another split (other ranks, passes, images per rank or sampling) deals out the images that
its epoch has not had yet. Its update counter goes on; `EpochPlan.position` is the place in the schedule.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

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
class Part:
    """The first updates of an epoch's rest, made under a split that the run has left since.

    Attributes:
        images_per_rank, num_ranks, accumulate, local: as in `EpochPlan`.
        steps: updates made.
    """

    images_per_rank: int
    num_ranks: int
    accumulate: int
    local: ShardLocal | None
    steps: int


@dataclass(frozen=True)
class EpochPlan:
    """The order of a training set's images over epochs, ranks and passes.

    Attributes:
        portrait: (images,) bool, True where the image is higher than wide; all False turns grouping off.
        images_per_rank: images of a micro-batch.
        num_ranks: ranks of the world.
        accumulate: micro-batches of a rank in one update.
        seed: of the order.
        local: nodes and shards of shard-local sampling; None: uniform, every order of the images equally likely.
        parts: what was done of epoch `resumed_epoch` under other splits, oldest first.
        resumed_epoch: the epoch in which the split changed last.
        offset: the update at which this split's position 0 lies; below 0 where steps have become smaller.
    """

    portrait: NDArray[np.bool_]
    images_per_rank: int
    num_ranks: int
    accumulate: int
    seed: int
    local: ShardLocal | None = None
    parts: tuple[Part, ...] = ()
    resumed_epoch: int = 0
    offset: int = 0

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
        """Images of one update."""
        return self.images_per_rank * self.num_ranks * self.accumulate

    @cached_property
    def steps_per_epoch(self) -> int:
        """Updates of a whole epoch."""
        return self._steps(np.ones(self.num_images, np.bool_))

    def position(self, step: int) -> int:
        """Where update `step` lies in the schedule, counted in updates of this split."""
        return step - self.offset

    def epoch(self, epoch: int) -> NDArray[np.int64]:
        """The image indices of an epoch: (steps, accumulate, ranks, images_per_rank).

        Of `resumed_epoch` only the images that its earlier parts left; its steps are the epoch's last ones.
        """
        return self._order(epoch, self._left(epoch))

    def state(self, step: int) -> dict[str, Any]:
        """Plain values from which `continued` finds the same place, after `step` updates."""
        epoch = self.position(step) // self.steps_per_epoch
        parts = self.parts if epoch == self.resumed_epoch else ()
        return {
            **_split(self),
            "local": asdict(self.local) if self.local else None,
            "offset": self.offset,
            "resumed_epoch": epoch,
            "parts": [asdict(part) for part in parts],
        }

    def continued(self, state: dict[str, Any], step: int) -> EpochPlan:
        """This plan from update `step` of a run on, whose `state` may be that of another split.

        Under the same split the order goes on as it would have. Under another one the images that the epoch has not
        had yet are dealt out anew, and the epoch ends at a whole multiple of this plan's steps_per_epoch.
        """
        theirs = replace(
            self,
            **_split_of(state),
            offset=state.get("offset", 0),
            resumed_epoch=state.get("resumed_epoch", 0),
            parts=tuple(Part(**_split_of(part), steps=part["steps"]) for part in state.get("parts", [])),
        )
        if _split(theirs) == _split(self):
            return theirs
        epoch, position = divmod(theirs.position(step), theirs.steps_per_epoch)
        parts = theirs.parts if epoch == theirs.resumed_epoch else ()
        done = position - theirs.steps_per_epoch + theirs._steps(theirs._left(epoch))
        if done:
            parts = (*parts, Part(**_split(theirs), steps=done))
        plan = replace(self, parts=parts, resumed_epoch=epoch)
        return replace(plan, offset=step - (epoch + 1) * plan.steps_per_epoch + plan._steps(plan._left(epoch)))

    def _left(self, epoch: int) -> NDArray[np.bool_]:
        """(images,) bool: the images of an epoch that the parts have not had."""
        left = np.ones(self.num_images, np.bool_)
        for part in self.parts if epoch == self.resumed_epoch else ():
            plan = replace(self, parts=(), **_split(part))
            left[plan._order(epoch, left)[: part.steps]] = False
        return left

    def _steps(self, left: NDArray[np.bool_]) -> int:
        """Updates that the images marked in `left` need."""
        counts = np.bincount(self.portrait[left].astype(np.int64), minlength=2)
        batches = sum(-(-int(count) // self.images_per_rank) for count in counts)
        return -(-batches // (self.num_ranks * self.accumulate))

    def _order(self, epoch: int, left: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The images marked in `left`, in the shape that `epoch` gives."""
        generator = np.random.default_rng([self.seed, epoch])
        shape = (self._steps(left), self.accumulate, self.num_ranks, self.images_per_rank)
        if self.local:
            return shard_local_batches(self.local, self.portrait, left, generator, shape)
        order = generator.permutation(self.num_images)
        order = order[left[order]]
        batches = []
        for portrait in (False, True):
            images = order[self.portrait[order] == portrait]
            if len(images):
                whole = -(-len(images) // self.images_per_rank) * self.images_per_rank
                batches.append(np.resize(images, whole).reshape(-1, self.images_per_rank))
        if not batches:
            return np.empty(shape, np.int64)
        return np.resize(generator.permutation(np.concatenate(batches)), shape)


def _split(plan: EpochPlan | Part) -> dict[str, Any]:
    """How a plan splits the batch: what may change while a run goes on."""
    return {key: getattr(plan, key) for key in ("images_per_rank", "num_ranks", "accumulate", "local")}


def _split_of(state: dict[str, Any]) -> dict[str, Any]:
    """The split written by `EpochPlan.state`; a state without "local" is of uniform sampling."""
    local = state.get("local")
    numbers = {key: state[key] for key in ("images_per_rank", "num_ranks", "accumulate")}
    return {**numbers, "local": ShardLocal.of(local) if local else None}


def describe_change(state: dict[str, Any], plan: EpochPlan, step: int) -> str:
    """What a plan that continues from `state` after `step` updates does otherwise; empty where the split is the same.

    Args:
        state: of `EpochPlan.state`, as the checkpoint holds it.
        plan: the result of `EpochPlan.continued`.
        step: of both.
    """
    old, new = _split_of(state), _split(plan)
    if old == new:
        return ""
    changes = [f"{key} {old[key]} -> {new[key]}" for key in new if key != "local" and old[key] != new[key]]
    if old["local"] != new["local"]:
        names = ["shard_local" if split["local"] else "uniform" for split in (old, new)]
        changes.append(f"sampling {' -> '.join(names)}" if names[0] != names[1] else "nodes, shards or shuffle_buffer")
    before = old["images_per_rank"] * old["num_ranks"] * old["accumulate"]
    epoch, position = divmod(plan.position(step), plan.steps_per_epoch)
    return (
        f"{', '.join(changes)}; global batch {before} -> {plan.global_batch} images, and the rate with it; "
        f"the rest of epoch {epoch} takes {plan.steps_per_epoch - position} of now {plan.steps_per_epoch} steps"
    )


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
        steps = self.plan.steps_per_epoch
        for step in range(self.first_step, self.last_step):
            epoch, position = divmod(self.plan.position(step), steps)
            order = epoch_of(epoch)
            for images in order[position - steps + len(order), :, self.rank]:
                yield [(epoch, int(index)) for index in images]
