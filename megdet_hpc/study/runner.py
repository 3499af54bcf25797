"""Runs one after the other or a few at a time, each a trainer of its own; what is finished stays finished."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from megdet_hpc.config import to_dict
from megdet_hpc.engine.stop import EXIT_UNFINISHED
from megdet_hpc.errors import UserError
from megdet_hpc.files import atomic_write
from megdet_hpc.study.grids import Run, with_settings
from megdet_hpc.study.outcome import LOG, judge, read_outcome, write_outcome

_POLL_SECONDS = 0.2
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True)
class Inputs:
    """Paths that a run's configuration takes but its hash does not."""

    train: Path
    val: Path
    weights: Path | None


@contextmanager
def only_one(folder: Path) -> Iterator[int]:
    """Hold the folder's lock; trainers inherit its descriptor, so that one left over from a killed study holds it too.

    Raises:
        UserError: another study, or a trainer of one, is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: a study, or a training run of one, is at work there; wait for it") from None
        yield descriptor
    finally:
        os.close(descriptor)


class Runner:
    """Trains runs.

    Args:
        folder: where the runs' folders lie.
        jobs: runs at a time; runs on real ranks are alone, since their time is the result.
        max_minutes: save and stop before this time is over; None for no limit [minutes].
        lock: descriptor that trainers inherit.
    """

    def __init__(self, folder: Path, jobs: int, max_minutes: float | None, lock: int) -> None:
        self.folder, self.jobs, self.lock = folder, jobs, lock
        # a step, an evaluation and a checkpoint still fit in what is left
        margin = 0.0 if max_minutes is None else min(30.0, 6 * max_minutes)
        self.deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes - margin
        self.stopped = ""

    def train(self, runs: list[Run], inputs: Inputs) -> int:
        """Train what is not finished. Returns how many runs are left unfinished or broke."""
        waiting = [run for run in runs if not self._finished(run)]
        print(f"{len(runs)} runs, {len(runs) - len(waiting)} finished, {len(waiting)} to train", flush=True)
        for run in waiting:
            self._say_what_changed(run)
        previous = {number: signal.signal(number, self._note) for number in _SIGNALS}
        active: list[tuple[Run, subprocess.Popen[bytes], float]] = []
        left, told = 0, False
        try:
            while active or (waiting and not self._stopping()):
                while waiting and not self._stopping() and self._fits(waiting[0], [run for run, _, _ in active]):
                    run = waiting.pop(0)
                    active.append((run, self._start(run, inputs), time.monotonic()))
                if self._stopping() and not told:
                    told = True
                    print(f"stopping: {self.stopped}; waiting for {len(active)} run(s) to save", flush=True)
                    for _, process, _ in active:
                        process.send_signal(signal.SIGUSR1)
                time.sleep(_POLL_SECONDS)
                for entry in [entry for entry in active if entry[1].poll() is not None]:
                    active.remove(entry)
                    left += not self._record(entry[0], entry[1].returncode, time.monotonic() - entry[2])
        finally:
            for _, process, _ in active:  # only after an error of our own
                process.kill()
            for number, handler in previous.items():
                signal.signal(number, handler)
        return left + len(waiting)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.stopped and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked a second time: what runs is not waited for
        self.stopped = self.stopped or f"{signal.Signals(number).name} received"

    def _stopping(self) -> bool:
        if not self.stopped and self.deadline is not None and time.monotonic() > self.deadline:
            self.stopped = "max-minutes is near"
        return bool(self.stopped)

    def _fits(self, run: Run, active: list[Run]) -> bool:
        alone = run.ranks > 0 or any(other.ranks for other in active)
        return not active if alone else len(active) < self.jobs

    def _finished(self, run: Run) -> bool:
        outcome = read_outcome(self.folder / run.folder)
        return outcome is not None and outcome.status in ("done", "failed")

    def _say_what_changed(self, run: Run) -> None:
        """Name earlier runs of the same name, which had other settings; they stay where they are."""
        for folder in sorted(self.folder.glob(f"{run.name}-{'[0-9a-f]' * 8}")):
            if folder.name != run.folder and read_outcome(folder):
                print(f"{run.name}: the declared settings changed since {folder}; trained anew in {run.folder}")

    def _start(self, run: Run, inputs: Inputs) -> subprocess.Popen[bytes]:
        output = self.folder / run.folder
        places: dict[str, Any] = {"data.train": str(inputs.train), "output": str(output), "resume": "auto"}
        if run.config.data.val is not None:
            places["data.val"] = str(inputs.val)
        if inputs.weights:
            places["model.backbone_weights"] = str(inputs.weights)
        config = json.loads(json.dumps(to_dict(with_settings(run.config, places))))  # lists for tuples, as in YAML
        declared = output / "study.yaml"
        with atomic_write(declared) as file:
            file.write(yaml.safe_dump(config, sort_keys=False).encode())
        launcher = ["mpirun", "--oversubscribe", "-np", str(run.ranks)] if run.ranks else []
        command = [*launcher, sys.executable, "-m", "megdet_hpc.train", "--config", str(declared)]
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        with open(output / LOG, "ab") as log:
            # a session of its own: Ctrl-C reaches the study, which asks the trainers to save
            return subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
                pass_fds=(self.lock,),
            )

    def _record(self, run: Run, status: int, seconds: float) -> bool:
        """Write what became of a run; whether it is finished."""
        folder = self.folder / run.folder
        if status == EXIT_UNFINISHED or (self.stopped and status != 0 and not self._diverged(run, status)):
            print(f"{run.folder}: unfinished, goes on next time ({seconds:.0f} s)", flush=True)
            return False
        outcome = judge(folder, status, run.global_batch)
        write_outcome(folder, outcome, json.loads(json.dumps(to_dict(run.config))))
        score = "" if outcome.ap is None else f", AP {outcome.ap:.3f}"
        why = f": {outcome.reason}" if outcome.reason else ""
        print(f"{run.folder}: {outcome.status} after step {outcome.step}{score}{why} ({seconds:.0f} s)", flush=True)
        return outcome.status != "error"

    def _diverged(self, run: Run, status: int) -> bool:
        return judge(self.folder / run.folder, status, run.global_batch).status == "failed"
