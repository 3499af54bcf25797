from __future__ import annotations

import dataclasses
from itertools import pairwise

import numpy as np
import pytest

from megdet_hpc.config import Config, SolverConfig
from megdet_hpc.data.sampler import EpochPlan
from megdet_hpc.errors import UserError
from megdet_hpc.solver.lr_schedule import LrSchedule, resolve_schedule

# COCO train2017: 118,287 images. 118,287 / 16 = 7,392.9, / 256 = 462.06; the last, partly filled step counts.
STEPS_PER_EPOCH = {16: 7393, 256: 463}


def schedule(batch: int, **keys: object) -> LrSchedule:
    config = SolverConfig(**keys)  # type: ignore[arg-type]
    return resolve_schedule(config, global_batch=batch, steps_per_epoch=STEPS_PER_EPOCH[batch])


def check(resolved: LrSchedule, total: int, table: list[tuple[int, float]]) -> None:
    assert resolved.total_steps == total
    for step, rate in table:
        assert resolved.lr_at(step) == pytest.approx(rate, rel=1e-9, abs=1e-15), step


@pytest.mark.parametrize(("batch", "ranks"), [(16, 8), (256, 128)])
def test_steps_of_a_coco_epoch(batch: int, ranks: int) -> None:
    plan = EpochPlan(np.zeros(118_287, dtype=np.bool_), 2, ranks, 1, 0)
    assert (plan.global_batch, plan.steps_per_epoch) == (batch, STEPS_PER_EPOCH[batch])


# normal at 16: 0.02. Warmup 500 iterations from 0.1: 0.02 * (0.1 + 0.9 * 250 / 500) = 0.011 halfway.
# Drops at 8 * 7393 = 59144 and 10 * 7393 = 73930, end 11 * 7393 = 81323.
NORMAL_16 = [(0, 0.002), (250, 0.011), (499, 0.02 * (0.1 + 0.9 * 0.998)), (500, 0.02), (59143, 0.02)]
NORMAL_16 += [(59144, 0.002), (73929, 0.002), (73930, 0.0002), (81322, 0.0002)]
# normal at 256: 0.02 * 16 = 0.32. Warmup one epoch, 463 steps, from 1/16: 0.02, then 0.02 + 0.30 * step / 463.
# Drops at 8 * 463 = 3704 and 10 * 463 = 4630, end 11 * 463 = 5093.
NORMAL_256 = [(0, 0.02), (1, 0.02 + 0.3 / 463), (231, 0.02 + 0.3 * 231 / 463), (463, 0.32), (3703, 0.32)]
NORMAL_256 += [(3704, 0.032), (4629, 0.032), (4630, 0.0032), (5092, 0.0032)]


@pytest.mark.parametrize("policy", ["normal", "steps"])
def test_normal_at_16_and_256(policy: str) -> None:
    check(schedule(16, policy=policy, warmup_iterations=500), 81323, NORMAL_16)
    check(schedule(256, policy=policy, warmup_start_factor=0.0625), 5093, NORMAL_256)


def test_long_at_16_and_256() -> None:
    # 16: 11 * 7393 = 81323, 14 * 7393 = 103502, 17 * 7393 = 125681, 18 * 7393 = 133074
    table = [(0, 0.02), (81322, 0.02), (81323, 0.002), (103501, 0.002), (103502, 0.0002), (125680, 0.0002)]
    check(schedule(16, policy="long", warmup_epochs=0), 133074, [*table, (125681, 0.0001), (133073, 0.0001)])
    # 256: 11 * 463 = 5093, 14 * 463 = 6482, 17 * 463 = 7871, 18 * 463 = 8334
    table = [(0, 0.32), (5092, 0.32), (5093, 0.032), (6481, 0.032), (6482, 0.0032), (7870, 0.0032)]
    check(schedule(256, policy="long", warmup_epochs=0), 8334, [*table, (7871, 0.0016), (8333, 0.0016)])


