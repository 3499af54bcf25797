from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from megdet_hpc.config import Config, FasterRcnnConfig, NormConfig
from megdet_hpc.data.batch import Batch
from megdet_hpc.data.sample import Target
from megdet_hpc.engine.passes import NotFiniteError
from megdet_hpc.engine.state import average_running_statistics, check_same_state
from megdet_hpc.engine.step import train_step
from megdet_hpc.models.detector import Detector
from megdet_hpc.models.factory import build_detector
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.runtime import SynchronizedOptimizer
from megdet_hpc.parallel.serial import SerialCommunicator
from megdet_hpc.parallel.threads import run_ranks

CONFIG = Config(
    model=FasterRcnnConfig(
        backbone="resnet10", neck_channels=16, box_head_channels=32, anchor_sizes=(12, 24, 48, 96, 160)
    ),
    norm=NormConfig(kind="gn", where=("backbone", "fpn")),
)


def model() -> Detector:
    return build_detector(CONFIG, num_categories=2, group=SerialCommunicator())


def batch(*ids: int) -> Batch:
    generator = torch.Generator().manual_seed(ids[0])
    images = torch.randint(0, 256, (len(ids), 3, 64, 64), dtype=torch.uint8, generator=generator)
    target = Target.ordinary(torch.tensor([[8.0, 8.0, 40.0, 40.0]]), torch.tensor([1]))
    return Batch(images, [(64, 64)] * len(ids), [(1.0, 1.0)] * len(ids), list(ids), [target] * len(ids))


def sgd(m: Detector) -> SynchronizedOptimizer:
    return SynchronizedOptimizer(torch.optim.SGD(m.parameters(), lr=0.0, momentum=0.9))


def step(m: Detector, batches: list[Batch], world: Communicator, clip: float | None = None) -> float:
    optimizer = sgd(m)
    arguments = {"step": 3, "seed": 0, "lr": 0.01, "clip_norm": clip, "world": world}
    return train_step(m, optimizer, batches, **arguments).gradient_norm  # type: ignore[arg-type]


def test_two_accumulated_passes_equal_their_mean() -> None:
    first, accumulated = model(), model()
    step(accumulated, [batch(1), batch(2)], SerialCommunicator())
    gradients: list[list[Tensor]] = []
    for one in (batch(1), batch(2)):
        m = copy.deepcopy(first)
        step(m, [one], SerialCommunicator())
        gradients.append([p.grad.clone() for p in m.parameters() if p.grad is not None])
    for p, a, b in zip(accumulated.parameters(), *gradients, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, (a + b) / 2, rtol=1e-4, atol=1e-6)


def test_clipping_bounds_the_update() -> None:
    m = model()
    before = [p.detach().clone() for p in m.parameters()]
    assert step(m, [batch(1)], SerialCommunicator(), clip=0.1) > 0.1
    moved = torch.cat([(p - b).flatten() for p, b in zip(m.parameters(), before, strict=True)])
    assert float(moved.detach().norm()) == pytest.approx(0.01 * 0.1, rel=1e-3)


def test_a_loss_that_is_not_finite_stops_every_rank_before_the_update() -> None:
    def body(world: Communicator) -> str:
        m = model()
        if world.rank == 1:
            with torch.no_grad():
                m.roi_heads.box_predictor.cls_score.bias.fill_(math.nan)  # type: ignore[union-attr]
        before = [p.detach().clone() for p in m.parameters()]
        with pytest.raises(NotFiniteError) as error:
            step(m, [batch(10 + world.rank)], world)
        assert all(torch.equal(p, b) or b.isnan().any() for p, b in zip(m.parameters(), before, strict=True))
        return str(error.value)

    # fork_rng in concurrent threads would race on the global generator, so the ranks' draws are not compared here
    for message in run_ranks(2, body):
        assert "step 3: a loss is not finite" in message
        assert "rank 1 on" in message and "images [11]" in message and "rank 0" not in message


def unbounded(gradient: Tensor) -> Tensor:
    return gradient * math.inf


def test_the_gradient_is_read_with_the_losses_of_the_next_update() -> None:
    m = model()
    optimizer = sgd(m)
    arguments = {"seed": 0, "lr": 0.01, "clip_norm": 1.0, "world": SerialCommunicator()}
    first = train_step(m, optimizer, [batch(1)], step=0, **arguments)  # type: ignore[arg-type]
    assert "_read" not in vars(first.norms)
    train_step(m, optimizer, [batch(2)], step=1, earlier=first, **arguments)  # type: ignore[arg-type]
    assert "_read" in vars(first.norms) and math.isfinite(first.gradient_norm)


@pytest.mark.parametrize("spoils", [True, False], ids=["the weights", "only the gradient"])
def test_a_gradient_that_is_not_finite_is_named_by_the_next_update(spoils: bool) -> None:
    def body(world: Communicator) -> str:
        m = model()
        bias = m.roi_heads.box_predictor.cls_score.bias  # type: ignore[union-attr]
        hook = bias.register_hook(unbounded)  # type: ignore[union-attr, operator]
        optimizer = sgd(m)
        arguments = {"seed": 0, "clip_norm": None, "world": world}
        images = [batch(10 + world.rank)]
        first = train_step(m, optimizer, images, step=3, lr=float(spoils), **arguments)  # type: ignore[arg-type]
        hook.remove()
        if not spoils:
            with torch.no_grad():
                bias.zero_()  # type: ignore[union-attr, operator]
        with pytest.raises(NotFiniteError) as error:
            train_step(m, optimizer, [batch(1)], step=4, lr=0.1, earlier=first, **arguments)  # type: ignore[arg-type]
        return str(error.value)

    for message in run_ranks(2, body):
        assert "step 3: the gradient is not finite in 1 parameter(s)" in message
        assert "roi_heads.box_predictor.cls_score.bias" in message and "{0: [10], 1: [11]}" in message


def test_different_weights_are_named() -> None:
    def body(world: Communicator) -> None:
        m = torch.nn.Linear(2, 2)
        torch.nn.init.constant_(m.weight, 1.0 if world.rank == 2 else 0.0)
        torch.nn.init.zeros_(m.bias)
        with pytest.raises(RuntimeError, match=r"ranks \[2\] hold other weights"):
            check_same_state(m, torch.optim.SGD(m.parameters(), lr=0.1), world)

    run_ranks(3, body)


def test_running_statistics_become_the_mean_over_ranks() -> None:
    def body(world: Communicator) -> tuple[list[float], list[float]]:
        norm = torch.nn.BatchNorm2d(2)
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.fill_(world.rank)
        norm.running_var.fill_(2 * world.rank)
        average_running_statistics(norm, world)
        return norm.running_mean.tolist(), norm.running_var.tolist()

    assert run_ranks(3, body) == [([1.0, 1.0], [2.0, 2.0])] * 3
