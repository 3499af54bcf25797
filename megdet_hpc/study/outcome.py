"""The outcome of a run: done, failed (it did not converge, which is a result) or error (it is tried again)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from megdet_hpc.files import write_json
from megdet_hpc.log import read_metrics
from megdet_hpc.record.run_record import scores_of_row

RESULT = "result.json"
LOG = "log.txt"
FINISHED = ("done", "failed")
"""Statuses of a run that is not tried again."""

# A detector below this AP finds nothing. An untrained one scores 0.000 to 0.001 on five classes.
LEAST_AP = 0.005
_NOT_FINITE = re.compile(r"NotFiniteError: step (\d+): (a loss|the gradient) is not finite")
_LAST_LINES = 4
# A mean, since losses of small mini-batches vary more than they fall in a few steps.
_LAST_ROWS = 5


@dataclass(frozen=True)
class Outcome:
    """A run's record."""

    status: str
    """done, failed or error."""
    reason: str
    """Why it failed or broke; "" if done."""
    step: int
    """Updates done."""
    ap: float | None
    ap50: float | None
    """The score of the run's evaluation.metric, and COCO's AP50, at the end; those of averaged weights where there are
    any. None without evaluation."""
    loss_first: float | None
    loss_last: float | None
    """The first logged sum of losses, and the mean of the last five after it."""
    train_seconds: float
    """Time of all steps on the slowest rank: loading, passes, messages. Start, evaluation and saving do not count
    [seconds]."""
    images_per_s: float | None
    """Images of all steps over train_seconds."""
    score_name: str = "AP"
    """What `ap` is: AP, AP50_voc07 or AP50_voc12."""


def judge(folder: Path, exit_status: int, global_batch: int, score_name: str = "AP") -> Outcome:
    """The outcome of a run that ended, from its exit status, log.txt and metrics.jsonl.

    A run failed if the trainer stopped for a number that is not finite, if its AP is below LEAST_AP, or if its last
    loss is above its first.

    Args:
        folder: folder of the run.
        exit_status: status of the trainer.
        global_batch: images of one update.
        score_name: name of the score of the run's evaluation.metric.
    """
    rows = read_metrics(folder / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    scores = [row for row in rows if "val/AP" in row]
    log = folder / LOG
    text = log.read_text(errors="replace") if log.is_file() else ""
    broken = _NOT_FINITE.findall(text)
    step = int(steps[-1]["step"]) if steps else 0
    first, last = losses_of(steps)
    # the last evaluation counts only if the run reached its end
    at_end = scores[-1] if scores and exit_status == 0 and scores[-1]["step"] >= step else {}
    _, ap50, ap, _ = scores_of_row(at_end, score_name)
    status, reason = "done", ""
    if exit_status != 0 and broken:
        number, what = broken[-1]
        step = int(number)
        status, reason = "failed", f"{what} is not finite at step {number}"
    elif exit_status != 0:
        status, reason = "error", f"exit status {exit_status}: {_ending(text)}"
    elif ap is not None and ap < LEAST_AP:
        status, reason = "failed", f"{score_name} {ap:.4f} at the end is below {LEAST_AP}"
    elif first is not None and last is not None and last > first:
        status, reason = "failed", f"loss {last:.3g} at the end is above {first:.3g} at the start"
    seconds, speed = times_of(steps, global_batch)
    return Outcome(status, reason, step, ap, ap50, first, last, seconds, speed, score_name)


def losses_of(steps: Sequence[dict[str, Any]]) -> tuple[float | None, float | None]:
    """The first logged sum of losses, and the mean of the last five after it; None without rows.

    Args:
        steps: rows of metrics.jsonl that have losses, from the run's first on.
    """
    first = steps[0]["loss"] if steps else None
    return first, fmean(row["loss"] for row in steps[1:][-_LAST_ROWS:]) if len(steps) > 1 else first


def _ending(text: str) -> str:
    """The last lines of a log, and the last error line before them if there is one; without progress bars."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and "step/s" not in line]
    said = [line for line in lines[:-_LAST_LINES] if "error:" in line or "does not exist" in line]
    return " | ".join([*said[-1:], *lines[-_LAST_LINES:]])


def times_of(steps: Sequence[dict[str, Any]], global_batch: int) -> tuple[float, float | None]:
    """The time of steps on the slowest rank [seconds], and their images/s; None without steps.

    Args:
        steps: rows of metrics.jsonl that have losses, from the run's first on.
        global_batch: images of one update.
    """
    before, total = 0, 0.0
    for row in steps:
        total += (row["step"] - before) * row["step_max_s"]
        before = row["step"]
    return total, before * global_batch / total if total else None


def write_outcome(folder: Path, outcome: Outcome, settings: dict[str, Any]) -> None:
    """Write result.json: the outcome beside the run's settings."""
    write_json(folder / RESULT, {**asdict(outcome), "settings": settings})


def read_outcome(folder: Path) -> Outcome | None:
    """The recorded outcome; None if there is none or it cannot be read."""
    try:
        record = json.loads((folder / RESULT).read_text())
        return Outcome(**{key: value for key, value in record.items() if key != "settings"})
    except (OSError, ValueError, TypeError):
        return None
