"""The plan's hours on GPUs for the updates that runs needed to reach an AP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megdet_hpc.plan.gpu_hours import LEAST_GPUS, MOST_GPUS, describe_gpu_hours

_COLUMN = "updates_to_AP_"


def gpu_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines for each AP of the table; runs of one mini-batch that reached it count by the mean of their updates.

    Args:
        rows: rows that table.rows_of gives.
    """
    lines: list[str] = []
    for column in (name for name in rows[0] if name.startswith(_COLUMN)):
        updates: dict[int, list[int | None]] = {}
        for row in rows:
            if row["mini_batch"]:
                updates.setdefault(row["mini_batch"], []).append(row[column])
        lines += ["", *found] if (found := describe_gpu_hours(updates, float(column.removeprefix(_COLUMN)))) else []
    return lines or [
        "",
        f"--gpus: nothing to compare; an AP must have been reached at two mini-batches that are 2 images on each of "
        f"{LEAST_GPUS} to {MOST_GPUS} GPUs, in whole nodes of 8",
    ]
