from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megdet_hpc.data.sampler import EpochPlan, RankSampler
from megdet_hpc.data.shard_local import ShardLocal, number_nodes
from megdet_hpc.errors import UserError

SHARDS = (3, 17, 1, 9, 20, 0, 14)  # 64 images


def plan(images: int, per_rank: int, ranks: int, accumulate: int = 1, portraits: int = 0) -> EpochPlan:
    portrait = np.arange(images) < portraits
    return EpochPlan(portrait, per_rank, ranks, accumulate, seed=7)


def local_plan(
    per_rank: int = 2, nodes: tuple[int, ...] = (0, 0, 1, 1), accumulate: int = 1, buffer: int = 6
) -> EpochPlan:
    portrait = np.arange(sum(SHARDS)) % 3 == 0
    local = ShardLocal(nodes, SHARDS, buffer)
    return EpochPlan(portrait, per_rank, len(nodes), accumulate, seed=7, local=local)


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
    seen = [index for rank in range(4) for batch in RankSampler(p, [rank], 0, 8) for _, index in batch]
    assert sorted(seen) == list(range(64))


def test_epochs_differ_and_repeat() -> None:
    p = plan(40, 2, 2)
    assert not np.array_equal(p.epoch(0), p.epoch(1))
    assert np.array_equal(p.epoch(1), plan(40, 2, 2).epoch(1))


def test_resuming_at_any_step_gives_the_same_order() -> None:
    p = plan(21, 2, 2, accumulate=2)
    whole = list(RankSampler(p, [1], 0, 9))
    for first in range(9):
        sampler = RankSampler(p, [1], first, 9)
        assert list(sampler) == whole[first * 2 :]
        assert len(sampler) == (9 - first) * 2


def test_an_empty_set_is_refused() -> None:
    with pytest.raises(UserError, match="no images"):
        plan(0, 2, 2)


def test_the_order_of_uniform_sampling_is_what_it_always_was() -> None:
    """Earlier checkpoints resume bit for bit: the order of one (seed, epoch), written down."""
    assert plan(12, 2, 2, portraits=5).epoch(1)[:, 0].tolist() == [
        [[7, 10], [3, 4]],
        [[5, 7], [0, 1]],
        [[2, 0], [8, 9]],
        [[6, 11], [7, 10]],
    ]


NODES = [(0,), (0, 0, 1, 1), (0, 1, 0, 1), (0, 0, 0, 1), (0, 1, 2, 3, 4), tuple(range(40))]


@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize(("per_rank", "accumulate"), [(1, 1), (2, 1), (3, 2), (16, 1)])
def test_shard_local_gives_every_image_in_as_many_steps(nodes: tuple[int, ...], per_rank: int, accumulate: int) -> None:
    p = local_plan(per_rank, nodes, accumulate)
    uniform = replace(p, local=None)
    for epoch in range(3):
        order = p.epoch(epoch)
        assert order.shape == uniform.epoch(epoch).shape
        assert set(order.flat) == set(range(64))
        grouped = p.portrait[order]
        assert (grouped.all(axis=-1) | ~grouped.any(axis=-1)).all()
    assert not np.array_equal(p.epoch(0), p.epoch(1))
    assert np.array_equal(p.epoch(1), local_plan(per_rank, nodes, accumulate).epoch(1))


def test_shard_local_gives_no_image_twice_where_all_batches_are_full() -> None:
    p = replace(local_plan(), portrait=np.zeros(64, np.bool_))
    assert sorted(p.epoch(2).flat) == list(range(64))


def test_shard_local_nodes_share_few_shards() -> None:
    """Of 40 shards on 4 nodes a node reads its 10 and at most the two at its borders, some images pooled apart."""
    local = ShardLocal(number_nodes(["a", "a", "b", "b", "c", "c", "d", "d"]), (50,) * 40, 100)
    assert local.node_of_rank == (0, 0, 1, 1, 2, 2, 3, 3)
    p = EpochPlan(np.arange(2000) % 4 == 0, 2, 8, 1, seed=0, local=local)
    order = p.epoch(0)
    for node in range(4):
        shard, counts = np.unique(order[:, :, 2 * node : 2 * node + 2] // 50, return_counts=True)
        assert len(shard) <= 16
        assert np.sort(counts)[::-1][:12].sum() >= 0.98 * counts.sum()
    uniform = replace(p, local=None).epoch(0)
    assert len(np.unique(uniform[:, :, :2] // 50)) == 40


def _spread(buffer: int) -> float:
    """How far from its place in the sequence an image of one rank, one shard comes, on average."""
    local = ShardLocal((0,), (1000,), buffer)
    order = EpochPlan(np.zeros(1000, np.bool_), 1, 1, 1, seed=1, local=local).epoch(0).ravel()
    return float(np.abs(order - np.arange(1000)).mean())


def test_the_shuffle_buffer_bounds_how_far_reads_jump() -> None:
    assert _spread(1) == 0
    assert 5 < _spread(20) < 40 < _spread(400) < 400
    local = ShardLocal((0,), (1000,), 50)
    order = EpochPlan(np.zeros(1000, np.bool_), 1, 1, 1, seed=1, local=local).epoch(0).ravel()
    assert (order < np.arange(1000) + 50).all(), "an image cannot come before it has entered the buffer"


def test_shard_local_resumes_at_any_step() -> None:
    p = local_plan(accumulate=2)
    last = 2 * p.steps_per_epoch
    whole = list(RankSampler(p, [3], 0, last))
    for first in range(last):
        assert list(RankSampler(p, [3], first, last)) == whole[first * 2 :]


def test_shard_local_is_refused_where_it_does_not_fit() -> None:
    for local, text in [
        (ShardLocal((0,), SHARDS, 5), "1 ranks on nodes, 2 in the world"),
        (ShardLocal((0, 0), (60,), 5), "60 images in shards, 64 in the set"),
        (ShardLocal((0, 0), SHARDS, 0), "data.shuffle_buffer is 0; accepted: 1 or more"),
    ]:
        with pytest.raises(UserError, match=text):
            EpochPlan(np.zeros(64, np.bool_), 2, 2, 1, seed=0, local=local)
