from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from megdet_hpc.config import Config, FasterRcnnConfig, NormConfig, SolverConfig
from megdet_hpc.engine.checkpoint import load_checkpoint, save_checkpoint
from megdet_hpc.errors import UserError
from megdet_hpc.models.factory import build_detector
from megdet_hpc.parallel.serial import SerialCommunicator
from megdet_hpc.solver.lamb import Lamb
from megdet_hpc.solver.lars import Lars
from megdet_hpc.solver.optimizer import build_optimizer


def parameter(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def step(optimizer: torch.optim.Optimizer, p: nn.Parameter, gradient: list[float], lr: float) -> list[float]:
    p.grad = torch.tensor(gradient, dtype=p.dtype)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return p.tolist()


def test_lars_by_hand() -> None:
    # |w| = 5, |g| = 10, local = 0.5 * 5 / (10 + 0.2 * 5) = 2.5 / 11
    p = parameter(3.0, 4.0)
    lars = Lars([p], momentum=0.9, weight_decay=0.2, trust_coefficient=0.5)
    local = 2.5 / 11
    v = [0.1 * local * (6 + 0.6), 0.1 * local * (8 + 0.8)]  # lr * local * (g + decay * w)
    first = step(lars, p, [6.0, 8.0], 0.1)
    assert v == pytest.approx([0.15, 0.2], rel=1e-14)
    assert first == pytest.approx([3 - v[0], 4 - v[1]], rel=1e-14)
    # |w| = 4.75, |g| = 0.05: local = 2.375 / (0.05 + 0.95) = 2.375; rate 0.2; u = 2.375 * (0.03 + 0.57, 0.04 + 0.76)
    second = step(lars, p, [0.03, 0.04], 0.2)
    expected = [2.85 - (0.9 * 0.15 + 0.2 * 2.375 * 0.6), 3.8 - (0.9 * 0.2 + 0.2 * 2.375 * 0.8)]
    assert second == pytest.approx(expected, rel=1e-13)


def test_lars_without_adaptation_or_scale_is_sgd_with_the_rate_inside() -> None:
    p = parameter(3.0, 4.0)
    lars = Lars([{"params": [p], "adapt": False}], momentum=0.5)
    assert step(lars, p, [1.0, 2.0], 0.1) == pytest.approx([2.9, 3.8])
    zero = parameter(0.0, 0.0)
    assert step(Lars([zero]), zero, [1.0, 2.0], 0.1) == pytest.approx([-0.1, -0.2])
    still = parameter(1.0, 2.0)
    assert step(Lars([still]), still, [0.0, 0.0], 0.1) == [1.0, 2.0]


def test_lamb_by_hand() -> None:
    # t = 1: m / (1 - beta1) = g, s / (1 - beta2) = g^2, so r = sign(g) + decay * w = (1 + 0.3, -1 + 0.4)
    p = parameter(3.0, 4.0)
    lamb = Lamb([p], betas=(0.9, 0.99), eps=0.0, weight_decay=0.1)
    r = (1.3, -0.6)
    scale = 0.01 * 5 / math.hypot(*r)
    first = step(lamb, p, [2.0, -7.0], 0.01)
    assert first == pytest.approx([3 - scale * r[0], 4 - scale * r[1]], rel=1e-13)
    # t = 2 with g = (4, 0): m = 0.9 * 0.2 + 0.4 = 0.58, 0.9 * -0.7 = -0.63, over 1 - 0.81 = 0.19;
    # s = 0.99 * 0.04 + 0.16 = 0.1996, 0.99 * 0.49 = 0.4851, over 1 - 0.9801 = 0.0199
    adam = [0.58 / 0.19 / math.sqrt(0.1996 / 0.0199), -0.63 / 0.19 / math.sqrt(0.4851 / 0.0199)]
    r = (adam[0] + 0.1 * first[0], adam[1] + 0.1 * first[1])
    scale = 0.01 * math.hypot(*first) / math.hypot(*r)
    second = step(lamb, p, [4.0, 0.0], 0.01)
    assert second == pytest.approx([first[0] - scale * r[0], first[1] - scale * r[1]], rel=1e-12)


def test_a_changed_rate_needs_no_momentum_correction_in_torchs_form() -> None:
    """Goyal et al. 2017, section 3: v = m v + lr g needs the factor lr_new / lr_old on v; torch's v = m v + g does not.

    Rates as in a warmup and a drop. The corrected second form equals torch's, the uncorrected one does not.
    """
    rates, gradients, m = [0.1, 0.2, 0.4, 0.04, 0.04], [1.0, -2.0, 3.0, 0.5, 1.5], 0.9
    p = parameter(1.0)
    sgd = torch.optim.SGD([p], lr=0.0, momentum=m)
    corrected, uncorrected, v, u, last = 1.0, 1.0, 0.0, 0.0, rates[0]
    for rate, gradient in zip(rates, gradients, strict=True):
        torchs = step(sgd, p, [gradient], rate)[0]
        v = m * v * rate / last + rate * gradient
        u = m * u + rate * gradient
        corrected, uncorrected, last = corrected - v, uncorrected - u, rate
        assert torchs == pytest.approx(corrected, rel=1e-13)
    assert abs(torchs - uncorrected) > 0.1
    # Lars has both forms; without adaptation its own are these two
    for correction, expected in ((True, corrected), (False, uncorrected)):
        p = parameter(1.0)
        lars = Lars([{"params": [p], "adapt": False}], momentum=m, momentum_correction=correction)
        for rate, gradient in zip(rates, gradients, strict=True):
            moved = step(lars, p, [gradient], rate)[0]
        assert moved == pytest.approx(expected, rel=1e-13)


def detector(**norm: Any) -> nn.Module:
    config = Config(
        model=FasterRcnnConfig(backbone="resnet10", neck_channels=16, box_head_channels=32),
        norm=NormConfig(kind="gn", **norm),
    )
    return build_detector(config, num_categories=2, group=SerialCommunicator())


@pytest.mark.parametrize("name", ["sgd", "lars", "lamb"])
@pytest.mark.parametrize("decay_biases", [True, False])
def test_what_decays_and_what_adapts(name: str, decay_biases: bool) -> None:
    model = detector(parameters="no_decay")
    config = SolverConfig(optimizer=name, weight_decay=0.5, decay_biases=decay_biases)  # type: ignore[arg-type]
    optimizer = build_optimizer(model, config, decay_norm=False)
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(group_of) == sum(1 for p in model.parameters() if p.requires_grad)
    named = dict(model.named_parameters())
    weight, norm, bias = (
        group_of[id(named[key])]
        for key in ("backbone.body.conv1.weight", "backbone.body.bn1.weight", "rpn.head.cls_logits.bias")
    )
    assert [g["weight_decay"] for g in (weight, norm, bias)] == [0.5, 0.0, 0.5 if decay_biases else 0.0]
    if name != "sgd":
        assert [g["adapt"] for g in (weight, norm, bias)] == [True, False, False]


@pytest.mark.parametrize("keys", [{"optimizer": "lars"}, {"optimizer": "lamb"}, {"optimizer": "lars", "momentum": 0.5}])
def test_state_goes_through_a_checkpoint(keys: dict[str, Any], tmp_path: Path) -> None:
    """Cut after two steps and continued from the file, the weights of the fourth step have the same bits."""

    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))

    def advance(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for number in steps:
            x = torch.randn(5, 4, generator=torch.Generator().manual_seed(number))
            optimizer.zero_grad()
            model(x).square().sum().backward()
            for group in optimizer.param_groups:
                group["lr"] = 0.1 / (1 + number)
            optimizer.step()

    config = SolverConfig(**keys)
    whole, cut = network(), network()
    advance(whole, build_optimizer(whole, config, decay_norm=True), range(4))
    first = build_optimizer(cut, config, decay_norm=True)
    advance(cut, first, range(2))
    path = save_checkpoint(tmp_path, 2, {"model": cut.state_dict(), "optimizer": first.state_dict()}, keep=1)
    state = load_checkpoint(path)
    resumed = network()
    resumed.load_state_dict(state["model"])
    second = build_optimizer(resumed, config, decay_norm=True)
    second.load_state_dict(state["optimizer"])
    advance(resumed, second, range(2, 4))
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"momentum": 1.0}, r"solver.momentum is 1.0; accepted: 0 to 1, less than 1"),
        ({"optimizer": "lamb", "beta2": 1.0}, "solver.beta2 is 1.0"),
        ({"trust_coefficient": 0.0}, "solver.trust_coefficient is 0.0; accepted: more than 0"),
        ({"optimizer": "lars", "agvm": True}, "solver.agvm is True; accepted: true with solver.optimizer sgd"),
    ],
)
def test_bad_optimizers_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Config(solver=SolverConfig(**keys))
