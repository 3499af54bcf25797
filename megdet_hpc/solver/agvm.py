"""AGVM: each part of the detector has its own rate, so that all gradients vary like the backbone's.

Xue et al., Large-batch Optimization for Dense Visual Predictions (NeurIPS 2022). At large batches the gradients of
backbone, FPN, RPN and heads differ in variance. One half of the ranks gives a gradient G1, the other half G2. The
variance of a part is estimated by eta^2 (1 - cos(G1, G2)). The rate eta is common to all parts and cancels in
quotients.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from megdet_hpc.errors import UserError
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.runtime import SynchronizedOptimizer

# Steps between two measurements, and weight of the past in the moving average of the factors; both from the paper.
INTERVAL = 10
MOMENTUM = 0.97
# Bounds of a quotient of variances before its root, and the number that keeps it finite, as in the authors' code.
BOUNDS = (0.5, 10.0)
EPSILON = 1e-6
ANCHOR = "backbone"


def _require_even(ranks: int) -> None:
    if ranks % 2:
        raise UserError(
            f"solver.agvm compares the gradients of two equal halves of the ranks; this run has {ranks} rank(s), "
            "accepted: an even number, real or emulated"
        )


def _joined(parameters: Sequence[nn.Parameter], gradients: Mapping[nn.Parameter, Tensor | None]) -> Tensor:
    """The gradients of some parameters as one, (n,); zeros for a parameter without."""
    found = [(parameter, gradients.get(parameter)) for parameter in parameters]
    return torch.cat([(torch.zeros_like(p) if own is None else own).flatten() for p, own in found])


class Halves(Protocol):
    """The gradients of two halves of the ranks."""

    def begin(self, *, due: bool) -> None:
        """Make ready for the passes of an update; what was kept is forgotten.

        Args:
            due: whether the update measures. In the others nothing is kept.
        """

    def sums(self, parameters: Sequence[nn.Parameter], name: str) -> tuple[Tensor, Tensor]:
        """The gradients, (n,) each, summed over the first and over the second half, up to a common factor.

        It is called once the gradients of all ranks are averaged. A collective of the world.

        Args:
            parameters: those of a part.
            name: begin of the messages' names.
        """

    def agreed(self, variances: dict[str, float]) -> dict[str, float]:
        """The same numbers on every rank. A collective of the world."""


class RankHalves:
    """The halves of real ranks.

    Args:
        world: all ranks, on the transport of the halves' gradients.
        parameters: those of the detector.

    Raises:
        UserError: the ranks have no two equal halves.
    """

    def __init__(self, world: Communicator, parameters: Iterable[nn.Parameter]) -> None:
        """Collective of the world: two splits, names `agvm_halves` and `agvm_pairs`."""
        _require_even(world.size)
        self._world, self._due = world, False
        half = world.size // 2
        self._half = world.split(world.rank // half, name="agvm_halves")
        self._pair = world.split(world.rank % half, name="agvm_pairs")
        self._own: dict[nn.Parameter, Tensor] = {}
        for parameter in parameters:
            if parameter.requires_grad:
                # runs before Horovod's own hook, which starts to average the gradient in place
                parameter.register_post_accumulate_grad_hook(self._keep)

    def _keep(self, parameter: Tensor) -> None:
        if self._due and parameter.grad is not None:
            assert isinstance(parameter, nn.Parameter)
            self._own[parameter] = parameter.grad.clone()

    def begin(self, *, due: bool) -> None:
        self._due = due
        self._own.clear()

    def sums(self, parameters: Sequence[nn.Parameter], name: str) -> tuple[Tensor, Tensor]:
        """The sums. Two messages: pairs of ranks, one from each half, exchange the sums of their halves."""
        gradient = _joined(parameters, self._own)
        self._half.allreduce_sum_(gradient, name=f"{name}.half")
        first, second = self._pair.allgather_tensor(gradient, name=f"{name}.pair")
        return first, second

    def agreed(self, variances: dict[str, float]) -> dict[str, float]:
        """Those of rank 0. The sums of the halves may differ between ranks in their last bits; the factors must not."""
        result: dict[str, float] = self._world.broadcast_object(variances, name="agvm.variances")
        return result


class EmulatedHalves:
    """The halves of ranks that one process emulates.

    Args:
        ranks: number of emulated ranks.
        parameters: those of the detector, in the order in which `add` gets gradients.

    Raises:
        UserError: the ranks have no two equal halves.
    """

    def __init__(self, ranks: int, parameters: Iterable[nn.Parameter]) -> None:
        _require_even(ranks)
        self._ranks, self._parameters, self._due = ranks, list(parameters), False
        self._first: dict[nn.Parameter, Tensor] = {}

    def begin(self, *, due: bool) -> None:
        self._due = due
        self._first.clear()

    def add(self, rank: int, gradients: Iterable[Tensor | None]) -> None:
        """Add the gradient of one pass of a rank, as it enters the sum over all."""
        if not self._due or rank >= self._ranks // 2:
            return
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            if gradient is None:
                continue
            if parameter in self._first:
                self._first[parameter] += gradient
            else:
                self._first[parameter] = gradient.clone()

    def sums(self, parameters: Sequence[nn.Parameter], name: str) -> tuple[Tensor, Tensor]:
        """The sum that was kept, and what it lacks of the sum over all, which the parameters have. No message."""
        del name
        first = _joined(parameters, self._first)
        return first, _joined(parameters, {p: p.grad for p in parameters}) - first

    def agreed(self, variances: dict[str, float]) -> dict[str, float]:
        return variances


class ModulatedOptimizer(SynchronizedOptimizer):
    """A synchronized optimizer that multiplies the rate of each part by a factor, measured every INTERVAL steps.

    The factors and the count of steps are in the optimizer's state, so checkpoints hold them.

    Args:
        inner: optimizer that averages gradients over the world; its groups name their `part`.
        halves: gradients of the two halves of the ranks.
        first_step: steps before the first measurement; the paper begins after the warmup.

    Raises:
        UserError: the backbone is not trained.
    """

    def __init__(self, inner: SynchronizedOptimizer, halves: Halves, *, first_step: int) -> None:
        super().__init__(inner.optimizer)
        self.inner, self._halves, self.first_step = inner, halves, first_step
        self._parts: dict[str, list[nn.Parameter]] = {}
        for group in self.optimizer.param_groups:
            self._parts.setdefault(group["part"], []).extend(group["params"])
        if ANCHOR not in self._parts:
            raise UserError("solver.agvm measures all parts against the backbone, of which nothing is trained")
        self._rate = 0.0
        self._due = False
        self._measured: dict[str, float] = {}

    def wait_for(self, updates: int) -> None:
        """Measure again after this number of further updates; those that a resumed run's warmup has left."""
        self.first_step = self._count + max(updates, 0)

    def factors(self) -> dict[str, float]:
        """The factor of each part's rate; 1 until the first measurement."""
        state = self.optimizer.state
        return {part: float(state[params[0]].get("agvm_factor", 1.0)) for part, params in self._parts.items()}

    @property
    def _count(self) -> int:
        return int(self.optimizer.state[self._parts[ANCHOR][0]].get("agvm_steps", 0))

    def set_lr(self, rate: float) -> None:
        self._rate = rate
        self.inner.set_lr(rate)

    def set_passes(self, number: int) -> None:
        self.inner.set_passes(number)

    def zero_grad(self) -> None:
        self.inner.zero_grad()
        self._due = self._count >= self.first_step and self._count % INTERVAL == 0
        self._halves.begin(due=self._due)
        self._measured.clear()  # gradients of an update that was skipped

    def synchronize(self) -> None:
        """Average the gradients. A measuring step of real ranks sends two more messages a part, and a broadcast."""
        self.inner.synchronize()
        if self._due:
            self._measure()

    def step(self) -> None:
        """Update each part at its own rate. A measurement of this step counts already."""
        for part, factor in self._measured.items():
            self.optimizer.state[self._parts[part][0]]["agvm_factor"] = factor
        factors = self.factors()
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate * factors[group["part"]]
        self.inner.step()
        self.optimizer.state[self._parts[ANCHOR][0]]["agvm_steps"] = self._count + 1

    @torch.no_grad()
    def _measure(self) -> None:
        """Move the factors towards sqrt(variance of the backbone / variance of the part); `step` uses them."""
        variances = self._halves.agreed({part: self._variance(part) for part in sorted(self._parts)})
        if not all(map(math.isfinite, variances.values())):
            return  # float16 overflowed and this step will be skipped; the next one measures
        for part, old in self.factors().items():
            quotient = (variances[ANCHOR] + EPSILON) / (variances[part] + EPSILON)
            new = math.sqrt(min(max(quotient, BOUNDS[0]), BOUNDS[1]))
            self._measured[part] = MOMENTUM * old + (1 - MOMENTUM) * new
        self._halves.begin(due=False)

    def _variance(self, part: str) -> float:
        """The variance 1 - cos(G1, G2) of a part; not finite where a gradient is not."""
        first, second = (own.double() for own in self._halves.sums(self._parts[part], f"agvm.{part}"))
        norms = first.norm() * second.norm()
        return 1.0 if norms == 0 else 1.0 - float(first.dot(second) / norms)
