"""The learning rate of each update: linear scaling, warmup and policy in one pure function.

Variance equivalence (paper, section 3.1): one step of a mini-batch that is k times larger equals k accumulated steps if
its rate is k times larger. The scaled rate is too large for the first steps, so the warmup grows towards it with every
iteration (section 3.2).

Lengths are given in epochs or in iterations of a reference batch. An iteration stands for its images: 500 iterations of
16 images are 31 updates of 256. docs/recipe.md has the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from megdet_hpc.config import NX_BATCH, NX_DROPS_BEFORE_END, NX_ITERATIONS, SolverConfig
from megdet_hpc.solver.growth import Growth, grown

WarmupForm = Literal["linear", "doubling", "constant", "exp"]


@dataclass(frozen=True)
class _Preset:
    epochs: float
    drop_epochs: tuple[float, ...]
    drop_factors: tuple[float, ...]


_NORMAL = SolverConfig()  # the defaults of policy steps
# Our own choices for a ResNet-50 that starts from ImageNet weights.
PRESETS = {
    "normal": _Preset(_NORMAL.epochs, _NORMAL.drop_epochs, _NORMAL.drop_factors),
    "long": _Preset(18, (11, 14, 17), (0.1, 0.1, 0.5)),
}


@dataclass(frozen=True)
class LrSchedule:
    """A resolved schedule. A step is an update of the run; a rate is per update."""

    peak_lr: float
    warmup_steps: int
    warmup_start_factor: float
    drop_steps: tuple[int, ...]
    drop_factors: tuple[float, ...]
    total_steps: int
    warmup_form: WarmupForm = "linear"
    cosine: bool = False
    """Whether half a cosine, from the end of the warmup to 0 at total_steps, joins the drops."""
    clip_norm: float | None = None
    """Upper bound of the gradient's norm."""
    clip_steps: tuple[int, int] | None = None
    """First update with the bound and the first one after it without; None: all. first_step does not move them."""
    first_step: int = 0
    """Update at which the schedule begins, and from which its other steps count. It is not 0 where a run goes on with
    another number of steps per epoch; it is below 0 where the run began with fewer."""

    @property
    def last_step(self) -> int:
        """Update after which the schedule ends."""
        return self.first_step + self.total_steps

    def lr_at(self, step: int) -> float:
        """The rate of update `step`, in [first_step, last_step)."""
        return self._lr_at(step - self.first_step)

    def clip_norm_at(self, step: int) -> float | None:
        """The bound of the gradient's norm in update `step`; None where there is none."""
        return self.clip_norm if self.clip_steps is None or self.clip_steps[0] <= step < self.clip_steps[1] else None

    def clip_gap(self) -> str:
        """A sentence where the updates with a bound leave out the end of the warmup; else empty."""
        end = self.first_step + self.warmup_steps
        if self.clip_steps is None or not self.warmup_steps or self.clip_steps[0] <= end <= self.clip_steps[1]:
            return ""
        return (
            f"solver.clip_norm_steps {list(self.clip_steps)} are updates of the run, and the warmup ends at update "
            f"{end}, so its end is not clipped"
        )

    def _lr_at(self, step: int) -> float:
        rate = self.peak_lr
        if step < self.warmup_steps:
            rate *= self._warmup_factor(step)
        elif self.cosine:
            done = (step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1)
            rate *= 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        for drop, factor in zip(self.drop_steps, self.drop_factors, strict=True):
            if step >= drop:
                rate *= factor
        return rate

    def _warmup_factor(self, step: int) -> float:
        start = self.warmup_start_factor
        if self.warmup_form == "constant":
            return start
        if self.warmup_form == "linear":
            return start + (1 - start) * step / self.warmup_steps
        if self.warmup_form == "exp":
            return float(start ** (1 - step / self.warmup_steps))
        return min(start * 2 ** (step * self._num_doublings // self.warmup_steps), 1.0)

    @property
    def _num_doublings(self) -> int:
        """Number of stages of the warmup, which are equally long. The doubling of the last one ends at the peak."""
        # 1e-9: a factor of 1/8 with a rounding error has 3 doublings, not 4
        return max(math.ceil(-math.log2(self.warmup_start_factor) - 1e-9), 1)

    def __str__(self) -> str:
        marks = sorted({0, self.warmup_steps, *self.drop_steps})
        rows = [f"step {step}: {self._lr_at(step):.3g}" for step in marks if step < self.total_steps]
        if self.warmup_steps:
            rows[0] += f" ({self.warmup_form} warmup)"
        if self.cosine:
            rows.append("cosine to 0")
        moved = f"; its step 0 is at update {self.first_step}" if self.first_step else ""
        return ", ".join(rows) + f", end after {self.total_steps}{moved}"


def growth_of(config: SolverConfig) -> Growth:
    """The drops that are given in epochs, divided into those of the rate and growth of the mini-batch."""
    preset = PRESETS.get(config.policy) or _Preset(config.epochs, config.drop_epochs, config.drop_factors)
    return grown(config, preset.drop_epochs, preset.drop_factors)


def resolve_schedule(
    config: SolverConfig,
    *,
    global_batch: int,
    steps_per_epoch: float,
    steps_of: Callable[[float], int] | None = None,
) -> LrSchedule:
    """Turn epochs and reference iterations into steps, and the reference rate into that of this batch.

    Args:
        config: rates and lengths.
        global_batch: images of one update; the first ones where they grow.
        steps_per_epoch: updates of one epoch.
        steps_of: updates of a number of epochs from the first one on; None: steps_per_epoch each.
    """

    # Hoffer et al. (NeurIPS 2017): a larger batch makes as many updates as the small one, each of more images
    slower = global_batch / config.reference_batch if config.policy == "regime" else 1.0

    def of_epochs(epochs: float) -> int:
        return steps_of(epochs) if steps_of else round(epochs * steps_per_epoch * slower)

    def of_iterations(iterations: float, batch: int = config.reference_batch) -> int:
        return round(iterations * batch / global_batch * slower)

    def either(epochs: float, iterations: float | None) -> int:
        return of_epochs(epochs) if iterations is None else of_iterations(iterations)

    drops: tuple[int, ...] = ()
    factors: tuple[float, ...] = ()
    if config.policy in PRESETS:
        total, left = of_epochs(PRESETS[config.policy].epochs), growth_of(config)
        drops, factors = tuple(map(of_epochs, left.drop_epochs)), left.drop_factors
    elif config.policy == "nx":
        end = config.policy_n * NX_ITERATIONS
        total, factors = of_iterations(end, NX_BATCH), (0.1,) * len(NX_DROPS_BEFORE_END)
        drops = tuple(of_iterations(end - before, NX_BATCH) for before in NX_DROPS_BEFORE_END)
    else:
        total = either(config.epochs, config.iterations)
        if config.least_iterations is not None:
            total = max(total, of_iterations(config.least_iterations))
        if config.policy in ("steps", "regime"):
            if config.drop_iterations is None:
                left = growth_of(config)
                drops, factors = tuple(map(of_epochs, left.drop_epochs)), left.drop_factors
            else:
                drops, factors = tuple(map(of_iterations, config.drop_iterations)), config.drop_factors
    return LrSchedule(
        peak_lr=config.base_lr * (global_batch / config.reference_batch) ** config.scaling_exponent,
        warmup_steps=either(config.warmup_epochs, config.warmup_iterations),
        warmup_start_factor=config.warmup_start_factor,
        drop_steps=drops,
        drop_factors=factors,
        total_steps=max(total, 1),
        warmup_form=config.warmup_form,
        cosine=config.policy == "cosine",
        clip_norm=config.clip_norm,
        clip_steps=config.clip_norm_steps,
    )
