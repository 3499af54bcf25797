"""The gradient noise scale of a run while it trains, from gradients that exist anyway (McCandlish et al., 2018).

A mini-batch of B images is averaged from n smaller ones of b images each: those of the ranks, and where ranks are
emulated those of their passes. With the gradients g_i of the small ones and their mean g

    signal   = (B |g|^2 - b mean |g_i|^2) / (B - b)          estimates |G|^2, the square of the mean gradient
    variance = (mean |g_i|^2 - |g|^2) / (1 / b - 1 / B)      estimates the trace of the covariance for one image

Both are unbiased if the g_i are independent. variance / signal is the noise scale in images: a larger mini-batch than
this no longer makes a step much better. A quotient of means over many updates is meant, since both scatter.

The losses of a rank are divided by counts of all ranks, so g_i is n times the rank's share, which is not quite the
gradient of its own images. Ranks that share batch statistics are not independent either: what they have in common
counts as signal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megdet_hpc.errors import UserError
from megdet_hpc.parallel.communicator import Communicator


@dataclass(frozen=True)
class NoiseMeasurement:
    """The estimates of one update.

    Attributes:
        signal: square of the norm of the mean gradient. A single one may be below 0.
        variance: trace of the covariance of the gradient of one image.
        small: mean square of the norms of the small mini-batches' gradients.
        whole: square of the norm of their mean.
        number: number of small mini-batches.
    """

    signal: float
    variance: float
    small: float
    whole: float
    number: int


class GradientNoise:
    """Measures in some updates. In the others nothing is computed or sent.

    Args:
        model: detector of this process; its gradients are this rank's own until they are averaged.
        every: updates from one measurement to the next.
        ranks: number of ranks, real or emulated.
        images: images of a rank's pass.
        accumulate: passes of an update.
        emulated: whether one process makes the passes of all ranks, and gives each gradient to `add`.

    Raises:
        UserError: there is one small mini-batch only.
    """

    def __init__(
        self, model: nn.Module, every: int, *, ranks: int, images: int, accumulate: int, emulated: bool
    ) -> None:
        self.every, self._emulated, self._ranks, self._images = every, emulated, ranks, images
        self._of_passes(accumulate)
        if self._number < 2:
            raise UserError(
                f"solver.noise_every {every}, or solver.adascale: compares the gradients of ranks; this run has "
                f"{ranks} rank, accepted: two or more, real or emulated"
            )
        self._due = False
        self.newest: NoiseMeasurement | None = None
        self._norms: dict[int, Tensor] = {}
        self._sum = torch.zeros((), dtype=torch.float64)
        if not emulated:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    # runs before the gradient is averaged in place, also with solver.overlap (see agvm.py)
                    parameter.register_post_accumulate_grad_hook(self._keep)

    def _of_passes(self, accumulate: int) -> None:
        self._number = self._ranks * accumulate if self._emulated else self._ranks
        self._small = self._images if self._emulated else self._images * accumulate

    def begin(self, step: int, accumulate: int | None = None) -> None:
        """Make ready for the passes of update `step`. Forgets the newest measurement.

        Args:
            step: number of the update.
            accumulate: passes of this update and later ones; None: as many as before.
        """
        if accumulate is not None:
            self._of_passes(accumulate)
        self.newest = None
        self._due = self.every > 0 and step % self.every == 0
        self._norms.clear()
        self._sum = torch.zeros((), dtype=torch.float64)

    def _keep(self, parameter: Tensor) -> None:
        if self._due and parameter.grad is not None:
            # the last of several passes has the sum of all
            self._norms[id(parameter)] = torch.linalg.vector_norm(parameter.grad)

    def add(self, gradients: Iterable[Tensor | None]) -> None:
        """Add the gradient of one pass of an emulated rank, as it enters the sum over all."""
        if self._due and (found := [gradient for gradient in gradients if gradient is not None]):
            self._sum += _total(torch._foreach_norm(found))

    @torch.no_grad()
    def end(self, norm: Callable[[], float], scale: float, world: Communicator) -> NoiseMeasurement | None:
        """The estimates of an update; None if it does not measure, or its gradient is not finite.

        Collective of the world in a measuring update (`noise`). It blocks, and waits for the device.

        Args:
            norm: norm of the averaged gradient, without the loss scale; read in a measuring update only.
            scale: loss scale with which the passes' gradients were made.
            world: all real ranks.
        """
        if not self._due:
            return None
        number = self._number
        if self._emulated:
            # each pass gave its gradient divided by their number
            total, whole = float(self._sum) * number**2, norm() ** 2
        else:
            # every rank adds up the same numbers in the same order and takes rank 0's norm, so that all get the same
            # bits: processors of two kinds give the norm of one tensor other last bits
            rows = world.allgather_object((float(_total(self._norms.values())), norm() ** 2), name="noise")
            total, whole = math.fsum(own for own, _ in rows), rows[0][1]
        if math.isfinite(total) and math.isfinite(whole):
            self.newest = measured(total / number / scale**2, whole, number, images=self._small)
        return self.newest


def measured(small: float, whole: float, number: int, *, images: int) -> NoiseMeasurement:
    """The estimates from the mean square of the norms of small mini-batches, and the square of the norm of their mean.

    Args:
        small: mean of |g_i|^2.
        whole: |g|^2.
        number: number of small mini-batches.
        images: images of each.
    """
    all_images = number * images
    signal = (all_images * whole - images * small) / (all_images - images)
    variance = (small - whole) / (1 / images - 1 / all_images)
    return NoiseMeasurement(signal, variance, small, whole, number)


def _total(norms: Iterable[Tensor]) -> Tensor:
    """The sum of the squares of norms, on the CPU."""
    found = list(norms)
    return torch.stack(found).square().sum(dtype=torch.float64).cpu() if found else torch.zeros((), dtype=torch.float64)
