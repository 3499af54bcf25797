from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from megdet_hpc.engine.checkpoint import load_checkpoint
from megdet_hpc.log import read_metrics
from tests.conftest import HAS_HOROVOD, Launch
from tests.parallel.test_toy import arguments as toy_arguments
from tests.parallel.test_training import arguments, newest

pytestmark = pytest.mark.parallel


@pytest.mark.parametrize("gradients", ["horovod", "torch", "mpi"])
def test_optimizers_clipping_compression_and_agvm_on_ranks(launch: Launch, gradients: str) -> None:
    done = launch(4, "-m", "tests.parallel.solver", gradients, timeout=120)
    assert done.returncode == 0, done.stderr
    passed = re.findall(r"rank \d+ of \d+ passed", done.stdout)
    assert sorted(passed) == [f"rank {rank} of 4 passed" for rank in range(4)]


@pytest.mark.horovod
def test_gradients_leave_during_or_after_the_backward_pass_with_the_same_bits(launch: Launch) -> None:
    done = launch(2, "-m", "tests.parallel.overlap", timeout=120)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")[:2]) == [f"rank {rank}: 12 steps, same bits" for rank in range(2)]


def test_a_run_says_when_its_gradients_leave_and_ends_with_the_same_bits(
    launch: Launch, shapes: Path, tmp_path: Path
) -> None:
    states = []
    for choice, when in (("auto", "during"), ("false", "after")):
        output = tmp_path / choice
        further = ("--max_steps", "2", "--data.val", "null", "--solver.accumulate", "2", "--solver.overlap", choice)
        # gradients one by one change no bit of two ranks' sums either
        further += ("--deterministic", str(choice == "false").lower())
        done = launch(2, *arguments(shapes, output, *further))
        assert done.returncode == 0, done.stderr
        carrier = "Horovod" if HAS_HOROVOD else "torch.distributed"
        assert f"averaged by {carrier} {when} the backward pass (solver.overlap {choice})" in done.stdout
        states.append(load_checkpoint(newest(output))["model"])
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_two_passes_on_one_rank_equal_two_ranks(launch: Launch, shapes: Path) -> None:
    done = launch(2, "-m", "tests.parallel.accumulation", str(shapes / "train"), timeout=120)
    assert done.returncode == 0, done.stderr
    assert "4 images: losses differ by" in done.stdout


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_run_with_agvm_half_precision_and_fp16_resumes(
    launch: Launch, shapes: Path, tmp_path: Path, precision: str
) -> None:
    extra = ["--solver.agvm", "true", "--solver.precision", precision, "--solver.compression", "fp16"]
    extra += ["--solver.warmup_epochs", "0", "--data.val", "null"]
    first = launch(2, *arguments(shapes, tmp_path / "run", *extra, "--max_steps", "2"))
    assert first.returncode == 0, first.stderr
    file = newest(tmp_path / "run")
    state = load_checkpoint(file)["optimizer"]["state"]
    factors = sorted(entry["agvm_factor"] for entry in state.values() if "agvm_factor" in entry)
    assert len(factors) == 4 and factors[-1] != 1.0 and 1.0 in factors
    # a rank that differed in weights or state would stop the resumed run
    again = launch(2, *arguments(shapes, tmp_path / "run", *extra, "--max_steps", "3", "--resume", "auto"))
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize("gradients", ["horovod", "torch", "mpi"])
def test_a_float16_gradient_of_one_rank_that_overflows_skips_the_update_of_all(
    launch: Launch, shapes: Path, gradients: str
) -> None:
    done = launch(2, "-m", "tests.parallel.overflow", gradients, str(shapes / "train"))
    assert done.returncode == 0, done.stderr
    passed = re.findall(r"rank \d+ of \d+ passed", done.stdout)
    assert sorted(passed) == [f"rank {rank} of 2 passed" for rank in range(2)]


@pytest.mark.parametrize("gradients", ["horovod", "torch", "mpi"])
def test_a_run_resumed_after_a_skipped_update_keeps_its_loss_scale(
    launch: Launch, shapes: Path, tmp_path: Path, gradients: str
) -> None:
    keys = ["--solver.gradients", gradients, "--solver.precision", "float16", "--data.val", "null", "--log_every", "1"]
    output = tmp_path / "run"
    for steps in (2, 3):
        further = toy_arguments(shapes, output, 2, *keys, "--max_steps", str(steps), "--resume", "auto")
        # rank 1's gradient of the second update is infinite
        done = launch(2, "-m", "tests.parallel.faulty", "overflow", "1", "1", *further)
        assert done.returncode == 0, done.stderr
    first, last = (load_checkpoint(file)["loss_scale"] for file in sorted((output / "checkpoints").glob("*.pt")))
    rows = [row for row in read_metrics(output / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3] and [row["skipped_steps"] for row in rows[1:]] == [1, 0]
    before, halved, kept = (row["grad_scale"] for row in rows)
    assert before / 2 == halved == kept == first["scale"] == last["scale"] >= 2.0**13
    assert (first["_growth_tracker"], last["_growth_tracker"]) == (0, 1)
