"""A run's folder as read, in any state of the run: configuration, metrics, starts, and whether it lives. No torch."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megdet_hpc import owner
from megdet_hpc.config import flatten
from megdet_hpc.config.outcome import EMA_PREFIX, SCORE_NAMES
from megdet_hpc.errors import UserError
from megdet_hpc.log import config_files, read_metrics, time_of_steps
from megdet_hpc.log.deferred import waiting
from megdet_hpc.record.journal import Now, Start, read_now, read_starts

_FILES = ("config.yaml", "metrics.jsonl", "starts.jsonl", "owner/holder.json", "job/attempts")
# A run on another host that has not written for so long is not known to live [seconds].
SILENT_SECONDS = 60.0


@dataclass(frozen=True)
class Score:
    """A validation of a run."""

    step: int
    images: int
    """Images that the run had seen."""
    hours: float
    """Time of its steps so far, as of the last row of losses [hours]."""
    AP: float | None
    AP50: float | None
    """0 to 1; None where there was nothing to score."""
    own: float | None = None
    """The score of the run's evaluation.metric; None also where this validation did not measure it."""
    averaged: bool = False
    """Whether these are the scores of averaged weights. They are where a run has any, since they choose its best."""


@dataclass(frozen=True)
class Position:
    """The place of a row in its run."""

    step: int
    images: int
    """Images seen, those of this run's rows."""
    hours: float
    """Time of the steps: loading, passes, exchange; not start, evaluation and saving [hours]."""


