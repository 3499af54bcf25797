"""Rank and size from what each launcher sets in the environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from megdet_hpc.errors import UserError
from megdet_hpc.parallel.launch import find_launch, is_first_process, known_launch
from megdet_hpc.parallel.launchers import GLOO_LAUNCHER, LAUNCHERS, TORCHRUN, Launch
from megdet_hpc.parallel.meeting import meeting_place

# A batch script of SLURM has these, and so have the launchers that it starts.
SBATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_NODELIST": "node[00-01]"}
SRUN = {**SBATCH, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}
PBS = {"PBS_JOBID": "7.server", "PBS_NODEFILE": "/var/spool/pbs/aux/7.server", "PBS_TASKNUM": "1"}
MPIRUN = {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}

PMI = {"PMI_RANK": "5", "PMI_SIZE": "8", "PMI_FD": "9"}
HYDRA = {**PMI, "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4", "HYDI_CONTROL_FD": "7"}
PMI_2 = {**SRUN, **PMI}
PALS = {"PALS_RANKID": "5", "PALS_LOCAL_RANKID": "1", "PALS_LOCAL_SIZE": "4", "PALS_NODEID": "1", "PALS_APID": "a"}
CRAY_PMI = {"PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "4", "PMI_CONTROL_PORT": "20001", "PMI_UNIVERSE_SIZE": "8"}
FLUX = {"FLUX_TASK_RANK": "5", "FLUX_JOB_SIZE": "8", "FLUX_TASK_LOCAL_ID": "1", "FLUX_JOB_NNODES": "2"}
JSM = {"JSM_NAMESPACE_RANK": "5", "JSM_NAMESPACE_SIZE": "8", "JSM_NAMESPACE_LOCAL_RANK": "1"}
# The daemons of Hydra and Open MPI are started by a step of srun with one task a node, whose variables ranks inherit.
DAEMON = {**SRUN, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_NODEID": "1"}

# What the launchers set: read off Open MPI 4.1, MPICH 5.0, Intel MPI 2021.18 and SLURM 22.05; PALS, flux and jsrun as
# published programs read them.
CASES = {
    "Open MPI": (MPIRUN, "mpirun (Open MPI)"),
    "Open MPI 5, whose daemon is PMIx": ({**MPIRUN, "PMIX_RANK": "5"}, "mpirun (Open MPI)"),
    "Open MPI in a SLURM batch script": ({**SBATCH, **MPIRUN}, "mpirun (Open MPI)"),
    "Open MPI on SLURM, several nodes": ({**DAEMON, **MPIRUN}, "mpirun (Open MPI)"),
    "Open MPI in a PBS job": ({**PBS, **MPIRUN}, "mpirun (Open MPI)"),
    "MPICH": (HYDRA, "mpiexec (MPICH, Hydra)"),
    "MPICH in a PBS job": ({**PBS, **HYDRA}, "mpiexec (MPICH, Hydra)"),
    "MPICH on SLURM, several nodes": ({**DAEMON, **HYDRA}, "mpiexec (MPICH, Hydra)"),
    "Intel MPI": ({**HYDRA, "I_MPI_HYDRA_UUID": "ed63"}, "mpiexec (Intel MPI)"),
    "srun --mpi=pmix": ({**SRUN, "PMIX_RANK": "5", "PMIX_NAMESPACE": "slurm.pmix.7.0"}, "srun (PMIx)"),
    "srun --mpi=pmi2": (PMI_2, "srun (PMI-2)"),
    "srun, Cray PMI": ({**PMI_2, **CRAY_PMI, **PALS}, "srun (Cray PMI)"),
    "srun --mpi=none": (SRUN, "srun"),
    "PALS": ({**PBS, **PALS, **PMI, **CRAY_PMI}, "mpiexec (PALS)"),
    "flux": ({**FLUX, **PMI}, "flux run"),
    "flux, PMIx": ({**FLUX, "PMIX_RANK": "5"}, "flux run"),
    "jsrun": ({**JSM, **MPIRUN, "PMIX_RANK": "5", "LSB_JOBID": "7"}, "jsrun"),
    "an unknown one with PMI": ({**PBS, **PMI, "PMI_LOCAL_RANK": "1"}, "an MPI launcher (PMI)"),
    "horovodrun --gloo": ({"HOROVOD_SIZE": "8", "HOROVOD_RANK": "5", "HOROVOD_LOCAL_RANK": "1"}, GLOO_LAUNCHER),
    "MPICH in a shell of PALS": ({**PALS, **CRAY_PMI, **HYDRA, "PALS_RANKID": "0"}, "an MPI launcher (PMI)"),
    "Open MPI in a shell of flux": ({**FLUX, "FLUX_JOB_SIZE": "1", **MPIRUN}, "mpirun (Open MPI)"),
}


@pytest.mark.parametrize("case", CASES)
def test_rank_and_size(case: str) -> None:
    environ, launcher = CASES[case]
    found = find_launch(environ)
    assert found is not None and found == known_launch(environ)
    assert (found.launcher, found.size, found.rank, found.local_rank) == (launcher, 8, 5, 1)
    # many batch scripts export these for torch.distributed
    assert known_launch({**environ, "WORLD_SIZE": "8", "RANK": "5", "MASTER_ADDR": "node00"}) == found
    assert not is_first_process(environ)
    assert all(f"{name}={environ[name]}" == word for word in found.told_by for name in [word.partition("=")[0]])


def test_every_row_of_the_table_has_a_case() -> None:
    assert {launcher for _, launcher in CASES.values()} == {row.name for row in LAUNCHERS}


def test_the_place_of_a_rank_names_the_variables_that_tell_it() -> None:
    found = find_launch(HYDRA)
    assert found is not None and found.place == (
        "rank 5 of 8, local rank 1 of 4 (PMI_RANK=5, PMI_SIZE=8, MPI_LOCALRANKID=1, MPI_LOCALNRANKS=4)"
    )
    uneven = find_launch({**SRUN, "SLURM_NODEID": "3", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1"})
    assert uneven is not None and uneven.local_size == 1


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({**HYDRA, "PMI_SIZE": "eight"}, "PMI_SIZE is 'eight', by which mpiexec .MPICH, Hydra. tells a rank its place"),
        (PALS, "PALS_RANKID=5 is set by mpiexec .PALS., but PMI_SIZE and PALS_SIZE are not: the number of ranks is"),
    ],
)
def test_what_cannot_be_read_is_named(environ: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        known_launch(environ)
    assert not is_first_process(environ)


SHELL = {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}  # srun --pty bash


@pytest.mark.parametrize(
    "environ",
    [
        {},
        SBATCH,
        PBS,
        {**SBATCH, "SLURM_STEP_ID": "batch"},
        SHELL,
        {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"},
        {"RANK": "0"},
        {**SBATCH, "WORLD_SIZE": "8", "MASTER_ADDR": "node00"},
    ],
)
def test_a_script_or_shell_is_one_process(environ: dict[str, str]) -> None:
    assert find_launch(environ) is None and known_launch(environ) is None
    assert is_first_process(environ)


BY_TORCHRUN = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "a"}
FOREIGN = {
    "accelerate": ({**BY_TORCHRUN, "ACCELERATE_MIXED_PRECISION": "no"}, "set by accelerate launch"),
    "deepspeed": ({"WORLD_SIZE": "2", "RANK": "1", "CROSS_SIZE": "1", "LOCAL_SIZE": "2"}, "set by deepspeed"),
    "operator": ({"WORLD_SIZE": "2", "RANK": "1"}, "set by a launcher of PyTorch's"),
    "MVAPICH2": ({"MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_SIZE": "2"}, "set by MVAPICH2's launcher"),
    "horovodrun in torchrun": (
        {**BY_TORCHRUN, **MPIRUN},
        "set by torchrun, beside mpirun .* started 8 rank.s.* mpirun alone",
    ),
    "srun, a torchrun for each rank": (
        {**BY_TORCHRUN, **SRUN, "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"},
        "set by torchrun, beside srun, which started 8 rank",
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_launcher_that_is_not_understood_is_named(case: str) -> None:
    environ, said = FOREIGN[case]
    with pytest.raises(UserError, match=said):
        known_launch(environ)
    assert not is_first_process(environ)


NODES = {"GROUP_RANK": "5", "GROUP_WORLD_SIZE": "8"}


@pytest.mark.parametrize("around", [{}, SRUN, SBATCH, {**SRUN, **NODES}, {**PMI_2, **NODES}, {**PALS, **PMI, **NODES}])
def test_torchrun_counts_alone_and_once_on_each_node(around: dict[str, str]) -> None:
    environ = {**around, **BY_TORCHRUN, "LOCAL_WORLD_SIZE": "2"}
    assert known_launch(environ) == Launch(TORCHRUN, 2, 1, 1, 2)
    assert not is_first_process(environ)


def test_ranks_without_mpi_meet_at_the_first_node(tmp_path: Path) -> None:
    launch = Launch("srun", 8, 5)
    nodes = {"n[01-16,20]": "n01", "nid001234": "nid001234", "a1,b2": "a1", "x[3,7]-ib": "x3-ib", "h-[07-09]": "h-07"}
    for text, first in nodes.items():
        address, port = meeting_place(launch, {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": text})
        assert address == first and 20_000 <= port < 30_000
    (tmp_path / "nodes").write_text("p1\np1\np2\n")
    job = {"PBS_JOBID": "7.server", "PBS_NODEFILE": str(tmp_path / "nodes")}
    assert meeting_place(launch, job)[0] == "p1"
    assert meeting_place(launch, job)[1] != meeting_place(launch, {**job, "PBS_JOBID": "8.server"})[1]
    assert meeting_place(launch, {**job, "MASTER_ADDR": "q", "MASTER_PORT": "29500"}) == ("q", 29500)
    here = Launch("mpiexec", 8, 5, 5, 8)
    assert meeting_place(here, {}, 41)[0] == "127.0.0.1" and meeting_place(here, {}, 41) != meeting_place(here, {}, 42)
    for environ, said in (
        ({}, "export MASTER_ADDR=HOST_OF_RANK_0"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT is 'x'"),
        ({"MASTER_ADDR": "q"}, "export MASTER_PORT=FREE_PORT_OF_RANK_0 too"),
    ):
        with pytest.raises(UserError, match=said):
            meeting_place(launch, environ)


NODES_OF_JOB = {"SLURM_JOB_NODELIST": "node[00-02]"}
FIRST = {**SBATCH, **NODES_OF_JOB}
SECOND = {**DAEMON, **NODES_OF_JOB, "SLURM_STEP_NODELIST": "node[01-02]", "PMIX_NAMESPACE": "slurm.pmix.7.0"}


@pytest.mark.parametrize(
    "launcher", [{**MPIRUN, "PMIX_NAMESPACE": "prterun-1"}, HYDRA, {**HYDRA, "I_MPI_HYDRA_UUID": "ed63"}]
)
def test_ranks_of_mpirun_meet_whatever_started_its_daemons(launcher: dict[str, str]) -> None:
    """SLURM's variables of a step are set on the nodes whose daemon srun started, and not on mpirun's own."""
    places = []
    for around, local in ((FIRST, {"PMI_RANK": "0"}), (SECOND, {})):
        environ = {**around, **launcher, **(local if "PMI_RANK" in launcher else {})}
        launch = find_launch(environ)
        assert launch is not None and not launch.launcher.startswith("srun")
        places.append(meeting_place(launch, environ))
    assert places[0] == places[1] and places[0][0] == "node00"


def test_two_launches_of_one_job_meet_at_different_ports() -> None:
    for environ, name in ((SRUN, "SLURM_STEP_ID"), (MPIRUN, "PMIX_NAMESPACE"), ({**FLUX, **PMI}, "FLUX_JOB_ID")):
        launch = find_launch(environ)
        assert launch is not None
        ports = {meeting_place(launch, {**environ, **NODES_OF_JOB, "MASTER_ADDR": "q", name: id_})[1] for id_ in "12"}
        assert len(ports) == 2, name
