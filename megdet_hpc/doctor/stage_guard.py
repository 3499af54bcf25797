"""The guard that kills a rank which makes no progress, and prints its rank, host and stage.

The guard is a process, since no thread can run while mpi4py waits inside MPI_Init for a missing rank: it holds Python's
lock. The watched rank sends the guard its next stage and time limit over a pipe. This file imports only the standard
library, so that the guard runs before torch and MPI are loaded.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time

# Once the first rank dies, the launcher ends all. The other ranks' lines must reach the terminal before.
_GRACE_SECONDS = 3.0


class StageGuard:
    """A guard of this process. It starts with the object and watches one stage at a time.

    Args:
        who: this process as the message names it: rank, host.
        seconds: time limit of a stage; 0: no guard.
    """

    def __init__(self, who: str, seconds: float) -> None:
        self._seconds = seconds
        self._pipe = None
        if seconds > 0:
            command = [sys.executable, "-I", "-S", __file__, who, str(os.getpid())]
            # the child inherits that and ignores Ctrl-C; it ends when the rank ends
            previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
            signal.signal(signal.SIGINT, previous)
            self._pipe = self._process.stdin

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
        if self._pipe is not None:
            self._pipe.close()
            self._process.wait()
            self._pipe = None

    def _tell(self, complaint: str, seconds: float | None = None) -> None:
        if self._pipe is not None:
            self._pipe.write(f"{self._seconds if seconds is None else seconds}\t{complaint}\n".encode())
            self._pipe.flush()


def _guard(who: str, watched: int) -> None:
    """Watch a process: return once it closes the pipe or dies, kill it if it is late."""
    pending, complaint, deadline = b"", "", float("inf")
    while True:
        left = max(0.0, deadline - time.monotonic())
        ready, _, _ = select.select([0], [], [], None if left == float("inf") else left)
        if not ready:
            break
        received = os.read(0, 65536)
        if not received:
            return
        *told, pending = (pending + received).split(b"\n")
        if told:
            seconds, complaint = told[-1].decode().split("\t", 1)
            deadline = time.monotonic() + float(seconds)
    sys.stderr.write(f"megdet_hpc.doctor: {who}: wrong: {complaint}\n")
    sys.stderr.flush()
    time.sleep(_GRACE_SECONDS)
    # SIGKILL, since a rank inside MPI's or the kernel's code runs no handler
    os.kill(watched, signal.SIGKILL)


if __name__ == "__main__":
    _guard(sys.argv[1], int(sys.argv[2]))
