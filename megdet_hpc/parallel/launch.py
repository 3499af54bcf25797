"""The launcher of this process, read from its environment before MPI starts."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from megdet_hpc.errors import UserError
from megdet_hpc.parallel.launchers import ELASTIC, TORCH, TORCHRUN, Launch, rank_told, read_launch, read_row

# On a busy host one process starts seconds before another. mpirun and horovodrun end the wait when the first leaves.
_OTHERS_WAIT_SECONDS = 10.0

# Launchers that are not supported, the most specific first: name, a variable that only it sets, the variables of the
# number of ranks and of this rank. Without this table each rank would take itself for the only process.
_FOREIGN = (
    ("accelerate launch", "ACCELERATE_MIXED_PRECISION", "WORLD_SIZE", "RANK"),
    (TORCHRUN, ELASTIC, "WORLD_SIZE", "RANK"),
    ("deepspeed", "CROSS_SIZE", "WORLD_SIZE", "RANK"),
    ("a launcher of PyTorch's", "RANK", "WORLD_SIZE", "RANK"),
    ("a launcher of PyTorch's", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("aprun (Cray ALPS)", "ALPS_APP_PE", "ALPS_APP_SIZE", "ALPS_APP_PE"),
    ("MVAPICH2's launcher", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
)
# Options that put ranks on all nodes of a job.
FILL_NODES = (
    "horovodrun and a bare mpirun fill one host first: name the hosts (horovodrun -H HOST:RANKS,...), or start the "
    "ranks by srun or the scripts in jobs/"
)
_PROGRAMS = {"horovodrun", "mpirun", "mpiexec", "orterun", "prterun", "mpiexec.hydra", "srun"}


def find_launch(environ: Mapping[str, str] = os.environ) -> Launch | None:
    """The launcher of this process; None if it was started by hand.

    Raises:
        UserError: a launcher's variable is no number, or it does not tell the number of ranks.
    """
    return torchrun_launch(environ) or read_launch(environ)


def _foreign(environ: Mapping[str, str]) -> tuple[str, str, int, int] | None:
    """The launcher that is not supported: its name, the variables that tell, number of ranks, this rank; else None.

    Some sites and notebooks leave WORLD_SIZE=1, or one of the variables, in every shell. Such a process is alone.
    """
    if torchrun_launch(environ) or (read_launch(environ) and ELASTIC not in environ):
        return None
    for name, known_by, size, rank in _FOREIGN:
        if known_by not in environ or rank not in environ:
            continue
        told = environ.get(size, "")
        of_torch = size == "WORLD_SIZE"
        if of_torch and not told.isdigit():
            continue
        number = int(told) if told.isdigit() else 0
        if number == 1 and not (of_torch and ELASTIC in environ):
            continue
        index = int(environ[rank]) if environ[rank].isdigit() else 0
        shown = f"{size}={told} and {rank}={environ[rank]} are" if told else f"{rank}={environ[rank]} is"
        return name, shown, number, index
    return None


def torchrun_launch(environ: Mapping[str, str] = os.environ) -> Launch | None:
    """The ranks of torchrun, alone or started on each node by another launcher; None under any other launcher.

    A launcher that torchrun started would start all ranks several times. One outside it started one torchrun a node, so
    its numbers are smaller.
    """
    words = environ.get("WORLD_SIZE", ""), environ.get("RANK", "")
    if not all(word.isdigit() for word in words) or not (ranks := read_row(TORCH, environ)):
        return None
    other = read_launch(environ)
    return ranks if other is None or _starts_torchrun(other, environ) else None


def _starts_torchrun(outer: Launch, environ: Mapping[str, str]) -> bool:
    """Whether a launcher started torchrun once on each node, judged by its number of processes."""
    node, nodes = environ.get("GROUP_RANK", ""), environ.get("GROUP_WORLD_SIZE", "")
    if node.isdigit() and nodes.isdigit():
        return outer.size == int(nodes)
    return outer.launcher.startswith("srun")


def known_launch(environ: Mapping[str, str] = os.environ) -> Launch | None:
    """The launcher of this process, as find_launch gives it, if no other launcher started the process.

    Raises:
        UserError: a launcher that is not supported started it, or one launcher inside another.
    """
    launch, foreign = find_launch(environ), _foreign(environ)
    if foreign is None:
        return launch
    name, shown, size, _ = foreign
    if launch:
        raise UserError(
            f"{shown} set by {name}, beside {launch.launcher}, which started {launch.size} rank(s): one launcher "
            f"inside the other starts all ranks several times; use {launch.launcher.split(' ')[0]} alone"
        )
    ranks, of_torch = str(size) if size > 1 else "N", "WORLD_SIZE" in shown
    raise UserError(
        f"{shown} set by {name}, which {'does not start MPI' if of_torch else 'this program does not understand'}; use "
        f"torchrun, horovodrun -np {ranks} or mpirun -np {ranks}, or plain python for one process"
        + (", without WORLD_SIZE in its environment" if of_torch else "")
    )


def launcher_terminal() -> str | None:
    """The terminal on which the launcher of this process writes, if the launcher runs on this host; else None.

    After Ctrl-C a launcher may no longer forward the lines of its ranks to the terminal.
    """
    pid, found = os.getppid(), None
    with suppress(OSError, ValueError):
        while pid > 1:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if any(os.path.basename(word).decode(errors="replace") in _PROGRAMS for word in words[:2]):
                shown = os.readlink(f"/proc/{pid}/fd/2")
                found = shown if shown.startswith(("/dev/pts/", "/dev/tty")) else None
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return found


def note_status(status: int) -> None:
    """Write the exit status of this process to the file that MEGDET_STATUS_FILE names, unless another rank has.

    jobs/restart.sh reads it. A launcher may return another status: that of a signal with which it ended other ranks.
    """
    path = os.environ.get("MEGDET_STATUS_FILE")
    if path:
        with suppress(OSError), open(path, "x", encoding="utf-8") as file:
            file.write(f"{status}\n")


def note_launched(environ: Mapping[str, str] = os.environ) -> None:
    """Tell the job's script that the ranks have met: rank 0 makes the file that MEGDET_LAUNCH_FILE names.

    A launcher that does not reach a node hangs without a message, and so do ranks that do not reach each other.
    jobs/restart.sh ends the launch if the file does not appear.
    """
    path = environ.get("MEGDET_LAUNCH_FILE")
    if path and is_first_process(environ):
        with suppress(OSError):
            Path(path).touch()


def note_finished(environ: Mapping[str, str] = os.environ) -> None:
    """Tell the job's script that the training has come to its end: rank 0 writes so into the file of `note_launched`.

    srun may return 0 after it has ended a step whose ranks it lost.
    """
    path = environ.get("MEGDET_LAUNCH_FILE")
    if path and is_first_process(environ):
        with suppress(OSError):
            Path(path).write_text("finished\n", encoding="utf-8")


def idle_nodes(num_hosts: int, environ: Mapping[str, str] = os.environ) -> str:
    """A line about nodes of the job that have no ranks, such as "2 nodes in the job, ranks on 1 of them".

    SLURM_JOB_NUM_NODES or PBS_NODEFILE gives the number of nodes.

    Args:
        num_hosts: number of hosts with ranks.

    Returns:
        The line; "" where every node has ranks, or where the scheduler does not tell.
    """
    told, nodes = environ.get("SLURM_JOB_NUM_NODES", ""), 0
    if told.isdigit():
        nodes = int(told)
    elif path := environ.get("PBS_NODEFILE"):
        with suppress(OSError):
            nodes = len(set(Path(path).read_text(encoding="utf-8").split()))
    return f"{nodes} nodes in the job, ranks on {num_hosts} of them" if nodes > num_hosts else ""


def is_first_process(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is rank 0 or alone."""
    try:
        foreign, launch = _foreign(environ), find_launch(environ)
    except UserError:
        return not rank_told(environ)
    if foreign:
        return foreign[3] == 0
    return launch is None or launch.rank == 0


def speaks_for_all(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process prints an error that all processes find before they are connected. Only the first one does.

    In the others the call returns after a while. A launcher ends all processes with the first that fails, and the text
    must be printed before.
    """
    if is_first_process(environ):
        return True
    time.sleep(_OTHERS_WAIT_SECONDS)
    return False
