"""One update of the weights, in the order it happens."""

from __future__ import annotations

import math
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NoReturn, Protocol

import torch
from torch import nn

from megdet_hpc.data.batch import Batch
from megdet_hpc.data.sampler import EpochPlan, RankSampler
from megdet_hpc.engine.state import average_running_statistics
from megdet_hpc.models.detector import Detector, Draws
from megdet_hpc.models.losses import Losses, mean_over_world
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.runtime import SynchronizedOptimizer
from megdet_hpc.solver.precision import Precision


class NotFiniteError(RuntimeError):
    """A loss or a gradient is infinite or not a number; raised by every rank, before the update."""


@dataclass(frozen=True)
class StepResult:
    """What an update showed; the same on every rank.

    Attributes:
        losses: averaged over ranks and passes.
        flags: the sums over the ranks of what each passed.
        gradient_norm: the global norm of the averaged gradient before clipping; not finite where it was skipped.
        skipped: the weights stayed, since the gradient was not finite at float16's loss scale, now halved.
    """

    losses: dict[str, float]
    flags: tuple[float, ...]
    gradient_norm: float
    skipped: bool = False


class Passes(Protocol):
    """Makes the forward and backward passes of a step: `Ranks`, or many ranks in one process (emulate.py)."""

    precision: Precision

    def sampler(self, plan: EpochPlan, first_step: int, last_step: int) -> Iterable[list[tuple[int, int]]]:
        """The (epoch, index) keys of each micro-batch of this process, in order."""

    def batches_per_step(self, accumulate: int) -> int:
        """Micro-batches that `forward_backward` takes."""

    def forward_backward(
        self, batches: list[Batch], *, step: int, seed: int, flags: Sequence[float] = ()
    ) -> tuple[dict[str, float], tuple[float, ...]]:
        """Leave gradients, times the loss scale, in the parameters.

        Returns:
            The losses, averaged over ranks and passes, and the sums over the ranks of the flags that each passed.
        """

    def average_running_statistics(self) -> None:
        """Make the running statistics equal over all ranks."""


class Ranks:
    """The passes of this process's rank.

    Args:
        model: in training mode.
        world: all ranks.
        precision: of the passes.
    """

    def __init__(self, model: Detector, world: Communicator, precision: Precision | None = None) -> None:
        self.model, self.world, self.precision = model, world, precision or Precision()

    def sampler(self, plan: EpochPlan, first_step: int, last_step: int) -> RankSampler:
        """The keys of this rank's micro-batches."""
        return RankSampler(plan, self.world.rank, first_step, last_step)

    def batches_per_step(self, accumulate: int) -> int:
        """Micro-batches that `forward_backward` takes."""
        return accumulate

    def forward_backward(
        self, batches: list[Batch], *, step: int, seed: int, flags: Sequence[float] = ()
    ) -> tuple[dict[str, float], tuple[float, ...]]:
        """Add this rank's gradients up. Collective of the world: one message per micro-batch, `losses`.

        Raises:
            NotFiniteError: on every rank; names per rank its host, image ids and losses.
        """
        totals, sums = dict[str, float](), tuple(flags)
        for batch in batches:
            with self.precision.autocast():
                losses = self.model.losses(batch, Draws(seed, step))
            found = mean_over_world(losses, self.world, flags)
            sums = found.flags
            if not found.finite:
                _report_not_finite(losses, batch, step, self.world)
            for key, value in found.means.items():
                totals[key] = totals.get(key, 0.0) + value / len(batches)
            self.precision.scaler.scale(torch.stack(list(found.shares.values())).sum() / len(batches)).backward()
        return totals, sums

    def average_running_statistics(self) -> None:
        """See engine.state. Collective of the world; blocks."""
        average_running_statistics(self.model, self.world)


def train_step(
    model: Detector,
    optimizer: SynchronizedOptimizer,
    batches: list[Batch],
    *,
    step: int,
    seed: int,
    lr: float,
    clip_norm: float | None,
    world: Communicator,
    ranks: Passes | None = None,
    flags: Sequence[float] = (),
) -> StepResult:
    """Forward and backward over this rank's micro-batches, one averaged update, or none where float16 overflowed.

    Collective of the world: the messages of `ranks`, one per parameter for the gradients, and those of the optimizer
    (solver.agvm).

    Args:
        ranks: makes the passes; None: of this process's rank, in float32.
        flags: of this rank, which travel with the losses; equally many on every rank.

    Raises:
        NotFiniteError: names the step, and per rank its image ids and losses.
    """
    optimizer.set_lr(lr)
    optimizer.zero_grad()
    passes = ranks or Ranks(model, world)
    totals, sums = passes.forward_backward(batches, step=step, seed=seed, flags=flags)
    optimizer.synchronize()
    scaler = passes.precision.scaler
    scale = scaler.get_scale()
    scaler.unscale_(optimizer.optimizer)
    norm = _global_norm(model)
    finite = math.isfinite(norm)  # the averaged gradient is the same on every rank, so all go the same way
    if finite:
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
    scaler.update()
    skipped = not finite and scaler.get_scale() < scale and scale > 1
    if not finite and not skipped:
        bad = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        ids = world.allgather_object([i for batch in batches for i in batch.image_ids], name="not_finite.images")
        raise NotFiniteError(
            f"step {step}: the gradient is not finite in {len(bad)} parameter(s), first {bad[:3]}; "
            f"loss scale {scale:g}, losses {totals}; image ids by rank: {dict(enumerate(ids))}"
        )
    return StepResult(totals, sums, norm, skipped)


def _global_norm(model: nn.Module) -> float:
    """The norm of all gradients; clip_grad_norm_ would, with no bound, spoil those beside one that is infinite."""
    norms = [torch.linalg.vector_norm(p.grad) for p in model.parameters() if p.grad is not None]
    return float(torch.linalg.vector_norm(torch.stack(norms)))


def _report_not_finite(losses: Losses, batch: Batch, step: int, world: Communicator) -> NoReturn:
    """Raise on every rank what each rank's losses are. Collective of the world; blocks."""
    values = {key: float(loss.value.detach()) for key, loss in losses.items()}
    reports = world.allgather_object((socket.gethostname(), batch.image_ids, values), name="not_finite.losses")
    lines = [
        f"  rank {rank} on {host}: images {ids}, losses {values}"
        for rank, (host, ids, values) in enumerate(reports)
        if not all(map(math.isfinite, values.values()))
    ]
    raise NotFiniteError(f"step {step}: a loss is not finite\n" + "\n".join(lines))
