"""The launchers that start ranks, one row each: the variables of the environment by which each tells a rank its place.

A launcher may run inside another one's shell, and some set the variables of others too. So a row counts only where the
numbers of rank and size that it shares with PMI are the same, and the order of the rows decides between those left.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from megdet_hpc.errors import UserError

GLOO_LAUNCHER = "horovodrun (Gloo)"
TORCHRUN = "torchrun"
# Every process that torchrun started has it.
ELASTIC = "TORCHELASTIC_RUN_ID"
# accelerate starts its processes by torchrun's library, and means other things by its variables.
_ACCELERATE = "ACCELERATE_MIXED_PRECISION"
_PMI = ("PMI_SIZE", "PMI_RANK")

Starts = Literal["mpi", "torch", "gloo"]


@dataclass(frozen=True)
class Launch:
    """A launcher, its number of ranks, and the place of this one."""

    launcher: str
    size: int
    rank: int
    local_rank: int | None = None
    """Number of this rank on its host; None where the launcher does not tell."""
    local_size: int | None = None
    """Number of ranks on this host; None where the launcher does not tell."""
    starts: Starts = field(default="mpi", compare=False)
    told_by: tuple[str, ...] = field(default=(), compare=False)
    """The variables that were read, each with its value."""

    @property
    def place(self) -> str:
        """This rank's numbers and the variables that tell them, as text for people."""
        local = "" if self.local_rank is None else f", local rank {self.local_rank}"
        local += "" if self.local_size is None or not local else f" of {self.local_size}"
        by = f" ({', '.join(self.told_by)})" if self.told_by else ""
        return f"rank {self.rank} of {self.size}{local}{by}"


@dataclass(frozen=True)
class Launcher:
    """A row of the table: the variables of one launcher. Of several names for a number the first that is set counts."""

    name: str
    size: tuple[str, ...]
    rank: tuple[str, ...]
    local_rank: tuple[str, ...] = ()
    local_size: tuple[str, ...] = ()
    known_by: tuple[str, ...] = ()
    """Variables that must be set beside those of the rank."""
    not_with: tuple[str, ...] = ()
    """Variables in whose presence the row does not count."""
    agrees_with: tuple[str, str] | None = None
    """Variables of size and rank that say the same, where they are set. Others belong to a launcher inside this one."""
    shell_alone: bool = False
    """Whether a single rank counts as no launch at all: a step of srun may be a shell."""
    starts: Starts = "mpi"
    """What connects its ranks: mpi; torch, without MPI; gloo, Horovod's own."""
    needs_size: bool = False
    """Whether its rank without its size is an error, and not another launcher's."""


def _srun(name: str, known_by: tuple[str, ...] = ()) -> Launcher:
    return Launcher(
        name,
        ("SLURM_STEP_NUM_TASKS",),
        ("SLURM_PROCID",),
        ("SLURM_LOCALID",),
        ("SLURM_STEP_TASKS_PER_NODE",),
        ("SLURM_STEP_ID", *known_by),
        agrees_with=_PMI,
        shell_alone=True,
    )


