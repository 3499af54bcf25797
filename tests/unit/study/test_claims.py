"""Verdicts and readings from rows by hand: what is within the scatter of seeds, what fails, what has too few seeds."""

from __future__ import annotations

from typing import Any

import pytest

from megdet_hpc.study.claims import Found, as_good, difference, enough_at, findings, is_behind, readings
from megdet_hpc.study.readings import SeedScores

SMALL = SeedScores("16", (0.80, 0.81, 0.82))  # mean 0.81, sd 0.01


def scores(*values: float, failed: int = 0) -> SeedScores:
    return SeedScores("256", values, failed)


@pytest.mark.parametrize(
    ("large", "found"),
    [
        (scores(0.792, 0.802, 0.812), "shown"),  # 0.008 below, sd 0.01
        (scores(0.79, 0.80, 0.795), "undecided"),  # 0.015 below
        (scores(0.77, 0.78, 0.79), "refuted"),  # 0.03 below
        (scores(0.90, 0.91, 0.92), "shown"),
        (scores(0.70, 0.85, 0.85), "shown"),  # 0.01 below, sd 0.087
        (scores(0.80, 0.81), "too few seeds"),
        (scores(0.80, 0.81, failed=1), "undecided"),  # a mean of two seeds decides nothing
        (scores(failed=3), "undecided"),
        (scores(0.90, 0.91, 0.92, failed=1), "undecided"),  # the seeds that train are as good
        (scores(0.77, 0.78, 0.79, failed=1), "refuted"),
    ],
)
def test_as_good(large: SeedScores, found: Found) -> None:
    assert as_good(large, SMALL) == found


@pytest.mark.parametrize(
    ("rival", "found"),
    [
        (scores(failed=2), "shown"),  # the third seed can change nothing
        (scores(0.81, failed=1), "too few seeds"),
        (scores(0.81, 0.80, failed=1), "undecided"),  # a mean of two seeds decides nothing
        (scores(0.77, 0.78, 0.79), "shown"),  # 0.03 below: over two sd and over 0.02
        (scores(0.785, 0.788, 0.79), "shown"),  # 0.022 below
        (scores(0.792, 0.794, 0.793), "undecided"),  # 0.017 below: between one and two sd
        (scores(0.80, 0.81, 0.80), "refuted"),
    ],
)
def test_is_behind(rival: SeedScores, found: Found) -> None:
    assert is_behind(rival, SMALL, failures=2, gap=0.02) == found


def test_what_fails_as_often_does_not_fail_more() -> None:
    own = SeedScores("CGBN", (0.8,), failed=2)
    assert is_behind(scores(0.81, failed=2), own, failures=2) == "undecided"
    assert is_behind(scores(failed=2), SeedScores("CGBN", (0.8, 0.81), failed=1), failures=2) == "shown"
    assert is_behind(scores(0.80, 0.81, failed=1), SeedScores("CGBN", (0.8, 0.81), failed=1), failures=1) == "undecided"
    claim = [row("cgbn", batch, seed, 0.8) for batch in (16, 256) for seed in range(3)]
    claim[-1] |= {"status": "failed", "AP": None}
    claim += [row("frozen", 256, seed, None, "failed") for seed in range(3)]
    fails = next(one for one in findings({"claim": claim}) if one.text == "It fails with fixed statistics.")
    assert fails.found == "shown"
    assert fails.numbers.endswith("Failed: 3 of 3 seeds of 256 with fixed statistics, 1 of 3 seeds of 256 with CGBN.")


def test_a_comparison_whose_first_setting_failed_is_said() -> None:
    claim = [row("cgbn", 16, seed, None, "failed") for seed in range(3)]
    claim += [row("cgbn", 256, seed, 0.8) for seed in range(3)]
    (said,) = readings("claim", claim)
    assert said == ("norm cgbn: batch 256 0.800 +- 0.000 (3 seeds); batch 16: 3 seeds failed. Nothing to compare.")


