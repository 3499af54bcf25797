"""Sentences made from numbers: whether what one setting is said to bring over another one shows in some seeds.

The rule knows no distribution: it is the exact rank test of Mann and Whitney (1947). Each seed of one setting is
compared with each of the other. If nothing differed, every way to deal the scores out to both settings would be as
likely. A difference shows if at most 1 in 20 of these ways has as many pairs won. With three seeds each, that is the
one way in which every seed of one setting is above every seed of the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import sqrt
from statistics import fmean, stdev
from typing import Literal

Verdict = Literal["appears", "within scatter", "the opposite appears", "too few seeds"]

LEAST_SEEDS = 3
"""Seeds of each setting that a sentence rests on."""
MOST_SEEDS = 10
"""Seeds of each setting that are compared, since all ways to deal them out are counted."""
CHANCE = 1 / 20
"""Share of chance up to which a difference shows."""


@dataclass(frozen=True)
class SeedScores:
    """The scores of one setting, one for each seed that is finished.

    Attributes:
        name: name of the setting, as it stands in a sentence.
        scores: AP of each seed; a run that failed has what its detector scores, or 0.
        failed: number of seeds that failed.
    """

    name: str
    scores: tuple[float, ...]
    failed: int = 0

    @property
    def mean(self) -> float:
        return fmean(self.scores)

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the seeds; None for fewer than two."""
        return stdev(self.scores) if len(self.scores) > 1 else None

    def text(self) -> str:
        """The name, the mean, the scatter, and how many seeds there are."""
        if not self.scores:
            return f"{self.name}: {_seeds(self.failed)} failed" if self.failed else f"{self.name}: no run is finished"
        scatter = "" if self.deviation is None else f" +- {self.deviation:.3f}"
        failed = f", {self.failed} failed" if self.failed else ""
        return f"{self.name} {self.mean:.3f}{scatter} ({_seeds(len(self.scores))}{failed})"


@dataclass(frozen=True)
class Statement:
    """A claim that one setting scores more than another one.

    Attributes:
        source: who says so.
        text: what is said, as a sentence.
        better: the setting that is said to score more.
        worse: the other one.
    """

    source: str
    text: str
    better: SeedScores
    worse: SeedScores

    @property
    def verdict(self) -> Verdict:
        return verdict(self.better.scores, self.worse.scores)

    @property
    def begun(self) -> bool:
        """Whether a run of either setting is finished."""
        return bool(self.better.scores or self.worse.scores)

    def reading(self) -> str:
        """The claim, the numbers, and whether it appears in them."""
        numbers = f"{self.better.text()}; {self.worse.text()}"
        if not self.better.scores or not self.worse.scores:
            return f"{self.source}: {self.text} {numbers}. Too few seeds to say."
        return f"{self.source}: {self.text} {numbers}; difference {_difference(self.better, self.worse)}. {self._end()}"

    def _end(self) -> str:
        if self.verdict == "too few seeds":
            return f"Too few seeds to say ({LEAST_SEEDS} of each are needed)."
        above, below = self.better, self.worse
        # by the pairs, as the verdict is: the means may say the opposite
        if pairs_won(above.scores, below.scores) < pairs_won(below.scores, above.scores):
            above, below = below, above
        pairs = f"{pairs_won(above.scores, below.scores):g} of {len(above.scores) * len(below.scores)} pairs of seeds"
        share = chance(above.scores, below.scores)
        begin = {"appears": "Appears", "within scatter": "Within scatter"}.get(self.verdict, "The opposite appears")
        return f"{begin}: {above.name} is above in {pairs} (by chance in {100 * share:.2g} %)."


def pairs_won(own: Sequence[float], other: Sequence[float]) -> float:
    """The pairs of a score and one of the other setting in which it is larger; equal ones are half a pair."""
    return sum((a > b) + (a == b) / 2 for a in own for b in other)


def chance(own: Sequence[float], other: Sequence[float]) -> float:
    """The share of all ways to deal out the scores in which the first setting wins as many pairs, or more.

    Args:
        own: scores of one setting.
        other: scores of the other one.
    """
    scores, won, as_many, ways = [*own, *other], pairs_won(own, other), 0, 0
    for chosen in combinations(range(len(scores)), len(own)):
        rest = [score for index, score in enumerate(scores) if index not in chosen]
        as_many += pairs_won([scores[index] for index in chosen], rest) >= won
        ways += 1
    return as_many / ways


def verdict(better: Sequence[float], worse: Sequence[float]) -> Verdict:
    """Whether a difference shows in the seeds of two settings.

    Args:
        better: scores of the setting that is said to score more.
        worse: scores of the other one.

    Raises:
        ValueError: there are more than MOST_SEEDS of one.
    """
    if max(len(better), len(worse)) > MOST_SEEDS:
        raise ValueError(f"{len(better)} and {len(worse)} seeds; accepted: up to {MOST_SEEDS} each")
    if min(len(better), len(worse)) < LEAST_SEEDS:
        return "too few seeds"
    if chance(better, worse) <= CHANCE:
        return "appears"
    return "the opposite appears" if chance(worse, better) <= CHANCE else "within scatter"


def _difference(better: SeedScores, worse: SeedScores) -> str:
    """The difference of the means, and its standard error where there is one."""
    text = f"{better.mean - worse.mean:+.3f}"
    if better.deviation is None or worse.deviation is None:
        return text
    error = sqrt(better.deviation**2 / len(better.scores) + worse.deviation**2 / len(worse.scores))
    return f"{text} (standard error {error:.3f})"


def _seeds(number: int) -> str:
    return f"{number} seed" if number == 1 else f"{number} seeds"
