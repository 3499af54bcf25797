"""What a run consists of, and where it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megdet_hpc.config import Config, to_dict
from megdet_hpc.data.continuation import plan_state
from megdet_hpc.data.dataset import DetectionDataset
from megdet_hpc.data.sampler import EpochPlan
from megdet_hpc.engine.passes import Passes
from megdet_hpc.models.detector import Detector
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.runtime import SynchronizedOptimizer
from megdet_hpc.solver.lr_schedule import LrSchedule
from megdet_hpc.solver.precision import Precision


@dataclass
class Training:
    """Everything that a run needs. `step` counts the updates done, whatever split they had."""

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
    passes: Passes | None = None
    """Makes the passes; None: those of this process's rank."""
    step: int = 0
    check: Callable[[], None] = lambda: None
    """Raises where the output folder is another run's by now; called before each write to it."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Scores of the newest evaluation. Empty before the first one, and in a resumed run whose step has none."""
    best_ap: float = -math.inf
    """AP of the checkpoint that best.json names."""

    @property
    def checkpoints(self) -> Path:
        """The folder of this run's checkpoints."""
        return self.output / "checkpoints"

    @property
    def last_step(self) -> int:
        """Updates after which the run ends."""
        return min(self.schedule.last_step, self.config.max_steps or self.schedule.last_step)

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
        }

    def order(self) -> dict[str, int | str | bool]:
        """What must stay the same while a run goes on: an epoch's images, their groups, the seed of their order."""
        pack = self.dataset.pack
        return {
            # the same file taken as boxes of upright pictures is another data set
            "annotations_sha256": pack.manifest["source"]["sha256"] + " upright" * pack.upright,
            "group_by_aspect_ratio": self.config.data.group_by_aspect_ratio,
            "num_images": self.plan.num_images,
            "seed": self.plan.seed,
        }

    def evaluation_due(self, step: int) -> bool:
        """Whether the validation set is scored after `step` updates."""
        return step == self.last_step or self._due(step, self.config.evaluation.every_epochs)

    def checkpoint_due(self, step: int) -> bool:
        """Whether a checkpoint is written after `step` updates, whatever else asks for one."""
        return self._due(step, self.config.checkpoints.every_epochs)

    def _due(self, step: int, every_epochs: float) -> bool:
        return period_ends(self.plan.position(step), every_epochs, self.plan.steps_per_epoch)


def period_ends(step: int, every_epochs: float, steps_per_epoch: int) -> bool:
    """Whether a period of every_epochs ended with this step; 0 means never."""
    if every_epochs == 0:
        return False
    period = every_epochs * steps_per_epoch
    return int(step / period + 1e-9) > int((step - 1) / period + 1e-9)
