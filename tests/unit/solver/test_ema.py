from __future__ import annotations

import pytest
import torch
from torch import nn

from megdet_hpc.config import SolverConfig
from megdet_hpc.errors import UserError
from megdet_hpc.solver.ema import WeightAverage, decay_at


def keys(decay: float = 0.9, *, ramp: bool = False) -> SolverConfig:
    return SolverConfig(ema_decay=decay, ema_reference_batch=16, ema_ramp=ramp)


def small() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    model[2].weight.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("iterations", "batches", "expected"),
    [
        (1, 1, 2 / 11),
        (8, 1, 0.5),
        (80, 1, 0.9),  # (1 + 80) / (10 + 80)
        (81, 1, 0.9),
        (8, 2, 0.25),
        (8, 0.5, 0.5**0.5),
        (16, 16, (17 / 26) ** 16),
    ],
)
def test_the_ramp_by_hand(iterations: float, batches: float, expected: float) -> None:
    assert decay_at(keys(ramp=True), iterations, batches) == pytest.approx(expected, rel=1e-12)
    assert decay_at(keys(), iterations, batches) == pytest.approx(0.9**batches, rel=1e-12)


@pytest.mark.parametrize("k", [2, 4, 16])
def test_one_update_of_k_reference_batches_is_k_of_one(k: int) -> None:
    """The rule rho^k, where the weights stay: an average of the same images reaches back equally far."""
    ends = []
    for batch in (16, 16 * k):
        model = small()
        nn.init.zeros_(model[0].weight)
        average = WeightAverage(model, keys())
        nn.init.ones_(model[0].weight)
        for _ in range(16 * k // batch):
            average.update(batch, {})
        assert average.iterations == k
        ends.append(average.state()["model"]["0.weight"])
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(ends[1], torch.full((2, 2), 1 - 0.9**k), rtol=1e-6, atol=0)


def test_weights_and_statistics_are_averaged_and_constants_are_not() -> None:
    model = small()
    first = {name: value.clone() for name, value in model.state_dict().items()}
    average = WeightAverage(model, keys(0.75))
    for value in model.state_dict().values():
        value.add_(1)
    average.update(16, {"1.running_mean": model[1].running_mean + 3})
    state = average.state()["model"]
    assert state.keys() == first.keys()
    for name in ("0.weight", "0.bias", "1.weight", "1.running_var"):
        torch.testing.assert_close(state[name], first[name] + 0.25)
    torch.testing.assert_close(state["1.running_mean"], first["1.running_mean"] + 0.25 * 4)
    for name in ("2.weight", "1.num_batches_tracked"):
        assert torch.equal(state[name], model.state_dict()[name])


def test_the_average_is_lent_to_the_model_and_comes_back() -> None:
    model = small()
    average = WeightAverage(model, keys())
    nn.init.constant_(model[0].weight, 5.0)
    before, pixels = model[0].weight, torch.ones(1, 2)
    model.eval()
    raw = model(pixels)
    with pytest.raises(ZeroDivisionError), average.in_model():
        assert not torch.equal(model(pixels), raw)
        assert model[0].weight is before  # what an optimizer or a hook holds
        raise ZeroDivisionError
    assert torch.equal(model(pixels), raw) and torch.equal(model[0].weight, torch.full((2, 2), 5.0))


def test_a_state_goes_on_and_another_model_is_refused() -> None:
    model = small()
    average = WeightAverage(model, keys(ramp=True))
    nn.init.ones_(model[0].weight)
    average.update(8, {})
    stored = {"model": {k: v.clone() for k, v in average.state()["model"].items()}, "iterations": 0.5}
    again = WeightAverage(model, keys(ramp=True))
    again.load(stored)
    for one in (average, again):
        one.update(8, {})
    assert again.iterations == average.iterations == 1
    for name, value in average.state()["model"].items():
        assert torch.equal(value, again.state()["model"][name]), name
    del stored["model"]["0.bias"]
    with pytest.raises(UserError, match=r"averaged weights have no 0.bias of shape \(2,\)"):
        again.load(stored)
