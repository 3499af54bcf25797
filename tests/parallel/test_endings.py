"""Runs that end early: by signal, by time, by a rank that hangs, by a full disk; with real Horovod over real MPI."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

from megdet_hpc import train
from megdet_hpc.engine.checkpoint import load_checkpoint
from megdet_hpc.log import read_metrics
from tests.conftest import ROOT, Launch, environment, mpirun, ranks_of
from tests.parallel.test_training import arguments, newest

pytestmark = pytest.mark.parallel

UNFINISHED = 75


def start(ranks: int, output: Path, log: Path, *command: str) -> subprocess.Popen[bytes]:
    """A training under mpirun in the background; its output goes to `log`."""
    launcher = [*mpirun(ranks), sys.executable]
    with open(log, "wb") as file:
        return subprocess.Popen([*launcher, *command], cwd=ROOT, env=environment(), stdout=file, stderr=file)


def wait_for_step(launcher: subprocess.Popen[bytes], output: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not any(row["step"] >= step for row in read_metrics(output / "metrics.jsonl")):
        assert launcher.poll() is None, "ended before its first steps"
        assert time.monotonic() < deadline, "no steps"
        time.sleep(0.05)


def end(launcher: subprocess.Popen[bytes]) -> int:
    try:
        return launcher.wait(timeout=180)
    finally:
        launcher.kill()


LONG = ["--solver.epochs", "40", "--log_every", "1"]


def test_usr1_stops_all_ranks_at_one_step_and_the_run_goes_on_as_if_uncut(
    launch: Launch, shapes: Path, tmp_path: Path
) -> None:
    output = tmp_path / "cut"
    keys = [*LONG, "--data.val", "null"]
    launcher = start(2, output, tmp_path / "log", *arguments(shapes, output, *keys))
    wait_for_step(launcher, output, 3)
    ranks_of(launcher)[1].send_signal(signal.SIGUSR1)
    assert end(launcher) == UNFINISHED
    text = (tmp_path / "log").read_text()
    found = re.search(r"stopped after step (\d+) of \d+: SIGUSR1 received by rank 1; the state is saved", text)
    assert found, text
    step = int(found[1])
    assert "Traceback" not in text
    assert load_checkpoint(newest(output))["step"] == step
    more = str(step + 3)
    again = launch(2, *arguments(shapes, output, *keys, "--resume", "auto", "--max_steps", more))
    assert again.returncode == 0, again.stderr
    whole = launch(2, *arguments(shapes, tmp_path / "whole", *keys, "--max_steps", more))
    assert whole.returncode == 0, whole.stderr
    one, other = (load_checkpoint(newest(folder)) for folder in (output, tmp_path / "whole"))
    assert one["step"] == other["step"] == step + 3
    for key, value in one["model"].items():
        assert torch.equal(value, other["model"][key]), key


def test_the_end_of_its_time_stops_a_run(launch: Launch, shapes: Path, tmp_path: Path) -> None:
    output = tmp_path / "timed"
    # the time is over when the first step ends
    done = launch(2, *arguments(shapes, output, *LONG, "--max_minutes", "0.0001"))
    assert done.returncode == UNFINISHED, done.stderr
    assert "stopped after step 1 of" in done.stdout
    assert "max_minutes 0.0001 is near" in done.stdout
    assert load_checkpoint(newest(output))["step"] == 1


def test_an_evaluation_that_was_cut_off_is_made_up_for(
    launch: Launch, shapes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    train.main(arguments(shapes, output, "--max_steps", "2")[2:])
    done = capfd.readouterr().out
    train.main(arguments(shapes, output, "--max_steps", "2", "--resume", "auto")[2:])
    assert "nothing left to do" in capfd.readouterr().out
    rows = read_metrics(output / "metrics.jsonl")
    assert sum("val/AP" in row for row in rows) == 1, "scored again, though nothing had changed"
    log = output / "metrics.jsonl"
    log.write_text("".join(line + "\n" for line in log.read_text().splitlines() if "val/AP" not in line))
    third = launch(1, *arguments(shapes, output, "--max_steps", "2", "--resume", "auto"))
    assert third.returncode == 0, third.stderr
    assert third.stdout.splitlines()[-1] == done.splitlines()[-1]
    assert [row["step"] for row in read_metrics(log) if "val/AP" in row] == [2]


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_a_rank_that_hangs_or_dies_ends_the_job(shapes: Path, tmp_path: Path, how: signal.Signals) -> None:
    output = tmp_path / "hung"
    limit = ["--watchdog_minutes", "0.25"]
    launcher = start(2, output, tmp_path / "log", *arguments(shapes, output, *LONG, *limit))
    wait_for_step(launcher, output, 2)
    ranks_of(launcher)[1].send_signal(how)
    status = end(launcher)
    text = (tmp_path / "log").read_text()
    assert status not in (0, UNFINISHED), text
    if how == signal.SIGSTOP:
        assert re.search(r"rank\(s\) 0 wait after step \d+, in \w+ '[\w.]+' over mpi", text) or (
            "the gradients' allreduce" in text
        ), text
        assert re.search(r"rank 1 on \S+ does not answer", text), text
        assert "stack of rank 0" in text


def test_a_killed_rank_leaves_no_loader_process(shapes: Path, tmp_path: Path) -> None:
    output = tmp_path / "killed"
    command = [sys.executable, *arguments(shapes, output, *LONG, "--data.num_workers", "2")]
    with open(tmp_path / "log", "wb") as log:
        rank = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=log)
    wait_for_step(rank, output, 1)
    others = psutil.Process(rank.pid).children(recursive=True)
    assert len(others) >= 3  # fork server and two workers
    rank.kill()
    rank.wait()
    _, alive = psutil.wait_procs(others, timeout=30)
    assert [process.cmdline() for process in alive] == []


def test_a_rank_that_never_enters_a_collective_is_named_with_its_stack(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.parallel.hanging", str(tmp_path)]
    done = subprocess.run(
        [*mpirun(3), *command],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert "rank(s) 0, 2 wait after step 4, in allreduce_sum_ 'layer3.bn' over mpi" in done.stderr
    assert re.search(r"rank 1 on \S+ did not enter allreduce_sum_ 'layer3.bn' over mpi", done.stderr), done.stderr
    assert "in lose_the_way" in done.stderr


@pytest.mark.horovod
def test_a_rank_that_stands_still_as_gradients_are_sent_leaves_the_watchdog_running(tmp_path: Path) -> None:
    """With groups over Horovod the sender may wait with the interpreter held: then the backstop ends the job.

    Which of Horovod's two meetings of a cycle the stopped rank missed decides that.
    """
    command = [*mpirun(2), sys.executable, "-m", "tests.parallel.stopped", str(tmp_path)]
    run = partial(subprocess.run, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    done = run([*command, "rank"])
    assert done.returncode != 0
    assert re.search(r"rank 1 on \S+ does not answer", done.stderr), done.stderr
    done = run([*command, "groups"])
    assert done.returncode != 0
    held = "a call has held the interpreter for 18 s" in done.stderr and "allreduce_async_" in done.stderr
    assert held or re.search(r"rank 1 on \S+ does not answer", done.stderr), done.stderr


def test_a_launcher_that_does_not_answer_cannot_keep_a_rank_that_aborts(tmp_path: Path) -> None:
    command = [*mpirun(2), sys.executable, "-m", "tests.parallel.stopped", str(tmp_path)]
    launcher = subprocess.Popen([*command, "launcher"], cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "pid").exists():
            assert time.monotonic() < deadline, "not started"
            time.sleep(0.1)
        rank = psutil.Process(int((tmp_path / "pid").read_text()))
        while rank.status() != psutil.STATUS_ZOMBIE:  # a launcher that stands still does not collect its processes
            assert time.monotonic() < deadline, "the rank waits for its launcher"
            time.sleep(0.1)
    finally:
        if (tmp_path / "parent").exists():
            os.kill(int((tmp_path / "parent").read_text()), signal.SIGCONT)
        assert launcher.wait(timeout=60) != 0


def test_a_full_disk_at_a_checkpoint_ends_the_job_and_keeps_the_one_before(shapes: Path, tmp_path: Path) -> None:
    output = tmp_path / "full"
    train.main(arguments(shapes, output, "--max_steps", "2", "--data.val", "null")[2:])
    before = newest(output).read_bytes()
    limit = len(before) // 2
    done = subprocess.run(
        [sys.executable, *arguments(shapes, output, "--max_steps", "3", "--data.val", "null", "--resume", "auto")],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=180,
        preexec_fn=lambda: (
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        ),
    )
    assert done.returncode not in (0, UNFINISHED)
    assert "step_00000003.pt: cannot be written" in done.stderr, done.stderr
    assert newest(output).read_bytes() == before
    assert os.listdir(output / "checkpoints") == [newest(output).name]
