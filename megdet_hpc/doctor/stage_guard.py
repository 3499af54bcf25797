"""Ends a rank that does not get on, and says which, where and at what.

A process of its own, since a thread cannot: while mpi4py waits inside MPI_Init for a rank that never comes, it holds
Python's lock. The watched rank tells it over a pipe what it is about to do and how long that may take. Imports
nothing but the standard library, so that it stands guard before torch and MPI are loaded.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time

# Other ranks' lines must reach the terminal before the launcher ends them all for the first that dies.
_GRACE_SECONDS = 3.0


class StageGuard:
    """Guards this process from its creation on, one stage at a time.

    Args:
        who: this process as the message names it: rank, host.
        seconds: a stage may take; 0 guards nothing.
    """

    def __init__(self, who: str, seconds: float) -> None:
        self._seconds = seconds
        self._pipe = None
        if seconds > 0:
            command = [sys.executable, "-I", "-S", __file__, who, str(os.getpid())]
            # the child keeps that: Ctrl-C is the rank's, at whose end the guard ends
            previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
            signal.signal(signal.SIGINT, previous)
            self._pipe = self._process.stdin

    def local(self, what: str) -> None:
        """Begin what this rank does without the others; the stage before has ended."""
        self._tell(f"stuck for {self._seconds:g} s at: {what}; mend this host, or raise --timeout")

    def collective(self, what: str) -> None:
        """Begin what needs every rank; the stage before has ended."""
        self._tell(
            f"waited {self._seconds:g} s for other ranks at: {what}; the culprit is a rank that prints no such line or "
            "is stuck, or the network between them"
        )

    def at_risk(self, what: str, verdict: str, seconds: float) -> None:
        """Begin what may never end; the stage before has ended.

        Args:
            what: is tried.
            verdict: what it means if that does not end.
            seconds: it may take, or the guard's own limit where that is shorter.
        """
        limit = min(self._seconds, seconds)
        self._tell(f"{what} did not end in {limit:g} s: {verdict}", limit)

    def close(self) -> None:
        """Guard no longer."""
        if self._pipe is not None:
            self._pipe.close()
            self._process.wait()
            self._pipe = None

    def _tell(self, complaint: str, seconds: float | None = None) -> None:
        if self._pipe is not None:
            self._pipe.write(f"{self._seconds if seconds is None else seconds}\t{complaint}\n".encode())
            self._pipe.flush()


def _guard(who: str, watched: int) -> None:
    """The guard's process: returns when the watched one closes the pipe or dies, kills it when it is late."""
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
