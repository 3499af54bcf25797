from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megdet_hpc.config import Config, DataConfig, EvaluationConfig, FasterRcnnConfig, SolverConfig
from megdet_hpc.engine.build import build_training
from megdet_hpc.engine.loop import train
from megdet_hpc.engine.passes import NotFiniteError
from megdet_hpc.engine.resume import changed_keys, restore
from megdet_hpc.engine.stop import StopRequests
from megdet_hpc.engine.training import Training, period_ends
from megdet_hpc.engine.watchdog import Watchdog
from megdet_hpc.errors import UserError
from megdet_hpc.log import MetricsLog, read_metrics
from megdet_hpc.parallel.runtime import Runtime
from megdet_hpc.parallel.serial import SerialCommunicator
from megdet_hpc.record.journal import read_starts
from megdet_hpc.record.run_record import read_run


def test_changed_keys_are_named_with_both_values() -> None:
    old = {"seed": 0, "norm": {"kind": "cgbn", "size": 0}}
    new = {"seed": 0, "norm": {"kind": "bn", "size": 0, "unit": "images"}}
    assert changed_keys(old, new) == ["norm.kind: cgbn -> bn", "norm.unit: None -> images"]


def test_periods_in_epochs() -> None:
    assert [step for step in range(1, 31) if period_ends((step - 1) / 10, step / 10, 1.0)] == [10, 20, 30]
    assert [step for step in range(1, 31) if period_ends((step - 1) / 10, step / 10, 1.5)] == [15, 30]
    assert [step for step in range(1, 8) if period_ends((step - 1) / 10, step / 10, 0.25)] == [3, 5]
    assert not any(period_ends((step - 1) / 10, step / 10, 0) for step in range(1, 31))


def built(shapes: Path, output: Path, max_steps: int | None = None, **solver: Any) -> Training:
    """A run of one process on generated data: 24 images, 2 an update times solver.accumulate."""
    data = DataConfig(
        train=str(shapes / "train"),
        val=None,
        images_per_rank=2,
        num_workers=0,
        group_by_aspect_ratio=False,
    )
    model = FasterRcnnConfig(backbone="resnet10", neck_channels=16, box_head_channels=32)
    schedule = SolverConfig(epochs=4, drop_epochs=(2, 3), **solver)
    config = Config(
        output=str(output), seed=1, device="cpu", data=data, model=model, solver=schedule, max_steps=max_steps
    )
    runtime = Runtime(SerialCommunicator())
    return build_training(config, runtime)[0]


def test_another_split_goes_on_at_the_same_place(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = built(shapes, tmp_path / "a"), built(shapes, tmp_path / "b", accumulate=3)
    old.step = 26  # 2 epochs of 12 updates and 4 images more
    assert old.schedule.lr_at(26) == pytest.approx(0.02 * 2 / 16 * 0.1)
    state = old.state()
    capsys.readouterr()
    restore(new, state, Path("old.pt"))
    said = capsys.readouterr().out
    assert "re-planned: accumulate 1 -> 3; global batch 2 -> 6 images" in said
    assert "the rest of epoch 2 takes 4 of now 4 steps; rate 0.00075 at this step" in said
    assert (new.step, new.position, new.schedule.first_step) == (26, 8, 18)
    # the counter of updates goes on, so files and logs stay in order; 4 steps of this epoch, 4 of the next
    assert new.last_step == 34
    rates = [new.schedule.lr_at(step) / (0.02 * 6 / 16) for step in range(26, 34)]
    assert rates == pytest.approx([0.1] * 4 + [0.01] * 4)
    assert len(new.plan.epoch(2)) == 4 and len(np.unique(new.plan.epoch(2))) == 20

    back = built(shapes, tmp_path / "c")
    new.step = 28
    restore(back, new.state(), Path("new.pt"))
    # 4 + 12 images of the epoch are seen: 4 steps of 2 images are left, so the place is 8 steps into it
    assert (back.step, back.position, back.last_step) == (28, 32, 44)
    again = built(shapes, tmp_path / "d")
    back.step = 30
    restore(again, back.state(), Path("back.pt"))
    assert (again.position, again.last_step) == (34, 44)
    assert (
        np.array_equal(again.plan.epoch(2), back.plan.epoch(2)) and "re-planned" not in capsys.readouterr().out[-200:]
    )


def test_nothing_is_saved_after_a_gradient_that_is_not_finite(shapes: Path, tmp_path: Path) -> None:
    run = built(shapes, tmp_path / "run", max_steps=1)
    trained = next(parameter for parameter in run.model.parameters() if parameter.requires_grad)
    trained.register_hook(lambda gradient: gradient * np.inf)
    watchdog = Watchdog(0, tmp_path, run.world, lambda: None)
    with pytest.raises(NotFiniteError, match=r"step 0: the gradient is not finite in 1 parameter.*Nothing"):
        train(run, None, StopRequests(None), watchdog)
    assert not list(tmp_path.rglob("*.pt"))
    (start,) = read_starts(run.output)
    assert (start.end, start.end_step, start.last_step) == ("failed", 1, 1)
    assert start.why.startswith("NotFiniteError: step 0: the gradient is not finite")


def test_the_first_time_of_an_ap_is_recorded_once(shapes: Path, tmp_path: Path) -> None:
    run = built(shapes, tmp_path / "run", max_steps=4)
    wanted = EvaluationConfig(every_epochs=1 / 12, targets=(0.2, 0.3, 0.9))
    run.config = replace(run.config, evaluation=wanted, log_every=1)
    scores = iter([0.1, 0.25, 0.2, 0.35])
    train(
        run,
        lambda: {"AP": next(scores), "AP50": 0.5},
        StopRequests(None),
        Watchdog(0, tmp_path, run.world, lambda: None),
    )
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    seconds = {row["step"]: row["step_max_s"] for row in rows if "loss" in row}
    found = {row["step"]: {key: row[key] for key in row if key.startswith("time_to_ap")} for row in rows}
    assert found[2] == {"time_to_ap_h/0.2": pytest.approx((seconds[1] + seconds[2]) / 3600)}
    assert found[4] == {"time_to_ap_h/0.3": pytest.approx(sum(seconds.values()) / 3600)}
    assert found[1] == found[3] == {}
    record = read_run(tmp_path / "run")
    first = record.first_at(0.3)
    assert first and (first.step, first.images) == (4, 8)
    assert first.hours == pytest.approx(found[4]["time_to_ap_h/0.3"])
    again = MetricsLog(tmp_path / "run", 2)  # a run that goes on from step 2
    assert again.reached() == {"time_to_ap_h/0.2"}
    assert again.hours(1) == (pytest.approx(found[2]["time_to_ap_h/0.2"]), 2)
    again.close()


def test_another_optimizer_is_refused_by_its_name(shapes: Path, tmp_path: Path) -> None:
    state = built(shapes, tmp_path / "a").state()
    with pytest.raises(UserError, match=r"old.pt: solver.optimizer: sgd -> lars; the state of one optimizer does not"):
        restore(built(shapes, tmp_path / "b", optimizer="lars"), state, Path("old.pt"))


def test_other_data_or_seed_is_refused(shapes: Path, tmp_path: Path) -> None:
    run = built(shapes, tmp_path / "a")
    state = run.state()
    for key in ("annotations_sha256", "seed", "num_images", "group_by_aspect_ratio"):
        changed = {**state, "plan": {**state["plan"], key: 77}}
        with pytest.raises(UserError, match=f"was written with {key} 77 .now .*only with the same data, groups and"):
            restore(run, changed, Path("other.pt"))
