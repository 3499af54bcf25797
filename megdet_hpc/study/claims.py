"""The readings of the paper's grids: sentences from the numbers, and the verdicts that were fixed before the first run.

A difference of two means is read against sd, the larger one of the two sample standard deviations over seeds. The rules
of `PaperFinding` are those of docs/results.md; what is neither shown nor refuted is undecided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megdet_hpc.study.outcome import FINISHED
from megdet_hpc.study.readings import LEAST_SEEDS, SeedScores
from megdet_hpc.study.scatter import scores_of

Row = dict[str, Any]
Found = Literal["shown", "refuted", "undecided", "too few seeds"]

OF_FINDINGS = ("claim", "warmups", "bn_size", "epochs")
"""The grids from which findings() reads."""
LEAST_GAP = 0.02
"""Difference of AP from which a rival counts as clearly behind, beside the scatter."""


def scores_of_setting(rows: Sequence[Row], name: str, **columns: Any) -> SeedScores:
    """The finished seeds of one setting; a run that failed counts as such and has no score.

    Args:
        rows: rows of report.rows_of or rows_of_seeds.
        name: name in sentences.
        columns: values that the setting has in its columns.
    """
    own = [row for row in rows if all(row.get(key) == value for key, value in columns.items())]
    return SeedScores(name, tuple(scores_of(own)), sum(row["status"] == "failed" for row in own))


def scatter_of(one: SeedScores, other: SeedScores) -> float | None:
    """The larger standard deviation of two settings; None if neither has two seeds."""
    known = [own for own in (one.deviation, other.deviation) if own is not None]
    return max(known, default=None)


def difference(one: SeedScores, other: SeedScores) -> str:
    """A sentence on the difference of two settings, against the scatter of seeds."""
    if not one.scores or not other.scores:
        return f"{one.text()}; {other.text()}. Nothing to compare."
    gap, sd = one.mean - other.mean, scatter_of(one, other)
    numbers = f"{one.text()}; {other.text()}; difference {gap:+.3f}."
    if sd is None:
        return f"{numbers} One seed: what a seed does is not known, so nothing follows."
    times = f"{abs(gap) / sd:.1f} sd of {sd:.3f}" if sd > 0 else "sd 0"
    where = "within one sd" if abs(gap) <= sd else "between one and two sd" if abs(gap) <= 2 * sd else "over two sd"
    few = min(len(one.scores), len(other.scores)) < LEAST_SEEDS
    rest = f"; too few seeds to rest on ({LEAST_SEEDS} of each)." if few else "."
    return f"{numbers} That is {where} ({times}){rest}"


@dataclass(frozen=True)
class PaperFinding:
    """One of the paper's findings, the verdict on it and the numbers that it rests on."""

    text: str
    found: Found
    numbers: str

    def reading(self) -> str:
        """The finding as a sentence."""
        return f"{self.text} {self.found.capitalize()}. {self.numbers}"


def _enough(*settings: SeedScores) -> bool:
    return all(len(own.scores) + own.failed >= LEAST_SEEDS for own in settings)


def have_means(*settings: SeedScores) -> bool:
    """Whether so many seeds of each ended with a score that their mean may decide."""
    return all(len(own.scores) >= LEAST_SEEDS for own in settings)


def as_good(large: SeedScores, small: SeedScores) -> Found:
    """Whether a large mini-batch is as good as a small one: at most one sd below; refuted over two sd.

    A seed that failed has no part in the mean. So it alone refutes nothing, and what fails more often is not as good.
    """
    if not _enough(large, small):
        return "too few seeds"
    if not have_means(large, small):
        return "undecided"
    sd = scatter_of(large, small) or 0.0
    gap = small.mean - large.mean
    if gap > 2 * sd:
        return "refuted"
    return "shown" if gap <= sd and _failing(large) <= _failing(small) else "undecided"


def _failing(setting: SeedScores) -> float:
    """Share of the finished seeds that failed."""
    return setting.failed / max(setting.failed + len(setting.scores), 1)


def is_behind(rival: SeedScores, own: SeedScores, *, failures: int, gap: float = 0.0) -> Found:
    """Whether a rival fails or is behind: so many seeds fail, or its mean is over two sd and `gap` below.

    Refuted if it is at most one sd below. Failures decide nothing where the other setting fails as often.

    Args:
        rival: the setting that is said to be worse.
        own: the other one.
        failures: seeds that have to fail.
        gap: least difference of AP, beside the scatter.
    """
    if rival.failed >= failures and own.scores and _failing(rival) > _failing(own):
        return "shown"
    if not _enough(rival, own):
        return "too few seeds"
    if not have_means(rival, own):
        return "undecided"
    sd, below = scatter_of(rival, own) or 0.0, own.mean - rival.mean
    if below > 2 * sd and below > gap:
        return "shown"
    return "refuted" if below <= sd else "undecided"


def _with_failures(rival: SeedScores, own: SeedScores) -> str:
    """The numbers of `difference`, and how many seeds of each failed where one did."""
    text = difference(rival, own)
    if not (rival.failed or own.failed):
        return text
    failed = (f"{one.failed} of {one.failed + len(one.scores)} seeds of {one.name}" for one in (rival, own))
    return f"{text} Failed: {', '.join(failed)}."


