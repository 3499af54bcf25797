"""The rows of a run: the time of its steps, also where it began from another run's checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megdet_hpc.engine.first_lines import store_configuration
from megdet_hpc.log import MetricsLog, config_files
from megdet_hpc.record.run_record import read_run


@pytest.mark.parametrize(
    ("steps", "hours", "last"),
    [
        ([20, 40], 40 / 3600, 40),  # from step 0
        ([1020, 1040], 40 / 3600, 1040),  # from a checkpoint elsewhere, at step 1000
        ([1020, 1040, 1045], 45 / 3600, 1045),  # its last row is that of a stop
        ([], 0.0, 1040),  # it is about to begin there
    ],
)
def test_time_of_steps_is_that_of_the_run_alone(tmp_path: Path, steps: list[int], hours: float, last: int) -> None:
    (tmp_path / "config.yaml").write_text("log_every: 20\n")
    rows = [{"step": step, "loss": 1.0, "step_max_s": 1.0, "images_per_s": 4.0} for step in steps]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [place.hours for place in read_run(tmp_path).positions[-1:]] == [hours] * bool(steps)
    assert [place.images for place in read_run(tmp_path).positions[-1:]] == [round(hours * 3600) * 4] * bool(steps)
    log = MetricsLog(tmp_path, 1045)
    assert log.hours(20) == (hours, last)
    log.close()


def test_the_newest_configuration_is_that_of_the_newest_start(tmp_path: Path) -> None:
    """Also where a run goes on from an older checkpoint, since the newest is damaged."""
    for step in (0, 64, 32):
        store_configuration(tmp_path, step, f"seed: {step}\n")
    assert [(since, file.read_text()) for since, file in config_files(tmp_path)] == [
        (0, "seed: 0\n"),
        (32, "seed: 32\n"),
    ]
