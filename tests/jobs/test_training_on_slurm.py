"""A real training of 2 nodes x 1 rank on a real SLURM: signalled or a rank killed, requeued, finished, same bits."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from megdet_hpc.engine.checkpoint import checkpoint_files, load_checkpoint
from megdet_hpc.log import read_metrics
from megdet_hpc.parallel.launch import find_launch
from tests.conftest import ROOT, Launch, environment, run
from tests.jobs.conftest import log_of
from tests.jobs.slurm import Slurm
from tests.parallel.test_training import SMALL, arguments

pytestmark = pytest.mark.parallel

LONGER = ["--solver.epochs", "6", "--checkpoints.every_epochs", "1"]
LIMIT = 150.0


@pytest.fixture(scope="module")
def whole(launch: Launch, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The newest checkpoint of the same run, uncut and without SLURM."""
    output = tmp_path_factory.mktemp("whole") / "run"
    done = launch(2, *arguments(shapes, output, *LONGER))
    assert done.returncode == 0, done.stderr
    return checkpoint_files(output / "checkpoints")[-1]


def start(
    cluster: Slurm,
    shapes: Path,
    folder: Path,
    preflight: str = "0",
    *options: str,
    launcher: str = "mpirun",
    **further: str,
) -> tuple[str, Path]:
    """Submit the 128-GPU script for 2 ranks, with further settings; the job's id and the run's folder."""
    settings = {key: value for key, value in environment().items() if key.startswith("OMPI_")}
    settings |= {"VENV": str(Path(sys.executable).parent.parent), "MEGDET_ROOT": str(ROOT), "MEGDET_SCRATCH": "/tmp"}
    settings |= {"MEGDET_DATA": str(shapes), "MEGDET_RUNS": str(folder), "MEGDET_PREFLIGHT": preflight}
    settings |= {"MEGDET_LAUNCHER": launcher, "MEGDET_LEAVE_SECONDS": "5", **further}
    shape = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"]
    trained = [str(ROOT / "jobs/megdet_128gpu.sh"), *SMALL, *LONGER, *options]
    job_id = cluster.submit(*shape, f"--output={folder}/log", *trained, **settings)
    return job_id, folder / f"megdet_128gpu-{job_id}"


def wait_for_checkpoint(cluster: Slurm, job_id: str, output: Path) -> int:
    """Wait until the run has trained an epoch; the step of its checkpoint."""
    until = time.monotonic() + LIMIT
    while not (files := checkpoint_files(output / "checkpoints")):
        job = cluster.job(job_id)
        assert job["JobState"] != "FAILED" and time.monotonic() < until, log_of(job)
        time.sleep(0.1)
    return int(files[-1].stem.split("_")[1])


def rank_process(output: Path, rank: int) -> int:
    """The process id of a rank of the run."""
    for number, (process, _) in rank_processes(output).items():
        if number == rank:
            return process
    raise AssertionError(f"no process of rank {rank} of {output}")