def enough_at(size: int, own: SeedScores, less: SeedScores, more: SeedScores) -> PaperFinding:
    """Whether a BN size is enough: a smaller one is more than one sd below it, a larger one at most one sd above."""
    text = f"BN size {size} is enough."
    numbers = f"{less.text()}; {own.text()}; {more.text()}."
    if not _enough(less, own, more):
        return PaperFinding(text, "too few seeds", numbers)
    if not have_means(less, own, more):
        return PaperFinding(text, "undecided", numbers)
    above, sd = more.mean - own.mean, scatter_of(more, own) or 0.0
    if above > 2 * sd:
        return PaperFinding(text, "refuted", numbers)
    shown = own.mean - less.mean > (scatter_of(less, own) or 0.0) and above <= sd
    return PaperFinding(text, "shown" if shown else "undecided", numbers)


def findings(rows: dict[str, list[Row]]) -> list[PaperFinding]:
    """The verdicts on the paper's five findings, from the rows of the grids that were read.

    Args:
        rows: rows by grid; those of `claim` are needed for the first two, of `warmups`, `bn_size` and `epochs` for the
            others.
    """
    found: list[PaperFinding] = []
    claim = rows.get("claim", [])
    if not claim:
        return found
    batches = sorted({row["batch"] for row in claim})
    small, large = batches[0], batches[-1]
    at = {n: scores_of_setting(claim, f"{n} with CGBN", norm="cgbn", batch=n) for n in batches}
    found.append(
        PaperFinding(
            f"{large} images an update are as good as {small}, in {small}/{large} of the updates.",
            as_good(at[large], at[small]),
            difference(at[large], at[small]),
        )
    )
    for norm, name in (("frozen", "fixed statistics"), ("one rank", "statistics of one rank's images")):
        rival = scores_of_setting(claim, f"{large} with {name}", norm=norm, batch=large)
        verdict = is_behind(rival, at[large], failures=2, gap=LEAST_GAP)
        found.append(PaperFinding(f"It fails with {name}.", verdict, _with_failures(rival, at[large])))
    if warm := rows.get("warmups"):
        longest = max(row["epochs"] for row in warm)
        without = scores_of_setting(warm, f"{large} without warmup", form="none")
        own = scores_of_setting(warm, f"{large} with {longest:g} epochs of it", form="linear", epochs=longest)
        verdict = is_behind(without, own, failures=1)
        found.append(PaperFinding("Warmup is needed.", verdict, _with_failures(without, own)))
    if sizes := rows.get("bn_size"):
        have = sorted({row["bn_size"] for row in sizes})
        if 32 in have[1:-1]:
            by = {n: scores_of_setting(sizes, f"{n} images share statistics", bn_size=n) for n in have}
            found.append(enough_at(32, by[32], by[have[0]], by[have[-1]]))
    if epochs := rows.get("epochs"):
        found += _ahead_early(epochs, small, large)
    return [
        one for one in found if one.found != "too few seeds" or any(sign in one.numbers for sign in ("seed", "fail"))
    ]


def _ahead_early(rows: list[Row], small: int, large: int) -> list[PaperFinding]:
    """Whether the small mini-batch is ahead at a fifth of the epochs by more than one sd, and more than at the end."""
    known = sorted({row["epoch"] for row in rows if row["epoch"] is not None and row["status"] == "done"})
    if not known:
        return []
    early, end = min(known, key=lambda epoch: abs(epoch - known[-1] / 5)), known[-1]
    at = {
        (n, epoch): scores_of_setting(rows, f"{n} at epoch {epoch:g}", batch=n, epoch=epoch)
        for n in (small, large)
        for epoch in (early, end)
    }
    text = "The small mini-batch is ahead early."
    one, other = at[small, early], at[large, early]
    if min(len(own.scores) for own in at.values()) < LEAST_SEEDS or early == end:
        return [PaperFinding(text, "too few seeds", difference(one, other))]
    lead, sd = one.mean - other.mean, scatter_of(one, other) or 0.0
    later = at[small, end].mean - at[large, end].mean
    verdict: Found = "shown" if lead > sd and lead > later else "refuted" if lead <= 0 else "undecided"
    return [PaperFinding(text, verdict, f"{difference(one, other)} At the end the difference is {later:+.3f}.")]


def readings(grid: str, rows: list[Row]) -> list[str]:
    """Sentences that compare each setting of a grid with its first one of the same kind, by the scatter of seeds.

    Args:
        grid: key of GRIDS.
        rows: rows of report.rows_of or rows_of_seeds.
    """
    kinds: dict[str, tuple[tuple[str, ...], str]] = {
        # columns that stay the same within a comparison, and the one that varies
        "batch": (("norm", "rate"), "batch"),
        "claim": (("norm",), "batch"),
        "bn_size": (("batch",), "bn_size"),
        "warmup": (("norm", "batch"), "warmup"),
        "warmups": (("batch",), "form, epochs"),
        "rates": (("batch",), "rate"),
        "solvers": (("batch",), "solver, rate"),
    }
    if grid not in kinds or not any(row["status"] in FINISHED for row in rows):
        return []
    same, varies = kinds[grid]
    keys = varies.split(", ")
    sentences = []
    for fixed in dict.fromkeys(tuple(row[key] for key in same) for row in rows):
        columns = dict(zip(same, fixed, strict=True))
        own = [row for row in rows if all(row[key] == value for key, value in columns.items())]
        settings = list(dict.fromkeys(tuple(row[key] for key in keys) for row in own))
        head = ", ".join(f"{key} {value}" for key, value in columns.items())
        first, *others = (
            scores_of_setting(own, " ".join(f"{k} {_plain(v)}" for k, v in zip(keys, one, strict=True)),
                              **dict(zip(keys, one, strict=True)))
            for one in settings
        )  # fmt: skip
        compared = [difference(other, first) for other in others if other.scores or other.failed]
        sentences += [f"{head}: {text}" for text in compared if first.scores or first.failed]
    return sentences


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
