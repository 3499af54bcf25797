"""One update of the weights, in the order it happens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from megdet_hpc.data.batch import Batch
from megdet_hpc.engine.passes import NotFiniteError, Passes, RankPasses
from megdet_hpc.models.detector import Detector
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.runtime import SynchronizedOptimizer


@dataclass(frozen=True)
class StepResult:
    """What an update showed; the same on every rank.

    Attributes:
        losses: means over ranks and passes.
        flags: the sums over the ranks of what each passed.
        gradient_norm: the global norm of the averaged gradient before clipping; not finite where it was skipped.
        skipped: whether the weights stayed, because the gradient was not finite at float16's loss scale, now halved.
    """

    losses: dict[str, float]
    flags: tuple[float, ...]
    gradient_norm: float
    skipped: bool = False


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
    passes: Passes | None = None,
    flags: Sequence[float] = (),
) -> StepResult:
    """Forward and backward over this rank's micro-batches, one averaged update, or none where float16 overflowed.

    Collective of the world: the messages of `passes`, one per parameter for the gradients, and those of the optimizer
    (solver.agvm).

    Args:
        passes: maker of the passes; None: those of this process's rank, in float32.
        flags: flags of this rank, which travel with the losses; equally many on every rank.

    Raises:
        NotFiniteError: names the step, and per rank its image ids and losses.
    """
    optimizer.set_lr(lr)
    optimizer.zero_grad()
    passes = passes or RankPasses(model, world)
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
