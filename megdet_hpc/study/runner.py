"""Training of a study's runs, one or a few at a time, each by a trainer process. Finished runs are kept."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, cast

import yaml

from megdet_hpc.config import Config, SsdConfig, flatten, from_dict, to_dict
from megdet_hpc.engine.stop import EXIT_UNFINISHED, STOP_FILE
from megdet_hpc.errors import UserError
from megdet_hpc.files import atomic_write
from megdet_hpc.parallel.local_launch import passes_usr1, rank_launcher
from megdet_hpc.study.grids import PLACES, Run, with_settings
from megdet_hpc.study.outcome import FINISHED, LOG, RESULT, judge, read_outcome, write_outcome

DECLARED = "study.yaml"
"""The configuration that a run's trainer is given."""
DATA = "study_data.txt"
"""What the run's hash knows of its data and first weights, beside the configuration, which has their paths alone."""
_POLL_SECONDS = 0.2
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True)
class Inputs:
    """Paths that a run's configuration needs and its hash leaves out."""

    train: Path
    val: Path
    weights: Path | None
    """First weights of a backbone that several families share."""
    detector_weights: Path | None = None
    """First weights of a family with a backbone of its own, under the names that the whole detector has."""


@contextmanager
def only_one(folder: Path) -> Iterator[int]:
    """Hold the folder's lock. Trainers inherit its descriptor, so a trainer that outlives its study still holds it.

    Raises:
        UserError: another study, or a trainer of one, still runs there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: a study, or a trainer of one, still runs there; wait for its end") from None
        yield descriptor
    finally:
        os.close(descriptor)


def _plain(config: Config) -> dict[str, Any]:
    """A configuration with lists for tuples, as JSON and YAML give it back."""
    plain: dict[str, Any] = json.loads(json.dumps(to_dict(config)))
    return plain


def check_defaults(folder: Path, run: Run) -> None:
    """Raise UserError if a run's record has another value of a key; only a default can have changed since.

    Args:
        folder: folder of the run.
        run: the run as this version declares it.
    """
    try:
        stored = flatten(json.loads((folder / RESULT).read_text())["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        return
    now = flatten(_plain(run.config))
    changed = [f"{key} {stored[key]}, now {now[key]}" for key in now if key in stored and stored[key] != now[key]]
    changed = [text for text in changed if text.split()[0] not in PLACES]
    if changed:
        raise UserError(
            f"{folder}: was trained with other defaults ({'; '.join(changed)}); name another --output, or go on with "
            "the version that trained it"
        )


def means_the_same(declared: Path, run: Run, inputs: Inputs) -> bool:
    """Whether the configuration that a trainer was given is a run's, whatever keys this version has besides.

    Data and first weights are the same if what the hash knows of them is. A folder of a version that did not write
    that file has the paths alone; another file of weights is accepted there if it holds the same tensors, since the
    study names its own file by the hash of the run that trained it.

    Args:
        declared: file of the configuration.
        run: the run as this version declares it.
        inputs: its packs and weights.
    """
    try:
        stored = from_dict(yaml.safe_load(declared.read_text()))
        known = declared.with_name(DATA)
        data = known.read_text() if known.exists() else None
    except (OSError, ValueError, yaml.YAMLError, UserError, TypeError, AttributeError):
        return False
    if stored.data.train != str(inputs.train) or data not in (None, run.data):
        return False
    theirs, ours = (
        {key: value for key, value in flatten(_plain(config)).items() if key not in (*PLACES, "data.train", "data.val")}
        for config in (stored, with_settings(run.config, _weights_of(run, inputs)))
    )
    for key in ("model.backbone_weights", "model.weights"):
        one, other = theirs.pop(key, None), ours.pop(key, None)
        if data is None and one != other and not _same_tensors(one, other):
            return False
    return theirs == ours


def _same_tensors(one: str | None, other: str | None) -> bool:
    """Whether two files of weights are there and hold the same tensors under the same names."""
    if not one or not other or not (Path(one).is_file() and Path(other).is_file()):
        return False
    import torch

    try:
        first, second = (torch.load(file, map_location="cpu", weights_only=True) for file in (one, other))
        return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    except (OSError, RuntimeError, ValueError, TypeError, AttributeError, EOFError, pickle.UnpicklingError):
        return False


def _weights_of(run: Run, inputs: Inputs) -> dict[str, str]:
    """The key and the file of a run's first weights; empty if it begins with random ones."""
    own = isinstance(run.config.model, SsdConfig)
    weights = inputs.detector_weights if own else inputs.weights
    if run.from_scratch or not weights:
        return {}
    return {"model.weights" if own else "model.backbone_weights": str(weights)}


def _takes_usr1(trainer: subprocess.Popen[bytes]) -> bool:
    return passes_usr1(cast("list[str]", trainer.args))


