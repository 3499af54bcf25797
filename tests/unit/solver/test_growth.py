"""A mini-batch that grows where the rate would drop, against tables by hand and two runs that make it by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megdet_hpc.config import Config, DataConfig, EmulateConfig, FasterRcnnConfig, SolverConfig
from megdet_hpc.data.continuation import continue_plan, plan_state
from megdet_hpc.data.sampler import EpochPlan, RankSampler
from megdet_hpc.engine.build import build_training
from megdet_hpc.engine.loop import train
from megdet_hpc.engine.stop import StopRequests
from megdet_hpc.engine.training import Training
from megdet_hpc.engine.watchdog import Watchdog
from megdet_hpc.errors import UserError
from megdet_hpc.log import read_metrics
from megdet_hpc.parallel.runtime import Runtime
from megdet_hpc.parallel.serial import SerialCommunicator
from megdet_hpc.plan.__main__ import main as plan_command
from megdet_hpc.record.journal import read_starts
from megdet_hpc.record.run_record import read_run
from megdet_hpc.solver.lr_schedule import growth_of
from megdet_hpc.solver.run_plan import RunPlan
from megdet_hpc.watch import facts


def coco(grow_to: int, **keys: Any) -> RunPlan:
    """256 images an update of COCO's 118,287 on 128 ranks, drops by 0.1 after 8 and 10 of 11 epochs."""
    solver = SolverConfig(grow_to=grow_to, **keys)
    return RunPlan.of(Config(data=DataConfig(images_per_rank=2), solver=solver), 128, np.zeros(118_287, np.bool_))


def test_one_drop_grows_and_the_next_lowers_the_rate() -> None:
    plan = coco(10)
    # ceil(118287 / 256) = 463 updates an epoch; ceil(118287 / 2560) = 47 from epoch 8 on
    assert plan.epoch.growth == ((8, 10),)
    assert plan.total_steps == 8 * 463 + 3 * 47 == 3845
    assert plan.updates() == [(3704, 256), (141, 2560)]
    assert plan.total_images == 3704 * 256 + 141 * 2560
    rates = {0: 0.032, 463: 0.32, 3703: 0.32, 3704: 0.32, 3797: 0.32, 3798: 0.032, 3844: 0.032}
    assert {step: round(plan.schedule.lr_at(step), 6) for step in rates} == rates
    assert [plan.epoch.epochs_of(step) for step in (0, 463, 3704, 3751, 3845)] == [0, 1, 8, 9, 11]
    assert [plan.epoch.steps_of(epochs) for epochs in (0, 0.5, 8, 8.5, 11)] == [0, 232, 3704, 3728, 3845]


