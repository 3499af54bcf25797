"""The trackers of a run: programs in which people look at many runs. None of them may stop or delay the run.

TensorBoard's writer queues what it gets and runs in this process. Libraries that may wait for a network or another
program run in a process of their own (follow.py), which reads metrics.jsonl as it grows. So the training never waits
for them, and a row that one of them missed comes with the next start.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from megdet_hpc.log.terminal import warn

DEFAULT_TRACKERS = ("tensorboard",)
FOLDER = "trackers"
"""Folder in the run's where followers leave what they say and how far they are."""

# The end of a run waits so long for a follower that still has rows to send; after any other end the next start sends
# what is missing [seconds].
_LEAVE_SECONDS, _LEAVE_UNFINISHED_SECONDS = 20.0, 5.0


class TrackerError(Exception):
    """A tracker cannot be used, or not any more. The message says why, and what helps."""


class Tracker(Protocol):
    """A tracker as the training sees it. Its methods return at once, except `close`."""

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Take the numbers of a row. Whatever it raises becomes a warning and ends the tracker."""

    def close(self, how: str) -> None:
        """Bring everything out, if how is finished, stopped or failed; write nothing if it is displaced."""


class TensorBoard:
    """TensorBoard's event files in `tensorboard/`.

    Args:
        folder: folder of the run.
        first_step: number of updates that are done; points after it are dropped.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        for key, value in metrics.items():
            self._board.add_scalar(key, value, step)

    def close(self, how: str) -> None:
        if how != "displaced":
            self._board.close()


class Follower:
    """A tracker in a process of its own, which follows metrics.jsonl.

    Args:
        name: name of the tracker, of its library and of its extra in setup.cfg.
        folder: folder of the run.
    """

    def __init__(self, name: str, folder: Path) -> None:
        if find_spec(name) is None:
            raise TrackerError(f"{name} is not installed; pip install '.[{name}]' installs it")
        self._said = folder / FOLDER / f"{name}.log"
        self._said.parent.mkdir(exist_ok=True)
        here = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
        with open(self._said, "wb") as said:
            # in a session of its own, since signals to the ranks are not meant for it; it ends with its standard input
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megdet_hpc.log.follow", name, str(folder)],
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=said,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,
            )

    def write(self, step: int, metrics: dict[str, float]) -> None:
        if self._process.poll() is not None:
            raise TrackerError(self._last_line())

    def close(self, how: str) -> None:
        assert self._process.stdin is not None
        if how == "displaced":
            self._kill()
            return
        seconds = _LEAVE_SECONDS if how == "finished" else _LEAVE_UNFINISHED_SECONDS
        with suppress(OSError):
            self._process.stdin.write(how.encode())
            self._process.stdin.close()
        try:
            status = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._kill()
            raise TrackerError(f"it had not ended {seconds:.0f} s after the run, and was stopped") from None
        if status:
            raise TrackerError(self._last_line())

    def _kill(self) -> None:
        """End it, and what it started."""
        with suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _last_line(self) -> str:
        lines = self._said.read_text(errors="replace").split("\n") if self._said.is_file() else []
        said = next((line.strip() for line in reversed(lines) if line.strip()), "it ended without a word")
        return f"{said} ({self._said})"


def _open(name: str, folder: Path, first_step: int) -> Tracker:
    return TensorBoard(folder, first_step) if name == "tensorboard" else Follower(name, folder)


class Trackers:
    """The trackers of a run. One that fails is left out from then on, with a warning. Rank 0 only.

    Args:
        names: names of the trackers.
        folder: folder of the run.
        first_step: number of updates that are done.
    """

    def __init__(self, names: Sequence[str], folder: Path, first_step: int) -> None:
        self._open: dict[str, Tracker] = {}
        for name in names:
            if tracker := self._try(name, _open, name, folder, first_step):
                self._open[name] = tracker

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Give the numbers of a row to each tracker."""
        for name, tracker in list(self._open.items()):
            self._try(name, tracker.write, step, metrics)

    def close(self, how: str) -> None:
        """End them all; `Tracker.close`."""
        for name, tracker in list(self._open.items()):
            self._try(name, tracker.close, how)

    def _try(self, name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """What a call returns; None after a warning where it raises."""
        try:
            return call(*arguments)
        except Exception as error:
            self._open.pop(name, None)
            text = str(error) if isinstance(error, TrackerError) else f"{type(error).__name__}: {error}"
            warn(f"tracker {name}: {text}; the run goes on without it, and metrics.jsonl has every row")
        return None