def test_seeds_that_failed_are_no_early_lead() -> None:
    claim = [row("cgbn", batch, seed, 0.8) for batch in (16, 256) for seed in range(3)]
    epochs = [
        {**row("cgbn", batch, seed, ap + seed / 1000), "epoch": epoch}
        for batch, epoch, ap in ((16, 10.0, 0.6), (256, 10.0, 0.4), (16, 50.0, 0.8), (256, 50.0, 0.79))
        for seed in range(3)
    ]
    for status in ("failed", "unfinished", "error"):
        rows = [{**one, "status": status} if (one["batch"], one["seed"]) == (256, 2) else one for one in epochs]
        early = findings({"claim": claim, "epochs": rows})[-1]
        assert (early.text, early.found) == ("The small mini-batch is ahead early.", "too few seeds"), status


def test_a_bn_size_is_enough_if_more_brings_nothing() -> None:
    own, less = scores(0.80, 0.81, 0.82), scores(0.70, 0.71, 0.72)
    assert enough_at(32, own, less, scores(0.81, 0.82, 0.82)).found == "shown"
    assert enough_at(32, own, less, scores(0.84, 0.85, 0.86)).found == "refuted"
    assert enough_at(32, own, own, own).found == "undecided"  # less is no worse
    assert enough_at(32, own, less, scores(0.81)).found == "too few seeds"
    assert enough_at(32, own, less, scores(0.84, 0.85, failed=1)).found == "undecided"


def test_a_difference_says_what_it_rests_on() -> None:
    text = difference(scores(0.79, 0.80, 0.795), SMALL)
    assert "difference -0.015. That is between one and two sd (1.5 sd of 0.010)." in text
    assert "One seed: what a seed does is not known, so nothing follows." in difference(scores(0.7), scores(0.8))
    assert "too few seeds to rest on (3 of each)." in difference(scores(0.7), SMALL)
    wanted = "256: 2 seeds failed; 16 0.810 +- 0.010 (3 seeds). Nothing to compare."
    assert difference(scores(failed=2), SMALL) == wanted


def row(norm: str, batch: int, seed: int, ap: float | None, status: str = "done", **more: Any) -> dict[str, Any]:
    return {"seed": seed, "norm": norm, "batch": batch, "status": status, "AP": ap, "steps": 1, **more}


def test_findings_and_readings_of_a_grid_that_is_partly_done() -> None:
    claim = [row("cgbn", 16, seed, 0.80 + seed / 100) for seed in range(3)]
    claim += [row("cgbn", 256, seed, 0.81 + seed / 100) for seed in range(3)]
    claim += [row("frozen", 256, 0, None, "failed"), row("frozen", 256, 1, None, "failed")]
    claim += [row("frozen", 256, 2, None, "not run"), row("frozen", 16, 0, None, "not run")]
    found = findings({"claim": claim})
    assert [(one.text, one.found) for one in found] == [
        ("256 images an update are as good as 16, in 16/256 of the updates.", "shown"),
        ("It fails with fixed statistics.", "shown"),
        ("It fails with statistics of one rank's images.", "too few seeds"),
    ]
    (reading,) = readings("claim", claim)
    assert reading.startswith("norm cgbn: batch 256 0.820 +- 0.010 (3 seeds); batch 16 0.810 +- 0.010 (3 seeds)")
    epochs = [
        {**row("cgbn", batch, seed, ap + seed / 1000), "epoch": epoch}
        for batch, epoch, ap in ((16, 10.0, 0.6), (256, 10.0, 0.4), (16, 50.0, 0.8), (256, 50.0, 0.79))
        for seed in range(3)
    ]
    early = findings({"claim": claim, "epochs": epochs})[-1]
    assert (early.text, early.found) == ("The small mini-batch is ahead early.", "shown")
    assert early.numbers.endswith("At the end the difference is +0.010.")
