"""Cross-GPU batch normalization on a GPU against nn.BatchNorm2d in float64 on the CPU, of the same rounded values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from megdet_hpc.layers.cgbn import CrossGpuBatchNorm2d
from megdet_hpc.layers.cgbn_function import Exchange
from megdet_hpc.layers.fused import merged, own_row
from megdet_hpc.parallel.serial import SerialCommunicator

CHANNELS = 37
# Relative to the largest value: a channel adds 2 * 33 * 29 values; half precision rounds each output once.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def passes(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Output, gradients and running statistics of one forward and backward pass."""
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(dy)
    assert x.grad is not None
    found = {"y": y.detach(), "dx": x.grad}
    found |= {f"d_{name}": p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return found | {name: value for name, value in layer.named_buffers() if "running" in name}


@pytest.mark.parametrize("exchange", ["two_stage", "packed"])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_layer_is_batch_norm(gpu: torch.device, dtype: torch.dtype, layout: str, exchange: Exchange) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, CHANNELS, 33, 29, generator=generator, dtype=torch.float64).mul_(3).add_(1).to(dtype)
    dy = torch.randn(2, CHANNELS, 33, 29, generator=generator, dtype=torch.float64).to(dtype)
    layer = CrossGpuBatchNorm2d(CHANNELS, group=SerialCommunicator(), exchange=exchange)
    nn.init.uniform_(layer.weight, 0.5, 1.5, generator=generator)
    reference = nn.BatchNorm2d(CHANNELS).double()
    reference.load_state_dict(layer.state_dict(), strict=False)
    if dtype == torch.float64:
        layer.double()
    expected = passes(reference, x.double(), dy.double())
    there = [tensor.to(gpu, memory_format=FORMATS[layout]) for tensor in (x, dy)]
    found = passes(layer.to(gpu), *there)
    assert found["y"].dtype == dtype and found["y"].is_contiguous(memory_format=FORMATS[layout])
    assert found.keys() == expected.keys()
    for name, value in found.items():
        wanted = expected[name]
        error = float((value.cpu().double() - wanted).abs().max() / wanted.abs().max())
        assert error < TOLERANCE[dtype], f"{name}: {error:.1e}"


def test_a_rank_without_images_gives_an_empty_map(gpu: torch.device) -> None:
    layer = CrossGpuBatchNorm2d(CHANNELS, group=SerialCommunicator()).to(gpu)
    x = torch.zeros(0, CHANNELS, 5, 7, device=gpu, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.shape and x.grad is not None and x.grad.shape == x.shape
    assert all(bool(value.isfinite().all()) for value in layer.state_dict().values())


@pytest.mark.parametrize("exchange", ["two_stage", "packed"])
def test_the_host_does_not_wait(gpu: torch.device, exchange: Exchange) -> None:
    layer = CrossGpuBatchNorm2d(CHANNELS, group=SerialCommunicator(), exchange=exchange).to(gpu)
    x = torch.randn(2, CHANNELS, 5, 7, device=gpu, requires_grad=True)
    dy = torch.ones_like(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).backward(dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("shares", [(3, 0, 1), (0, 0, 2, 1), (2, 1)], ids=str)
def test_the_merging_kernel_takes_empty_ranks(gpu: torch.device, shares: tuple[int, ...]) -> None:
    """Rows of several ranks on one GPU, empty ones first, in the middle and nowhere."""
    x = torch.randn(sum(shares), CHANNELS, 9, 5, generator=torch.Generator().manual_seed(3)) + 100
    reference = nn.BatchNorm2d(CHANNELS, momentum=0.25).double()
    reference(x.double())
    rows = torch.stack([own_row(part.to(gpu), 1e-5) for part in x.split(shares)])
    running = torch.zeros(CHANNELS, device=gpu), torch.ones(CHANNELS, device=gpu)
    stats = merged(rows, 1e-5, running, 0.25)
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(stats.mean.cpu().double(), mean, rtol=2e-7, atol=0)
    torch.testing.assert_close(stats.inv_std.cpu().double(), (var + 1e-5).rsqrt(), rtol=1e-5, atol=0)
    assert stats.counts.tolist() == [share * 45 for share in shares]
    for own, name in zip(running, ("running_mean", "running_var"), strict=True):
        torch.testing.assert_close(own.cpu().double(), reference.state_dict()[name], rtol=1e-5, atol=0)
