"""AdaScale: the gain at its limits and by hand, its averages, and a run that it ends and that goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from megdet_hpc.config import Config, DataConfig, EmulateConfig, FasterRcnnConfig, SolverConfig
from megdet_hpc.engine.build import build_training
from megdet_hpc.engine.loop import train
from megdet_hpc.engine.stop import StopRequests
from megdet_hpc.engine.training import Training
from megdet_hpc.engine.watchdog import Watchdog
from megdet_hpc.errors import UserError
from megdet_hpc.log import read_metrics
from megdet_hpc.parallel.runtime import Runtime, SynchronizedOptimizer
from megdet_hpc.parallel.serial import SerialCommunicator
from megdet_hpc.solver.adascale import ScaledOptimizer, gain_of, terms
from megdet_hpc.solver.gradient_noise import GradientNoise, measured


def test_the_gain_by_hand() -> None:
    # 4 ranks, S = 8, mean square 10, square of the mean 4: var = 8 / 3 * 6 = 16, sqr = 4 - 16 / 8 = 2
    assert terms(measured(10.0, 4.0, 4, images=2), 8) == pytest.approx((16, 2))
    assert gain_of(16, 2, 8) == pytest.approx((16 + 2) / (16 / 8 + 2))
    assert gain_of(16, 0, 8) == 8 and gain_of(1e-6, 1, 8) == pytest.approx(1)
    # without noise, and with a mean that is smaller than its noise alone would make it
    assert terms(measured(4.0, 4.0, 4, images=2), 8) == pytest.approx((1e-6, 4))
    assert terms(measured(10.0, 1.0, 4, images=2), 8)[1] == 0


def scaled(scale: float = 8) -> ScaledOptimizer:
    parameter = nn.Parameter(torch.ones(1))
    noise = GradientNoise(nn.Linear(1, 1), 1, ranks=4, images=2, accumulate=1, emulated=True)
    return ScaledOptimizer(SynchronizedOptimizer(torch.optim.SGD([parameter], lr=0.0)), noise, scale=scale)


def test_an_update_counts_for_its_gain() -> None:
    optimizer = scaled()
    (parameter,) = optimizer.optimizer.param_groups[0]["params"]
    for number, (small, whole) in enumerate([(10.0, 4.0), (4.0, 4.0)]):
        optimizer.noise.newest = measured(small, whole, 4, images=2)
        optimizer.set_lr(0.01)
        before, parameter.grad = float(parameter.detach()), torch.ones(1)
        optimizer.step()
        if number == 0:
            assert optimizer.gain == pytest.approx(4.5) and optimizer.steps == pytest.approx(4.5)
    # the averages of both, each with almost the same weight (0.996 of the past, debiased)
    var, square = ((0.996 * first + second) / 1.996 for first, second in ((16, 1e-6), (2, 4)))
    assert optimizer.gain == pytest.approx(gain_of(var, square, 8), rel=1e-6)
    assert optimizer.steps == pytest.approx(4.5 + optimizer.gain)
    assert before - float(parameter.detach()) == pytest.approx(0.01 * optimizer.gain, rel=1e-4)


def test_a_batch_that_is_no_larger_is_refused() -> None:
    with pytest.raises(UserError, match=r"1 times the images of solver.reference_batch; accepted: over 1"):
        scaled(1)
    with pytest.raises(UserError, match=r"solver.adascale is True; accepted: true with solver.optimizer sgd"):
        SolverConfig(adascale=True, optimizer="lars").check()


def run_of(shapes: Path, output: Path, **keys: Any) -> Training:
    """24 images, 8 an update on 4 emulated ranks, 2 in the base batch; one epoch of it is 12 steps."""
    data = DataConfig(train=str(shapes / "train"), val=None, images_per_rank=2, num_workers=0, short_sides=(64,),
                      max_side=96, val_short_side=64, group_by_aspect_ratio=False)  # fmt: skip
    model = FasterRcnnConfig(backbone="resnet10_w16", backbone_weights=None, neck_channels=8, box_head_channels=16)
    solver = SolverConfig(
        adascale=True,
        base_lr=0.002,
        reference_batch=2,
        epochs=1,
        drop_epochs=(0.5,),
        drop_factors=(0.1,),
        warmup_epochs=0,
    )
    config = Config(
        output=str(output), device="cpu", log_every=1, data=data, model=model, solver=solver, emulate=EmulateConfig(4)
    )
    return build_training(replace(config, **keys), Runtime(SerialCommunicator()))[0]


def finish(run: Training, folder: Path) -> list[dict[str, Any]]:
    train(run, None, StopRequests(None), Watchdog(0, folder, run.world, lambda: None))
    return read_metrics(run.output / "metrics.jsonl")


def test_a_run_ends_with_its_schedule_and_goes_on(shapes: Path, tmp_path: Path) -> None:
    whole = run_of(shapes, tmp_path / "whole")
    assert whole.last_step == 12  # if no update is worth more than one of the base batch
    rows = finish(whole, tmp_path)
    gains = [row["adascale_gain"] for row in rows]
    assert all(1 <= gain <= 4 for gain in gains) and len(gains) == whole.step == whole.last_step
    assert 3 <= whole.step < 12 and sum(gains) >= 12 > sum(gains[:-1])
    assert rows[-1]["adascale_steps"] == pytest.approx(sum(gains))
    # the rate follows the schedule's steps that are done: 0.1 of it after 6 of 12
    done = [0.0, *(row["adascale_steps"] for row in rows)]
    assert [row["lr"] for row in rows] == [pytest.approx(0.0002 if steps >= 6 else 0.002) for steps in done[:-1]]
    finish(run_of(shapes, tmp_path / "cut", max_steps=2), tmp_path)
    more = run_of(shapes, tmp_path / "cut", resume="auto")
    assert more.step == 2 and more.scaled and more.scaled.steps == pytest.approx(sum(gains[:2]))
    finish(more, tmp_path)
    assert more.step == whole.step
    for own, other in zip(more.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(own, other)
