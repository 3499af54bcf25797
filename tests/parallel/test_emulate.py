"""One process that emulates K ranks against the K real ranks, over real MPI."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from megdet_hpc.engine.checkpoint import load_checkpoint
from megdet_hpc.log import read_metrics
from tests.conftest import Launch
from tests.parallel.test_training import arguments, newest

pytestmark = pytest.mark.parallel


@pytest.mark.parametrize(("ranks", "size"), [(2, 0), (2, 2), (4, 4), (4, 0)])
def test_an_emulated_step_equals_the_real_ranks(launch: Launch, shapes: Path, ranks: int, size: int) -> None:
    options = ["--norm.size", str(size), "--data.images_per_rank", "2"]
    done = launch(ranks, "-m", "tests.parallel.emulation", str(shapes / "train"), *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"BN group\(s\) of \d rank\(s\) = \d images each: losses differ by", done.stdout)


@pytest.mark.parametrize("options", [["--norm.size", "2"], ["--norm.kind", "bn"]])
def test_the_first_steps_of_an_emulated_run(launch: Launch, shapes: Path, tmp_path: Path, options: list[str]) -> None:
    """The whole program: order of the images, losses and running statistics; float32 sums in another order."""
    further = [*options, "--max_steps", "2", "--log_every", "1", "--data.short_sides", "[64, 96]"]
    further += ["--solver.noise_every", "1"]
    real = launch(2, *arguments(shapes, tmp_path / "real", *further))
    assert real.returncode == 0, real.stderr
    emulated = launch(0, *arguments(shapes, tmp_path / "emulated", *further, "--emulate.ranks", "2"))
    assert emulated.returncode == 0, emulated.stderr
    assert "emulates 2 ranks" in emulated.stdout
    names = ("real", "emulated")
    rows = [[row for row in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in row] for name in names]
    for one, other in zip(*rows, strict=True):
        for key in (key for key in one if key.startswith(("loss", "gradient_norm", "lr"))):
            assert one[key] == pytest.approx(other[key], rel=1e-4), (key, one["step"])
        for key in ("gradient_signal", "gradient_variance_per_image"):  # differences of nearly equal numbers
            assert one[key] == pytest.approx(other[key], rel=1e-2), (key, one["step"])
    states = [load_checkpoint(newest(tmp_path / name)) for name in names]
    assert states[0]["step"] == states[1]["step"] == 2
    assert states[0]["plan"] == states[1]["plan"]
    for key, value in states[0]["model"].items():
        torch.testing.assert_close(value, states[1]["model"][key], rtol=1e-3, atol=1e-5)


def test_a_real_run_continues_an_emulated_one(launch: Launch, shapes: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    done = launch(0, *arguments(shapes, output, "--emulate.ranks", "2", "--max_steps", "2"))
    assert done.returncode == 0, done.stderr
    more = launch(2, *arguments(shapes, output, "--resume", "auto", "--max_steps", "3"))
    assert more.returncode == 0, more.stderr
    assert load_checkpoint(newest(output))["step"] == 3


def test_real_ranks_do_not_emulate(launch: Launch, shapes: Path, tmp_path: Path) -> None:
    done = launch(2, *arguments(shapes, tmp_path / "run", "--emulate.ranks", "4"))
    assert done.returncode != 0
    assert "emulate.ranks 4: 2 ranks were started; emulate in a single process" in done.stderr
