"""Verdicts and sentences on made-up scores."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megdet_hpc.study.readings import SeedScores, Statement, chance, pairs_won, verdict


@pytest.mark.parametrize(
    ("better", "worse", "expected"),
    [
        ((0.5, 0.6, 0.7), (0.2, 0.3, 0.49), "appears"),
        ((0.5, 0.6, 0.7), (0.2, 0.3, 0.5), "within scatter"),
        ((0.2, 0.3, 0.4), (0.5, 0.6, 0.7), "the opposite appears"),
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "within scatter"),
        ((0.9, 0.9), (0.1, 0.1, 0.1), "too few seeds"),
        ((), (), "too few seeds"),
    ],
)
def test_verdicts(better: tuple[float, ...], worse: tuple[float, ...], expected: str) -> None:
    assert verdict(better, worse) == expected


def test_a_reading_has_the_numbers_behind_it() -> None:
    better = SeedScores("BN over 12", (0.5, 0.6, 0.7))
    worse = SeedScores("BN over 4", (0.1, 0.2, 0.0), failed=1)
    assert Statement("DSOD", "More is better.", better, worse).reading() == (
        "DSOD: More is better. BN over 12 0.600 +- 0.100 (3 seeds); BN over 4 0.100 +- 0.100 (3 seeds, 1 failed); "
        "difference +0.500 (standard error 0.082). "
        "Appears: BN over 12 is above in 9 of 9 pairs of seeds (by chance in 5 %)."
    )
    opposite = Statement("DSOD", "More is better.", worse, better).reading()
    assert "difference -0.500" in opposite
    assert opposite.endswith("The opposite appears: BN over 12 is above in 9 of 9 pairs of seeds (by chance in 5 %).")
    tied = Statement("DSOD", "More is better.", replace(better, scores=(0.2, 0.6, 0.7)), worse).reading()
    assert tied.endswith("Within scatter: BN over 12 is above in 8.5 of 9 pairs of seeds (by chance in 10 %).")


def test_the_end_of_a_reading_goes_by_pairs_where_the_means_say_the_opposite() -> None:
    better = SeedScores("a", (0.5, 0.51, 0.52, 0.53))
    worse = SeedScores("b", (0.3, 0.31, 0.32, 0.95, 0.33))
    assert worse.mean < better.mean
    above = SeedScores("c", (0.1, 0.2, 0.3, 3.0, 0.31))  # its mean is above, in 4 of 20 pairs
    said = Statement("X", "Y.", better, above).reading()
    assert "difference -0.2" in said
    assert said.endswith("a is above in 16 of 20 pairs of seeds (by chance in 9.5 %).")
    assert "Within scatter: a is above" in said


def test_chance_is_that_of_the_exact_rank_test() -> None:
    # Mann and Whitney's table: 4 and 4 scores, U = 15 or 16 of 16, are 2 of 70 ways; U = 14 makes it 4 of 70
    assert chance((5, 6, 7, 8), (1, 2, 3, 4)) == pytest.approx(1 / 70)
    assert (pairs_won((4, 6, 7, 8), (1, 2, 3, 5)), chance((4, 6, 7, 8), (1, 2, 3, 5))) == (15, pytest.approx(2 / 70))
    assert chance((3, 6, 7, 8), (1, 2, 4, 5)) == pytest.approx(4 / 70)
    assert verdict((4, 6, 7, 8), (1, 2, 3, 5)) == "appears"
    assert verdict((3, 6, 7, 8), (1, 2, 4, 5)) == "within scatter"
    with pytest.raises(ValueError, match="11 and 3 seeds"):
        verdict((0.5,) * 11, (0.5,) * 3)


def test_unfinished_seeds_are_said() -> None:
    one = SeedScores("a", (0.5,))
    assert Statement("X", "Y.", one, SeedScores("b", ())).reading() == (
        "X: Y. a 0.500 (1 seed); b: no run is finished. Too few seeds to say."
    )
    few = Statement("X", "Y.", one, SeedScores("b", (0.1, 0.2, 0.3))).reading()
    assert "difference +0.300. Too few seeds to say (3 of each are needed)." in few
