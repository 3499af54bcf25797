"""Rank and size from what each launcher sets in the environment."""

from __future__ import annotations

import pytest

from megdet_hpc.errors import UserError
from megdet_hpc.parallel.launch import GLOO_LAUNCHER, Launch, find_launch, is_first_process, known_launch

# A batch script of SLURM has these, and so have the launchers that it starts.
SBATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_NODELIST": "node[00-01]"}
SRUN = {**SBATCH, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}
PBS = {"PBS_JOBID": "7.server", "PBS_NODEFILE": "/var/spool/pbs/aux/7.server", "PBS_TASKNUM": "1"}
MPIRUN = {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}

CASES = {
    "Open MPI": (MPIRUN, "mpirun (Open MPI)"),
    "Open MPI 5, whose daemon is PMIx": ({**MPIRUN, "PMIX_RANK": "5"}, "mpirun (Open MPI)"),
    "Open MPI in a SLURM batch script": ({**SBATCH, **MPIRUN}, "mpirun (Open MPI)"),
    "Open MPI in a PBS job": ({**PBS, **MPIRUN}, "mpirun (Open MPI)"),
    "srun --mpi=pmix": ({**SRUN, "PMIX_RANK": "5", "PMIX_NAMESPACE": "slurm.pmix.7.0"}, "srun"),
    "srun --mpi=none": (SRUN, "srun"),
    "srun --mpi=pmi2": ({**SRUN, "PMI_RANK": "5", "PMI_SIZE": "8"}, "an MPI launcher (PMI)"),
    "MPICH's mpiexec in a PBS job": ({**PBS, "PMI_RANK": "5", "PMI_SIZE": "8"}, "an MPI launcher (PMI)"),
    "horovodrun --gloo": ({"HOROVOD_SIZE": "8", "HOROVOD_RANK": "5", "HOROVOD_LOCAL_RANK": "1"}, GLOO_LAUNCHER),
}


@pytest.mark.parametrize("case", CASES)
def test_rank_and_size(case: str) -> None:
    environ, launcher = CASES[case]
    assert find_launch(environ) == known_launch(environ) == Launch(launcher, 8, 5)
    # many batch scripts export these for torch.distributed
    assert known_launch({**environ, "WORLD_SIZE": "8", "RANK": "5", "MASTER_ADDR": "node00"}) == find_launch(environ)
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


TORCHRUN = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "a"}
FOREIGN = {
    "torchrun": (
        TORCHRUN,
        "WORLD_SIZE=2 and RANK=1 are set by torchrun, which does not start MPI; use horovodrun -np 2",
    ),
    "one process": (
        {**TORCHRUN, "WORLD_SIZE": "1", "RANK": "0"},
        "set by torchrun, .* or plain python for one process",
    ),
    "accelerate": ({**TORCHRUN, "ACCELERATE_MIXED_PRECISION": "no"}, "set by accelerate launch"),
    "deepspeed": ({"WORLD_SIZE": "2", "RANK": "1", "CROSS_SIZE": "1", "LOCAL_SIZE": "2"}, "set by deepspeed"),
    "operator": ({"WORLD_SIZE": "2", "RANK": "1"}, "set by a launcher of PyTorch's"),
    "PALS": ({"PALS_RANKID": "1", "PALS_LOCAL_RANKID": "1"}, "PALS_RANKID=1 is set by mpiexec .Cray PALS., which this"),
    "flux": ({"FLUX_TASK_RANK": "1", "FLUX_JOB_SIZE": "2"}, "FLUX_JOB_SIZE=2 and FLUX_TASK_RANK=1 are set by flux run"),
    "jsrun": ({"JSM_NAMESPACE_RANK": "1", "JSM_NAMESPACE_SIZE": "2"}, "set by jsrun"),
    "MVAPICH2": ({"MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_SIZE": "2"}, "set by MVAPICH2's launcher"),
    "horovodrun in torchrun": (
        {**TORCHRUN, **MPIRUN},
        "set by torchrun, beside mpirun .* started 8 rank.s.* mpirun alone",
    ),
    "srun torchrun": ({**TORCHRUN, **SRUN}, "set by torchrun, beside srun"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_launcher_that_is_not_understood_is_named(case: str) -> None:
    environ, said = FOREIGN[case]
    with pytest.raises(UserError, match=said):
        known_launch(environ)
    assert is_first_process(environ) == (case == "one process")
