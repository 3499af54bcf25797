"""Updates of many parameters by operators that take lists: the same bits as parameter by parameter."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from megdet_hpc.config import SolverConfig
from megdet_hpc.engine.gradient import GradientNorms
from megdet_hpc.parallel.buckets import Bucket
from megdet_hpc.solver import lists
from megdet_hpc.solver.lars import ratio_or_one
from megdet_hpc.solver.optimizer import build_optimizer

SHAPES = ((5, 3, 3, 3), (17,), (7, 13), (1,), (64, 33), (4, 4))
Update = Callable[[Tensor, Tensor, dict[str, Tensor], float, int, bool], None]


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    return nn.ParameterList([*parameters, nn.Parameter(torch.zeros(3, 4, dtype=dtype))])


def set_gradients(model: nn.Module, seed: int) -> None:
    """Gradients of a seed; the last but one parameter has none."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        gradient = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        parameter.grad = None if parameter.shape == (4, 4) else gradient


def sgd(p: Tensor, g: Tensor, state: dict[str, Tensor], lr: float, _step: int, _adapts: bool) -> None:
    g = g.add(p, alpha=0.01 * (p.ndim > 1))
    state["v"] = state["v"].mul_(0.9).add_(g) if "v" in state else g.clone()
    p.add_(state["v"], alpha=-lr)


def lars(p: Tensor, g: Tensor, state: dict[str, Tensor], lr: float, _step: int, adapts: bool) -> None:
    decay = 0.01 * adapts
    update = g.add(p, alpha=decay)
    if adapts:
        update.mul_(ratio_or_one(0.5 * p.norm(), g.norm() + decay * p.norm()))
    state.setdefault("v", torch.zeros_like(p)).mul_(0.9).add_(update, alpha=lr)
    p.sub_(state["v"])


def lamb(p: Tensor, g: Tensor, state: dict[str, Tensor], lr: float, step: int, adapts: bool) -> None:
    mean = state.setdefault("m", torch.zeros_like(p)).lerp_(g, 1 - 0.9)
    square = state.setdefault("s", torch.zeros_like(p)).mul_(0.999).addcmul_(g, g, value=1 - 0.999)
    update = (mean / (1 - 0.9**step)).div_((square / (1 - 0.999**step)).sqrt_().add_(1e-6))
    update.add_(p, alpha=0.01 * adapts)
    if adapts:
        update.mul_(ratio_or_one(p.norm(), update.norm()))
    p.sub_(update, alpha=lr)


@pytest.mark.parametrize("in_one", [False, True], ids=["lists of one", "one list"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("update", [sgd, lars, lamb])
def test_an_optimizer_is_its_own_parameter_by_parameter(
    update: Update, dtype: torch.dtype, in_one: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lists, "is_gpu", lambda _device: in_one)  # a GPU's lists, on the CPU
    model = network(dtype)
    plain = copy.deepcopy(model)
    name = update.__name__
    config = SolverConfig(optimizer=name, weight_decay=0.01, decay_biases=False, trust_coefficient=0.5)  # type: ignore[arg-type]
    optimizer = build_optimizer(model, config, decay_norm=False)
    states: dict[nn.Parameter, dict[str, Tensor]] = {}
    for number, lr in enumerate((0.1, 0.3, 0.05, 0.05), 1):
        set_gradients(model, number)
        set_gradients(plain, number)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        with torch.no_grad():
            for p in plain.parameters():
                if p.grad is not None:
                    update(p, p.grad, states.setdefault(p, {}), lr, number, p.ndim > 1)
        if number == 2:  # through a checkpoint
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_device_decides_about_fused_sgd_whatever_a_checkpoint_says() -> None:
    optimizer = build_optimizer(network(), SolverConfig(), decay_norm=True)
    stored = optimizer.state_dict()
    for group in stored["param_groups"]:
        group["fused"] = True
    optimizer.load_state_dict(stored)
    assert [group["fused"] for group in optimizer.param_groups] == [None]


@pytest.mark.parametrize("bound", [0.5, 1e6])
def test_clipping_is_torchs(bound: float) -> None:
    model, plain = network(), network()
    set_gradients(model, 1)
    set_gradients(plain, 1)
    norms = GradientNorms(model)
    norms.clip_(model, bound)
    total = nn.utils.clip_grad_norm_(plain.parameters(), bound)
    assert norms.total == float(total)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("wire", [torch.float32, torch.float16], ids=str)
def test_a_bucket_brings_the_mean(wire: torch.dtype) -> None:
    model = network()
    set_gradients(model, 1)
    before = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    bucket = Bucket(list(model.parameters()), wire, "gradients.0")
    bucket.send(lambda buffer, _name: buffer.mul_(3.0).numel)
    bucket.receive(3)
    for parameter, expected in zip(model.parameters(), before, strict=True):
        wanted = (expected.to(wire) * 3.0).float() / 3
        assert parameter.grad is not None and torch.equal(parameter.grad, wanted)


def test_a_first_gradient_that_comes_late_in_fused_sgd() -> None:
    """torch's fused form fails where some momenta are there and others are not."""
    found = []
    for fused in (True, False):
        model = network(torch.float64)
        optimizer = build_optimizer(model, SolverConfig(), decay_norm=True)
        for group in optimizer.param_groups:
            group["fused"], group["lr"] = fused, 0.1
        for seed, late in enumerate((None, 1, 1)):
            set_gradients(model, seed)
            for parameter in model.parameters():
                if parameter.shape == (4, 4) and late:
                    parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        found.append([p.detach().clone() for p in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-14)