# The first row that fits counts.
LAUNCHERS: tuple[Launcher, ...] = (
    Launcher(
        "jsrun",
        ("JSM_NAMESPACE_SIZE",),
        ("JSM_NAMESPACE_RANK",),
        ("JSM_NAMESPACE_LOCAL_RANK",),
        ("JSM_NAMESPACE_LOCAL_SIZE",),
        # its MPI sets Open MPI's variables too
        agrees_with=("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ),
    Launcher(
        "mpirun (Open MPI)",  # horovodrun calls it
        ("OMPI_COMM_WORLD_SIZE",),
        ("OMPI_COMM_WORLD_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    Launcher(
        GLOO_LAUNCHER,
        ("HOROVOD_SIZE",),
        ("HOROVOD_RANK",),
        ("HOROVOD_LOCAL_RANK",),
        ("HOROVOD_LOCAL_SIZE",),
        starts="gloo",
    ),
    Launcher(
        "mpiexec (Intel MPI)", _PMI[:1], _PMI[1:], ("MPI_LOCALRANKID",), ("MPI_LOCALNRANKS",), ("I_MPI_HYDRA_UUID",)
    ),
    Launcher(
        "mpiexec (MPICH, Hydra)",
        _PMI[:1],
        _PMI[1:],
        ("MPI_LOCALRANKID",),
        ("MPI_LOCALNRANKS",),
        ("MPI_LOCALRANKID",),
        not_with=("PALS_RANKID",),
    ),
    _srun("srun (Cray PMI)", ("PMI_CONTROL_PORT",)),  # it sets the variables of PALS too
    _srun("srun (PMIx)", ("PMIX_RANK",)),
    _srun("srun (PMI-2)", ("PMI_RANK",)),
    _srun("srun"),
    Launcher(
        "mpiexec (PALS)",
        ("PMI_SIZE", "PALS_SIZE"),
        ("PALS_RANKID", "PMI_RANK"),
        ("PALS_LOCAL_RANKID", "PMI_LOCAL_RANK"),
        ("PALS_LOCAL_SIZE", "PMI_LOCAL_SIZE"),
        ("PALS_RANKID",),
        agrees_with=_PMI,
        needs_size=True,
    ),
    Launcher(
        "flux run", ("FLUX_JOB_SIZE",), ("FLUX_TASK_RANK",), ("FLUX_TASK_LOCAL_ID",), agrees_with=_PMI, needs_size=True
    ),
    Launcher("an MPI launcher (PMI)", _PMI[:1], _PMI[1:], ("PMI_LOCAL_RANK",), ("PMI_LOCAL_SIZE",)),
)
TORCH = Launcher(
    TORCHRUN,
    ("WORLD_SIZE",),
    ("RANK",),
    ("LOCAL_RANK",),
    ("LOCAL_WORLD_SIZE",),
    (ELASTIC,),
    (_ACCELERATE,),
    starts="torch",
)


def _first(names: tuple[str, ...], environ: Mapping[str, str]) -> str:
    """The first of the variables that is set; "" if none is."""
    return next((name for name in names if environ.get(name, "") != ""), "")


def _number(name: str, environ: Mapping[str, str], launcher: str) -> int:
    if not environ[name].isdigit():
        raise UserError(f"{name} is {environ[name]!r}, by which {launcher} tells a rank its place; accepted: a number")
    return int(environ[name])


def _local_size(name: str, environ: Mapping[str, str], launcher: str) -> int | None:
    """The number of ranks on this host. SLURM has one number for each node, such as 2(x3),1."""
    if name != "SLURM_STEP_TASKS_PER_NODE":
        return _number(name, environ, launcher)
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environ[name]):
        counts += [int(count)] * int(times or 1)
    node = environ.get("SLURM_NODEID", "0")
    return counts[int(node)] if node.isdigit() and int(node) < len(counts) else None


def read_row(row: Launcher, environ: Mapping[str, str]) -> Launch | None:
    """The place of this process by one row; None if another launcher, or none, started it.

    Raises:
        UserError: a variable of the row is no number, or the number of ranks is missing.
    """
    size, rank = _first(row.size, environ), _first(row.rank, environ)
    if any(name not in environ for name in row.known_by) or any(name in environ for name in row.not_with):
        return None
    if row.needs_size and rank and not size:
        raise UserError(
            f"{rank}={environ[rank]} is set by {row.name}, but {' and '.join(row.size)} are not: the number of ranks "
            "is unknown; start them with the site's PMI, for example mpiexec --pmi=cray"
        )
    if not size or not rank:
        return None
    if "SLURM_STEP_ID" in row.known_by and not environ["SLURM_STEP_ID"].isdigit():
        return None  # the batch script
    ranks, number = _number(size, environ, row.name), _number(rank, environ, row.name)
    if row.shell_alone and ranks <= 1:
        return None
    if row.agrees_with:
        told = [environ.get(name) for name in row.agrees_with]
        if any(other is not None and other != str(own) for other, own in zip(told, (ranks, number), strict=True)):
            return None
    local, on_host = _first(row.local_rank, environ), _first(row.local_size, environ)
    told_by = tuple(f"{name}={environ[name]}" for name in (rank, size, local, on_host) if name)
    local_rank = _number(local, environ, row.name) if local else None
    local_size = _local_size(on_host, environ, row.name) if on_host else None
    return Launch(row.name, ranks, number, local_rank, local_size, row.starts, told_by)


def read_launch(environ: Mapping[str, str]) -> Launch | None:
    """The launcher of MPI's or Horovod's ranks that started this process; None if none did."""
    for row in LAUNCHERS:
        if found := read_row(row, environ):
            return found
    return None


def rank_told(environ: Mapping[str, str]) -> bool:
    """Whether any launcher's variable gives this process a rank other than 0, whatever else is wrong with them."""
    return any(environ.get(name, "0") != "0" for row in (*LAUNCHERS, TORCH) for name in row.rank)
