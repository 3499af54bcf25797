"""Which launcher started this process, read from its environment before MPI starts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megdet_hpc.errors import UserError

GLOO_LAUNCHER = "horovodrun (Gloo)"
# launcher, variable with the number of ranks, variable with this rank
_LAUNCHERS = (
    ("mpirun (Open MPI)", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    (GLOO_LAUNCHER, "HOROVOD_SIZE", "HOROVOD_RANK"),
    ("an MPI launcher (PMI)", "PMI_SIZE", "PMI_RANK"),
)
# Launchers that are not understood, most particular first: launcher, a variable by which it is known, the variables of
# the number of ranks and this rank. Each of their ranks would take itself for the only one.
_FOREIGN = (
    ("accelerate launch", "ACCELERATE_MIXED_PRECISION", "WORLD_SIZE", "RANK"),
    ("torchrun", "TORCHELASTIC_RUN_ID", "WORLD_SIZE", "RANK"),
    ("deepspeed", "CROSS_SIZE", "WORLD_SIZE", "RANK"),
    ("a launcher of PyTorch's", "RANK", "WORLD_SIZE", "RANK"),
    ("a launcher of PyTorch's", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("mpiexec (Cray PALS)", "PALS_RANKID", "PALS_SIZE", "PALS_RANKID"),
    ("aprun (Cray ALPS)", "ALPS_APP_PE", "ALPS_APP_SIZE", "ALPS_APP_PE"),
    ("flux run", "FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_RANK"),
    ("jsrun", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK"),
    ("MVAPICH2's launcher", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
)
# How to put ranks on all nodes of a job.
FILL_NODES = (
    "horovodrun and a bare mpirun fill one host first: name the hosts (horovodrun -H HOST:RANKS,...), or start the "
    "ranks by srun or the scripts in jobs/"
)
# What torchrun starts is torchrun's even where that is a launcher of MPI, which then starts all ranks several times.
_ELASTIC = "TORCHELASTIC_RUN_ID"


_PROGRAMS = {"horovodrun", "mpirun", "mpiexec", "orterun", "prterun", "mpiexec.hydra", "srun"}


@dataclass(frozen=True)
class Launch:
    """A launcher, its number of ranks and this one's."""

    launcher: str
    size: int
    rank: int


def find_launch(environ: Mapping[str, str] = os.environ) -> Launch | None:
    """The launcher of this process, or None when it was started by hand.

    A batch script outside srun carries SLURM_NTASKS too, so SLURM counts only inside a step of srun; one of a single
    task, such as a shell, need not be MPI's.
    """
    for launcher, size, rank in _LAUNCHERS:
        if size in environ:
            return Launch(launcher, int(environ[size]), int(environ.get(rank, 0)))
    step = environ.get("SLURM_STEP_ID", "")
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS", 0))
    if "SLURM_PROCID" in environ and step.isdigit() and tasks > 1:
        return Launch("srun", tasks, int(environ["SLURM_PROCID"]))
    return None


def _foreign(environ: Mapping[str, str]) -> tuple[str, str, int, int] | None:
    """The launcher that is not understood: its name, the variables that tell, ranks, this rank. None: there is none.

    Some sites and notebooks leave WORLD_SIZE=1, or one of the variables, in every shell; such a process is alone.
    """
    understood = find_launch(environ)
    if understood and _ELASTIC not in environ:
        return None
    for name, known_by, size, rank in _FOREIGN:
        if known_by not in environ or rank not in environ:
            continue
        told = environ.get(size, "")
        of_torch = size == "WORLD_SIZE"
        if of_torch and not told.isdigit():
            continue
        number = int(told) if told.isdigit() else 0
        if number == 1 and not (of_torch and _ELASTIC in environ):
            continue
        index = int(environ[rank]) if environ[rank].isdigit() else 0
        shown = f"{size}={told} and {rank}={environ[rank]} are" if told else f"{rank}={environ[rank]} is"
        return name, shown, number, index
    return None


def known_launch(environ: Mapping[str, str] = os.environ) -> Launch | None:
    """The launcher of this process as find_launch tells it, once it is sure that no other one started this process.

    Raises:
        UserError: a launcher that is not understood did, or one inside another.
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
        f"horovodrun -np {ranks} or mpirun -np {ranks}, or plain python for one process"
        + (", without WORLD_SIZE in its environment" if of_torch else "")
    )


def launcher_terminal() -> str | None:
    """The terminal on which this process's launcher writes, if it was typed on this host; else None.

    A launcher that Ctrl-C ends, or that ends its ranks then, no longer forwards their lines to it.
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
    """Leave this process's exit status in the file that MEGDET_STATUS_FILE names, if no other rank has.

    A launcher may return another: that of a signal with which it ended the other ranks. jobs/restart.sh asks.
    """
    path = os.environ.get("MEGDET_STATUS_FILE")
    if path:
        with suppress(OSError), open(path, "x", encoding="utf-8") as file:
            file.write(f"{status}\n")


def note_launched(environ: Mapping[str, str] = os.environ) -> None:
    """Tell the job's script that the ranks have met: rank 0 makes the file that MEGDET_LAUNCH_FILE names.

    A launcher that does not reach a node, or ranks that do not reach each other, hang without a word. jobs/restart.sh
    ends the launch where the file does not come.
    """
    path = environ.get("MEGDET_LAUNCH_FILE")
    if path and is_first_process(environ):
        with suppress(OSError):
            Path(path).touch()


def idle_nodes(num_hosts: int, environ: Mapping[str, str] = os.environ) -> str:
    """What to say of a job with more nodes than ranks are on: "2 nodes in the job, ranks on 1 of them".

    Args:
        num_hosts: hosts with ranks.

    Returns:
        "" where no node is idle, or the scheduler does not tell: SLURM in SLURM_JOB_NUM_NODES, PBS in PBS_NODEFILE.
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
    foreign = _foreign(environ)
    if foreign:
        return foreign[3] == 0
    launch = find_launch(environ)
    return launch is None or launch.rank == 0
