"""Ending a run early and in order: a signal to any rank, or the end of its time, stops all ranks at one step."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import TYPE_CHECKING

from megdet_hpc.owner import EXIT_DISPLACED as EXIT_DISPLACED

if TYPE_CHECKING:
    from megdet_hpc.parallel.communicator import Communicator

EXIT_UNFINISHED = 75
"""Exit status of a run that saved its state before its end: EX_TEMPFAIL of sysexits.h, "run me again".

A run that another start has displaced from its folder ends with EXIT_DISPLACED.
"""

_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class StopRequests:
    """Collects what asks this rank to stop, and lets all ranks agree on the step.

    SIGUSR1 (a scheduler's warning) and SIGTERM (mpirun's or the scheduler's end) both ask; a second SIGTERM ends the
    process at once, as it would without us. Make it in the main thread, before what takes long to import: time counts
    from then, and until then SIGUSR1 kills.

    Args:
        max_minutes: of the whole process, loading included; None for no limit [minutes].
    """

    def __init__(self, max_minutes: float | None) -> None:
        self._deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._limit = f"max_minutes {max_minutes:g} is near" if max_minutes is not None else ""
        self._reason = ""
        self._previous = {number: signal.signal(number, self._note) for number in _SIGNALS}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._reason = signal.Signals(number).name
        if number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)

    def agreed(self, world: Communicator, seconds: float) -> str:
        """Why to stop now, or "" to go on; the same on every rank. Collective of the world; blocks; one number.

        Args:
            world: all ranks.
            seconds: what rank 0 expects the next step to take, with all that comes with it.
        """
        import torch

        late = self._deadline is not None and time.monotonic() + seconds > self._deadline
        asked = torch.tensor([float(bool(self._reason)), float(late and world.rank == 0)])
        world.allreduce_sum_(asked, name="stop")
        if asked[0]:
            reasons = world.allgather_object(self._reason, name="stop.reasons")
            rank = next(rank for rank, reason in enumerate(reasons) if reason)
            return f"{reasons[rank]} received by rank {rank}"
        return self._limit or "max_minutes is near" if asked[1] else ""

    def close(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
