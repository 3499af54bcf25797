"""An epoch plan that takes over in the middle of an epoch, from a plan with another split of the batch.

A split is the number of ranks, passes and images per rank, how passes grow, and the sampling. A run that goes on under
another one deals out the images that its epoch has not had yet. Its update counter goes on; `position` is the place in
the schedule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megdet_hpc.data.sampler import EpochPlan
from megdet_hpc.data.shard_local import ShardLocal


@dataclass(frozen=True)
class Stretch:
    """Updates of an epoch that were made under a split which the run has left since.

    Attributes:
        images_per_rank, num_ranks, accumulate, local: the split, see `EpochPlan`.
        steps: updates made, from the first of what the stretches before it left.
    """

    images_per_rank: int
    num_ranks: int
    accumulate: int
    local: ShardLocal | None
    steps: int


@dataclass(frozen=True)
class ContinuedPlan(EpochPlan):
    """A plan that shares one epoch with other splits.

    Attributes:
        stretches: what was done of epoch `resumed_epoch` under other splits, oldest first.
        resumed_epoch: the epoch in which the split changed last.
        offset: the update at which this split's position 0 lies; below 0 where steps have become smaller.
    """

    stretches: tuple[Stretch, ...] = ()
    resumed_epoch: int = 0
    offset: int = 0

    def position(self, step: int) -> int:
        """The place of update `step` in the schedule, counted in updates of this plan's split."""
        return step - self.offset

    def place(self, step: int) -> tuple[int, int]:
        """The epoch of update `step`, and the update's row in what `epoch` gives for it."""
        epoch, position = super().place(step)
        if epoch == self.resumed_epoch:
            # what is left are the epoch's last updates, so row 0 lies where the stretches end
            position -= self.steps_of(epoch + 1) - self.steps_of(epoch) - self.num_steps(self._left, epoch)
        return epoch, position

    def epoch(self, epoch: int) -> NDArray[np.int64]:
        """The image indices of an epoch: (steps, accumulate, ranks, images_per_rank).

        Of `resumed_epoch` only the images that the stretches left.
        """
        return self.order(epoch, self._left) if epoch == self.resumed_epoch else super().epoch(epoch)

    @cached_property
    def _left(self) -> NDArray[np.bool_]:
        """(images,) bool: the images of `resumed_epoch` that the stretches have not had."""
        left = np.ones(self.num_images, np.bool_)
        for stretch in self.stretches:
            then = EpochPlan(self.portrait, seed=self.seed, **_split(stretch))
            left[then.order(self.resumed_epoch, left)[: stretch.steps]] = False
        return left

    def continue_in(self, split: dict[str, Any], step: int) -> ContinuedPlan:
        """The plan of another split from update `step` on, whose epoch ends at a whole multiple of its steps."""
        epoch, done = self.place(step)
        stretches = self.stretches if epoch == self.resumed_epoch else ()
        if done:
            passes = self.passes_at(step - 1)
            stretches = (*stretches, Stretch(**{**_split(self), "accumulate": passes}, steps=done))
        plan = ContinuedPlan(self.portrait, seed=self.seed, **split, stretches=stretches, resumed_epoch=epoch)
        left = plan.num_steps(plan._left, epoch)
        return replace(plan, offset=step + left - plan.steps_of(epoch + 1))


def plan_state(plan: EpochPlan, step: int) -> dict[str, Any]:
    """Plain values from which `continue_plan` finds the same place, after `step` updates."""
    epoch, _ = plan.place(step)
    offset = 0
    stretches: tuple[Stretch, ...] = ()
    if isinstance(plan, ContinuedPlan):
        offset = plan.offset
        stretches = plan.stretches if epoch == plan.resumed_epoch else ()
    return {
        **_split(plan),
        "local": asdict(plan.local) if plan.local else None,
        **({"growth": plan.growth} if plan.growth else {}),
        "offset": offset,
        "resumed_epoch": epoch,
        "parts": [asdict(stretch) for stretch in stretches],
    }


def continue_plan(plan: EpochPlan, state: dict[str, Any], step: int) -> ContinuedPlan:
    """A plan from update `step` of a run on, whose `state` may be that of another split.

    Under the same split the order goes on as it would have. Under another one the images that the epoch has not
    had yet are dealt out anew, and the epoch ends at a whole multiple of the plan's steps_per_epoch.

    Args:
        plan: plan of the run that goes on, made for its first update.
        state: values that `plan_state` gave, from the checkpoint.
        step: updates made.
    """
    before = ContinuedPlan(
        plan.portrait,
        seed=plan.seed,
        **_split_of(state),
        growth=_growth_of(state),
        offset=state.get("offset", 0),
        resumed_epoch=state.get("resumed_epoch", 0),
        stretches=tuple(Stretch(**_split_of(part), steps=part["steps"]) for part in state.get("parts", [])),
    )
    same = _split(before) == _split(plan) and before.growth == plan.growth
    return before if same else before.continue_in({**_split(plan), "growth": plan.growth}, step)


def _split(plan: EpochPlan | Stretch) -> dict[str, Any]:
    """How a plan splits the batch, without its growth: what may change while a run goes on."""
    return {key: getattr(plan, key) for key in ("images_per_rank", "num_ranks", "accumulate", "local")}


def _growth_of(state: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    """The growth written by `plan_state`, if any."""
    return tuple((int(epoch), int(factor)) for epoch, factor in state.get("growth", ()))


def _split_of(state: dict[str, Any]) -> dict[str, Any]:
    """The split written by `plan_state`; a state without "local" is of uniform sampling."""
    local = state.get("local")
    numbers = {key: state[key] for key in ("images_per_rank", "num_ranks", "accumulate")}
    return {**numbers, "local": ShardLocal.of(local) if local else None}


def describe_change(state: dict[str, Any], plan: EpochPlan, step: int) -> str:
    """What changes where `plan` goes on from `state` after `step` updates; empty where the split is the same.

    Args:
        state: values that `plan_state` gave, from the checkpoint.
        plan: the result of `continue_plan`.
        step: updates made.
    """
    old, new = _split_of(state), _split(plan)
    grew = _growth_of(state)
    if old == new and grew == plan.growth:
        return ""
    changes = [f"{key} {old[key]} -> {new[key]}" for key in new if key != "local" and old[key] != new[key]]
    if old["local"] != new["local"]:
        names = ["shard_local" if split["local"] else "uniform" for split in (old, new)]
        changes.append(f"sampling {' -> '.join(names)}" if names[0] != names[1] else "nodes, shards or shuffle_buffer")
    if grew != plan.growth:
        changes.append(f"growth of the batch {dict(grew) or 'none'} -> {dict(plan.growth) or 'none'}")
    before = old["images_per_rank"] * old["num_ranks"] * old["accumulate"]
    stage = plan.stage_of(step)
    epochs, position = divmod(plan.position(step) - stage.step, stage.steps_per_epoch)
    return (
        f"{', '.join(changes)}; global batch {before} -> {plan.global_batch} images, and the rate with it; "
        f"the rest of epoch {stage.epoch + epochs} takes {stage.steps_per_epoch - position} of now "
        f"{stage.steps_per_epoch} steps"
    )