class Runner:
    """Trains runs.

    Args:
        folder: folder of the runs' folders.
        jobs: runs at a time. Runs on real ranks are trained alone, since their time is the result.
        max_minutes: time within which to save and stop; None: no limit [minutes].
        lock: descriptor that trainers inherit.
    """

    def __init__(self, folder: Path, jobs: int, max_minutes: float | None, lock: int) -> None:
        self.folder, self.jobs, self.lock = folder, jobs, lock
        # time for a last step, an evaluation and a checkpoint
        margin = 0.0 if max_minutes is None else min(30.0, 6 * max_minutes)
        self.deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes - margin
        self.stopped = ""
        self._stop_files: set[Path] = set()

    def train(self, runs: list[Run], inputs: Inputs) -> int:
        """Train the unfinished runs. Returns the number of runs that are still unfinished or broke."""
        for run in runs:
            self._take_up(run, inputs)
            check_defaults(self.folder / run.folder, run)
        waiting = [run for run in runs if not self._finished(run)]
        print(f"{len(runs)} runs, {len(runs) - len(waiting)} finished, {len(waiting)} to train", flush=True)
        for run in waiting:
            self._say_what_changed(run, {other.folder for other in runs})
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
                        if _takes_usr1(process):
                            process.send_signal(signal.SIGUSR1)
                if self._stopping():
                    for run, process, _ in active:
                        if not _takes_usr1(process):
                            self._ask_by_file(run)
                time.sleep(_POLL_SECONDS)
                for entry in [entry for entry in active if entry[1].poll() is not None]:
                    active.remove(entry)
                    left += not self._record(entry[0], entry[1].returncode, time.monotonic() - entry[2])
        finally:
            for _, process, _ in active:  # trainers are left only after an error in this function
                if _takes_usr1(process):
                    process.kill()
                else:
                    process.terminate()  # torchrun then ends its ranks
            for number, handler in previous.items():
                signal.signal(number, handler)
        return left + len(waiting)

    def _ask_by_file(self, run: Run) -> None:
        """Make a run's stop file. Called again and again, since a start removes a file that was there before it."""
        file = self.folder / run.folder / STOP_FILE
        if not file.exists():
            file.touch()
            self._stop_files.add(file)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.stopped and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second signal: do not wait for the trainers
        self.stopped = self.stopped or f"{signal.Signals(number).name} received"

    def _stopping(self) -> bool:
        if not self.stopped and self.deadline is not None and time.monotonic() > self.deadline:
            self.stopped = "the end of --max-minutes is near"
        return bool(self.stopped)

    def _fits(self, run: Run, active: list[Run]) -> bool:
        alone = run.ranks > 0 or any(other.ranks for other in active)
        return not active if alone else len(active) < self.jobs

    def _finished(self, run: Run) -> bool:
        outcome = read_outcome(self.folder / run.folder)
        return outcome is not None and outcome.status in FINISHED

    def _of_name(self, run: Run) -> list[Path]:
        """The folders of runs of the same name, with whatever hash."""
        return sorted(self.folder.glob(f"{run.name}-{'[0-9a-f]' * 8}"))

    def _say_what_changed(self, run: Run, declared: set[str]) -> None:
        """Name earlier runs of the same name that had other settings. Their folders are kept.

        Args:
            run: the run that is to be trained.
            declared: folders of all runs of the study, among which are those of other seeds.
        """
        for folder in self._of_name(run):
            if folder.name not in declared and read_outcome(folder):
                print(f"{run.name}: the declared settings changed since {folder}; trained anew in {run.folder}")

    def _take_up(self, run: Run, inputs: Inputs) -> None:
        """Rename an earlier version's folder of the same settings and data, where the hash was of other keys."""
        if (self.folder / run.folder).exists():
            return
        for folder in self._of_name(run):
            if means_the_same(folder / DECLARED, run, inputs):
                folder.rename(self.folder / run.folder)
                print(f"{folder}: has the settings of {run.folder}, and is that from now on", flush=True)
                return

    def _start(self, run: Run, inputs: Inputs) -> subprocess.Popen[bytes]:
        output = self.folder / run.folder
        places: dict[str, Any] = {"data.train": str(inputs.train), "output": str(output), "resume": "auto"}
        if run.config.data.val is not None:
            places["data.val"] = str(inputs.val)
        places |= _weights_of(run, inputs)
        config = _plain(with_settings(run.config, places))
        declared = output / DECLARED
        with atomic_write(declared) as file:
            file.write(yaml.safe_dump(config, sort_keys=False).encode())
        with atomic_write(output / DATA) as file:
            file.write(run.data.encode())
        command = [*rank_launcher(run.ranks), sys.executable, "-m", "megdet_hpc.train", "--config", str(declared)]
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        with open(output / LOG, "ab") as log:
            # in a new session, so that Ctrl-C reaches only the study, which then asks the trainers to save
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
        """Write the outcome of a run. Returns whether it is finished."""
        folder = self.folder / run.folder
        if folder / STOP_FILE in self._stop_files:  # not a user's own
            (folder / STOP_FILE).unlink(missing_ok=True)
        if status == EXIT_UNFINISHED or (self.stopped and status != 0 and not self._diverged(run, status)):
            print(f"{run.folder}: unfinished, continues next time ({seconds:.0f} s)", flush=True)
            return False
        outcome = judge(folder, status, run.global_batch, run.config.evaluation.score_name)
        write_outcome(folder, outcome, _plain(run.config))
        score = "" if outcome.ap is None else f", {outcome.score_name} {outcome.ap:.3f}"
        why = f": {outcome.reason}" if outcome.reason else ""
        print(f"{run.folder}: {outcome.status} after step {outcome.step}{score}{why} ({seconds:.0f} s)", flush=True)
        return outcome.status != "error"

    def _diverged(self, run: Run, status: int) -> bool:
        name = run.config.evaluation.score_name
        return judge(self.folder / run.folder, status, run.global_batch, name).status == "failed"
