"""What a run tells onlookers besides its metrics: how each start went, and what it does now.

`starts.jsonl` gets a line when a training begins and one when it ends, unless it is killed. `now.json` says where it
is. A thread of rank 0 rewrites that file every few seconds, and never makes the training wait.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megdet_hpc.errors import UserError
from megdet_hpc.files import temporary_for

STARTS, NOW = "starts.jsonl", "now.json"
_WRITE_SECONDS = 5.0

Phase = Literal["training", "evaluating", "saving"]


@dataclass(frozen=True)
class Start:
    """A start of a run, and its end where that is known."""

    time: float
    """Time of its first step [seconds since 1970]."""
    host: str = ""
    job: str = ""
    """The scheduler's job, such as `SLURM job 12`; "" without one."""
    ranks: int = 0
    """Processes; 0 where an older run does not say, as for the next ones."""
    hosts: tuple[str, ...] = ()
    """Host of each rank."""
    step: int = 0
    """Updates that were done before it."""
    last_step: int = 0
    """Updates after which the run ends."""
    steps_per_epoch: int = 0
    global_batch: int = 0
    """Images of an update; the first ones where they grow."""
    growth: tuple[tuple[int, int, int], ...] = ()
    """Updates from which on there are more images in each, in rising order: the update, the images over those of the
    first one, the updates of an epoch (solver.grow_to)."""
    device: str = ""
    end: str = ""
    """finished, stopped (to go on) or failed; "" for a start that goes on, or that was killed."""
    why: str = ""
    """Reason of a stop or failure."""
    end_step: int | None = None
    end_time: float | None = None


@dataclass(frozen=True)
class Now:
    """What the newest start was doing when it last wrote."""

    time: float = 0.0
    """Time of that [seconds since 1970]."""
    phase: str = "training"
    step: int = 0
    moved: float = 0.0
    """Time of the last step, or of the last change of phase."""
    watchdog_s: float = 0.0
    """Time without a step after which the watchdog ends the job; 0: it watches nothing [seconds]."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Time that this start has spent in each phase."""
    times: dict[str, int] = field(default_factory=dict)
    """Number of times that it entered the phase."""


class Journal:
    """The journal of one start. Rank 0 only. An error of the disk costs lines of it, and nothing else.

    Args:
        folder: folder of the run.
        start: what is known at the beginning.
        limit: function that gives the watchdog's limit [seconds].
        check: function that raises where another run owns the folder now; nothing is written there then.
    """

    def __init__(self, folder: Path, start: Start, limit: Callable[[], float], check: Callable[[], None]) -> None:
        self._folder, self._limit, self._check = folder, limit, check
        self._phase, self._step, self._moved = "training", start.step, time.time()
        self._entered = time.monotonic()
        self._seconds: dict[str, float] = {}
        self._times: dict[str, int] = {}
        facts = {key: value for key, value in vars(start).items() if key.split("_")[0] not in ("end", "why")}
        self._append({"event": "start", **facts})
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._write_now_and_then, name="journal", daemon=True)
        self._thread.start()

    def step(self, done: int) -> None:
        """Note that so many updates are done."""
        self._step, self._moved = done, time.time()

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Note that rank 0 does something else than training."""
        before = self._phase
        self._enter(name)
        try:
            yield
        finally:
            self._enter(before)

    def _enter(self, name: str) -> None:
        now = time.monotonic()
        self._seconds = {**self._seconds, self._phase: self._seconds.get(self._phase, 0.0) + now - self._entered}
        self._times = {**self._times, name: self._times.get(name, 0) + 1}
        self._phase, self._entered, self._moved = name, now, time.time()

    def close(self, end: str, why: str = "") -> None:
        """Write the last lines.

        Args:
            end: finished, stopped or failed.
            why: reason of a stop or failure.
        """
        self._end.set()
        self._thread.join(_WRITE_SECONDS)  # a disk that hangs is no reason to wait for it
        self._write_now()
        self._append({"event": "end", "time": time.time(), "end": end, "why": why, "step": self._step})

    def _append(self, row: dict[str, Any]) -> None:
        with suppress(OSError, UserError):
            self._check()
            with open(self._folder / STARTS, "ab") as file:
                file.write(json.dumps(row).encode() + b"\n")

    def _write_now_and_then(self) -> None:
        while True:
            self._write_now()
            if self._end.wait(_WRITE_SECONDS):
                return

    def _write_now(self) -> None:
        phase, entered, seconds = self._phase, self._entered, self._seconds
        spent = {**seconds, phase: seconds.get(phase, 0.0) + time.monotonic() - entered}
        now = Now(time.time(), phase, self._step, self._moved, self._limit(), spent, self._times)
        # not flushed to the disk, as files.atomic_write would: it is worth nothing after a power cut
        temporary = temporary_for(self._folder / NOW)
        with suppress(OSError, UserError):
            self._check()
            temporary.write_text(json.dumps(vars(now), indent=1) + "\n")
            os.replace(temporary, self._folder / NOW)


def read_starts(folder: Path) -> list[Start]:
    """The starts of a run, oldest first; none where an older version wrote it."""
    starts: list[Start] = []
    path = folder / STARTS
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        with suppress(ValueError, TypeError, AttributeError, KeyError):
            row = json.loads(line)
            event = row.pop("event")
            if event == "start":
                growth = tuple((int(step), int(factor), int(steps)) for step, factor, steps in row.get("growth", ()))
                starts.append(Start(**{**row, "hosts": tuple(row["hosts"]), "growth": growth}))
            elif event == "end" and starts:
                ended = {"end": row["end"], "why": row["why"], "end_step": row["step"], "end_time": row["time"]}
                starts[-1] = Start(**{**vars(starts[-1]), **ended})
    return starts


def read_now(folder: Path) -> Now | None:
    """What a run does now; None where it has not said."""
    with suppress(OSError, ValueError, TypeError):
        return Now(**json.loads((folder / NOW).read_bytes()))
    return None
