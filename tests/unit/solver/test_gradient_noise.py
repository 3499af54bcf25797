"""The gradient noise scale of gradients whose mean and covariance are known, and of real and emulated ranks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from megdet_hpc.errors import UserError
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.serial import SerialCommunicator
from megdet_hpc.parallel.threads import run_ranks
from megdet_hpc.solver.gradient_noise import GradientNoise, NoiseMeasurement, measured


def test_by_hand() -> None:
    # two mini-batches of 3 images with gradients (3, 0) and (1, 0): mean (2, 0), mean square 5
    found = measured(5.0, 4.0, 2, images=3)
    assert found.variance == pytest.approx((5 - 4) / (1 / 3 - 1 / 6))
    assert found.signal == pytest.approx((6 * 4 - 3 * 5) / 3)


def test_it_finds_the_mean_and_the_covariance() -> None:
    """Gradients of images are drawn with mean of square 4 and a covariance of trace 60."""
    generator = torch.Generator().manual_seed(0)
    mean, deviation = torch.tensor([2.0, 0, 0, 0]), math.sqrt(15.0)
    number, images = 8, 4
    found = []
    for _ in range(2000):
        own = mean + deviation / math.sqrt(images) * torch.randn(number, 4, generator=generator)
        small, whole = own.square().sum(1).mean(), own.mean(0).square().sum()
        found.append(measured(float(small), float(whole), number, images=images))
    assert sum(one.signal for one in found) / len(found) == pytest.approx(4, rel=0.05)
    assert sum(one.variance for one in found) / len(found) == pytest.approx(60, rel=0.05)


def _gradients(rank: int) -> list[float]:
    return [1.0 + rank, 2.0 * rank]


def test_ranks_agree_where_their_processors_round_differently() -> None:
    def body(world: Communicator) -> NoiseMeasurement | None:
        model = nn.Linear(2, 1, bias=False)
        noise = GradientNoise(model, 1, ranks=2, images=3, accumulate=1, emulated=False)
        noise.begin(1)
        model(torch.tensor([_gradients(world.rank)])).sum().backward()
        return noise.end(lambda: 1.5 + world.rank * 2e-16, 1.0, world)

    first, second = run_ranks(2, body)
    assert first == second


def test_ranks_measure_what_emulation_does() -> None:
    """Two ranks with gradients (1, 0) and (2, 2); the emulated ones give theirs divided by their number."""

    def real(world: Communicator) -> NoiseMeasurement | None:
        model = nn.Linear(2, 1, bias=False)
        noise = GradientNoise(model, 2, ranks=2, images=3, accumulate=1, emulated=False)
        for step in (1, 2):
            noise.begin(step)
            model.zero_grad()
            model(torch.tensor([_gradients(world.rank)])).sum().backward()
            found = noise.end(lambda: math.sqrt(1.5**2 + 1), 1.0, world)
            assert (found is None) == (step == 1)
        return found

    both = run_ranks(2, real)
    noise = GradientNoise(nn.Linear(2, 1), 1, ranks=2, images=3, accumulate=1, emulated=True)
    noise.begin(0)
    for rank in range(2):
        noise.add([torch.tensor(_gradients(rank)) / 2, None])
    emulated = noise.end(lambda: math.sqrt(1.5**2 + 1), 1.0, SerialCommunicator())
    wanted = measured((1 + 8) / 2, 1.5**2 + 1, 2, images=3)
    assert emulated and both[0] and both[0] == both[1]
    for found in (emulated, both[0]):
        assert (found.signal, found.variance) == pytest.approx((wanted.signal, wanted.variance), rel=1e-6)


def test_one_rank_has_nothing_to_compare() -> None:
    with pytest.raises(UserError, match=r"solver.noise_every 5, .* this run has 1 rank, accepted: two or more"):
        GradientNoise(nn.Linear(2, 1), 5, ranks=1, images=3, accumulate=4, emulated=False)
