"""The address at which ranks meet that a launcher of MPI started where there is no mpi4py: torch.distributed needs one.

torchrun gives MASTER_ADDR and MASTER_PORT itself.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from megdet_hpc.errors import UserError
from megdet_hpc.parallel.launchers import Launch

# Ports that systems give to no outgoing connection: Linux begins at 32,768.
_PORTS = range(20_000, 30_000)
# Variables that together name one launch, by launcher. Those of another launcher may be set on some of the nodes only:
# those of srun, where it started the daemons of mpirun.
_SRUN = "srun"
_LAUNCH_IDS = {
    _SRUN: ("SLURM_JOB_ID", "SLURM_STEP_ID"),
    "mpirun (Open MPI)": ("PMIX_NAMESPACE",),
    "mpiexec (Intel MPI)": ("I_MPI_HYDRA_UUID",),
    "mpiexec (PALS)": ("PALS_APID",),
    "flux run": ("FLUX_JOB_ID",),
    "jsrun": ("PMIX_NAMESPACE",),
}
# Where the launcher names no launch: the first that is set.
_JOB_IDS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "FLUX_JOB_ID")


def meeting_place(
    launch: Launch, environ: Mapping[str, str] = os.environ, parent: int | None = None
) -> tuple[str, int]:
    """Host of rank 0, and a port that is the same on every rank and differs between jobs.

    Args:
        launch: the launcher and its ranks.
        environ: environment of this process.
        parent: number of the process that started this one, which the ranks of a host share; None: ask the system.

    Raises:
        UserError: nothing tells the host of rank 0, or MASTER_PORT is no port.
    """
    told = environ.get("MASTER_PORT", "")
    if told and not (told.isdigit() and 0 < int(told) < 65536):
        raise UserError(f"MASTER_PORT is {told!r}; accepted: 1 to 65535, a free port of the host of rank 0")
    alone = launch.local_size == launch.size or environ.get("FLUX_JOB_NNODES") == "1"
    address = environ.get("MASTER_ADDR") or ("127.0.0.1" if alone else _first_node(launch, environ))
    if not address:
        raise UserError(
            f"{launch.launcher} started {launch.size} ranks and there is no mpi4py, so they do not know where rank 0 "
            "is; export MASTER_ADDR=HOST_OF_RANK_0 in the job script, and MASTER_PORT if a certain port must be taken"
        )
    found = _launch_id(launch, environ)
    if not found and not told and not alone:
        raise UserError(
            f"{launch.launcher} started {launch.size} ranks on several hosts without a scheduler, and there is no "
            "mpi4py, so they do not agree on a port; export MASTER_PORT=FREE_PORT_OF_RANK_0 too"
        )
    # on one host without a scheduler the launcher's process tells two runs apart
    found = found or str(os.getppid() if parent is None else parent)
    port = int(told) if told else _PORTS[zlib.crc32(found.encode()) % len(_PORTS)]
    return address, port


def _by_srun(launch: Launch) -> bool:
    return launch.launcher.split()[0] == _SRUN


def _launch_id(launch: Launch, environ: Mapping[str, str]) -> str:
    """A text that all ranks of this launch share, on whatever node, and others do not; "" if nothing tells."""
    own = _LAUNCH_IDS.get(_SRUN if _by_srun(launch) else launch.launcher, ())
    told = [environ.get(name, "") for name in own]
    if told and all(told):
        return " ".join(told)
    return next((environ[name] for name in _JOB_IDS if environ.get(name)), "")


def _first_node(launch: Launch, environ: Mapping[str, str]) -> str:
    """The first node of a SLURM step or of a job of SLURM or PBS, where rank 0 is; "" if nothing tells."""
    # the step of a launcher's daemons leaves out the node of the launcher itself, on which rank 0 is
    step = environ.get("SLURM_STEP_NODELIST") if _by_srun(launch) else ""
    nodes = step or environ.get("SLURM_JOB_NODELIST") or ""
    if found := re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?", nodes):
        return "".join(part or "" for part in found.groups())
    if path := environ.get("PBS_NODEFILE"):
        with suppress(OSError):
            return (Path(path).read_text(encoding="utf-8").split() or [""])[0]
    return ""
