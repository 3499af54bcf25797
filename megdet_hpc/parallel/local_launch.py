"""The words that start ranks on this host, for programs that start others: the mpirun of any MPI, else torchrun."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from collections.abc import Sequence

_TORCHRUN = "torch.distributed.run"


@functools.cache
def _mpirun(path: str | None = None) -> tuple[str, ...]:
    """The launcher of the MPI on the path, without its number of ranks; empty where there is none.

    Open MPI has to be told that ranks may be more than cores. Hydra (MPICH, Intel MPI) takes no such option. Intel's
    `mpirun` is a script that a signal ends while its ranks go on, and `mpiexec.hydra` beside it passes signals on.
    """
    found = shutil.which("mpirun", path=path) or shutil.which("mpiexec", path=path)
    if not found:
        return ()
    said = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    if "Open MPI" in said or "OpenRTE" in said:
        return (found, "--oversubscribe")
    return (shutil.which("mpiexec.hydra", path=path) or found,)


def mpirun_words(path: str | None = None) -> list[str]:
    """The launcher of the MPI on the path, to be followed by `-np N PROGRAM`; empty where there is none.

    Args:
        path: folders in which to search, as in PATH; None: this process's PATH.
    """
    return list(_mpirun(path))


def rank_launcher(ranks: int, path: str | None = None) -> list[str]:
    """The words before a program that start it as ranks on this host.

    Args:
        ranks: number of ranks; 0 starts it plainly.
        path: folders in which to search, as in PATH; None: this process's PATH.
    """
    if not ranks:
        return []
    if mpirun := mpirun_words(path):
        return [*mpirun, "-np", str(ranks)]
    torchrun = [sys.executable, "-m", _TORCHRUN, "--standalone", "--no-python"]
    return [*torchrun, "--nproc-per-node", str(ranks)]


def passes_usr1(words: Sequence[str]) -> bool:
    """Whether what `rank_launcher` gave, and a program, hand SIGUSR1 to the ranks. torchrun dies of it; they go on."""
    return _TORCHRUN not in words


def error_of_ranks(text: str) -> str:
    """The line of the error in what ranks and their launcher printed, or three lines where none names one.

    Open MPI prints more lines after the rank's own error. A notice of its own stands between lines of dashes, and its
    first lines say what is wrong; otherwise the last ones do.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    if errors := [line for line in lines if "rror: " in line]:
        return errors[-1]
    if lines and not lines[-1].strip("-"):
        *_, notice = text.rstrip("- \n").rpartition("\n---")
        lines = [line for line in notice.splitlines() if line.strip("-")][:3]
    return " | ".join(lines[-3:])
