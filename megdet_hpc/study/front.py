"""Ranks of detectors by AP and by time, and their Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]

RANKED = ("ms_per_image", "rank_AP", "rank_time", "pareto")
"""Columns that ranked() adds. They are measured: each seed has its own."""


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether each point is on the front: no other is at least as good in both values and better in one.

    Args:
        points: pairs of AP (more is better) and time (less is better).
    """
    return [
        not any(ap >= own_ap and time <= own_time and (ap, time) != (own_ap, own_time) for ap, time in points)
        for own_ap, own_time in points
    ]


def ranked(rows: list[Row]) -> list[Row]:
    """Rows with ms_per_image, rank_AP, rank_time and pareto before their measured values, highest AP first.

    The time is that of training, over all images of all updates. Only runs that are done are ranked; the others
    follow in their order, with None in these columns. Equal values share the better rank.

    Args:
        rows: rows with the columns status, AP and images_per_s.
    """
    scored = [row for row in rows if row["status"] == "done" and row["AP"] is not None and row["images_per_s"]]
    points = [(row["AP"], 1000 / row["images_per_s"]) for row in scored]
    places = {}
    for row, (ap, time), on_front in zip(scored, points, pareto_front(points), strict=True):
        by_ap, by_time = 1 + sum(other > ap for other, _ in points), 1 + sum(other < time for _, other in points)
        places[id(row)] = dict(zip(RANKED, (time, by_ap, by_time, on_front), strict=True))
    none = dict.fromkeys(RANKED)
    ordered = sorted(scored, key=lambda row: -row["AP"]) + [row for row in rows if id(row) not in places]
    return [{**places.get(id(row), none), **row} for row in ordered]
