"""Variance of a mini-batch gradient from few draws, and how it falls with the size of the mini-batch.

The variance of a gradient vector is the trace of its covariance matrix: the sum of its entries' variances. So the
    variances
of the detector's parts add up to that of the whole model. Memory is one vector per part for any number of draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Resamples of the bootstrap: 2.5 % of them, 50, lie beyond each end of the interval.
_RESAMPLES = 2000
# A mean gradient counts as known if its square is at least this many times the noise in it.
_RESOLVED = 2.0
# Least number of contrasts (draws of all sizes, less one a size). With fewer the scatter itself is too uncertain.
_FEWEST_CONTRASTS = 20
# With a larger error, two standard errors around 1 reach 0.5 and 1.5, so the exponent says nothing.
_VAGUE = 0.25


class Moments:
    """Running mean and variance of a vector, after Welford (1962), in float64.

    Draw k + 1 adds k / (k + 1) |g - mean of the first k|^2 to the sum of squares. These terms belong to orthogonal
    contrasts of the draws (Helmert's): each alone has the variance as its expectation, and for Gaussian draws they
    are independent. Their scatter therefore gives the error of their mean, the unbiased sample variance.

    Attributes:
        contrasts: the terms, one fewer than draws.
    """

    def __init__(self) -> None:
        self.draws = 0
        self.contrasts: list[float] = []
        self._mean: Tensor | None = None

    def add(self, vector: Tensor) -> None:
        """Take in one draw: (P,), any float type; not kept."""
        vector = vector.detach().double()
        self.draws += 1
        if self._mean is None:
            self._mean = vector.clone()
            return
        difference = vector - self._mean
        self.contrasts.append(float(difference.square().sum()) * (self.draws - 1) / self.draws)
        self._mean += difference / self.draws

    @property
    def squared_mean(self) -> float:
        """|mean|^2 of the draws so far. The noise left in the mean makes it too large on average."""
        return 0.0 if self._mean is None else float(self._mean.square().sum())


@dataclass(frozen=True)
class Variance:
    """The variance of the gradient of mini-batches of one size.

    Attributes:
        batch: images.
        draws: mini-batches measured.
        value: unbiased estimate of the trace of the covariance.
        error: standard error of value; None below three draws.
        low, high: 95 % interval from a bootstrap over the contrasts, too narrow below some ten draws; None as error.
        squared_mean: |mean gradient|^2 less its noise; it may be below 0 if noise dominates.
        noise_scale: batch * value / squared_mean: number of images at which noise and mean are equally large
            (McCandlish et al. 2018, B_simple); None if the mean is not known well enough.
    """

    batch: int
    draws: int
    value: float
    error: float | None
    low: float | None
    high: float | None
    squared_mean: float
    noise_scale: float | None


def variance(batch: int, contrasts: Sequence[float], squared_mean: float) -> Variance:
    """Summarize draws of one size.

    Args:
        batch: images of a draw.
        contrasts: contrasts of `Moments`, or their sums over parts; one or more.
        squared_mean: squared_mean of `Moments`.
    """
    values = np.asarray(contrasts, dtype=np.float64)
    draws, value = len(values) + 1, float(values.mean())
    error = low = high = None
    if len(values) > 1:
        error = float(values.std(ddof=1) / math.sqrt(len(values)))
        picks = np.random.default_rng(0).integers(len(values), size=(_RESAMPLES, len(values)))
        low, high = (float(bound) for bound in np.quantile(values[picks].mean(axis=1), [0.025, 0.975]))
    noise = value / draws
    known = squared_mean > _RESOLVED * noise
    corrected = squared_mean - noise
    return Variance(batch, draws, value, error, low, high, corrected, batch * value / corrected if known else None)


def by_part(batch: int, moments: Mapping[str, Moments]) -> dict[str, Variance]:
    """The variance of each part and, as `all`, of the whole."""
    found = {part: variance(batch, own.contrasts, own.squared_mean) for part, own in moments.items()}
    sums = np.sum([own.contrasts for own in moments.values()], axis=0)
    found["all"] = variance(batch, sums.tolist(), sum(own.squared_mean for own in moments.values()))
    return found


@dataclass(frozen=True)
class Exponent:
    """variance = constant / N ** value.

    Attributes:
        value: 1 where images are independent of each other.
        error: standard error; None where no size has three draws.
        contrasts: number of contrasts that the error rests on.
    """

    value: float
    error: float | None
    contrasts: int = _FEWEST_CONTRASTS

    def reading(self) -> str:
        """What the exponent says about the linear scaling rule."""
        if self.error is None:
            return "too few draws for an error"
        if self.contrasts < _FEWEST_CONTRASTS:
            return "too few draws to say"
        if self.error > _VAGUE:
            return "too uncertain to say; more draws or a wider range of sizes"
        if abs(self.value - 1) <= 2 * self.error:
            return "agrees with 1/N, as the rule assumes"
        if self.value < 1:
            return "slower than 1/N: a larger batch gains less than the rule assumes"
        return "faster than 1/N: a larger batch gains more than the rule assumes"


def fit_exponent(variances: Sequence[Variance]) -> Exponent | None:
    """Weighted line through log variance over log N.

    The relative scatter of one contrast is assumed to be equal at all sizes and is pooled over them, since the few
    contrasts of one size would give it too uncertainly for a weight. The error is enlarged if the points lie further
    from the line than the scatter explains.

    Args:
        variances: variances of one part, at different sizes.

    Returns:
        None with fewer than two sizes, or if nothing varies.
    """
    if len({found.batch for found in variances}) < 2 or any(found.value <= 0 for found in variances):
        return None
    x = np.log([found.batch for found in variances])
    y = np.log([found.value for found in variances])
    contrasts = np.asarray([found.draws - 1 for found in variances], dtype=np.float64)
    scatter = sum(
        (found.draws - 2) * (found.draws - 1) * ((found.error or 0) / found.value) ** 2 for found in variances
    )
    known = any(found.error is not None for found in variances)
    # to first order the error of a logarithm is the relative error
    weights = contrasts * float(np.sum(contrasts - 1)) / scatter if known else contrasts
    centre = np.average(x, weights=weights)
    spread = float(np.sum(weights * np.square(x - centre)))
    slope = float(np.sum(weights * (x - centre) * y)) / spread
    if not known:
        return Exponent(-slope, None)
    rest = y - np.average(y, weights=weights) - slope * (x - centre)
    misfit = float(np.sum(weights * np.square(rest))) / (len(x) - 2) if len(x) > 2 else 0.0
    return Exponent(-slope, math.sqrt(max(misfit, 1.0) / spread), int(contrasts.sum()))


def flat_gradients(parts: Mapping[str, Sequence[torch.nn.Parameter]]) -> dict[str, Tensor]:
    """Each part's gradient as one vector (P,); zeros where a parameter got none."""
    return {
        part: torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        for part, parameters in parts.items()
    }
