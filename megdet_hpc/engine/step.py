"""One update of the weights, in its order of operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megdet_hpc.data.batch import Batch
from megdet_hpc.engine.gradient import GradientNorms
from megdet_hpc.engine.passes import NotFiniteError, Passes, RankPasses
from megdet_hpc.models.detector import Detector
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.runtime import SynchronizedOptimizer
from megdet_hpc.solver.gradient_noise import GradientNoise, NoiseMeasurement


@dataclass(frozen=True)
class StepResult:
    """The result of an update. It is the same on every rank, except for image_ids.

    Attributes:
        step: number of the update.
        losses: means over ranks and passes.
        flags: sums of the flags over the ranks.
        norms: norms of the averaged gradient before clipping.
        image_ids: images of this rank.
        loss_scale: scale of the losses; 1 except in float16.
        skipped: whether the update was skipped, since the gradient overflowed in float16. The loss scale is then
            halved.
        noise: measurement of the gradient noise scale, if this update made one.
    """

    step: int
    losses: dict[str, float]
    flags: tuple[float, ...]
    norms: GradientNorms
    image_ids: tuple[int, ...]
    loss_scale: float = 1.0
    skipped: bool = False
    noise: NoiseMeasurement | None = None

    @property
    def gradient_norm(self) -> float:
        """The global norm of the averaged gradient before clipping. It is not finite if the update was skipped."""
        return self.norms.total

    def check(self, world: Communicator) -> None:
        """Raise an error if the gradient was not finite but the update was made.

        A collective of the world only if it raises. Every rank then raises, since all have the same norms.

        Raises:
            NotFiniteError: names the step, the parameters, the losses and each rank's image ids.
        """
        if self.skipped or self.norms.finite:
            return
        bad = self.norms.not_finite
        ids = world.allgather_object(list(self.image_ids), name="not_finite.images")
        raise NotFiniteError(
            f"step {self.step}: the gradient is not finite in {len(bad)} parameter(s), first {bad[:3]}; "
            f"loss scale {self.loss_scale:g}, losses {self.losses}; image ids by rank: {dict(enumerate(ids))}. "
            "Nothing of this update was saved"
        )


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
    earlier: StepResult | None = None,
    noise: GradientNoise | None = None,
) -> StepResult:
    """Forward and backward over this rank's micro-batches, then one averaged update; none if float16 overflowed.

    The device is waited for once, for the losses. Whether the gradient is finite is read with the losses of the next
    update, and before anything is saved (`StepResult.check`). Only float16 waits for it here, since it skips an update.

    Collective of the world: the messages of `passes`, one per parameter for the gradients, and those of the optimizer
    (solver.agvm).

    Args:
        passes: object that makes the passes; None: passes of this process's rank, in float32.
        flags: flags of this rank, sent with the losses. Every rank passes the same number.
        earlier: result of the update before, which is checked here; None for the first update.
        noise: measuring of the gradient noise scale; None: not measured.

    Raises:
        NotFiniteError: names the step, which may be the one before, and each rank's image ids and losses.
    """
    passes = passes or RankPasses(model, world)
    number = len(batches) // len(passes.ranks)
    optimizer.set_lr(lr)
    optimizer.zero_grad()
    optimizer.set_passes(number)
    if noise:
        noise.begin(step, number)
    try:
        totals, sums = passes.forward_backward(batches, step=step, seed=seed, flags=flags)
    except NotFiniteError:
        if earlier:
            earlier.check(world)  # if the gradient before was not finite, it is the cause
        raise
    if earlier:
        earlier.check(world)
    optimizer.synchronize()
    scaler = passes.precision.scaler
    scale = scaler.get_scale()
    scaler.unscale_(optimizer.optimizer)
    norms = GradientNorms(model)
    found = noise.end(lambda: norms.total, scale, world) if noise else None
    overflows = scaler.is_enabled() and not norms.finite
    if not overflows:
        if clip_norm is not None:
            norms.clip_(model, clip_norm)
        optimizer.step()
    scaler.update()
    skipped = overflows and scaler.get_scale() < scale and scale > 1
    ids = tuple(i for batch in batches for i in batch.image_ids)
    result = StepResult(step, totals, sums, norms, ids, scale, skipped, found)
    if overflows:
        result.check(world)
    return result
