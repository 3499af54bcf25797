"""Readings of the grids `solvers` and `causes`, and of all grids in one call.

`causes` asks why a large mini-batch is behind the small one, if it is. Each of its runs changes one thing. A change
closes the gap if it brings the mean to at most one standard deviation over seeds below the small mini-batch; it narrows
the gap if it brings more than one. What is neither is no cause that these runs show.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megdet_hpc.study.claims import as_good, difference, have_means, readings, scatter_of, scores_of_setting
from megdet_hpc.study.outcome import FINISHED
from megdet_hpc.study.readings import LEAST_SEEDS, SeedScores

Row = dict[str, Any]

_CHANGES = {
    "updates": ("2x epochs", "4x epochs"),
    "rate": ("half rate", "quarter rate"),
    "updates and rate together": ("4x epochs, half rate",),
}
"""Cases of the grid by the cause that they try."""


def readings_of(grid: str, rows: list[Row]) -> list[str]:
    """The sentences of a grid.

    Args:
        grid: key of GRIDS.
        rows: rows of report.rows_of or rows_of_seeds.
    """
    if grid == "causes":
        return cause_readings(rows)
    return readings(grid, rows) + (solver_readings(rows) if grid == "solvers" else [])


def solver_readings(rows: Sequence[Row]) -> list[str]:
    """Sentences on each solver at the best of its rates: against SGD at the best of its own, and over mini-batches."""
    chosen = "each at the best of its rates, chosen on these same runs:"
    solvers = dict.fromkeys(row["solver"] for row in rows)
    at: dict[int, dict[str, SeedScores]] = {}
    for batch in dict.fromkeys(row["batch"] for row in rows):
        own = [row for row in rows if row["batch"] == batch]
        at[batch] = {
            solver: best
            for solver in solvers
            if (best := _best(solver, [row for row in own if row["solver"] == solver])) is not None
        }
    sentences = [
        f"batch {batch}, {chosen} {difference(own, best['sgd'])}"
        for batch, best in at.items()
        for solver, own in best.items()
        if solver != "sgd" and "sgd" in best
    ]
    small = next(iter(at), None)
    return sentences + [
        f"{solver} at batch {batch} against batch {small}, {chosen} {difference(best[solver], least)}"
        for solver, least in (at[small].items() if small is not None else ())
        for batch, best in at.items()
        if batch != small and solver in best
    ]


def _best(solver: str, rows: Sequence[Row]) -> SeedScores | None:
    """The rate of one solver with the highest mean; a rate at which a seed failed comes after all others.

    None without a run that has ended.
    """
    rates = dict.fromkeys(row["rate"] for row in rows)
    own = [scores_of_setting(rows, f"{solver} {rate:.4g}", rate=rate) for rate in rates]
    own = [one for one in own if one.scores or one.failed]
    if not own:
        return None
    return max(own, key=lambda one: (bool(one.scores), -one.failed, one.mean if one.scores else 0.0))


def cause_readings(rows: Sequence[Row]) -> list[str]:
    """Sentences on why the large mini-batch is behind the small one, if it is."""
    if not any(row["status"] in FINISHED for row in rows):
        return []
    at = {
        row["case"]: scores_of_setting(rows, f"{row['batch']} ({row['case']})", case=row["case"])
        for row in {row["case"]: row for row in rows}.values()
    }
    small, large, few = at["small"], at["large"], at["small, updates of large"]
    sentences = [f"The gap: {difference(large, small)}"]
    verdict = as_good(large, small)
    if small.scores and not large.scores and large.failed >= LEAST_SEEDS:
        return [*sentences, *_remedies(at, large)]
    if verdict == "too few seeds" or not have_means(small, large):
        return [*sentences, "Too few seeds to say what causes it.", *_data(large, few)]
    if verdict == "shown":
        sentences.append("There is no gap to explain; the sentences below say what each change does.")
    words: dict[str, str] = {}
    for cause, cases in _CHANGES.items():
        found = [_effect(at[case], large, small) for case in cases]
        words[cause] = next((w for w in ("closes", "narrows") if w in found), "unknown" if None in found else "neither")
        sentences += [
            f"{cause.capitalize()}, {case}: {difference(at[case], large)} {_EFFECTS[effect]}"
            for case, effect in zip(cases, found, strict=True)
        ]
    return [*sentences, *_data(large, few), *([] if verdict == "shown" else [_conclusion(words)])]


_EFFECTS = {
    "closes": "It closes the gap.",
    "narrows": "It narrows the gap and does not close it.",
    "neither": "It does not narrow the gap.",
    None: "Too few seeds to say.",
}


def _remedies(at: dict[str, SeedScores], large: SeedScores) -> list[str]:
    """Sentences where every seed of the large mini-batch failed: which changes let it train."""
    sentences = [f"The large mini-batch fails, with each of {large.failed} seeds. Its gap has no size."]
    for cause, cases in _CHANGES.items():
        for case in cases:
            own = at[case]
            done = len(own.scores) + own.failed
            if done:
                trained = f"{len(own.scores)} of {done} seeds train"
                sentences.append(f"{cause.capitalize()}, {case}: {own.text()}. With it {trained}.")
    return sentences


def _effect(changed: SeedScores, large: SeedScores, small: SeedScores) -> str | None:
    """What a change does to the gap; None with too few seeds."""
    if changed.failed >= LEAST_SEEDS and not changed.scores:
        return "neither"
    if not have_means(changed, large, small):
        return None
    gain = changed.mean - large.mean
    if gain <= (scatter_of(changed, large) or 0.0):
        return "neither"
    return "closes" if as_good(changed, small) == "shown" else "narrows"


def _data(large: SeedScores, few: SeedScores) -> list[str]:
    """A sentence on what more images in each of the same number of updates bring."""
    if not large.scores or not few.scores:
        return []
    text = f"Data, the same number of updates: {difference(large, few)}"
    if not have_means(large, few):
        return [f"{text} Too few seeds to say."]
    used = large.mean - few.mean > (scatter_of(large, few) or 0.0)
    return [
        f"{text} "
        + (
            "An update gains from its further images."
            if used
            else "An update gains nothing from its further images: the number of updates decides."
        )
    ]


def _conclusion(words: dict[str, str]) -> str:
    """The cause by the words that each change got."""
    for word, text in (("closes", "{}: enough to close the gap."), ("narrows", "{}: a part of the gap, not all.")):
        if named := [cause for cause, own in words.items() if own == word]:
            single = [cause for cause in named if " together" not in cause]
            return "The cause: " + text.format(" or ".join(single or named))
    if "unknown" in words.values():
        return "The cause: not to be told before all cases have their seeds."
    return "The cause: neither updates nor rate. Data or model are left, which these runs do not separate."