def rank_processes(output: Path) -> dict[int, tuple[int, str]]:
    """By rank of the run, its process id and its node, whatever launcher started it."""
    found: dict[int, tuple[int, str]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        # torchrun itself has the run's words too
        if not {str(output).encode(), b"megdet_hpc.train"} <= set(words) or b"torch.distributed.run" in words:
            continue
        environ = dict(line.decode(errors="replace").partition("=")[::2] for line in variables if b"=" in line)
        # the launchers themselves, such as mpirun and srun, have no rank
        if launch := find_launch(environ):
            found[launch.rank] = int(folder.name), environ.get("SLURMD_NODENAME", "")
    return found


def check_finished(cluster: Slurm, job_id: str, output: Path, whole: Path, restarts: tuple[str, ...] = ("1",)) -> str:
    """The job was requeued, once unless more is accepted, and ended with the uncut run's bits; its log."""
    job = cluster.wait(job_id, "COMPLETED", "FAILED", "CANCELLED", timeout=LIMIT)
    log = log_of(job)
    assert job["JobState"] == "COMPLETED" and job["Restarts"] in restarts, log
    ours, theirs = load_checkpoint(checkpoint_files(output / "checkpoints")[-1]), load_checkpoint(whole)
    assert ours["step"] == theirs["step"]
    for key, value in theirs["model"].items():
        assert torch.equal(value, ours["model"][key]), key
    for key, value in theirs["optimizer"]["state"].items():
        assert torch.equal(value["momentum_buffer"], ours["optimizer"]["state"][key]["momentum_buffer"]), key
    steps = [row["step"] for row in read_metrics(output / "metrics.jsonl") if "loss" in row]
    assert len(steps) == len(set(steps))
    return log


@pytest.mark.timeout(400)
@pytest.mark.parametrize("launcher", ["mpirun", "srun"])
def test_signalled_in_the_middle_it_ends_with_the_same_bits(
    cluster: Slurm, shapes: Path, whole: Path, tmp_path: Path, launcher: str
) -> None:
    job_id, output = start(cluster, shapes, tmp_path, preflight="1", launcher=launcher)
    wait_for_checkpoint(cluster, job_id, output)
    assert cluster.run("scancel", "--batch", "--signal=USR1", job_id).returncode == 0
    log = check_finished(cluster, job_id, output, whole)
    assert "status 75: stopped early, state saved at step" in log
    assert "preflight" in log.lower()
    assert "attempt 1 of 3 from step" in log.split("requeuing", 1)[1]


@pytest.mark.timeout(400)
@pytest.mark.parametrize("launcher", ["mpirun", "srun"])
@pytest.mark.parametrize("wrong", [("--norm.size", "3"), ("--solver.base_lr", "-1")])
def test_bad_input_is_not_requeued(
    cluster: Slurm, shapes: Path, tmp_path: Path, launcher: str, wrong: tuple[str, str]
) -> None:
    """Once found by all ranks together, once by each before they meet; srun itself may return a signal's status."""
    job_id, _ = start(cluster, shapes, tmp_path, "0", *wrong, launcher=launcher)
    job = cluster.wait(job_id, "COMPLETED", "FAILED", "CANCELLED", timeout=LIMIT)
    assert (job["JobState"], job["Restarts"], job["ExitCode"]) == ("FAILED", "0", "2:0"), log_of(job)
    assert "not submitted again" in log_of(job)


@pytest.mark.timeout(400)
def test_with_a_rank_killed_it_resumes_and_ends_with_the_same_bits(
    cluster: Slurm, shapes: Path, whole: Path, tmp_path: Path
) -> None:
    job_id, output = start(cluster, shapes, tmp_path)
    saved = wait_for_checkpoint(cluster, job_id, output)
    os.kill(rank_process(output, 1), signal.SIGKILL)
    log = check_finished(cluster, job_id, output, whole)
    assert "failed; newest checkpoint is of step" in log
    assert saved > 0


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.timeout(900)
def test_torchrun_by_srun_with_a_rank_killed_resumes_and_ends_with_the_same_bits(
    cluster: Slurm, shapes: Path, tmp_path: Path
) -> None:
    """The way of a site without MPI: no Horovod and no mpi4py take part; srun's own PMI is not used."""
    keys = [*LONGER, "--solver.gradients", "torch"]
    done = run([*TORCHRUN, *arguments(shapes, tmp_path / "whole", *keys)], timeout=600)
    assert done.returncode == 0, done.stderr
    options = {"launcher": "torchrun", "MEGDET_SRUN_OPTIONS": "--mpi=pmi2"}
    job_id, output = start(cluster, shapes, tmp_path, "0", *keys, **options)
    wait_for_checkpoint(cluster, job_id, output)
    os.kill(rank_process(output, 1), signal.SIGKILL)
    log = check_finished(cluster, job_id, output, checkpoint_files(tmp_path / "whole" / "checkpoints")[-1])
    assert "2 rank(s) on 2 host(s), torch.distributed without MPI, started by torchrun" in log
    assert "failed; newest checkpoint is of step" in log


@pytest.mark.timeout(400)
def test_bad_input_under_torchrun_is_not_requeued(cluster: Slurm, shapes: Path, tmp_path: Path) -> None:
    """torchrun returns 1 whatever its ranks returned; the script has the rank's own status."""
    options = {"launcher": "torchrun", "MEGDET_SRUN_OPTIONS": "--mpi=none"}
    job_id, _ = start(cluster, shapes, tmp_path, "0", "--norm.size", "3", **options)
    job = cluster.wait(job_id, "COMPLETED", "FAILED", "CANCELLED", timeout=LIMIT)
    assert (job["JobState"], job["Restarts"], job["ExitCode"]) == ("FAILED", "0", "2:0"), log_of(job)
    assert "not submitted again" in log_of(job)


@pytest.mark.timeout(400)
def test_with_a_node_gone_it_resumes_and_ends_with_the_same_bits(
    cluster: Slurm, shapes: Path, whole: Path, tmp_path: Path
) -> None:
    job_id, output = start(cluster, shapes, tmp_path)
    wait_for_checkpoint(cluster, job_id, output)
    job = cluster.job(job_id)
    nodes = cluster.run("scontrol", "show", "hostnames", job["NodeList"]).stdout.split()
    # the script runs on the first; where that is lost SLURM itself requeues, once it has noticed
    cluster.crash_node(next(node for node in nodes if node != job["BatchHost"]))
    # an attempt may still fall on the node before SLURM knows that it is down
    log = check_finished(cluster, job_id, output, whole, restarts=("1", "2"))
    assert "failed; newest checkpoint is of step" in log
