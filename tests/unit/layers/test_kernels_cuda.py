"""CUDA's arithmetic of the layer between the fused kernels, on the CPU.

torch has the four kernels for CUDA alone. Here they are written out from what they compute, so what is tested is what
the layer makes of their results. The kernels themselves are tested by `bn_check --device cuda`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from megdet_hpc.layers import cgbn
from megdet_hpc.layers.cgbn import CrossGpuBatchNorm2d
from megdet_hpc.layers.cgbn_function import Exchange
from megdet_hpc.layers.kernels_cuda import CudaBatch
from megdet_hpc.parallel.communicator import Communicator
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
    unused = mean.new_empty(0)
    return grad_out.sum(AXES), (grad_out * (input - _wide(mean))).sum(AXES), unused, unused


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
    assert count.dtype == torch.int32 and count.shape == (1,)
    scale = invstd if weight is None else weight * invstd
    slope = _wide(invstd.square() * sum_dy_xmu / count)
    return _wide(scale) * (grad_out - _wide(sum_dy / count) - (input - _wide(mean)) * slope)


@pytest.fixture(autouse=True)
def kernels_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    library = torch.library.Library("aten", "IMPL")
    found: dict[str, Callable[..., object]] = {
        "batch_norm_stats": _stats,
        "batch_norm_elemt": _elemt,
        "batch_norm_backward_reduce": _reduce,
        "batch_norm_backward_elemt": _backward_elemt,
    }
    for name, kernel in found.items():
        library.impl(name, kernel, "CPU")
    monkeypatch.setattr(cgbn, "local_batch", CudaBatch)
    yield
    library._destroy()


@pytest.mark.parametrize("exchange", ["two_stage", "packed"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_uneven_and_empty_batches_as_one(exchange: Exchange, affine: bool, mean: float) -> None:
    shares, size = (3, 0, 1), (5, 4)
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
