"""Rank and size from what each launcher sets in the environment."""

from __future__ import annotations

import pytest

from megdet_hpc.parallel.launch import GLOO_LAUNCHER, Launch, find_launch, is_first_process

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
    assert find_launch(environ) == Launch(launcher, 8, 5)
    assert not is_first_process(environ)


SHELL = {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}  # srun --pty bash


@pytest.mark.parametrize("environ", [{}, SBATCH, PBS, {**SBATCH, "SLURM_STEP_ID": "batch"}, SHELL])
def test_a_script_or_shell_is_one_process(environ: dict[str, str]) -> None:
    assert find_launch(environ) is None
    assert is_first_process(environ)
