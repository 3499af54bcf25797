"""CUDA's arithmetic of the layer between the fused kernels, on the CPU.

torch has these kernels for CUDA alone. Here they are written out from what they compute, so what is tested is what
the layer makes of their results. The kernels themselves are tested by `bn_check --device cuda`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megdet_hpc import bn_check
from megdet_hpc.layers import cgbn
from megdet_hpc.layers.cgbn import CrossGpuBatchNorm2d
from megdet_hpc.layers.cgbn_function import Exchange
from megdet_hpc.layers.kernels_cuda import CudaBatch
from megdet_hpc.layers.recompute import recomputed
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.serial import SerialCommunicator
from megdet_hpc.parallel.threads import run_ranks

AXES = (0, 2, 3)


def _wide(vector: Tensor) -> Tensor:
    return vector.view(-1, 1, 1)


def _stats(input: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(biased variance + eps), in float32 for half precision."""
    var, mean = torch.var_mean(input.double(), AXES, correction=0)
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    return mean.to(dtype), (var + eps).rsqrt().to(dtype)


def _elemt(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor, eps: float
) -> Tensor:
    y = (input - _wide(mean)) * _wide(invstd)
    y = y if weight is None else y * _wide(weight)
    return (y if bias is None else y + _wide(bias)).to(input.dtype)


