"""Losses of several ranks against the loss of the concatenated batch."""

from __future__ import annotations

import math

import pytest
import torch

from megdet_hpc.models.losses import Loss, WorldLosses, mean_over_world
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.serial import SerialCommunicator
from megdet_hpc.parallel.threads import run_ranks

# per rank: the samples of a loss that is given as a mean and of one that is given as a sum; the last rank has none
MEANS = [[1.0, 2.0, 6.0], [5.0], [1.0]]
SUMS = [[4.0], [1.0, 3.0], []]


def exchange(world: Communicator) -> WorldLosses:
    mean, total = MEANS[world.rank], SUMS[world.rank]
    losses = {
        "mean": Loss.mean(torch.tensor(mean).mean(), len(mean)),
        "sum": Loss(torch.tensor(total).sum(), torch.tensor(len(total))),
    }
    return mean_over_world(losses, world, [float(world.rank), 1.0])


def test_the_average_of_the_shares_is_the_mean_over_all_samples() -> None:
    found = run_ranks(3, exchange)
    for key, samples in (("mean", MEANS), ("sum", SUMS)):
        everyone = [value for own in samples for value in own]
        expected = sum(everyone) / len(everyone)
        assert sum(float(f.shares[key]) for f in found) / 3 == pytest.approx(expected, rel=1e-6)
        assert [f.means[key] for f in found] == pytest.approx([expected] * 3, rel=1e-12)
    assert all(f.finite and f.flags == (3.0, 3.0) for f in found)


def test_no_samples_anywhere_are_a_loss_of_zero() -> None:
    found = mean_over_world({"masks": Loss(torch.zeros((), requires_grad=True), 0)}, SerialCommunicator())
    assert found.means == {"masks": 0.0} and float(found.shares["masks"].detach()) == 0


def test_one_rank_that_is_not_finite_is_known_to_all() -> None:
    def body(world: Communicator) -> bool:
        value = torch.tensor(math.inf if world.rank == 2 else 1.0)
        return mean_over_world({"loss": Loss(value, 1)}, world).finite

    assert run_ranks(3, body) == [False] * 3


def test_one_message_carries_everything() -> None:
    class Counting(SerialCommunicator):
        size = 2
        messages: list[int] = []  # noqa: RUF012 - of this test only

        def allreduce_sum_(self, tensor: torch.Tensor, *, name: str) -> None:
            assert name == "losses" and tensor.dtype == torch.float64
            self.messages.append(len(tensor))

    world = Counting()
    mean_over_world({"a": Loss(torch.ones(()), 1), "b": Loss(torch.ones(()), 2)}, world, [0.0])
    assert world.messages == [2 + 2 + 1 + 1]
