"""The objects of a run, and its position."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megdet_hpc.config import Config, to_dict
from megdet_hpc.config.outcome import EMA_PREFIX
from megdet_hpc.data.continuation import plan_state
from megdet_hpc.data.dataset import DetectionDataset
from megdet_hpc.data.sampler import EpochPlan
from megdet_hpc.engine.passes import Passes
from megdet_hpc.models.detector import Detector
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.runtime import SynchronizedOptimizer
from megdet_hpc.solver.adascale import ScaledOptimizer
from megdet_hpc.solver.ema import WeightAverage
from megdet_hpc.solver.gradient_noise import GradientNoise
from megdet_hpc.solver.lr_schedule import LrSchedule
from megdet_hpc.solver.precision import Precision


@dataclass
class Training:
    """Everything that a run needs. `step` counts all updates done, also those with other ranks or images per rank."""

    config: Config
    world: Communicator
    device: torch.device
    model: Detector
    optimizer: SynchronizedOptimizer
    schedule: LrSchedule
    dataset: DetectionDataset
    plan: EpochPlan
    output: Path
    precision: Precision
    average: WeightAverage | None = None
    """Moving average of the weights, if solver.ema_decay asks for one. Its scores then choose the best checkpoint."""
    passes: Passes | None = None
    """Object that makes the passes; None: passes of this process's rank."""
    noise: GradientNoise | None = None
    """Measuring of the gradient noise scale, if solver.noise_every asks for it."""
    step: int = 0
    check: Callable[[], None] = lambda: None
    """Function that raises if another start has taken the output folder. It is called before each write."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Scores of the newest evaluation. Empty before the first one, and in a resumed run whose step has none."""
    best_ap: float = -math.inf
    """Score of the checkpoint that best.json names, with the weights that it names."""

    @property
    def chosen_by(self) -> str:
        """Name of the score that chooses the best checkpoint, without a prefix."""
        return self.config.evaluation.score_name

    @property
    def deferred(self) -> bool:
        """Whether another process scores the checkpoints of this run."""
        return self.config.evaluation.mode == "deferred" and bool(self.config.data.val)

    @property
    def checkpoints(self) -> Path:
        """The folder of this run's checkpoints."""
        return self.output / "checkpoints"

    @property
    def last_step(self) -> int:
        """Number of updates after which the run ends; with solver.adascale the most, until it is at its end."""
        if self.scaled and self.step and self.scaled.steps >= self.schedule.total_steps:
            return self.step
        return min(self.schedule.last_step, self.config.max_steps or self.schedule.last_step)

    @property
    def scaled(self) -> ScaledOptimizer | None:
        """The optimizer, if it counts the steps of the schedule itself (solver.adascale)."""
        return self.optimizer if isinstance(self.optimizer, ScaledOptimizer) else None

    def rate(self) -> float:
        """The schedule's rate of the next update."""
        return self.schedule.lr_at(int(self.scaled.steps) if self.scaled else self.step)

    @property
    def position(self) -> int:
        """The place in the schedule, in updates of this run's split; `step` unless that changed on the way."""
        return self.plan.position(self.step)

    def state(self) -> dict[str, Any]:
        """The checkpoint's content. Order, augmentation, sampling are functions of the seed, the step and the plan."""
        return {
            "step": self.step,
            "plan": {**self.order(), **plan_state(self.plan, self.step)},
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.optimizer.state_dict(),
            "loss_scale": self.precision.scaler.state_dict(),
            "rng": torch.get_rng_state(),
            "config": to_dict(self.config),
            "category_ids": self.dataset.categories.ids,
            "category_names": self.dataset.categories.names,
            **({"ema": self.average.state()} if self.average else {}),
        }

    @property
    def scored(self) -> str:
        """The prefix of the scores that choose the best checkpoint: of the averaged weights where there are any."""
        return EMA_PREFIX if self.average else ""

    def order(self) -> dict[str, int | str | bool]:
        """Values that a continued run must not change: an epoch's images, their groups, the seed of their order."""
        pack = self.dataset.pack
        return {
            # the same file taken as boxes of upright pictures is another data set
            "annotations_sha256": pack.manifest["source"]["sha256"] + " upright" * pack.upright,
            "group_by_aspect_ratio": self.config.data.group_by_aspect_ratio,
            "num_images": self.plan.num_images,
            "seed": self.plan.seed,
        }

    def epochs(self, step: int) -> float:
        """The place in the schedule after `step` updates [epochs]."""
        return self.plan.epochs_of(self.plan.position(step))

    def evaluation_due(self, step: int) -> bool:
        """Whether the validation set is scored after `step` updates."""
        if times := self.config.evaluation.times:
            return step == self.last_step or self._due(step, self.plan.epochs_of(self.schedule.total_steps) / times)
        return step == self.last_step or self._due(step, self.config.evaluation.every_epochs)

    def checkpoint_due(self, step: int) -> bool:
        """Whether a checkpoint is written after `step` updates, whatever else asks for one."""
        return self._due(step, self.config.checkpoints.every_epochs)

    def _due(self, step: int, every_epochs: float) -> bool:
        return period_ends(self.epochs(step - 1), self.epochs(step), every_epochs)


def period_ends(before: float, now: float, every: float) -> bool:
    """Whether a period ended with an update, before which a run was at one place and after which it is at another.

    Args:
        before, now: the places, in the unit of the period.
        every: length of the period; 0: none ever ends.
    """
    return every > 0 and int(now / every + 1e-9) > int(before / every + 1e-9)
