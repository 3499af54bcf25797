"""jobs/*.sh on a real SLURM: directives, the 128 ranks, signals, requeues, failures; with light programs."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path

import pytest

from megdet_hpc.submit import main as submit_job
from tests.conftest import SHELL_LOCAL_RANK, SHELL_RANK, SHELL_SIZE, environment, has_open_mpi, mpirun
from tests.jobs.conftest import JOBS, log_of, set_program
from tests.jobs.slurm import GPUS_PER_NODE, NODES, NUM_NODES, Slurm

pytestmark = pytest.mark.parallel

ALLOW_ROOT = {key: value for key, value in environment().items() if key.startswith("OMPI_ALLOW")}
SMALL = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")

# What a rank of megdet_hpc.train does as far as jobs see it: on USR1 it saves, says so and ends with 75; it goes on
# from the newest checkpoint. It writes its own rank's number of starts into the run's folder.
RANK = r"""
while (($#)); do case $1 in --output) output=$2 ;; esac; shift; done
rank=SHELL_RANK
save() { mkdir -p "$output/checkpoints"; ((rank)) || : >"$output/checkpoints/step_$1.pt"; }
trap 'echo "rank $rank got USR1"; save 00000010; echo 75 >"$MEGDET_STATUS_FILE"; sleep 0.3; exit 75' USR1
echo x >>"$output/starts.$rank"
starts=$(wc -l <"$output/starts.$rank")
""".replace("SHELL_RANK", SHELL_RANK)


def submit(cluster: Slurm, checkout: Path, *arguments: str, **variables: str) -> str:
    """sbatch from outside the checkout, as root, without the preflight."""
    fixed = {"VENV": "", "MEGDET_PREFLIGHT": "0", "MEGDET_SCRATCH": "/tmp", "MEGDET_ROOT": ""}
    settings = {**ALLOW_ROOT, **fixed, **variables}
    script = str(checkout / "jobs" / "megdet_128gpu.sh")
    return cluster.submit(*arguments, f"--output={checkout}/%x-%j.out", script, **settings)


def wait_for(file: Path, timeout: float = 60) -> None:
    until = time.monotonic() + timeout
    while not file.exists():
        assert time.monotonic() < until, f"no {file}"
        time.sleep(0.05)


@pytest.mark.parametrize("script", sorted(path.name for path in JOBS.glob("*.sh") if "#SBATCH" in path.read_text()))
def test_slurm_accepts_the_directives(cluster: Slurm, script: str) -> None:
    shown = cluster.run("sbatch", "--test-only", str(JOBS / script))
    assert shown.returncode == 0, shown.stderr
    assert "to start at" in shown.stderr


@pytest.mark.parametrize("request_of_gpus", ["--gres=gpu:{n}", "--gpus-per-task=1", "--gpus-per-node={n}", ""])
def test_slurm_accepts_what_submit_renders(
    cluster: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str], request_of_gpus: str
) -> None:
    site = tmp_path / "site.yaml"
    site.write_text(f"queue: gpu\nconstraint: a100&hbm80g\ncores_per_node: 40\ngpu_request: '{request_of_gpus}'\n")
    words = ["--scheduler", "slurm", "--config", "megdet_r50_fpn_256", "--ranks", "128", "--walltime", "8:00"]
    submit_job([*words, "--profile", str(site), "--dry-run"])
    script = tmp_path / "job.sh"
    script.write_text(capsys.readouterr().out)
    shown = cluster.run("sbatch", "--test-only", str(script))
    assert shown.returncode == 0 and "to start at" in shown.stderr, shown.stderr
    site.write_text("constraint: h100\n")
    submit_job([*words, "--profile", str(site), "--dry-run"])
    script.write_text(capsys.readouterr().out)
    refused = cluster.run("sbatch", "--test-only", str(script))
    assert refused.returncode != 0 and "feature" in refused.stderr.lower(), refused.stderr


def test_slurm_refuses_a_node_more_than_there_is(cluster: Slurm) -> None:
    refused = cluster.run("sbatch", "--test-only", "--nodes=17", str(JOBS / "megdet_128gpu.sh"))
    assert refused.returncode != 0
    assert "not available" in refused.stderr


@pytest.mark.parametrize("launcher", ["mpirun", "srun"])
def test_all_128_ranks_have_their_place_and_gpus(cluster: Slurm, checkout: Path, launcher: str) -> None:
    record = f"""
    while (($#)); do case $1 in --output) output=$2 ;; esac; shift; done
    mkdir -p "$output/ranks"
    printf '%s ' "{SHELL_LOCAL_RANK}" "$(hostname)" "$CUDA_VISIBLE_DEVICES" "{SHELL_SIZE}" "$OMP_NUM_THREADS" \\
        >"$output/ranks/{SHELL_RANK}"
    """
    set_program(checkout, record)
    job = cluster.wait(
        submit(cluster, checkout, MEGDET_LAUNCHER=launcher, OMP_NUM_THREADS="40"), "COMPLETED", "FAILED", timeout=120
    )
    log = log_of(job)
    assert job["JobState"] == "COMPLETED", log
    assert "128 ranks, 8 per node on node[01-16]" in log
    ranks = {int(path.name): path.read_text().split() for path in checkout.glob("runs/*/ranks/*")}
    assert sorted(ranks) == list(range(NUM_NODES * GPUS_PER_NODE))
    for rank, found in ranks.items():
        assert found == [str(rank % 8), NODES[rank // 8], "0,1,2,3,4,5,6,7", "128", "1"], rank


@pytest.mark.parametrize("launcher", ["mpirun", "srun"])
def test_a_signalled_run_is_requeued_and_finishes_in_its_folder(cluster: Slurm, checkout: Path, launcher: str) -> None:
    set_program(checkout, RANK + '((starts > 1)) && exit 0\n: >"$output/up.$rank"\nwhile :; do sleep 0.1; done')
    job_id = submit(cluster, checkout, *SMALL, MEGDET_LAUNCHER=launcher)
    output = checkout / "runs" / f"megdet_128gpu-{job_id}"
    for rank in (0, 1):
        wait_for(output / f"up.{rank}")
    assert cluster.run("scancel", "--batch", "--signal=USR1", job_id).returncode == 0
    job = cluster.wait(job_id, "COMPLETED", "FAILED", timeout=90)
    log = log_of(job)
    assert job["JobState"] == "COMPLETED", log
    assert job["Restarts"] == "1"
    for rank in (0, 1):
        assert f"rank {rank} got USR1" in log
        assert (output / f"starts.{rank}").read_text() == "x\nx\n"
    assert "stopped early, state saved at step 10" in log
    assert "attempt 1 of 3 from step 10" in log


@pytest.mark.skipif(not has_open_mpi(), reason="it is about PMIx, which Open MPI takes under srun; here is another MPI")
@pytest.mark.parametrize("launcher", ["srun"])
def test_what_a_lost_node_has_left_of_an_earlier_step_is_passed_over(
    cluster: Slurm, checkout: Path, launcher: str
) -> None:
    """A requeued job counts its steps from 0 again, and PMIx refuses a step whose sockets are there already."""
    meet = 'until (($(wc -l <"$output/starts.1") > 1)); do sleep 0.1; done; exit 0'
    set_program(checkout, RANK + f'((starts > 1)) && {{ {meet}; }}\n: >"$output/up.$rank"\nwhile :; do sleep 0.1; done')
    job_id = submit(cluster, checkout, *SMALL, MEGDET_LAUNCHER=launcher)
    output = checkout / "runs" / f"megdet_128gpu-{job_id}"
    for rank in (0, 1):
        wait_for(output / f"up.{rank}")
    job = cluster.job(job_id)
    node = cluster.run("scontrol", "show", "hostnames", job["NodeList"]).stdout.split()[1]
    cluster.run("scancel", "--batch", "--signal=USR1", job_id)
    cluster.wait(job_id, "PENDING", timeout=90)
    with socket.socket(socket.AF_UNIX) as left:
        path = cluster.folder / "spool" / node / f"stepd.slurm.pmix.{job_id}.0"
        while path.exists():  # the node is still at the end of the step
            time.sleep(0.02)
        left.bind(str(path))
    job = cluster.wait(job_id, "COMPLETED", "FAILED", timeout=90)
    log = log_of(job)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), log
    assert "launch failed" in log
    assert "in a job that was requeued: launched again, as another step" in log
    assert (output / "starts.1").read_text() == "x\nx\n"


def test_a_launcher_that_starts_no_rank_and_returns_0_has_failed(cluster: Slurm, checkout: Path) -> None:
    """srun has done so; the run would have counted as finished."""
    launcher = checkout / "bin" / "srun"
    launcher.parent.mkdir()
    launcher.write_text("#!/bin/bash\n", encoding="utf-8")
    launcher.chmod(0o755)
    variables = {"MEGDET_LAUNCHER": "srun", "MEGDET_RESUBMIT": "0", "PATH": f"{launcher.parent}:{os.environ['PATH']}"}
    job = cluster.wait(submit(cluster, checkout, *SMALL, **variables), "COMPLETED", "FAILED", timeout=90)
    log = log_of(job)
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "1:0"), log
    assert "srun returned 0, but no rank of the training has reported" in log
    assert "finished" not in log


def test_a_signal_during_the_preflight_ends_it_and_starts_no_training(cluster: Slurm, checkout: Path) -> None:
    # the first preflight lasts; that of the next attempt does not
    first = '[[ " $* " == *" --preflight "* && ! -e $output.checking ]]'
    check = first + ' && { : >"$output.checking"; sleep 60; exit 0; }; exit 0'
    set_program(checkout, 'for word in "$@"; do [[ $last != --output ]] || output=$word; last=$word; done; ' + check)
    job_id = submit(cluster, checkout, *SMALL, MEGDET_PREFLIGHT="1")
    wait_for(checkout / "runs" / f"megdet_128gpu-{job_id}.checking")
    assert cluster.run("scancel", "--batch", "--signal=USR1", job_id).returncode == 0
    job = cluster.wait(job_id, "COMPLETED", "FAILED", timeout=90)
    log = log_of(job)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), log
    assert log.index("stop requested") < log.index("status 75: stopped early") < log.index("attempt 2 of 3 from step 0")


def test_a_run_that_does_not_stop_when_told_is_ended_and_requeued(cluster: Slurm, checkout: Path) -> None:
    """A rank that hangs would let the time limit end the script too, and nobody would requeue the job."""
    hang = 'trap "" USR1\n((starts > 1)) && exit 0\n: >"$output/up.$rank"\nwhile :; do sleep 0.1; done'
    set_program(checkout, RANK + hang)
    job_id = submit(cluster, checkout, *SMALL, MEGDET_STOP_SECONDS="2")
    for rank in (0, 1):
        wait_for(checkout / "runs" / f"megdet_128gpu-{job_id}" / f"up.{rank}")
    assert cluster.run("scancel", "--batch", "--signal=USR1", job_id).returncode == 0
    job = cluster.wait(job_id, "COMPLETED", "FAILED", timeout=90)
    log = log_of(job)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), log
    assert "has not stopped in 2 s: ended" in log


def test_crashes_without_progress_end_at_the_limit(cluster: Slurm, checkout: Path) -> None:
    set_program(checkout, RANK + "((rank)) || kill -KILL $$\nsleep 30")
    job_id = submit(cluster, checkout, *SMALL, MEGDET_MAX_FAILURES="2")
    job = cluster.wait(job_id, "COMPLETED", "FAILED", timeout=90)
    log = log_of(job)
    assert (job["JobState"], job["Restarts"]) == ("FAILED", "1"), log
    assert "2 attempts in a row ended at step 0: not submitted again" in log


def test_a_crash_after_progress_does_not_count(cluster: Slurm, checkout: Path) -> None:
    set_program(checkout, RANK + "((starts > 1)) || { save 00000005; sleep 0.5; exit 1; }")
    job = cluster.wait(submit(cluster, checkout, *SMALL, MEGDET_MAX_FAILURES="1"), "COMPLETED", "FAILED", timeout=90)
    log = log_of(job)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), log
    assert "failed; newest checkpoint is of step 5" in log


@pytest.mark.parametrize("launcher", ["mpirun", "srun"])
def test_ranks_that_do_not_meet_are_ended_and_requeued(cluster: Slurm, checkout: Path, launcher: str) -> None:
    set_program(checkout, RANK + "((starts > 1)) || sleep 1000")
    job_id = submit(cluster, checkout, *SMALL, MEGDET_LAUNCH_SECONDS="3", MEGDET_LAUNCHER=launcher)
    job = cluster.wait(job_id, "COMPLETED", "FAILED", timeout=90)
    log = log_of(job)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), log
    program = Path(mpirun()[0]).name if launcher == "mpirun" else launcher  # Hydra's is mpiexec
    assert f"no rank reported within 3 s of the training's launch: {program} does not reach a node" in log
    assert "status 1: failed; newest checkpoint is of step 0" in log


def test_bad_input_is_not_requeued(cluster: Slurm, checkout: Path) -> None:
    set_program(checkout, "exit 2")
    job = cluster.wait(submit(cluster, checkout, *SMALL), "COMPLETED", "FAILED", timeout=60)
    assert (job["JobState"], job["Restarts"], job["ExitCode"]) == ("FAILED", "0", "2:0")
    assert "not submitted again" in log_of(job)


def test_a_cancelled_run_stays_cancelled(cluster: Slurm, checkout: Path) -> None:
    set_program(checkout, RANK + ': >"$output/up.$rank"\nwhile :; do sleep 0.1; done')
    job_id = submit(cluster, checkout, *SMALL)
    wait_for(checkout / "runs" / f"megdet_128gpu-{job_id}" / "up.0")
    cluster.run("scancel", job_id)
    cluster.wait(job_id, "CANCELLED", timeout=30)
    until = time.monotonic() + 4
    while time.monotonic() < until:
        assert cluster.job(job_id)["JobState"] == "CANCELLED"
        time.sleep(0.5)


def test_a_step_of_one_task_is_no_launch(cluster: Slurm, tmp_path: Path) -> None:
    """In `srun --pty bash` MPI, which was not built for SLURM, would refuse to start."""
    program = "from megdet_hpc.parallel.start import started\nwith started() as r: print(r.world.size, r.description)"
    done = cluster.run("srun", "--ntasks=1", "--chdir", str(JOBS.parent), sys.executable, "-c", program)
    assert done.returncode == 0 and done.stdout == "1 1 process, without Horovod\n", done.stderr
