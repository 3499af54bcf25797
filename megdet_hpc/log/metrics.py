"""metrics.jsonl, the metrics of a run as JSON lines, and the trackers beside it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megdet_hpc.errors import UserError
from megdet_hpc.files import atomic_write
from megdet_hpc.log.deferred import score_rows
from megdet_hpc.log.trackers import DEFAULT_TRACKERS, Trackers

METRICS = "metrics.jsonl"
TIME_TO_AP = "time_to_ap_h/"


def scores_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The scores of a row of metrics.jsonl, without their prefix; NaN for one that does not exist."""
    found = {key[4:]: value for key, value in row.items() if key.startswith("val/")}
    return {key: math.nan if value is None else value for key, value in found.items()}


def time_to_ap(target: float) -> str:
    """Key of the time of the steps [hours] until the first validation with this AP or more."""
    return f"{TIME_TO_AP}{target:g}"


class MetricsLog:
    """The metrics of a run: one JSON object a line in metrics.jsonl, and the same in each tracker. Rank 0 only.

    A resumed run drops the lines of the steps that it will repeat. Each line is on disk before the run goes on, so a
    checkpoint never exists without the lines before it. Of trackers nothing is awaited.

    Args:
        folder: folder of the run.
        first_step: number of updates that are done.
        check: function called before each write; it raises where another run owns the folder now.
        trackers: names of the trackers.
    """

    def __init__(
        self,
        folder: Path,
        first_step: int,
        check: Callable[[], None] = lambda: None,
        trackers: Sequence[str] = DEFAULT_TRACKERS,
    ) -> None:
        check()
        path = folder / METRICS
        kept = [row for row in _own_rows(path) if row["step"] <= first_step]
        with atomic_write(path) as file:
            file.write("".join(json.dumps(row) + "\n" for row in kept).encode())
        self._check, self._kept, self._first_step = check, kept, first_step
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 - open for the length of the run
        self._trackers = Trackers(trackers, folder, first_step)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Log numbers of the state after `step` updates. Where a number has a unit, the key names it.

        NaN stands for a metric that does not exist: null in the file, no point in a tracker.
        """
        self._check()
        known = {key: None if math.isnan(value) else value for key, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **known}) + "\n")
        os.fsync(self._file.fileno())
        self._trackers.write(step, {key: value for key, value in known.items() if value is not None})

    def validation(self, step: int) -> dict[str, float]:
        """The scores that an earlier start of this run logged at this step; empty if there are none."""
        return scores_of({key: value for row in self._kept if row["step"] == step for key, value in row.items()})

    def hours(self, log_every: int) -> tuple[float, int]:
        """Time of the steps that earlier starts of this run logged [hours], and the step that the next row counts from.

        Args:
            log_every: updates of a row.
        """
        losses = [row for row in self._kept if "loss" in row]
        if not losses:
            return 0.0, _before(self._first_step + 1, log_every)
        return time_of_steps(losses, log_every)[-1][1] / 3600, losses[-1]["step"]

    def reached(self) -> frozenset[str]:
        """Keys of the APs whose first time earlier starts of this run logged."""
        return frozenset(key for row in self._kept for key in row if key.startswith(TIME_TO_AP))

    def close(self, how: str = "finished") -> None:
        """Close the file and let the trackers end. Where another run owns the folder now, they write nothing more.

        Args:
            how: finished, stopped (to go on later) or failed.
        """
        self._file.close()
        try:
            self._check()
        except UserError:
            how = "displaced"
        self._trackers.close(how)


def _before(first: int, log_every: int) -> int:
    """The step from which a run's first row counts; a run that began from a checkpoint elsewhere has no rows before.

    Args:
        first: step of the row, or of any other update that it counts.
        log_every: updates of a row.
    """
    return (first - 1) // log_every * log_every


def time_of_steps(rows: Sequence[Mapping[str, Any]], log_every: int | None) -> list[tuple[int, float]]:
    """Updates of each row with losses of a run, and the time of the steps up to it [seconds].

    Args:
        rows: all of them, oldest first.
        log_every: updates of a row; None where it is not known: the first row counts from step 0.
    """
    found: list[tuple[int, float]] = []
    before = _before(rows[0]["step"], log_every) if rows and log_every else 0
    seconds = 0.0
    for row in rows:
        steps = max(row["step"] - before, 0)
        seconds, before = seconds + steps * (row.get("step_max_s") or 0.0), row["step"]
        found.append((steps, seconds))
    return found


def config_files(folder: Path) -> list[tuple[int, Path]]:
    """The configuration files of a run's starts, oldest first, as pairs (updates done at that start, file)."""
    first = folder / "config.yaml"
    later = sorted(folder.glob("config-*.yaml"))
    numbered = [(int(file.stem[7:]), file) for file in later if file.stem[7:].isdigit()]
    return [(0, first)] * first.is_file() + numbered


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl and of deferred evaluations. A line that a kill or a power cut tore is left out.

    A metric that does not exist is None. So is pycocotools' -1, which older runs logged for it.
    """
    rows = _own_rows(path)
    scored = {row["step"] for row in rows if "val/AP" in row}
    further = [row for row in score_rows(path.parent) if row["step"] not in scored]
    return sorted([*rows, *further], key=lambda row: int(row["step"])) if further else rows


def _own_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of the file, which the training wrote."""
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    return [row for line in lines if (row := read_row(line))]


def read_row(line: str) -> dict[str, Any] | None:
    """A row of a metrics.jsonl from its line; None where the line is torn or its step is no number."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return None
    return {key: None if value == -1 and key.startswith("val/") else value for key, value in row.items()}