def _reduce(
    grad_out: Tensor,
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    input_g: bool,
    weight_g: bool,
    bias_g: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sum_dy, sum_dy_c = grad_out.sum(AXES), (grad_out * (input - _wide(mean))).sum(AXES)
    vector = mean.dtype
    return sum_dy.to(vector), sum_dy_c.to(vector), (sum_dy_c * invstd).to(vector), sum_dy.to(vector)


def _gather(
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    """Rank by rank in the type of the vectors, with its whole sum of counts (torch, Normalization.cuh)."""
    expected = input.dtype if running_mean is None else running_mean.dtype
    assert counts.dtype == expected == mean.dtype == invstd.dtype
    total, merged_mean, merged_squares = 0, torch.zeros_like(mean[0]), torch.zeros_like(mean[0])
    for own_mean, own_invstd, count in zip(mean, invstd, counts, strict=True):
        before = torch.tensor(total, dtype=counts.dtype)
        var = 1 / own_invstd
        factor = 1 / (before + count)
        squares = (var * var - eps) * count
        merged_squares = merged_squares + squares + (merged_mean - own_mean).square() * before * count * factor
        merged_mean = before * factor * merged_mean + count * factor * own_mean
        total = int(before + count)
    for running, new in ((running_mean, merged_mean), (running_var, merged_squares / (total - 1))):
        if running is not None:
            running.mul_(1 - momentum).add_(new * momentum)
    return merged_mean, 1 / (merged_squares / total + eps).sqrt()


def _backward_elemt(
    grad_out: Tensor,
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    count: Tensor,
) -> Tensor:
    assert count.dtype == torch.int32 and count.dim() == 1 and count.is_contiguous()
    n = count.sum()
    scale = invstd if weight is None else weight * invstd
    slope = _wide(invstd.square() * sum_dy_xmu / n)
    return (_wide(scale) * (grad_out - _wide(sum_dy / n) - (input - _wide(mean)) * slope)).to(input.dtype)


@pytest.fixture(autouse=True)
def kernels_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    library = torch.library.Library("aten", "IMPL")
    found: dict[str, Callable[..., object]] = {
        "batch_norm_stats": _stats,
        "batch_norm_gather_stats_with_counts": _gather,
        "batch_norm_elemt": _elemt,
        "batch_norm_backward_reduce": _reduce,
        "batch_norm_backward_elemt": _backward_elemt,
    }
    for name, kernel in found.items():
        library.impl(name, kernel, "CPU")
    monkeypatch.setattr(cgbn, "local_batch", CudaBatch)
    monkeypatch.setattr(cgbn, "has_kernels", lambda _x: True)
    yield
    library._destroy()


@pytest.mark.parametrize("exchange", ["two_stage", "packed"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("shares", [(3, 0, 1), (0, 0, 2, 2), (1,)], ids=str)
def test_uneven_and_empty_batches_as_one(
    exchange: Exchange, affine: bool, mean: float, shares: tuple[int, ...]
) -> None:
    size = (5, 4)
    generator = torch.Generator().manual_seed(1)
    whole = torch.randn(sum(shares), 6, *size, generator=generator, dtype=torch.float64) + mean
    slope = torch.randn(whole.shape, generator=generator, dtype=torch.float64)
    oracle = nn.BatchNorm2d(6, affine=affine).double()
    if affine:
        nn.init.uniform_(oracle.weight, 0.5, 2)
        nn.init.uniform_(oracle.bias)
    x = whole.clone().requires_grad_()
    expected = oracle(x)
    expected.backward(slope)

    def body(comm: Communicator) -> tuple[Tensor, Tensor | None, list[Tensor | None], dict[str, Tensor]]:
        layer = CrossGpuBatchNorm2d(6, affine=affine, group=comm, exchange=exchange).double()
        if affine:
            with torch.no_grad():
                layer.weight.copy_(oracle.weight)
                layer.bias.copy_(oracle.bias)
        own = whole.split(shares)[comm.rank].clone().requires_grad_()
        y = layer(own)
        y.backward(slope.split(shares)[comm.rank])
        return y.detach(), own.grad, [p.grad for p in layer.parameters()], layer.state_dict()

    found = run_ranks(len(shares), body)
    torch.testing.assert_close(torch.cat([y for y, *_ in found]), expected.detach())
    torch.testing.assert_close(torch.cat([dx for _, dx, *_ in found if dx is not None]), x.grad)
    for index, parameter in enumerate(oracle.parameters()):
        parts = [grads[index] for _, _, grads, _ in found]
        torch.testing.assert_close(sum(part for part in parts if part is not None), parameter.grad)
    for *_, state in found:
        for key in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(state[key], oracle.state_dict()[key])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_types_of_vectors(dtype: torch.dtype) -> None:
    """Messages in float64, the mean in float32 but for float64."""
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(2)).to(dtype)
    batch = CudaBatch(x)
    assert {batch.own_mean.dtype, batch.own_var.dtype} == {torch.float64}
    assert batch.own_mean.shape == batch.own_var.shape == (3,)
    stats = batch.statistics(batch.own_mean, batch.own_var, torch.tensor(32.0, dtype=torch.float64))
    assert stats.centre.mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)  # type: ignore[attr-defined]
    y = batch.normalize(stats, weight=None, bias=None, eps=1e-5)
    assert y.dtype == dtype
    # half precision rounds the output to 8 bits (bfloat16)
    assert y.double().mean((0, 2, 3)).abs().max() < 1e-2
    assert (y.double().square().mean((0, 2, 3)) - 1).abs().max() < 2e-2


def worst(case: bn_check.Case, ranks: int, exchange: Exchange) -> dict[str, float]:
    """The largest errors of bn_check over ranks."""
    found = run_ranks(ranks, lambda comm: bn_check.layer_errors(comm, case, exchange, torch.device("cpu")))
    return {key: max(errors[key] for errors in found) for key in found[0]}


@pytest.mark.parametrize("exchange", ["two_stage", "packed"])
@pytest.mark.parametrize("case", bn_check.cases(), ids=lambda case: f"{case.name}, {case.dtype}")
def test_bn_check_passes(case: bn_check.Case, exchange: Exchange) -> None:
    errors = worst(case, 4, exchange)
    assert {key: error for key, error in errors.items() if not error <= case.tolerance} == {}


def test_many_ranks_keep_the_digits_of_a_large_mean() -> None:
    """Means merged as they are, rank by rank in float32, would be wrong by 6e-3 of a deviation on 128 ranks."""
    errors = worst(bn_check.cases()[-1], 32, "packed")
    assert max(errors.values()) < bn_check.LARGE_MEAN_TOLERANCE / 2


class Operators(TorchDispatchMode):
    """Counts torch's operators, and what a GPU would wait for, but not views."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func is not torch.ops.aten.detach.default:
            self.found.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("exchange", "forward", "backward", "messages"), [("two_stage", 29, 11, 3), ("packed", 11, 3, 2)]
)
def test_operators_and_messages_of_a_layer(exchange: Exchange, forward: int, backward: int, messages: int) -> None:
    """Each operator is a kernel on a GPU, or a few. None is read by the host."""
    group = Counting()
    layer = CrossGpuBatchNorm2d(5, group=group, exchange=exchange)
    x = torch.randn(2, 5, 4, 4, requires_grad=True)
    dy = torch.ones_like(x)
    with Operators() as there:
        y = layer(x)
    with Operators() as back:
        y.backward(dy)
    assert (len(there.found), len(back.found), group.sent) == (forward, backward, messages)
    assert "_local_scalar_dense" not in there.found + back.found


class Counting(SerialCommunicator):
    """A group of one rank that counts its messages."""

    sent = 0

    def allreduce_sum_(self, tensor: Tensor, *, name: str) -> None:
        self.sent += 1

    def allgather_tensor(self, tensor: Tensor, *, name: str) -> Tensor:
        self.sent += 1
        return tensor[None]


def test_a_second_run_moves_no_statistics_and_sends_no_message() -> None:
    group = Counting()
    layer = CrossGpuBatchNorm2d(5, group=group, exchange="packed")
    plain = copy.deepcopy(layer)
    x = torch.randn(2, 5, 4, 4)
    for run in (lambda own: recomputed(layer, own), plain):
        run(x.clone().requires_grad_()).sum().backward()
    assert group.sent == 2
    for name, value in layer.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name])


@pytest.mark.parametrize("momentum", [None, 0.25])
def test_running_statistics_of_another_type(momentum: float | None) -> None:
    """The kernel takes statistics of its own type only."""
    x = torch.randn(4, 5, 4, 4)
    layer = CrossGpuBatchNorm2d(5, momentum=momentum, group=SerialCommunicator(), exchange="packed")
    oracle = nn.BatchNorm2d(5, momentum=momentum)
    layer.double()
    for _ in range(2):
        layer(x)
        oracle(x)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(layer.state_dict()[name], oracle.state_dict()[name].double(), rtol=1e-5, atol=1e-6)


def test_one_value_over_the_group_is_refused_and_none_changes_nothing() -> None:
    def body(comm: Communicator) -> dict[str, Tensor]:
        layer = CrossGpuBatchNorm2d(5, group=comm, exchange="packed")
        layer(torch.zeros(0, 5, 1, 1, requires_grad=True)).sum().backward()
        with pytest.raises(ValueError, match="expected more than 1 value per channel over the group, got 1"):
            layer(torch.zeros(int(comm.rank == 1), 5, 1, 1))
        return layer.state_dict()

    for state in run_ranks(2, body):
        assert torch.equal(state["running_mean"], torch.zeros(5)) and torch.equal(state["running_var"], torch.ones(5))
