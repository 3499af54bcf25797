"""A guard: a small process that ends the process which started it, once that one is late.

A thread cannot do this, since it does not run while a call in C holds Python's lock. The watched process sends its
guard a limit and a complaint over a pipe. The guard counts the time in short looks, of which it takes none while the
job is suspended, so a suspension does not count. This file imports only the standard library, so that a guard can
start before torch and MPI are loaded.
"""

from __future__ import annotations

import faulthandler
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

# Time between two looks. A suspension counts as one look at most [seconds].
_LOOK_SECONDS = 1.0
# Once the first rank dies, the launcher ends all. The other ranks' lines must reach the terminal before [seconds].
_GRACE_SECONDS = 3.0
# What a launcher passes on to the group of a rank, and a terminal to all: the rank decides, and its guard goes with it.
_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Guard:
    """A guard of this process. It starts with the object and waits for the first limit.

    Args:
        spares_stopped: whether the time in which this process alone stands still, by SIGSTOP, does not count either.
        stacks: whether SIGUSR2 prints the stacks of this process until `close`, which the guard sends before the end.
    """

    def __init__(self, *, spares_stopped: bool = False, stacks: bool = False) -> None:
        self._stacks = stacks
        if stacks:
            faulthandler.register(signal.SIGUSR2, file=2)
        words = [str(os.getpid()), str(int(spares_stopped)), str(int(stacks))]
        # the guard inherits the mask; a signal that comes to this process meanwhile waits
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, *words], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        assert self._process.stdin is not None
        self._pipe = self._process.stdin
        os.set_blocking(self._pipe.fileno(), False)

    def expect(self, seconds: float, complaint: str) -> None:
        """Begin a limit, which replaces the one before.

        Args:
            seconds: time until the guard ends this process, if nothing replaces the limit [seconds].
            complaint: the line that the guard prints before that.
        """
        # a guard that was killed or stopped keeps nothing from going on
        with suppress(BlockingIOError, BrokenPipeError):
            os.write(self._pipe.fileno(), f"{seconds}\t{complaint}\n".encode())

    def rest(self) -> None:
        """End the limit. The guard waits for the next one."""
        self.expect(float("inf"), "")

    def close(self) -> None:
        """End the guard. A second call does nothing."""
        if not self._pipe.closed:
            self._pipe.close()
            self._process.kill()  # loaders, which are forked, may hold the pipe open
            self._process.wait()
            if self._stacks:
                faulthandler.unregister(signal.SIGUSR2)


def _stands_still(process: int) -> bool:
    """Whether a process is stopped, as Linux tells it; elsewhere False."""
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    return False


def _watch(watched: int, spares_stopped: bool, stacks: bool) -> None:
    """Watch a process: return once it closes the pipe or dies, kill it if it is late."""
    pending, complaint, left = b"", "", float("inf")
    while left > 0:
        look, begin = min(_LOOK_SECONDS, left), time.monotonic()
        ready, _, _ = select.select([0], [], [], look)
        if os.getppid() != watched:
            return  # its loaders may hold the pipe open
        if not ready:
            left -= 0.0 if spares_stopped and _stands_still(watched) else look
            continue
        received = os.read(0, 65536)
        if not received:
            return
        *told, pending = (pending + received).split(b"\n")
        if told:
            seconds, complaint = told[-1].decode().split("\t", 1)
            left = float(seconds)
        else:
            left -= min(look, time.monotonic() - begin)
    sys.stderr.write(f"{complaint}\n")
    sys.stderr.flush()
    if stacks:
        os.kill(watched, signal.SIGUSR2)
    time.sleep(_GRACE_SECONDS)
    # SIGKILL, since a rank inside MPI's or the kernel's code runs no handler
    with suppress(ProcessLookupError):
        os.kill(watched, signal.SIGKILL)


if __name__ == "__main__":
    _watch(int(sys.argv[1]), sys.argv[2] == "1", sys.argv[3] == "1")