def test_nx_drops_at_fixed_distances_from_its_end() -> None:
    # 2x at 16: end 180,000; drops at 180,000 - 60,000 = 120,000 and 180,000 - 20,000 = 160,000
    keys = {"policy": "nx", "warmup_epochs": 0}
    table = [(0, 0.02), (119_999, 0.02), (120_000, 0.002), (159_999, 0.002), (160_000, 0.0002)]
    check(schedule(16, policy_n=2, **keys), 180_000, table)
    # 6x at 256: 540,000 * 16 / 256 = 33,750; drops at 480,000 / 16 = 30,000 and 520,000 / 16 = 32,500
    table = [(0, 0.32), (29_999, 0.32), (30_000, 0.032), (32_499, 0.032), (32_500, 0.0032)]
    check(schedule(256, policy_n=6, **keys), 33_750, table)
    # its iterations have 16 images whatever base_lr refers to: reference 8 doubles the rate alone
    check(schedule(16, policy_n=2, reference_batch=8, **keys), 180_000, [(0, 0.04), (120_000, 0.004)])


def test_cosine_from_the_warmups_end_to_zero() -> None:
    # 256: one epoch of warmup, 463 steps, ten epochs of cosine, 4630: half of it 463 + 2315 = 2778
    table = [(0, 0.02), (463, 0.32), (2778, 0.16), (463 + 4630 // 5, 0.32 * 0.9045084971874737)]
    resolved = schedule(256, policy="cosine", warmup_start_factor=0.0625)
    check(resolved, 5093, table)
    assert 0 < resolved.lr_at(5092) < 1e-6 and "cosine to 0" in str(resolved)


def test_lengths_in_iterations_of_the_reference_batch() -> None:
    # 90,000 iterations of 16 images are 1,440,000 images: 5,625 updates of 256; drops 60,000 -> 3,750, 80,000 -> 5,000;
    # warmup 1,000 -> 62.5 -> 62 (round half to even)
    keys = {"iterations": 90_000, "drop_iterations": (60_000, 80_000), "warmup_iterations": 1000}
    table = [(0, 0.032), (31, 0.32 * 0.55), (62, 0.32), (3749, 0.32), (3750, 0.032), (5000, 0.0032)]
    check(schedule(256, **keys), 5625, table)
    check(schedule(16, **keys), 90_000, [(500, 0.011), (1000, 0.02), (60_000, 0.002), (80_000, 0.0002)])


def test_exponential_warmup() -> None:
    # 256: from 1/16 of 0.32 over 463 steps; the factor is 16 ** (step / 463) / 16
    table = [(0, 0.02), (1, 0.02 * 16 ** (1 / 463)), (231, 0.02 * 16 ** (231 / 463)), (463, 0.32)]
    check(schedule(256, warmup_form="exp", warmup_start_factor=0.0625), 5093, table)


def test_regime_adaptation_makes_as_many_updates_as_the_small_batch() -> None:
    # Hoffer et al.: at 256 the rate is 0.02 * sqrt(16), and an epoch is 463 * 16 = 7408 updates, as at 16 (7393)
    keys = {"policy": "regime", "scaling_exponent": 0.5, "warmup_epochs": 0}
    table = [(0, 0.08), (8 * 7408 - 1, 0.08), (8 * 7408, 0.008), (10 * 7408, 0.0008)]
    check(schedule(256, **keys), 11 * 7408, table)
    check(schedule(16, **keys), 81323, [(0, 0.02), (59144, 0.002)])


def test_clipping_within_some_updates() -> None:
    resolved = schedule(256, clip_norm=2.0, clip_norm_steps=(100, 200))
    assert [resolved.clip_norm_at(step) for step in (0, 99, 100, 199, 200, 5092)] == [None, None, 2.0, 2.0, None, None]
    # they are updates of the run: a resume with other ranks moves the schedule, and not them
    moved = dataclasses.replace(resolved, first_step=50)
    assert [moved.clip_norm_at(step) for step in (99, 100, 199, 200)] == [None, 2.0, 2.0, None]
    ends = dataclasses.replace(resolved, warmup_steps=150)
    assert not ends.clip_gap() and not dataclasses.replace(ends, first_step=50).clip_gap()
    later = dataclasses.replace(ends, first_step=51).clip_gap()
    assert later.startswith(
        "solver.clip_norm_steps [100, 200] are updates of the run, and the warmup ends at update 201"
    )
    assert not dataclasses.replace(ends, clip_steps=None, first_step=500).clip_gap()
    assert schedule(256, clip_norm=2.0).clip_norm_at(0) == 2.0 and schedule(256).clip_norm_at(0) is None


def test_warmup_by_doublings() -> None:
    # from 1/16 four doublings, 1000 / 4 = 250 steps each: 1/16, 1/8, 1/4, 1/2 of 0.02, then 0.02
    keys = {"warmup_form": "doubling", "warmup_iterations": 1000}
    stages = [(0, 0.00125), (249, 0.00125), (250, 0.0025), (500, 0.005), (750, 0.01), (999, 0.01), (1000, 0.02)]
    check(schedule(16, warmup_start_factor=0.0625, **keys), 81323, stages)
    # from 0.1 the fourth doubling would be 1.6: 0.1, 0.2, 0.4, 0.8, then 1
    stages = [(0, 0.002), (250, 0.004), (500, 0.008), (750, 0.016), (999, 0.016), (1000, 0.02)]
    check(schedule(16, warmup_start_factor=0.1, **keys), 81323, stages)


def test_constant_warmup_and_none() -> None:
    keys = {"warmup_form": "constant", "warmup_iterations": 500}
    check(schedule(16, **keys), 81323, [(0, 0.002), (499, 0.002), (500, 0.02)])
    check(schedule(16, warmup_iterations=0), 81323, [(0, 0.02)])


@pytest.mark.parametrize(("exponent", "rate"), [(1.0, 0.32), (0.5, 0.08), (0.0, 0.02)])
def test_scaling_exponent(exponent: float, rate: float) -> None:
    assert schedule(256, scaling_exponent=exponent, warmup_epochs=0).lr_at(0) == pytest.approx(rate)


def test_warmup_grows_every_step() -> None:
    resolved = resolve_schedule(SolverConfig(warmup_epochs=1), global_batch=16, steps_per_epoch=50)
    rates = [resolved.lr_at(step) for step in range(51)]
    assert all(a < b for a, b in pairwise(rates))
    assert rates[0] == pytest.approx(0.002)
    assert rates[50] == 0.02


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"drop_iterations": (5, 3)}, r"solver.drop_iterations is \(5, 3\); accepted: rising order"),
        ({"drop_iterations": (5,)}, "one factor for each of solver.drop_iterations"),
        ({"iterations": 0}, "solver.iterations is 0; accepted: more than 0"),
        ({"warmup_iterations": -1}, "solver.warmup_iterations is -1; accepted: 0 or more"),
        ({"warmup_form": "doubling", "warmup_start_factor": 0}, "more than 0 with solver.warmup_form doubling"),
        ({"clip_norm_steps": (1, 2)}, "accepted: null without solver.clip_norm, which is the bound"),
        ({"clip_norm": 1.0, "clip_norm_steps": (2, 2)}, "two updates, 0 or more, in rising order"),
        ({"policy": "regime"}, "scaling_exponent is 1.0; accepted: 0.5 with solver.policy regime"),
        ({"warmup_form": "exp", "warmup_start_factor": 0}, "more than 0 with solver.warmup_form exp"),
        ({"policy": "nx", "policy_n": 0.5}, "solver.policy_n is 0.5; accepted: 0.667 or more"),
    ],
)
def test_bad_schedules_are_refused(keys: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Config(solver=SolverConfig(**keys))  # type: ignore[arg-type]
