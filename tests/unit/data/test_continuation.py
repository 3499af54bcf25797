from __future__ import annotations

import json
from dataclasses import replace

import pytest

from megdet_hpc.data.continuation import continue_plan, describe_change, plan_state
from megdet_hpc.data.sampler import EpochPlan, RankSampler
from megdet_hpc.data.shard_local import ShardLocal
from tests.unit.data.test_sampler import local_plan, plan


def images_of(p: EpochPlan, first: int, last: int) -> list[int]:
    """The images of all ranks from one update to another."""
    return [index for rank in range(p.num_ranks) for batch in RankSampler(p, [rank], first, last) for _, index in batch]


def epochs_of(p: EpochPlan, first: int, last: int) -> set[int]:
    return {epoch for batch in RankSampler(p, [0], first, last) for epoch, _ in batch}


def through_json(state: dict[str, object]) -> dict[str, object]:
    """As a file gives it back, tuples as lists at worst."""
    plain: dict[str, object] = json.loads(json.dumps(state))
    return plain


@pytest.mark.parametrize("make", [plan, local_plan])
def test_the_same_split_continues_as_if_nothing_happened(make: object) -> None:
    p = local_plan() if make is local_plan else plan(50, 2, 4, portraits=20)
    for step in range(3 * p.steps_per_epoch):
        again = continue_plan(p, through_json(plan_state(p, step)), step)
        assert again.offset == 0
        assert images_of(again, step, 30) == images_of(p, step, 30)
        assert describe_change(plan_state(p, step), again, step) == ""


def test_a_checkpoint_from_before_there_were_splits() -> None:
    p = plan(50, 2, 4)
    old = {"num_images": 50, "images_per_rank": 2, "num_ranks": 2, "accumulate": 1, "seed": 7}
    assert images_of(continue_plan(p, {**old, "num_ranks": 4}, 9), 9, 20) == images_of(p, 9, 20)
    assert continue_plan(p, old, 13).position(13) == 7


WAYS = {  # a full list has 64 / 2 = 32 micro-batches
    "4 to 2 to 4 ranks": [plan(64, 2, 4), plan(64, 2, 2), plan(64, 2, 4)],
    "1 to 4 ranks": [plan(64, 2, 1), plan(64, 2, 4)],
    "accumulate": [plan(64, 2, 2, 2), plan(64, 2, 2, 1), plan(64, 2, 2, 4)],
    "images per rank": [plan(64, 2, 4), plan(64, 4, 2), plan(64, 1, 4)],
}
ODD_WAYS = {
    "groups and odd counts": [
        plan(61, 2, 4, portraits=19),
        plan(61, 3, 2, 2, portraits=19),
        plan(61, 1, 5, portraits=19),
    ],
    "to shard_local and back": [replace(local_plan(), local=None), local_plan(), replace(local_plan(), local=None)],
    "other nodes": [local_plan(), local_plan(nodes=(0, 1, 2, 3)), local_plan(3, (0, 0, 0, 0, 1, 1), 2)],
    "another pack of the same set": [local_plan(), replace(local_plan(), local=ShardLocal((0,) * 4, (64,), 3))],
}


def follow(way: list[EpochPlan], first: int, steps: int) -> tuple[list[int], EpochPlan, int]:
    """`first` updates under the first split, `steps` under each later one, the epoch's rest under the last one.

    Returns:
        The images seen, the last plan, and updates made.
    """
    current, step = way[0], first
    seen = images_of(current, 0, step)
    for following in way[1:]:
        current = continue_plan(following, through_json(plan_state(current, step)), step)
        left = current.steps_per_epoch - current.position(step)
        count = left if following is way[-1] else min(steps, left)
        assert epochs_of(current, step, step + count) <= {0}
        seen += images_of(current, step, step + count)
        step += count
    return seen, current, step


@pytest.mark.parametrize("name", [*WAYS, *ODD_WAYS])
@pytest.mark.parametrize(("first", "steps"), [(1, 1), (2, 1), (3, 2), (5, 3)])
def test_another_split_takes_over_the_rest_of_the_epoch(name: str, first: int, steps: int) -> None:
    way = (WAYS | ODD_WAYS)[name]
    seen, current, step = follow(way, first, steps)
    assert set(seen) == set(range(way[0].num_images))
    # without groups only the last update is filled up; with them each group's last batch of each split is, too
    twice = len(seen) - len(set(seen))
    assert twice < current.global_batch if name in WAYS else twice <= 2 * current.global_batch
    assert current.position(step) == current.steps_per_epoch, "the epoch ends at a whole multiple of its steps"
    untouched = replace(way[-1])
    ahead = current.steps_per_epoch
    assert images_of(current, step, step + ahead) == images_of(untouched, ahead, 2 * ahead), "later epochs as ever"


def test_a_second_resume_after_another_split_is_exact() -> None:
    for way in [*WAYS.values(), *ODD_WAYS.values()]:
        current, step = way[0], 3
        for following in way[1:]:
            current = continue_plan(following, through_json(plan_state(current, step)), step)
            end = step + 2 * current.steps_per_epoch
            for later in range(step, end):
                again = continue_plan(following, through_json(plan_state(current, later)), later)
                assert again.offset == current.offset
                assert images_of(again, later, end) == images_of(current, later, end)
            step += 1


def test_a_change_at_an_epochs_end_starts_the_next_one_whole() -> None:
    old, new = plan(64, 2, 4), plan(64, 2, 2)
    p = continue_plan(new, plan_state(old, 16), 16)
    assert p.position(16) == 32 and p.stretches == ()
    assert images_of(p, 16, 32) == images_of(new, 32, 48)


def test_a_change_is_described() -> None:
    old, new = plan(64, 2, 4), plan(64, 2, 2)
    state = plan_state(old, 3)
    assert describe_change(state, continue_plan(new, state, 3), 3) == (
        "num_ranks 4 -> 2; global batch 8 -> 4 images, and the rate with it; "
        "the rest of epoch 0 takes 10 of now 16 steps"
    )
    state = plan_state(replace(local_plan(), local=None), 1)
    assert "sampling uniform -> shard_local" in describe_change(state, continue_plan(local_plan(), state, 1), 1)
