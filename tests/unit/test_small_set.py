"""The configuration of small sets: a length that follows the number of images, and evaluations spread over it."""

from __future__ import annotations

import re

import numpy as np
import pytest

from megdet_hpc.command_line import config_parser, parse_config
from megdet_hpc.config import Config, SolverConfig
from megdet_hpc.engine.training import period_ends
from megdet_hpc.errors import UserError
from megdet_hpc.plan.__main__ import main as plan
from megdet_hpc.solver.run_plan import RunPlan


def small_set(*arguments: str) -> Config:
    return parse_config(config_parser("test", ""), ["--config", "small_set", *arguments])[0]


@pytest.mark.parametrize(("images", "epochs"), [(50, 64), (131, 24.4), (266, 12), (267, 12), (2000, 12)])
def test_the_length_follows_the_number_of_images(
    images: int, epochs: float, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunPlan.of(small_set(), 1, np.zeros(images, np.bool_))
    assert run.total_steps == max(1600, 12 * run.epoch.steps_per_epoch)
    assert run.total_steps / run.epoch.steps_per_epoch == pytest.approx(epochs, abs=0.5)
    assert run.schedule.lr_at(run.total_steps - 1) < 1e-4 < run.schedule.peak_lr == 0.01
    plan(["--config", "small_set", "--ranks", "1", "--images", str(images)])
    said = capsys.readouterr()
    steps = next(line for line in said.out.splitlines() if line.startswith("steps"))
    assert re.search(r"; (\d+) in all", steps)[1] == str(run.total_steps)  # type: ignore[index]
    assert ("by solver.least_iterations 1600 of 2 images; solver.epochs 12 alone" in said.out) == (images <= 266)
    assert "warning" not in said.err


def test_the_plan_names_what_the_length_would_come_from(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", "small_set", "--ranks", "1", "--images", "50", "--solver.iterations", "1000"]
    plan([*arguments, "--solver.least_iterations", "5000"])
    assert "5000 of 2 images; solver.iterations 1000 alone would be 1000 steps" in capsys.readouterr().out


def test_evaluations_are_spread_over_the_run() -> None:
    run = RunPlan.of(small_set(), 1, np.zeros(60, np.bool_))
    total, times = run.schedule.total_steps, small_set().evaluation.times
    assert times == 8
    due = [step for step in range(1, total + 1) if period_ends(step - 1, step, total / times)]
    assert due == [200, 400, 600, 800, 1000, 1200, 1400, 1600]


def test_a_least_length_needs_a_schedule_without_drops() -> None:
    with pytest.raises(
        UserError, match=r"solver.least_iterations is 5\.0; accepted: null, except with solver.policy cos"
    ):
        Config(solver=SolverConfig(least_iterations=5.0))
