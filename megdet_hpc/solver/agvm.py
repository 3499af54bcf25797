"""AGVM: a rate per part of the detector, so that the parts' gradients vary like the backbone's.

Xue et al., Large-batch Optimization for Dense Visual Predictions (NeurIPS 2022). At large batches the gradients of
backbone, FPN, RPN and heads differ in variance. Half of the ranks give a gradient G1, the other half G2, and
eta^2 (1 - cos(G1, G2)) estimates a part's variance; eta, the rate, is common and cancels in the quotient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from megdet_hpc.errors import UserError
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.runtime import SynchronizedOptimizer

# Steps between two measurements, and the weight of the past in the moving average of the factors (the paper's).
INTERVAL = 10
MOMENTUM = 0.97
# Bounds of a quotient of variances before its root, and what keeps it finite, as in the authors' published code.
BOUNDS = (0.5, 10.0)
EPSILON = 1e-6
ANCHOR = "backbone"


class ModulatedOptimizer(SynchronizedOptimizer):
    """A synchronized optimizer whose rate is multiplied by a factor per part, measured every INTERVAL steps.

    The factors and the count of steps are in the optimizer's state, so checkpoints carry them.

    Args:
        inner: what averages gradients over the world; its optimizer's groups name their `part`.
        world: all ranks, on the transport for the halves' gradients.
        first_step: steps before the first measurement; the paper measures from the warmup's end on.

    Raises:
        UserError: the ranks have no two equal halves, or the backbone is not trained.
    """

    def __init__(self, inner: SynchronizedOptimizer, world: Communicator, *, first_step: int) -> None:
        """Collective of the world: two splits, names `agvm_halves` and `agvm_pairs`."""
        if world.size % 2:
            raise UserError(
                f"solver.agvm compares the gradients of two equal halves of the ranks; this run has {world.size} "
                "rank(s), accepted: an even number"
            )
        super().__init__(inner.optimizer)
        self.inner, self.world, self.first_step = inner, world, first_step
        self._parts: dict[str, list[nn.Parameter]] = {}
        for group in self.optimizer.param_groups:
            self._parts.setdefault(group["part"], []).extend(group["params"])
        if ANCHOR not in self._parts:
            raise UserError("solver.agvm measures all parts against the backbone, of which nothing is trained")
        half = world.size // 2
        self._half = world.split(world.rank // half, name="agvm_halves")
        self._pair = world.split(world.rank % half, name="agvm_pairs")
        self._rate = 0.0
        self._due = False
        self._measured: dict[str, float] = {}
        self._own: dict[nn.Parameter, Tensor] = {}
        for parameters in self._parts.values():
            for parameter in parameters:
                # runs before Horovod's own hook, which starts to average the gradient in place
                parameter.register_post_accumulate_grad_hook(self._keep)

    def _keep(self, parameter: Tensor) -> None:
        if self._due and parameter.grad is not None:
            assert isinstance(parameter, nn.Parameter)
            self._own[parameter] = parameter.grad.clone()

    def factors(self) -> dict[str, float]:
        """What each part's rate is multiplied by; 1 until the first measurement."""
        state = self.optimizer.state
        return {part: float(state[params[0]].get("agvm_factor", 1.0)) for part, params in self._parts.items()}

    @property
    def _count(self) -> int:
        return int(self.optimizer.state[self._parts[ANCHOR][0]].get("agvm_steps", 0))

    def set_lr(self, rate: float) -> None:
        self._rate = rate
        self.inner.set_lr(rate)

    def zero_grad(self) -> None:
        self.inner.zero_grad()
        self._due = self._count >= self.first_step and self._count % INTERVAL == 0
        self._own.clear()
        self._measured.clear()  # of an update that was skipped

    def synchronize(self) -> None:
        """As the inner one's; in a measuring step also one message per part over halves and pairs, and a broadcast."""
        self.inner.synchronize()
        if self._due:
            self._measure()

    def step(self) -> None:
        """Update each part at its own rate, by what was measured in this step already."""
        for part, factor in self._measured.items():
            self.optimizer.state[self._parts[part][0]]["agvm_factor"] = factor
        factors = self.factors()
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate * factors[group["part"]]
        self.inner.step()
        self.optimizer.state[self._parts[ANCHOR][0]]["agvm_steps"] = self._count + 1

    @torch.no_grad()
    def _measure(self) -> None:
        """Factors moved towards sqrt(variance of the backbone / variance of the part); `step` takes them over."""
        variances = {part: self._variance(part) for part in sorted(self._parts)}
        # the halves' sums may differ between ranks in their last bits, the factors must not
        variances = self.world.broadcast_object(variances, name="agvm.variances")
        if not all(map(math.isfinite, variances.values())):
            return  # float16 overflowed, and the step is about to be skipped: the next one measures
        for part, old in self.factors().items():
            quotient = (variances[ANCHOR] + EPSILON) / (variances[part] + EPSILON)
            new = math.sqrt(min(max(quotient, BOUNDS[0]), BOUNDS[1]))
            self._measured[part] = MOMENTUM * old + (1 - MOMENTUM) * new
        self._own.clear()

    def _variance(self, part: str) -> float:
        """1 - cos(G1, G2) of a part: (n,) gradients, summed over each half, brought together by pairs of ranks.

        Not finite where a gradient is not.
        """
        own = [self._own[p] if p in self._own else torch.zeros_like(p) for p in self._parts[part]]
        gradient = torch.cat([g.flatten() for g in own])
        self._half.allreduce_sum_(gradient, name=f"agvm.{part}.half")
        first, second = self._pair.allgather_tensor(gradient, name=f"agvm.{part}.pair").double()
        norms = first.norm() * second.norm()
        return 1.0 if norms == 0 else 1.0 - float(first.dot(second) / norms)
