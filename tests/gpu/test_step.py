"""The parts of a training step on a GPU beside the same on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from megdet_hpc.config import SolverConfig
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
