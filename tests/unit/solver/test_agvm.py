"""AGVM on virtual ranks: each parameter's gradient is chosen by rank, so that every cosine is known by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from megdet_hpc.config import SolverConfig
from megdet_hpc.engine.state import check_same_state
from megdet_hpc.errors import UserError
from megdet_hpc.models.detector import parts_by_name
from megdet_hpc.models.two_stage import part_of
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.runtime import SynchronizedOptimizer
from megdet_hpc.parallel.serial import SerialCommunicator
from megdet_hpc.parallel.threads import run_ranks
from megdet_hpc.solver.agvm import INTERVAL, EmulatedHalves, ModulatedOptimizer, RankHalves
from megdet_hpc.solver.optimizer import build_optimizer

# Gradients of ranks 0 to 3 per part; the first half is ranks 0 and 1.
GRADIENTS = {
    "backbone": [(2.0, 1.0), (0.0, -1.0), (0.0, 1.0), (0.0, 1.0)],  # sums (2, 0), (0, 2): cos 0, variance 1
    "fpn": [(1.0, 0.0), (0.0, 1.0), (3.0, 3.0), (1.0, 1.0)],  # sums (1, 1), (4, 4): cos 1, variance 0
    "rpn": [(1.0, 1.0), (0.0, 0.0), (1.0, 0.0), (1.0, 0.0)],  # sums (1, 1), (2, 0): cos 1 / sqrt(2)
    "heads": [(1.0, 0.0), (1.0, 0.0), (-1.0, 0.0), (0.0, 0.0)],  # sums (2, 0), (-1, 0): cos -1, variance 2
}
# sqrt of (1 / variance), between sqrt(0.5) and sqrt(10)
ROOTS = {"backbone": 1.0, "fpn": math.sqrt(10), "rpn": 1 / math.sqrt(1 - math.sqrt(0.5)), "heads": math.sqrt(0.5)}
PATHS = {"backbone": "backbone.body", "fpn": "backbone.fpn", "rpn": "rpn", "heads": "roi_heads"}


class Averaged(SynchronizedOptimizer):
    """Gradients averaged through a communicator."""

    def __init__(self, optimizer: torch.optim.Optimizer, world: Communicator) -> None:
        super().__init__(optimizer)
        self.world = world

    def synchronize(self) -> None:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                self.world.allreduce_sum_(parameter.grad, name="gradient")
                parameter.grad /= self.world.size


def network() -> nn.Module:
    root = nn.Module()
    for path in PATHS.values():
        module = root
        for name in path.split("."):
            if not hasattr(module, name):
                module.add_module(name, nn.Module())
            module = getattr(module, name)
        module.register_parameter("weight", nn.Parameter(torch.zeros(1, 2, dtype=torch.float64)))
    return root


def build(model: nn.Module, world: Communicator, first_step: int = 0) -> ModulatedOptimizer:
    config = SolverConfig(agvm=True, momentum=0, weight_decay=0)
    sgd = build_optimizer(model, config, decay_norm=True, parts=parts_by_name(model, part_of))
    return ModulatedOptimizer(Averaged(sgd, world), RankHalves(world, model.parameters()), first_step=first_step)


def update(model: nn.Module, optimizer: ModulatedOptimizer, rank: int, lr: float = 0.1) -> None:
    optimizer.set_lr(lr)
    optimizer.zero_grad()
    for name, p in model.named_parameters():
        (p * torch.tensor(GRADIENTS[part_of(name)][rank], dtype=p.dtype)).sum().backward()
    optimizer.synchronize()
    optimizer.step()


def test_factors_and_rates_against_a_calculation_by_hand() -> None:
    def body(world: Communicator) -> dict[str, float]:
        model = network()
        optimizer = build(model, world, first_step=2)
        expected = dict.fromkeys(ROOTS, 1.0)
        position = {part: torch.zeros(2, dtype=torch.float64) for part in ROOTS}
        # measured at the first multiple of the interval from step 2 on, and one interval later
        for number in range(2 * INTERVAL + 1):
            update(model, optimizer, world.rank)
            if number in (INTERVAL, 2 * INTERVAL):
                expected = {part: 0.97 * factor + 0.03 * ROOTS[part] for part, factor in expected.items()}
            assert optimizer.factors() == pytest.approx(expected, rel=1e-5), number
            for name, p in model.named_parameters():
                part = part_of(name)
                mean = torch.tensor(GRADIENTS[part], dtype=torch.float64).mean(0)
                position[part] -= 0.1 * expected[part] * mean
                torch.testing.assert_close(p[0].detach(), position[part], rtol=1e-5, atol=1e-9)
        check_same_state(model, optimizer.optimizer, world)
        return optimizer.factors()

    factors = run_ranks(4, body)
    assert all(f == factors[0] for f in factors)
    assert factors[0]["fpn"] > factors[0]["rpn"] > 1 > factors[0]["heads"]


@pytest.mark.parametrize("passes", [1, 2])
def test_emulated_ranks_have_the_factors_of_real_ones(passes: int) -> None:
    """Their gradients come one by one, in each pass those of all ranks."""
    model = network()
    sgd = build_optimizer(
        model, SolverConfig(agvm=True, momentum=0, weight_decay=0), decay_norm=True, parts=parts_by_name(model, part_of)
    )
    halves = EmulatedHalves(4, model.parameters())
    optimizer = ModulatedOptimizer(SynchronizedOptimizer(sgd), halves, first_step=2)
    for number in range(INTERVAL + 2):
        optimizer.set_lr(0.1)
        optimizer.zero_grad()
        for rank in list(range(4)) * passes:
            own = [
                torch.tensor([GRADIENTS[part_of(name)][rank]]).double() / passes for name, _ in model.named_parameters()
            ]
            halves.add(rank, own)
            for parameter, gradient in zip(model.parameters(), own, strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        optimizer.synchronize()
        optimizer.step()
        measured = number >= INTERVAL
        expected = {part: 0.97 + 0.03 * root if measured else 1.0 for part, root in ROOTS.items()}
        assert optimizer.factors() == pytest.approx(expected, rel=1e-5), number


def test_a_resumed_run_waits_for_the_end_of_its_own_warmup() -> None:
    """With fewer ranks the warmup has more updates left than the whole of the old one."""

    def body(world: Communicator) -> list[int]:
        first, second = build(old := network(), world), build(model := network(), world, first_step=2)
        for _ in range(3):
            update(old, first, world.rank)
        second.optimizer.load_state_dict(first.optimizer.state_dict())
        second.wait_for(INTERVAL)
        changed = []
        for number in range(3, 3 * INTERVAL):
            before = second.factors()
            update(model, second, world.rank)
            changed += [number] * (second.factors() != before)
        return changed

    # the first multiple of the interval from update 3 + INTERVAL on
    assert run_ranks(2, body) == [[2 * INTERVAL]] * 2


def test_factors_survive_a_checkpoint_and_the_count_goes_on() -> None:
    def body(world: Communicator) -> None:
        whole, cut = network(), network()
        straight, first = build(whole, world), build(cut, world)
        for _ in range(INTERVAL + 3):
            update(whole, straight, world.rank)
        for _ in range(4):
            update(cut, first, world.rank)
        second = build(resumed := network(), world)
        resumed.load_state_dict(cut.state_dict())
        second.optimizer.load_state_dict(first.optimizer.state_dict())
        for _ in range(INTERVAL - 1):
            update(resumed, second, world.rank)
        assert second.factors() == straight.factors() != dict.fromkeys(ROOTS, 1.0)
        for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
            assert torch.equal(ours, theirs)

    run_ranks(2, body)


def test_what_it_needs_is_said() -> None:
    with pytest.raises(UserError, match=r"this run has 1 rank\(s\), accepted: an even number"):
        build(network(), SerialCommunicator())

    def body(world: Communicator) -> None:
        model = network()
        model.backbone.body.requires_grad_(False)  # type: ignore[union-attr]
        with pytest.raises(UserError, match="against the backbone, of which nothing is trained"):
            build(model, world)

    run_ranks(2, body)


def test_parts_of_the_detector() -> None:
    names = ("backbone.body.conv1.weight", "backbone.fpn.inner_blocks.0.0.weight", "rpn.head.conv.0.0.weight")
    assert [part_of(name) for name in names] == ["backbone", "fpn", "rpn"]
    assert part_of("roi_heads.box_head.fc6.weight") == "heads"
