"""The arithmetic of a run, built once: ranks, groups that share statistics, epochs, schedule."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megdet_hpc.config import Config, TwoStageConfig
from megdet_hpc.data.sampler import EpochPlan
from megdet_hpc.data.shard_local import ShardLocal
from megdet_hpc.errors import UserError
from megdet_hpc.parallel.groups import BnGroups
from megdet_hpc.solver.lr_schedule import LrSchedule, growth_of, resolve_schedule


def check_heads(config: Config, groups: BnGroups) -> None:
    """Raise UserError where a rank's images are shared out, and its detector normalizes regions."""
    if groups.per_rank > 1 and "heads" in config.norm.where and isinstance(config.model, TwoStageConfig):
        raise UserError(
            f"norm.size {groups.images} with data.images_per_rank {groups.images_per_rank} and heads in norm.where: "
            f"the heads of {config.model.detector} normalize regions, which are not shared out by images; accepted: "
            "norm.size of a rank's images or more, or no heads in norm.where"
        )


@dataclass(frozen=True)
class RunPlan:
    """The arithmetic that follows from a configuration and a number of ranks, for the trainer and other programs.

    Attributes:
        config: configuration of the run.
        groups: ranks that share batch statistics; all ranks where the layers send nothing.
        epoch: images of every rank and update.
        schedule: rate of every update.
    """

    config: Config
    groups: BnGroups
    epoch: EpochPlan
    schedule: LrSchedule

    @classmethod
    def of(
        cls, config: Config, num_ranks: int, portrait: NDArray[np.bool_], local: ShardLocal | None = None
    ) -> RunPlan:
        """The plan of a run on real ranks, or on the ranks that config.emulate names.

        Args:
            config: configuration of the run.
            num_ranks: number of processes.
            portrait: (images,) bool, which `data.sampler.aspect_groups` gives.
            local: shards and nodes, for shard-local sampling.

        Raises:
            UserError: the groups are not whole, shard-local sampling does not fit, or an update needs more images than
                there are.
        """
        ranks, data = config.emulate.ranks or num_ranks, config.data
        images = config.norm.images(data.images_per_rank) if config.norm.kind == "cgbn" else 0
        groups = BnGroups(ranks, data.images_per_rank, images)
        check_heads(config, groups)
        solver = config.solver
        growth = growth_of(solver).passes if solver.grow_to else ()
        epoch = EpochPlan(portrait, data.images_per_rank, ranks, solver.accumulate, config.seed, local, growth)
        batch, steps = epoch.global_batch, float(epoch.steps_per_epoch)
        if solver.adascale:  # the schedule is that of the base batch, whose steps ScaledOptimizer counts
            batch, steps = solver.reference_batch, steps * batch / solver.reference_batch
        steps_of = epoch.steps_of if growth else None
        schedule = resolve_schedule(solver, global_batch=batch, steps_per_epoch=steps, steps_of=steps_of)
        return cls(config, groups, epoch, schedule)

    @property
    def total_steps(self) -> int:
        """Updates of the run."""
        return min(self.schedule.total_steps, self.config.max_steps or self.schedule.total_steps)

    def updates(self) -> list[tuple[int, int]]:
        """The run's stages: the number of updates in each, and the images of such an update."""
        ends = [*(stage.step for stage in self.epoch.stages[1:]), self.total_steps]
        stages = [stage for stage in self.epoch.stages if stage.step < self.total_steps]
        return [
            (min(end, self.total_steps) - stage.step, self.epoch.global_batch * stage.factor)
            for stage, end in zip(stages, ends, strict=False)
        ]

    @property
    def total_images(self) -> int:
        """Images of all updates of the run."""
        return sum(number * images for number, images in self.updates())

    @property
    def ranks_per_statistics(self) -> int:
        """Number of ranks whose images share batch statistics; 1 where nothing is sent."""
        return self.groups.ranks_per_group if self.config.norm.kind == "cgbn" else 1
