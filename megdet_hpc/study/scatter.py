"""Rows of several seeds as one row each: mean, scatter, and how many runs there are of how many."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from megdet_hpc.study.front import RANKED
from megdet_hpc.study.outcome import FINISHED
from megdet_hpc.study.readings import SeedScores

Row = dict[str, Any]

MEASURED = ("status", "steps", "AP", "AP50", "loss", "train_s", "images_per_s", "reason", "run")
"""Columns of a run's results, which report.rows_of puts after its settings."""
_UNTIL = ("updates_to_AP", "s_to_AP")
_ENDS = "run_steps"
"""Column of the grid `epochs`: updates of the whole run, whose evaluations have rows of their own."""


def settings_of(row: Row) -> tuple[tuple[str, Any], ...]:
    """The columns of a row that say what was run, without its seed."""
    return tuple((key, value) for key, value in row.items() if key not in (*MEASURED, *_UNTIL, *RANKED, _ENDS, "seed"))


def over_seeds(rows: list[Row]) -> list[Row]:
    """One row for each setting.

    Its columns are the settings; `runs`, such as 2 of 3; `failed`; AP, the mean of the runs that are done; `scatter`,
    their sample standard deviation (None for fewer than two); and `by seed`, where a run that is not finished is `-`.

    Args:
        rows: rows that report.rows_of_seeds gives.
    """
    settings: dict[tuple[tuple[str, Any], ...], list[Row]] = {}
    for row in _at_every_epoch(rows) if "epoch" in rows[0] else rows:
        settings.setdefault(settings_of(row), []).append(row)
    return [{**dict(key), **_summary(own)} for key, own in settings.items()]


def _at_every_epoch(rows: list[Row]) -> list[Row]:
    """A row for each setting, epoch and seed; without scores where a seed has no evaluation there.

    Args:
        rows: rows of the grid `epochs`; a run without evaluations has one, whose epoch is None.
    """
    settings: dict[tuple[tuple[str, Any], ...], list[Row]] = {}
    for row in rows:
        settings.setdefault(settings_of({**row, "epoch": None}), []).append(row)
    found = []
    for own in settings.values():
        ends = {row["seed"]: row for row in own}
        at = {(row["epoch"], row["seed"]): row for row in own}
        for epoch in sorted({row["epoch"] for row in own if row["epoch"] is not None}) or [None]:
            missing = {"epoch": epoch, **dict.fromkeys(("steps", "AP", "AP50", "loss", "train_s", "images_per_s"))}
            found += [at.get((epoch, seed)) or {**end, **missing} for seed, end in ends.items()]
    return found


def scores_of(rows: Sequence[Row]) -> list[float]:
    """The AP of each run that is done."""
    return [row["AP"] for row in rows if row["status"] == "done" and row["AP"] is not None]


def _summary(rows: list[Row]) -> Row:
    scores = SeedScores("", tuple(scores_of(rows)))
    finished = [row for row in rows if row["status"] in FINISHED]
    failed = [row for row in rows if row["status"] == "failed"]
    times = [row["train_s"] for row in rows if row["status"] == "done" and row["train_s"] is not None]
    return {
        "runs": f"{len(finished)} of {len(rows)}",
        "failed": len(failed),
        "AP": scores.mean if scores.scores else None,
        "scatter": scores.deviation,
        "by seed": ", ".join(map(_score, rows)),
        "steps": max((row["steps"] for row in finished if row["steps"] is not None), default=None),
        "train_s": fmean(times) if times else None,
        **{key: _by_seed(rows, key) for key in _UNTIL if key in rows[0]},
    }


def _by_seed(rows: list[Row], key: str) -> str:
    return ", ".join("-" if row[key] is None else f"{row[key]:.0f}" for row in rows)


def _score(row: Row) -> str:
    if row["status"] == "failed":
        return f"failed at {row.get(_ENDS, row['steps'])}"
    return f"{row['AP']:.3f}" if row["status"] == "done" and row["AP"] is not None else "-"
