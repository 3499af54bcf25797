"""AdaScale: the rate of a large mini-batch follows the variance of its gradient.

Johnson, Agrawal, Gu, Guestrin, AdaScale SGD (ICML 2020). The schedule is that of the base batch. An update of S times
its images counts for r of the schedule's steps, and its rate is r times that of the step where the schedule stands. The
gain r lies between 1, where the gradient has no noise that more images could remove, and S, where it is nothing but
noise. So the linear rule's rate comes by itself where it is right, and warmup and exponent with it.

With the gradients g_i of n ranks and their mean g, for the base batch

    var = S / (n - 1) * (mean |g_i|^2 - |g|^2)     sqr = |g|^2 - var / S     r = (var + sqr) / (var / S + sqr)

from moving averages of var and sqr, whose weight of the past is max(1 - n / 1000, 0), as in the fairscale library. All
parameters have one gain. The g_i are not quite independent here (gradient_noise.py): what ranks share through batch
statistics counts as sqr, so r is rather too small.
"""

from __future__ import annotations

from torch import nn

from megdet_hpc.errors import UserError
from megdet_hpc.parallel.runtime import SynchronizedOptimizer
from megdet_hpc.solver.gradient_noise import GradientNoise, NoiseMeasurement

LEAST_VARIANCE = 1e-6
"""Lower bound of var, as in fairscale."""
_WINDOW = 1000


class ScaledOptimizer(SynchronizedOptimizer):
    """A synchronized optimizer whose rate is multiplied by the gain of each update.

    Its count of the schedule's steps and its averages are in the optimizer's state, so checkpoints hold them.

    Args:
        inner: optimizer that averages gradients over the world.
        noise: measures each update.
        scale: images of an update over those of the base batch.

    Raises:
        UserError: an update has no more images than the base batch.
    """

    def __init__(self, inner: SynchronizedOptimizer, noise: GradientNoise, *, scale: float) -> None:
        super().__init__(inner.optimizer)
        if scale <= 1:
            raise UserError(
                f"solver.adascale: an update has {scale:g} times the images of solver.reference_batch; accepted: over 1"
            )
        self.inner, self.noise, self.scale = inner, noise, scale
        self._rate = 0.0
        self._first: nn.Parameter = self.optimizer.param_groups[0]["params"][0]

    def _stored(self, name: str) -> float:
        return float(self.optimizer.state[self._first].get(f"adascale_{name}", 0.0))

    @property
    def steps(self) -> float:
        """The schedule's steps that are done."""
        return self._stored("steps")

    @property
    def gain(self) -> float:
        """The gain of the newest update; 1 before the first."""
        return self._stored("gain") or 1.0

    def set_lr(self, rate: float) -> None:
        self._rate = rate
        self.inner.set_lr(rate)

    def set_passes(self, number: int) -> None:
        self.inner.set_passes(number)

    def zero_grad(self) -> None:
        self.inner.zero_grad()

    def synchronize(self) -> None:
        self.inner.synchronize()

    def step(self) -> None:
        """Update the weights at the rate times the gain, and count the gain as steps of the schedule."""
        found = self.noise.newest
        # the norm is not finite: the gain stays, and the run ends at the next check
        gain = self.gain if found is None else self._measure(found)
        self.inner.set_lr(gain * self._rate)
        self.inner.step()
        state = self.optimizer.state[self._first]
        state["adascale_gain"], state["adascale_steps"] = gain, self.steps + gain

    def _measure(self, found: NoiseMeasurement) -> float:
        """The gain of averages that this update joins."""
        variance, square = terms(found, self.scale)
        past = max(1 - found.number / _WINDOW, 0.0)
        state = self.optimizer.state[self._first]
        # weight of all terms so far, which takes the zero at the start out of the averages
        weight = past * self._stored("weight") + (1 - past)
        averages = [
            past * self._stored(name) + (1 - past) * value for name, value in (("var", variance), ("sqr", square))
        ]
        state["adascale_weight"], state["adascale_var"], state["adascale_sqr"] = weight, *averages
        return gain_of(averages[0] / weight, averages[1] / weight, self.scale)


def terms(found: NoiseMeasurement, scale: float) -> tuple[float, float]:
    """The variance of the base batch's gradient and the square of its mean, of one update.

    Args:
        found: measurement of the update.
        scale: images of an update over those of the base batch.
    """
    variance = max(scale / (found.number - 1) * (found.small - found.whole), LEAST_VARIANCE)
    return variance, max(found.whole - variance / scale, 0.0)


def gain_of(variance: float, square: float, scale: float) -> float:
    """The gain of an update, from 1 to its scale.

    Args:
        variance: variance of the base batch's gradient.
        square: square of the mean gradient.
        scale: images of an update over those of the base batch.
    """
    return min(max((variance + square) / (variance / scale + square), 1.0), scale)