@dataclass(frozen=True)
class RunRecord:
    """All that a run's folder tells."""

    folder: Path
    config: dict[str, Any]
    """Keys with dots; of the newest start. Empty where there is no configuration yet."""
    rows: list[dict[str, Any]]
    """Rows of metrics.jsonl that have losses."""
    positions: list[Position]
    """Place of each of them."""
    scores: list[Score]
    starts: list[Start]
    now: Now | None
    """What it does; None where it has not said, or where an older version wrote it."""
    reports: list[dict[str, Any]] = field(default_factory=list)
    """Reports of the watchdog's newest hang, by rank."""
    holder: owner.Mark | None = None
    alive: bool | None = False
    """Whether its holder lives; None: on another host, which only its files can tell."""
    attempts: str = ""
    """The job script's count, as text; "" without a job."""
    unscored: int = 0
    """Checkpoints that wait for `evaluate --follow`."""

    @property
    def step(self) -> int:
        """Updates done, as far as the files tell."""
        done = [self.rows[-1]["step"]] if self.rows else []
        done += [score.step for score in self.scores[-1:]]
        if self.now and self.starts and self.starts[-1].step <= self.now.step:
            done.append(self.now.step)
        return max([*done, *(start.end_step or start.step for start in self.starts[-1:])], default=0)

    @property
    def last_step(self) -> int | None:
        """Updates after which the run ends; None where nothing tells."""
        if self.starts and self.starts[-1].last_step:
            return self.starts[-1].last_step
        per_epoch = self.steps_per_epoch
        limit, epochs = self.config.get("max_steps"), self.config.get("solver.epochs")
        whole = round(per_epoch * epochs) if per_epoch and isinstance(epochs, (int, float)) else None
        known = [steps for steps in (limit, whole) if steps]
        return min(known) if known else None

    @property
    def steps_per_epoch(self) -> float | None:
        """Updates of an epoch; of the first one where updates grow."""
        if self.starts and self.starts[-1].steps_per_epoch:
            return float(self.starts[-1].steps_per_epoch)
        row = self.rows[-1] if self.rows else {}
        return row["step"] / row["epoch"] if row.get("epoch") else None

    @property
    def global_batch(self) -> int | None:
        """Images of the next update."""
        if self.starts and self.starts[-1].global_batch:
            return self.starts[-1].global_batch * self.factor_at(self.step)
        return _batch(self.rows[-1]) if self.rows else None

    @property
    def _growth(self) -> tuple[tuple[int, int, int], ...]:
        return self.starts[-1].growth if self.starts else ()

    def factor_at(self, step: int) -> int:
        """Images of update `step` over those of the first one (solver.grow_to)."""
        return next((factor for first, factor, _ in reversed(self._growth) if first <= step), 1)

    def work_of(self, step: int) -> int:
        """The first, small updates that have as many images as the first `step` updates; `step` if none grow."""
        done, before = step, 1
        for first, factor, _ in self._growth:
            done += (factor - before) * max(step - first, 0)
            before = factor
        return done

    def epochs_between(self, first: int, last: int) -> float | None:
        """The epochs from one update to a later one; None where nothing tells how long an epoch is."""
        per_epoch = self.steps_per_epoch
        if not per_epoch:
            return None
        lengths, begins = [per_epoch, *(steps for _, _, steps in self._growth)], [0, *(at for at, _, _ in self._growth)]
        ends = [*begins[1:], max(last, begins[-1])]
        return sum(
            max(min(last, end) - max(first, begin), 0) / length
            for begin, end, length in zip(begins, ends, lengths, strict=True)
        )

    @property
    def best(self) -> Score | None:
        """The validation of the highest score of the run's own metric; None where there is none."""
        return max((score for score in self.scores if score.own is not None), key=lambda s: s.own or 0, default=None)

    @property
    def score_name(self) -> str:
        """Name of the score of the run's evaluation.metric, which `Score.own` is."""
        return score_name(self.config)

    def first_at(self, ap: float) -> Score | None:
        """The first validation of this AP or more; None where there is none.

        Args:
            ap: AP [0 to 1].
        """
        return next((score for score in self.scores if score.AP is not None and ap <= score.AP), None)

    @property
    def targets(self) -> tuple[float, ...]:
        """APs whose first time the configuration asks for."""
        found = self.config.get("evaluation.targets") or ()
        return tuple(float(ap) for ap in found)

    @property
    def images_per_s(self) -> float | None:
        """Images over the time of the steps, of the whole run [images/s]."""
        end = self.positions[-1] if self.positions else None
        return end.images / end.hours / 3600 if end and end.hours else None

    @property
    def begun(self) -> bool:
        """Whether the newest start is that of the process or job that holds the folder, and has not ended."""
        last = self.starts[-1] if self.starts else None
        if last is None or last.end or self.holder is None:
            return False
        with suppress(ValueError):
            return last.time + 1 > time.mktime(time.strptime(self.holder.since, owner.SINCE))
        return True

    def state(self) -> tuple[str, str]:
        """A word for the state of the run, and what more is known of it."""
        last = self.starts[-1] if self.starts else None
        phase = self.now.phase if self.now else "training"
        where = f"on {self.holder.host}" if self.holder else ""
        if self.alive:
            if last is None and self.rows:
                return "running", where
            return (phase if self.begun else "starting"), where
        if last is None:
            return self._state_of_older(where)
        if last.end:
            return last.end, last.why
        silent = time.time() - self.now.time if self.now else None
        if self.alive is None and silent is not None:
            if silent < SILENT_SECONDS:
                return phase, where
            return "silent", f"no sign for {duration(silent)}; its host, {where[3:]}, or the shared folder may be gone"
        told = "the watchdog found a hang" if self.reports else "it was killed, or its host is gone"
        return "died", f"without a last word after step {self.step}: {told}"

    def _state_of_older(self, where: str) -> tuple[str, str]:
        if self.alive is None:
            return "unknown", f"held {where}; this host cannot see whether that process lives"
        if not self.rows:
            return "ended", "before the first row of metrics"
        complete = self.last_step is not None and self.step >= self.last_step
        return ("finished" if complete else "ended"), "" if complete else "its files do not say how"


def _batch(row: dict[str, Any]) -> int | None:
    """Images of an update: rows have them as a product, since they know their time."""
    speed, seconds = row.get("images_per_s"), row.get("step_max_s")
    return round(speed * seconds) if speed and seconds else None


