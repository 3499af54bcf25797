"""Runs a command as PBS's daemon (mom) runs a job's script or a task: `python pbs_task.py COMMAND...`.

The command gets a session of its own. When it ends, or when this program is told to (SIGTERM), what it has left behind
gets SIGKILL. The real mom kills by session, and a child that calls setsid escapes it only if it is faster; here none
is. No imports but the standard library's, since it runs once a node.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36  # orphans of all generations become this process's children


def children() -> list[int]:
    """Process ids whose parent is this process."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            # the name, in parentheses, may hold anything; after it: state, parent
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(folder.name))
    return found


def end_children() -> None:
    """SIGKILL to the children and, as these become orphans, to theirs."""
    while left := children():
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in left:
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)


def main(command: list[str]) -> int:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        status = subprocess.Popen(command, start_new_session=True).wait()
    finally:
        end_children()
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
