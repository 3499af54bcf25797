"""The early end of a run: a signal to any rank, a stop file or the time limit stops all ranks after one step."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from megdet_hpc.interrupts import end_interrupted, raise_dropped_interrupt
from megdet_hpc.owner import OWNER_VARIABLE
from megdet_hpc.parallel.launch import is_first_process, launcher_terminal

if TYPE_CHECKING:
    from megdet_hpc.parallel.communicator import Communicator

EXIT_UNFINISHED = 75
"""Exit status of a run that saved its state before its end: EX_TEMPFAIL of sysexits.h, "run me again".

A run that another start has displaced from its folder ends with owner.EXIT_DISPLACED.
"""

STOP_FILE = "stop"
"""File in the run's folder by which a user asks the run to save and stop. It works where signals do not."""

_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
# Time between two looks for the stop file; not shorter, since a shared file system may be slow [seconds].
_LOOK_SECONDS = 5.0
_FILE = 2.0


class StopRequests:
    """Requests to stop this rank, and the agreement of all ranks on the step.

    SIGUSR1 (a scheduler's warning) and SIGTERM (sent by mpirun or the scheduler) are requests. A second SIGTERM ends
    the process at once, as it would without this class. From `listen` on, Ctrl-C is a request too. Before that there is
    nothing to save, and Ctrl-C raises KeyboardInterrupt.

    Make the object in the main thread, before the imports that take long. Its time counts from then. Before it SIGUSR1
    kills the process.

    A file named `stop` in the run's folder is a request too, unless it is older than this start. A job's script has
    settled older files before its preflight, so in its training each file is a request.

    Args:
        max_minutes: time of the whole process, loading included; None for no limit [minutes].
        folder: the run's folder, where rank 0 looks for the stop file; None: it does not look.
    """

    def __init__(self, max_minutes: float | None, folder: Path | None = None) -> None:
        self._deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._limit = f"max_minutes {max_minutes:g} is near" if max_minutes is not None else ""
        self._reason = ""
        self._terminal: str | None = None
        self._file = folder / STOP_FILE if folder else None
        self._stale = None if OWNER_VARIABLE in os.environ else self._stop_file()
        self._looked = 0.0
        self._previous = {number: signal.signal(number, self._note) for number in _SIGNALS}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._reason = signal.Signals(number).name
        under_way = f"\n{self._reason}: the step or evaluation under way is finished and the state saved"
        if number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            # mpirun kills its ranks two seconds after it was interrupted
            slow = f"; touch {self._file} needs no hurry" if self._file else ""
            self._show(f"{under_way} if the launcher leaves the time{slow}\n")
        elif number == signal.SIGINT:
            signal.signal(number, end_interrupted)
            with suppress(OSError):  # not print, whose buffer the main program may be in the middle of
                os.write(2, f"{under_way}; once more: at once\n".encode())

    def _show(self, text: str) -> None:
        """Write to the terminal of the launcher. After Ctrl-C the launcher itself forwards nothing."""
        with suppress(OSError):
            if self._terminal:
                with open(self._terminal, "w", encoding="utf-8") as terminal:
                    terminal.write(text)

    def tell(self, *lines: str) -> None:
        """Print how the run ended, also if the launcher was interrupted and forwards nothing. On rank 0."""
        if self._reason == "SIGTERM":
            self._show("".join(f"{line}\n" for line in lines))
        print("\n".join(lines), flush=True)

    def listen(self) -> None:
        """Treat Ctrl-C as a request to save and stop, from now on. In the main thread.

        Raises:
            KeyboardInterrupt: Ctrl-C came before and got lost, as in a library that drops exceptions.
        """
        self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._note)
        raise_dropped_interrupt()
        self._terminal = launcher_terminal() if is_first_process() else None

    def remove_old_file(self) -> None:
        """Remove a stop file from before this start, and say so. On rank 0, once this run holds the folder."""
        if self._file and self._stale and self._stop_file() == self._stale:
            self._file.unlink(missing_ok=True)
            print(f"{self._file}: removed; it was there before this start, which it does not stop", flush=True)

    def _stop_file(self) -> tuple[int, int] | None:
        """Identity of the stop file, which changes when it is touched again; None if there is no file."""
        with suppress(OSError):
            if self._file:
                status = self._file.stat()
                return status.st_ino, status.st_mtime_ns
        return None

    def _asked_by_file(self) -> bool:
        """Whether somebody has made the stop file. Looks every few seconds, and at once after the first step."""
        if self._file is None or (self._looked and time.monotonic() - self._looked < _LOOK_SECONDS):
            return False
        self._looked = time.monotonic()
        return self._stop_file() not in (None, self._stale)

    def flags(self, rank: int, seconds: float) -> tuple[float, float]:
        """This rank's requests to stop after the step that begins now. `reason` gets their sums over the ranks.

        Args:
            rank: rank of this process. Rank 0 looks for the stop file and at the clock.
            seconds: expected time of this step and the next, with evaluations and a checkpoint.
        """
        late = self._deadline is not None and time.monotonic() + seconds > self._deadline
        by_rank_0 = 0.0
        if rank == 0:
            by_rank_0 = _FILE if self._asked_by_file() else float(late)
        return float(bool(self._reason)), by_rank_0

    def reason(self, sums: Sequence[float], world: Communicator) -> str:
        """The reason to stop after this step, or "" to go on. It is the same on every rank.

        After a signal it is a collective of the world (`stop.reasons`). All ranks know that from the sums.

        Args:
            sums: sums of the ranks' flags.
            world: all ranks.
        """
        signals, by_rank_0 = sums
        if signals:
            reasons = world.allgather_object(self._reason, name="stop.reasons")
            rank = next(rank for rank, reason in enumerate(reasons) if reason)
            return f"{reasons[rank]} received by rank {rank}"
        if by_rank_0 == _FILE:
            return f"{self._file} is there"
        return self._limit if by_rank_0 else ""

    def close(self) -> None:
        """Restore the earlier signal handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