def _positions(rows: list[dict[str, Any]], config: dict[str, Any]) -> list[Position]:
    """Images and time of each row with losses, summed up from the first."""
    every = config.get("log_every")
    positions: list[Position] = []
    images, batch = 0, 0
    counted = time_of_steps(rows, every if isinstance(every, int) and every > 0 else None)
    for row, (steps, seconds) in zip(rows, counted, strict=True):
        batch = _batch(row) or batch
        images += steps * batch
        positions.append(Position(row["step"], images, seconds / 3600))
    return positions


def score_name(config: dict[str, Any]) -> str:
    """The name of the score of a run's evaluation.metric. Runs of earlier versions have no such key.

    Args:
        config: keys with dots.
    """
    return SCORE_NAMES.get(str(config.get("evaluation.metric")), SCORE_NAMES["coco"])


def scores_of_row(row: dict[str, Any], name: str) -> tuple[float | None, float | None, float | None, bool]:
    """AP, AP50 and the score `name` of a validation, and whether they are those of averaged weights.

    Averaged weights count where there are any, since they choose the run's best.

    Args:
        row: row of metrics.jsonl that has val/AP.
        name: some score's name, as score_name gives it.
    """
    averaged = f"val/{EMA_PREFIX}AP" in row
    prefix = EMA_PREFIX if averaged else ""
    ap, ap50, own = (row.get(f"val/{prefix}{key}") for key in ("AP", "AP50", name))
    return ap, ap50, own, averaged


def _scores(rows: list[dict[str, Any]], positions: list[Position], name: str) -> list[Score]:
    scores = []
    for row in rows:
        if "val/AP" in row:
            at = next((place for place in reversed(positions) if place.step <= row["step"]), Position(0, 0, 0.0))
            scores.append(Score(row["step"], at.images, at.hours, *scores_of_row(row, name)))
    return scores


def _reports(folder: Path, since: float) -> list[dict[str, Any]]:
    """The watchdog's reports of the newest hang since a time; those of an older one have other times."""
    found = []
    for path in sorted((folder / "watchdog").glob("rank_*.json")):
        with suppress(OSError, ValueError):
            found.append((path.stat().st_mtime, json.loads(path.read_bytes())))
    newest = max((when for when, _ in found), default=0.0)
    return [report for when, report in found if newest >= since and newest - when < SILENT_SECONDS]


def _attempts(folder: Path) -> str:
    with suppress(OSError, ValueError):
        step, count, *job = (folder / "job" / "attempts").read_text().split()
        return f"attempt {count} from step {step}" + (f", job {job[0]}" if job else "")
    return ""


def configuration(folder: Path) -> dict[str, Any]:
    """The configuration of a run's newest start that can be read, its keys with dots; empty where there is none."""
    for _, file in reversed(config_files(folder)):
        with suppress(OSError, yaml.YAMLError, UnicodeDecodeError):
            content = yaml.safe_load(file.read_text())
            if isinstance(content, dict):
                return flatten(content)
    return {}


def read_run(folder: Path) -> RunRecord:
    """Read a run's folder.

    Raises:
        UserError: there is no such folder, or it holds no run.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; accepted: the folder of a run, its --output")
    if not any((folder / name).is_file() for name in _FILES):
        raise UserError(f"{folder}: is no run's folder: it has none of {', '.join(_FILES)}")
    try:
        config, rows = configuration(folder), read_metrics(folder / "metrics.jsonl")
        holder = owner.current(folder)
        alive = owner.seen_alive(folder, holder) if holder else False
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from error
    losses = [row for row in rows if "loss" in row]
    positions, starts = _positions(losses, config), read_starts(folder)
    return RunRecord(
        folder,
        config,
        losses,
        positions,
        _scores(rows, positions, score_name(config)),
        starts,
        read_now(folder),
        _reports(folder, starts[-1].time if starts else 0.0),
        holder,
        alive,
        _attempts(folder),
        len(waiting(folder)),
    )


def duration(seconds: float) -> str:
    """A time for readers: 12 s, 3 min 05 s, 2 h 07 min, 3 d 04 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"