def test_every_drop_may_grow_and_without_the_key_none_does() -> None:
    plan = coco(100)
    assert plan.updates() == [(3704, 256), (2 * 47, 2560), (5, 25600)]
    assert {plan.schedule.lr_at(step) for step in range(463, plan.total_steps)} == {plan.schedule.peak_lr}
    assert coco(0).updates() == [(11 * 463, 256)] and coco(0).schedule.drop_steps == (8 * 463, 10 * 463)
    # 2 passes first: 20 are within the limit, 200 are not; nor is a later drop by 2, since the rate has begun to fall
    assert growth_of(SolverConfig(accumulate=2, grow_to=20, policy="long")).drop_factors == (0.1, 0.5)
    assert coco(10, epochs=12.0, drop_epochs=(4, 6, 8), drop_factors=(0.5, 0.5, 1 / 3)).updates() == [
        (4 * 463, 256),
        (2 * 232, 512),
        (6 * 116, 1024),  # 12 passes would be more than 10
    ]


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"drop_epochs": (8.5, 10.0)}, r"drop_epochs is \(8.5, 10.0\); accepted: whole epochs with solver.grow_to"),
        ({"drop_factors": (0.3, 0.1)}, r"drop_factors is \(0.3, 0.1\); accepted: 1 / a whole number each"),
        ({"policy": "cosine"}, r"grow_to is 10; accepted: 0, except with drops and length in epochs"),
        ({"policy": "nx"}, r"grow_to is 10; accepted: 0, except with drops"),
        ({"iterations": 100.0}, r"grow_to is 10; accepted: 0, except with drops"),
        ({"adascale": True}, r"grow_to is 10; accepted: 0, except .* without adascale"),
        ({"accumulate": 12}, r"grow_to is 10; accepted: 0, or solver.accumulate \(12\) or more"),
    ],
)
def test_what_does_not_grow_is_refused(keys: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        SolverConfig(grow_to=10, **keys).check()


def test_the_same_images_come_in_the_same_order() -> None:
    portrait = np.arange(50) % 3 == 0
    small = EpochPlan(portrait, 2, 4, 1, seed=7)
    grown = EpochPlan(portrait, 2, 4, 1, seed=7, growth=((2, 2), (3, 6)))
    for epoch in range(5):
        one, other = small.epoch(epoch).reshape(-1, 2), grown.epoch(epoch).reshape(-1, 2)
        number = -(-17 // 2) + -(-33 // 2)  # micro-batches of the images higher than wide, and of the others
        assert np.array_equal(one[:number], other[:number])  # the rest fills up the last update
    # 26 micro-batches: 7 updates of 4, 4 of 8, 2 of 24
    assert [(s.epoch, s.step, s.factor, s.steps_per_epoch) for s in grown.stages] == [
        (0, 0, 1, 7),
        (2, 14, 2, 4),
        (3, 18, 6, 2),
    ]
    assert [grown.place(step) for step in (13, 14, 17, 18, 20)] == [(1, 6), (2, 0), (2, 3), (3, 0), (4, 0)]
    assert [grown.passes_at(step) for step in (13, 14, 18)] == [1, 2, 6]
    sampler = RankSampler(grown, [1, 2], 13, 19)
    assert len(list(sampler)) == len(sampler) == 2 * (1 + 4 * 2 + 6)


def test_other_ranks_go_on_within_a_grown_epoch() -> None:
    portrait = np.zeros(96, np.bool_)
    old = EpochPlan(portrait, 2, 4, 1, seed=7, growth=((1, 3),))  # 12 updates, then 4 an epoch
    new = EpochPlan(portrait, 2, 2, 1, seed=7, growth=((1, 3),))  # 24, then 8
    state = plan_state(old, 13)  # one of the 4: 24 images
    plan = continue_plan(new, state, 13)
    assert [plan.place(step) for step in (13, 18, 19)] == [(1, 0), (1, 5), (2, 0)]
    seen = [*old.epoch(1)[0].ravel(), *np.concatenate([plan.epoch(1)[row] for row in range(6)]).ravel()]
    assert sorted(seen) == list(range(96))
    assert plan.epochs_of(plan.position(19)) == 2 and plan.images_at(13) == 12
    again = continue_plan(new, plan_state(plan, 15), 15)
    assert [again.place(step) for step in (15, 18, 19)] == [(1, 2), (1, 5), (2, 0)]
    assert np.array_equal(again.epoch(1), plan.epoch(1))


KEYS: dict[str, Any] = {"epochs": 4, "drop_epochs": (2, 3), "drop_factors": (0.5, 0.1), "warmup_epochs": 0.5}


def run_of(shapes: Path, output: Path, *, emulate: int = 0, max_steps: int | None = None, resume: str = "never",
           **solver: Any) -> Training:  # fmt: skip
    """24 images, 4 an update: 6 updates in an epoch, 3 of 8 images from epoch 2 on."""
    data = DataConfig(train=str(shapes / "train"), val=None, images_per_rank=2 if emulate else 4, num_workers=0,
                      short_sides=(64,), max_side=96, val_short_side=64, group_by_aspect_ratio=False)  # fmt: skip
    model = FasterRcnnConfig(backbone="resnet10_w16", backbone_weights=None, neck_channels=8, box_head_channels=16)
    config = Config(
        output=str(output),
        device="cpu",
        log_every=2,
        data=data,
        model=model,
        max_steps=max_steps,
        resume=resume,
        solver=SolverConfig(**{**KEYS, **solver}),
        emulate=EmulateConfig(emulate),
    )
    return build_training(config, Runtime(SerialCommunicator()))[0]


def finish(run: Training, folder: Path) -> Training:
    train(run, None, StopRequests(None), Watchdog(0, folder, run.world, lambda: None))
    return run


def same_weights(one: Training, other: Training) -> bool:
    mine, theirs = one.model.state_dict(), other.model.state_dict()
    return all(torch.equal(mine[key], theirs[key]) for key in mine) and mine.keys() == theirs.keys()


@pytest.mark.parametrize("emulate", [0, 2])
def test_a_run_equals_two_calls_that_grow_it_by_hand(shapes: Path, tmp_path: Path, emulate: int) -> None:
    whole = finish(run_of(shapes, tmp_path / "whole", grow_to=2, emulate=emulate, ema_decay=0.9), tmp_path)
    assert whole.step == whole.last_step == 2 * 6 + 2 * 3
    rows = [row for row in read_metrics(whole.output / "metrics.jsonl") if "loss" in row]
    assert [(row["step"], row["epoch"]) for row in rows[5:]] == [
        (12, 2), (14, pytest.approx(8 / 3)), (16, pytest.approx(10 / 3)), (18, 4)]  # fmt: skip
    assert [round(row["images_per_s"] * row["step_max_s"], 6) for row in rows] == [4] * 6 + [8] * 3
    peak = 0.02 * 4 / 16
    # the first drop, by 2, is the growth; 20 passes would be too many for the second one
    assert [row["lr"] for row in rows[4:]] == [pytest.approx(peak)] * 3 + [pytest.approx(0.1 * peak)] * 2
    by_hand: dict[str, Any] = {"emulate": emulate, "ema_decay": 0.9, "drop_epochs": (3,), "drop_factors": (0.1,)}
    finish(run_of(shapes, tmp_path / "hand", max_steps=12, **by_hand), tmp_path)
    hand = run_of(shapes, tmp_path / "hand", accumulate=2, reference_batch=32, resume="auto", **by_hand)
    assert hand.last_step == 18 and not same_weights(hand, whole)
    assert same_weights(finish(hand, tmp_path), whole)
    assert whole.average and hand.average
    one, other = whole.average.state(), hand.average.state()
    assert one["iterations"] == other["iterations"] == 24 * 4 / 16
    assert all(torch.equal(value, other["model"][key]) for key, value in one["model"].items())


def test_a_run_that_was_cut_ends_with_the_same_bits(shapes: Path, tmp_path: Path) -> None:
    whole = finish(run_of(shapes, tmp_path / "whole", grow_to=2), tmp_path)
    for cut, then in ((11, 12), (12, 13), (13, None)):  # before, at and after the growth, in one run
        resume = "never" if cut == 11 else "auto"
        finish(run_of(shapes, tmp_path / "cut", grow_to=2, max_steps=cut, resume=resume), tmp_path)
        more = run_of(shapes, tmp_path / "cut", grow_to=2, max_steps=then, resume="auto")
        assert (more.step, more.last_step, more.schedule.first_step) == (cut, then or 18, 0)
    assert same_weights(finish(more, tmp_path), whole)


def test_evaluations_and_checkpoints_come_by_epochs(shapes: Path, tmp_path: Path) -> None:
    run = run_of(shapes, tmp_path / "run", grow_to=2)
    assert [step for step in range(1, 19) if run.checkpoint_due(step)] == [6, 12, 15, 18]
    assert [step for step in range(1, 19) if run._due(step, 0.5)] == [3, 6, 9, 12, 14, 15, 17, 18]
    assert run.passes is None and run.plan.images_at(12) == 8


def test_the_noise_scale_follows_the_passes(shapes: Path, tmp_path: Path) -> None:
    run = finish(run_of(shapes, tmp_path / "run", grow_to=2, emulate=2, noise_every=1), tmp_path)
    assert run.noise and run.noise.newest and run.noise.newest.number == 4  # 2 emulated ranks x 2 passes
    rows = read_metrics(run.output / "metrics.jsonl")
    assert all("gradient_variance_per_image" in row for row in rows if "loss" in row)


def test_watch_knows_the_larger_updates(shapes: Path, tmp_path: Path) -> None:
    run = finish(run_of(shapes, tmp_path / "run", grow_to=2, max_steps=13), tmp_path)
    (start,) = read_starts(run.output)
    assert start.growth == ((12, 2, 3),) and start.global_batch == 4
    record = read_run(run.output)
    assert record.global_batch == 8 and record.step == 13
    assert record.work_of(18) == 12 + 6 * 2 and record.epochs_between(11, 18) == pytest.approx(1 / 6 + 2)
    assert "epoch 2.33" in facts.progress_text(record)


def test_the_plan_tells_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    speed = ["--images-per-second", "5", "--model.backbone_weights", "null"]
    plan_command(["--config", "megdet_r50_fpn_256", "--ranks", "128", *speed, "--solver.grow_to", "10"])
    said = capsys.readouterr()
    assert "3845 in all, 11 epochs" in said.out
    assert "from epoch 8 on 10 passes = 2560 images: 47 an epoch" in said.out
    assert "3704        8       0.32  2560 images an update" in said.out
    assert "3798       10      0.032  drop x 0.1" in said.out
    assert "solver.grow_to 10: batch statistics are those of a pass, so the BN size stays 32 images" in said.err
    hours = float(said.out.split("training       ")[1].split(" h")[0])
    plan_command(["--config", "megdet_r50_fpn_256", "--ranks", "128", *speed])
    # the same images, but for the last update of an epoch; only gradients are sent less often
    assert float(capsys.readouterr().out.split("training       ")[1].split(" h")[0]) == pytest.approx(hours, rel=0.03)
