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


def settings_of(row: Row) -> tuple[tuple[str, Any], ...]:
    """The columns of a row that say what was run, without its seed."""
    return tuple((key, value) for key, value in row.items() if key not in (*MEASURED, *_UNTIL, *RANKED, "seed"))


def over_seeds(rows: list[Row]) -> list[Row]:
    """One row for each setting.

    Its columns are the settings; `runs`, such as 2 of 3; `failed`; AP, the mean of the runs that are done; `scatter`,
    their sample standard deviation (None for fewer than two); and `by seed`, where a run that is not finished is `-`.

    Args:
        rows: rows that report.rows_of_seeds gives.
    """
    settings: dict[tuple[tuple[str, Any], ...], list[Row]] = {}
    for row in rows:
        settings.setdefault(settings_of(row), []).append(row)
    return [{**dict(key), **_summary(own)} for key, own in settings.items()]


def scores_of(rows: Sequence[Row]) -> list[float]:
    """The AP of each run that is done."""
    return [row["AP"] for row in rows if row["status"] == "done" and row["AP"] is not None]


def _summary(rows: list[Row]) -> Row:
    scores = SeedScores("", tuple(scores_of(rows)))
    finished = [row for row in rows if row["status"] in FINISHED]
    failed = [row for row in rows if row["status"] == "failed"]
    times = [row["train_s"] for row in rows if row["status"] == "done"]
    return {
        "runs": f"{len(finished)} of {len(rows)}",
        "failed": len(failed),
        "AP": scores.mean if scores.scores else None,
        "scatter": scores.deviation,
        "by seed": ", ".join(map(_score, rows)),
        "steps": max((row["steps"] for row in finished), default=None),
        "train_s": fmean(times) if times else None,
        **{key: _by_seed(rows, key) for key in _UNTIL if key in rows[0]},
    }


def _by_seed(rows: list[Row], key: str) -> str:
    return ", ".join("-" if row[key] is None else f"{row[key]:.0f}" for row in rows)


def _score(row: Row) -> str:
    if row["status"] == "failed":
        return f"failed at {row['steps']}"
    return f"{row['AP']:.3f}" if row["status"] == "done" and row["AP"] is not None else "-"
