"""The forward and backward passes of an update, and the error for losses that are not finite."""

from __future__ import annotations

import math
import socket
from collections.abc import Mapping, Sequence
from typing import NoReturn, Protocol

import torch
from torch import Tensor

from megdet_hpc.data.batch import Batch
from megdet_hpc.engine.state import average_running_statistics, running_statistics
from megdet_hpc.models.detector import Detector, Draws
from megdet_hpc.models.losses import Losses, mean_over_world
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.solver.precision import Precision


class NotFiniteError(RuntimeError):
    """A loss or a gradient is infinite or not a number. Every rank raises it."""


class Passes(Protocol):
    """Makes the forward and backward passes of an update: `RankPasses`, or `VirtualPasses` of emulate.py.

    Attributes:
        precision: type and loss scale of the passes.
        ranks: ranks of the plan whose passes this process makes.
    """

    precision: Precision
    ranks: Sequence[int]

    def forward_backward(
        self, batches: list[Batch], *, step: int, seed: int, flags: Sequence[float] = ()
    ) -> tuple[dict[str, float], tuple[float, ...]]:
        """Leave gradients, times the loss scale, in the parameters.

        Args:
            batches: accumulate x ranks batches, ordered by pass and in each pass by rank.
            step, seed: numbers on which the box sampling depends.
            flags: flags of this process. Every process passes the same number.

        Returns:
            The losses, averaged over ranks and passes, and the sums of the flags over the ranks.
        """

    def average_running_statistics(self, further: Sequence[Tensor] = ()) -> None:
        """Make the running statistics, and further tensors of this process, equal over all ranks."""

    def running_statistics(self) -> Mapping[str, Tensor]:
        """The running statistics by name, as means over the ranks of this process."""


class RankPasses:
    """The passes of this process's rank.

    Args:
        model: detector in training mode.
        world: all ranks.
        precision: type and loss scale of the passes.
    """

    def __init__(self, model: Detector, world: Communicator, precision: Precision | None = None) -> None:
        self.model, self.world, self.precision = model, world, precision or Precision()
        self.ranks: Sequence[int] = (world.rank,)

    def forward_backward(
        self, batches: list[Batch], *, step: int, seed: int, flags: Sequence[float] = ()
    ) -> tuple[dict[str, float], tuple[float, ...]]:
        """Accumulate this rank's gradients. Collective of the world: one message per micro-batch, `losses`.

        Raises:
            NotFiniteError: a loss is not finite. Raised on every rank; names each rank's host, image ids and losses.
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

    def average_running_statistics(self, further: Sequence[Tensor] = ()) -> None:
        """See engine.state. Collective of the world; blocks."""
        average_running_statistics(self.model, self.world, further)

    def running_statistics(self) -> Mapping[str, Tensor]:
        """Those of the model."""
        return running_statistics(self.model)


def _report_not_finite(losses: Losses, batch: Batch, step: int, world: Communicator) -> NoReturn:
    """Raise an error with all ranks' losses, on every rank. Collective of the world; blocks."""
    values = {key: float(loss.value.detach()) for key, loss in losses.items()}
    reports = world.allgather_object((socket.gethostname(), batch.image_ids, values), name="not_finite.losses")
    lines = [
        f"  rank {rank} on {host}: images {ids}, losses {values}"
        for rank, (host, ids, values) in enumerate(reports)
        if not all(map(math.isfinite, values.values()))
    ]
    raise NotFiniteError(f"step {step}: a loss is not finite\n" + "\n".join(lines))
