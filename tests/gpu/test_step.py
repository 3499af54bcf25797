"""The parts of a training step on a GPU beside the same on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from megdet_hpc.config import Config, SolverConfig
from megdet_hpc.engine.arithmetic import set_arithmetic
from megdet_hpc.engine.gradient import GradientNorms
from megdet_hpc.solver.optimizer import build_optimizer
from tests.unit.solver.test_lists import network, set_gradients


@pytest.mark.parametrize("name", ["sgd", "lars", "lamb"])
def test_optimizers_take_all_parameters_at_once_with_the_cpus_result(gpu: torch.device, name: str) -> None:
    model = network(torch.float64)
    there = copy.deepcopy(model).to(gpu)
    config = SolverConfig(optimizer=name, weight_decay=0.01, trust_coefficient=0.5)  # type: ignore[arg-type]
    optimizers = [build_optimizer(each, config, decay_norm=False) for each in (model, there)]
    if name == "sgd":
        assert all(group["fused"] for group in optimizers[1].param_groups)
    for number in (1, 2, 3):
        set_gradients(model, number)
        for ours, theirs in zip(model.parameters(), there.parameters(), strict=True):
            theirs.grad = None if ours.grad is None else ours.grad.to(gpu)
        for each, optimizer in zip((model, there), optimizers, strict=True):
            GradientNorms(each).clip_(each, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = 0.1
            optimizer.step()
    for ours, theirs in zip(model.parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(theirs.cpu(), ours, rtol=1e-12, atol=1e-14)


def kernels(run: torch.profiler.profile) -> int:
    """Number of kernels that a profile saw."""
    return sum(event.count for event in run.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA)


@pytest.mark.parametrize("name", ["sgd", "lamb"])
def test_the_number_of_kernels_does_not_grow_with_the_parameters(gpu: torch.device, name: str) -> None:
    found = []
    for number in (20, 80):
        model = nn.ParameterList([nn.Parameter(torch.ones(64, device=gpu)) for _ in range(number)])
        optimizer = build_optimizer(model, SolverConfig(optimizer=name), decay_norm=True)  # type: ignore[arg-type]
        for turn in range(2):  # the first makes the state
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                GradientNorms(model).clip_(model, 1.0)
                optimizer.step()
                torch.cuda.synchronize(gpu)
            if turn:
                found.append(kernels(profile))
    assert found[1] <= found[0] + 8


@pytest.mark.parametrize("choice", ["none", "convolutions", "all"])
def test_tf32_shortens_what_it_is_asked_to(gpu: torch.device, choice: str) -> None:
    """A product of numbers that TF32 cannot hold, on a GPU that has TF32."""
    if torch.cuda.get_device_capability(gpu) < (8, 0) or torch.version.hip:
        pytest.skip("this GPU has no TF32")
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    try:
        set_arithmetic(Config(solver=SolverConfig(tf32=choice)))  # type: ignore[arg-type]
        a = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).to(gpu)
        image, kernel = a.view(1, 256, 16, 16), torch.randn(64, 256, 3, 3, device=gpu)
        product = float((a @ a - (a.double() @ a.double())).abs().max())
        convolved = nn.functional.conv2d(image, kernel, padding=1)
        whole = nn.functional.conv2d(image.double(), kernel.double(), padding=1)
        convolution = float((convolved - whole).abs().max())
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
    assert (product > 1e-3) is (choice == "all")
    assert choice != "none" or convolution < 1e-3
