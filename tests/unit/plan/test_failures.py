from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from megdet_hpc.errors import UserError
from megdet_hpc.plan.__main__ import main
from megdet_hpc.plan.failures import SavingPlan, describe_saving
from megdet_hpc.plan.run_time import CheckpointTime

HOUR = 3600.0


@pytest.mark.parametrize(("write", "failure"), [(5.0, 24 * HOUR), (60.0, 2 * HOUR), (300.0, HOUR)])
def test_the_interval_is_where_the_expected_time_is_least(write: float, failure: float) -> None:
    """The expected time of a run under failures at random, per second of work: (e^((t + w) / M) - 1) M / t."""
    times = np.geomspace(write / 10, 3 * failure, 20_000)
    expected = failure * np.expm1((times + write) / failure) / times
    best = float(times[expected.argmin()])
    plan = SavingPlan(write, failure, 600)
    assert plan.interval == pytest.approx(best, rel=0.01)
    assert plan.lost() < min(plan.lost(plan.interval / 2), plan.lost(2 * plan.interval))


def test_young_and_daly_agree_where_saving_is_quick() -> None:
    assert SavingPlan(1, 100 * HOUR, 0).interval == pytest.approx(math.sqrt(2 * 100 * HOUR), rel=0.01)
    assert SavingPlan(3 * HOUR, HOUR, 0).interval == HOUR


def test_a_job_that_cannot_finish_a_checkpoint_is_refused() -> None:
    with pytest.raises(UserError, match=r"--mtbf-hours 2 on 128 node\(s\): the job fails every 56 s"):
        describe_saving(2, 128, CheckpointTime(60, "given"), 10, None)


def test_plan_takes_the_time_of_a_checkpoint_from_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("data: {images_per_rank: 2}\nsolver: {accumulate: 1}\nemulate: {ranks: 0}\n")
    rows = [f'{{"step": {n}, "step_max_s": 0.5, "images_per_s": 64, "save_max_s": {n}}}\n' for n in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(rows))
    command = ["--config", "megdet_r50_fpn_16", "--ranks", "16", "--measured", str(tmp_path)]
    main([*command, "--mtbf-hours", "1000"])
    said = capsys.readouterr().out
    assert "of one of 2 every 500 h;" in said and "a checkpoint of 3 s (0.334 GB; the longest in" in said
    assert f"checkpoints.every_minutes {SavingPlan(3, 500 * HOUR, 600).interval / 60:.3g}, about" in said


def test_plan_takes_the_time_of_a_checkpoint_from_its_size_and_a_speed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--config", "megdet_r50_fpn_16", "--ranks", "16", "--write-speed", "0.1", "--mtbf-hours", "1000"])
    assert "a checkpoint of 3.34 s (0.334 GB at 0.1 GB/s, given)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--write-seconds", "3"], "--write-seconds 3 is used with --mtbf-hours, or beside the hours"),
        (["--mtbf-hours", "3"], "--mtbf-hours needs the time of a checkpoint"),
        (["--mtbf-hours", "0", "--write-seconds", "3"], "--mtbf-hours 0; accepted: a number above 0"),
    ],
)
def test_what_does_not_fit_is_refused(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--config", "megdet_r50_fpn_16", "--ranks", "16", *options])
    assert ended.value.code == 2 and said in capsys.readouterr().err
