"""The guard that kills a rank which makes no progress, and prints its rank, host and stage.

mpi4py holds Python's lock while it waits inside MPI_Init for a missing rank, so the guard is a process. It runs before
torch and MPI are loaded.
"""

from __future__ import annotations

from megdet_hpc.guard import Guard


class StageGuard:
    """A guard of this process. It starts with the object and watches one stage at a time.

    Args:
        who: this process as the message names it: rank, host.
        seconds: time limit of a stage; 0: no guard.
    """

    def __init__(self, who: str, seconds: float) -> None:
        self._who, self._seconds = who, seconds
        self._guard = Guard() if seconds > 0 else None

    def local(self, what: str) -> None:
        """Begin a stage without other ranks. It ends the stage before."""
        self._tell(f"stuck for {self._seconds:g} s at: {what}; repair this host, or raise --timeout")

    def collective(self, what: str) -> None:
        """Begin a stage that needs every rank. It ends the stage before."""
        self._tell(
            f"waited {self._seconds:g} s for other ranks at: {what}; the culprit is a rank that prints no such line or "
            "is stuck, or the network between them"
        )

    def at_risk(self, what: str, verdict: str, seconds: float) -> None:
        """Begin a stage that may never end. It ends the stage before.

        Args:
            what: name of the stage.
            verdict: text that says what a stage without an end means.
            seconds: time limit, if it is shorter than the guard's own.
        """
        limit = min(self._seconds, seconds)
        self._tell(f"{what} did not end in {limit:g} s: {verdict}", limit)

    def close(self) -> None:
        """End the guard."""
        if self._guard is not None:
            self._guard.close()
            self._guard = None

    def _tell(self, complaint: str, seconds: float | None = None) -> None:
        if self._guard is not None:
            limit = self._seconds if seconds is None else seconds
            self._guard.expect(limit, f"megdet_hpc.doctor: {self._who}: wrong: {complaint}")
