from __future__ import annotations

import numpy as np
import pytest

from megdet_hpc.data.sampler import EpochPlan, RankSampler
from megdet_hpc.errors import UserError


def plan(images: int, per_rank: int, ranks: int, accumulate: int = 1, portraits: int = 0) -> EpochPlan:
    portrait = np.arange(images) < portraits
    return EpochPlan(portrait, per_rank, ranks, accumulate, seed=7)


@pytest.mark.parametrize(
    ("images", "per_rank", "ranks", "accumulate", "portraits", "steps"),
    [
        (16, 2, 4, 1, 0, 2),
        (17, 2, 4, 1, 0, 3),  # 9 micro-batches of 2 on 4 ranks
        (17, 2, 4, 1, 5, 3),  # 3 + 6 micro-batches
        (3, 2, 4, 2, 1, 1),  # fewer images than one update takes
        (50, 2, 2, 2, 20, 7),  # 10 + 15 micro-batches, 4 an update
    ],
)
def test_every_image_every_epoch(
    images: int, per_rank: int, ranks: int, accumulate: int, portraits: int, steps: int
) -> None:
    p = plan(images, per_rank, ranks, accumulate, portraits)
    assert p.steps_per_epoch == steps
    order = p.epoch(3)
    assert order.shape == (steps, accumulate, ranks, per_rank)
    assert set(order.flat) == set(range(images))
    same_shape = p.portrait[order]
    assert (same_shape.all(axis=-1) | ~same_shape.any(axis=-1)).all()


def test_ranks_share_out_an_epoch_without_overlap() -> None:
    p = plan(64, 2, 4)
    seen = [index for rank in range(4) for batch in RankSampler(p, rank, 0, 8) for _, index in batch]
    assert sorted(seen) == list(range(64))


def test_epochs_differ_and_repeat() -> None:
    p = plan(40, 2, 2)
    assert not np.array_equal(p.epoch(0), p.epoch(1))
    assert np.array_equal(p.epoch(1), plan(40, 2, 2).epoch(1))


def test_resuming_at_any_step_gives_the_same_order() -> None:
    p = plan(21, 2, 2, accumulate=2)
    whole = list(RankSampler(p, 1, 0, 9))
    for first in range(9):
        sampler = RankSampler(p, 1, first, 9)
        assert list(sampler) == whole[first * 2 :]
        assert len(sampler) == (9 - first) * 2


def test_an_empty_set_is_refused() -> None:
    with pytest.raises(UserError, match="no images"):
        plan(0, 2, 2)
