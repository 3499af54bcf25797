from __future__ import annotations

from itertools import pairwise

import pytest

from megdet_hpc.config import SolverConfig
from megdet_hpc.solver.lr_schedule import resolve_schedule

# By hand: COCO train2017 with 117,266 annotated images, the paper's policy at 16 and at 256 images.
TABLES = {
    16: (7330, [(0, 0.002), (366, 0.011), (733, 0.02), (58639, 0.02), (58640, 0.002), (73300, 0.0002)]),
    256: (459, [(0, 0.02), (229, 0.02 + 0.3 * 229 / 459), (459, 0.32), (3671, 0.32), (3672, 0.032), (4590, 0.0032)]),
}


@pytest.mark.parametrize(("batch", "warmup", "start"), [(16, 0.1, 0.1), (256, 1.0, 0.0625)])
def test_against_hand_written_tables(batch: int, warmup: float, start: float) -> None:
    steps_per_epoch, table = TABLES[batch]
    config = SolverConfig(warmup_epochs=warmup, warmup_start_factor=start)
    schedule = resolve_schedule(config, global_batch=batch, steps_per_epoch=steps_per_epoch)
    assert schedule.total_steps == 11 * steps_per_epoch
    for step, rate in table:
        assert schedule.lr_at(step) == pytest.approx(rate, rel=2e-3), step


@pytest.mark.parametrize(("exponent", "rate"), [(1.0, 0.32), (0.5, 0.08), (0.0, 0.02)])
def test_scaling_exponent(exponent: float, rate: float) -> None:
    config = SolverConfig(scaling_exponent=exponent, warmup_epochs=0)
    assert resolve_schedule(config, global_batch=256, steps_per_epoch=10).lr_at(0) == pytest.approx(rate)


def test_warmup_grows_every_step() -> None:
    schedule = resolve_schedule(SolverConfig(warmup_epochs=1), global_batch=16, steps_per_epoch=50)
    rates = [schedule.lr_at(step) for step in range(51)]
    assert all(a < b for a, b in pairwise(rates))
    assert rates[0] == pytest.approx(0.002)
    assert rates[50] == 0.02
