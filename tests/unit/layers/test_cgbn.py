from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from megdet_hpc.layers.cgbn import CrossGpuBatchNorm2d, convert_batchnorm, share_out
from megdet_hpc.layers.cgbn_function import Exchange
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.serial import SerialCommunicator
from megdet_hpc.parallel.threads import run_ranks
from tests import bodies


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 128])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("exchange", ["two_stage", "packed"])
def test_equals_batchnorm_on_the_concatenated_batch(
    size: int, exchange: Exchange, dtype: torch.dtype, tolerance: float
) -> None:
    run_ranks(size, lambda comm: bodies.check_cgbn(comm, dtype, tolerance, exchange=exchange))


def test_large_mean_does_not_cancel() -> None:
    """Mean 1e4, std 1: float32's E[x^2] - E[x]^2 is off by several units, two passes are not."""
    x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)) + 1e4
    truth = x.double().var((0, 2, 3), unbiased=False)
    one_pass = x.square().mean((0, 2, 3)) - x.mean((0, 2, 3)).square()
    assert (one_pass - truth).abs().max() > 1

    def variance(comm: Communicator) -> torch.Tensor:
        layer = CrossGpuBatchNorm2d(3, group=comm, momentum=1.0)
        layer(x[comm.rank * 2 : comm.rank * 2 + 2])
        assert layer.running_var is not None
        n = x.numel() // 3
        return layer.running_var.double() * (n - 1) / n

    for var in run_ranks(4, variance):
        assert (var - truth).abs().max() < 1e-3


def test_gradcheck() -> None:
    def body(comm: Communicator) -> bool:
        layer = CrossGpuBatchNorm2d(2, group=comm).double()
        x = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
        return torch.autograd.gradcheck(layer, (x,))

    assert run_ranks(1, body) == [True]


def test_state_dict_is_batchnorms_both_ways() -> None:
    theirs = resnet18()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_()  # type: ignore[union-attr]
    state = {k: v.clone() for k, v in theirs.state_dict().items()}
    ours = convert_batchnorm(theirs, group=SerialCommunicator())
    assert ours.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in ours.state_dict().items())
    resnet18().load_state_dict(ours.state_dict())
    names = [m.name for m in ours.modules() if isinstance(m, CrossGpuBatchNorm2d)]
    assert len(set(names)) == len(names) == 20
    assert names[0] == "cgbn.bn1"


def test_conversion_keeps_mode_type_and_frozen_affine() -> None:
    layer = nn.BatchNorm2d(4, eps=1e-3, momentum=None).double().eval()
    layer.weight.requires_grad_(False)
    ours = convert_batchnorm(layer, group=SerialCommunicator())
    assert isinstance(ours, CrossGpuBatchNorm2d)
    assert (ours.eps, ours.momentum, ours.training) == (1e-3, None, False)
    assert ours.weight.dtype == torch.float64
    assert (ours.weight.requires_grad, ours.bias.requires_grad) == (False, True)


def test_one_value_per_channel_is_an_error() -> None:
    layer = CrossGpuBatchNorm2d(3, group=SerialCommunicator(), name="here")
    with pytest.raises(ValueError, match="layer here: expected more than 1 value per channel"):
        layer(torch.zeros(1, 3, 1, 1))


def test_all_ranks_empty_leaves_the_statistics() -> None:
    def body(comm: Communicator) -> None:
        layer = CrossGpuBatchNorm2d(3, group=comm)
        x = torch.zeros(0, 3, 4, 4, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert y.shape == x.shape
        assert layer.running_mean is not None and layer.running_var is not None
        assert layer.running_mean.tolist() == [0, 0, 0]
        assert layer.running_var.tolist() == [1, 1, 1]

    run_ranks(3, body)


def test_half_precision_is_normalized_in_float32() -> None:
    x = torch.randn(4, 3, 8, 8) + 100
    layer, reference = CrossGpuBatchNorm2d(3, group=SerialCommunicator()), nn.BatchNorm2d(3)
    y = layer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    # half a unit in the last of bfloat16's 8 bits, from the one rounding of the output
    torch.testing.assert_close(y.float(), reference(x.bfloat16().float()), rtol=2**-8, atol=1e-4)


def test_cumulative_average_and_untracked_statistics() -> None:
    for options in ({"momentum": None}, {"track_running_stats": False}, {"affine": False}):
        ours = CrossGpuBatchNorm2d(3, group=SerialCommunicator(), **options)  # type: ignore[arg-type]
        theirs = nn.BatchNorm2d(3, **options)  # type: ignore[arg-type]
        for seed in range(3):
            x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
            torch.testing.assert_close(ours(x), theirs(x))
        for key, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[key], value)
        ours.eval(), theirs.eval()
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("exchange", ["two_stage", "packed"])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_a_rank_shares_its_images_out(form: torch.memory_format, exchange: Exchange) -> None:
    """Groups of 2 of 6 images: torch's layer on each of them, its running statistics averaged."""
    torch.manual_seed(0)
    theirs = nn.BatchNorm2d(5).double()
    nn.init.uniform_(theirs.weight)
    nn.init.uniform_(theirs.bias)
    layer = convert_batchnorm(copy.deepcopy(theirs), group=SerialCommunicator(), exchange=exchange)
    share_out(layer, 2, 6)
    layers = [copy.deepcopy(theirs) for _ in range(3)]
    for _ in range(2):
        x = torch.randn(6, 5, 3, 4, dtype=torch.float64).to(memory_format=form).requires_grad_()
        wanted = x.detach().clone().requires_grad_()
        weights = torch.randn(6, 5, 3, 4, dtype=torch.float64)
        y = layer(x)
        truth = torch.cat([own(part) for own, part in zip(layers, wanted.split(2), strict=True)])
        for output in (y, truth):
            (output * weights).sum().backward()
        assert y.is_contiguous(memory_format=form)
        torch.testing.assert_close(y, truth, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(x.grad, wanted.grad, rtol=1e-11, atol=1e-12)
    for name in ("weight", "bias"):
        summed = torch.stack([getattr(own, name).grad for own in layers]).sum(0)
        torch.testing.assert_close(getattr(layer, name).grad, summed, rtol=1e-11, atol=1e-12)
    for name in ("running_mean", "running_var"):
        average = torch.stack([getattr(own, name) for own in layers]).mean(0)
        torch.testing.assert_close(getattr(layer, name), average, rtol=1e-12, atol=1e-12)
    assert int(layer.get_buffer("num_batches_tracked")) == 2
    with pytest.raises(ValueError, match="5 images cannot be shared out into groups of 2"):
        layer(torch.zeros(5, 5, 3, 4, dtype=torch.float64))
    assert "images=2" in repr(layer)


def test_groups_within_ranks_cannot_span_ranks() -> None:
    def body(comm: Communicator) -> None:
        layer = CrossGpuBatchNorm2d(3, group=comm)
        share_out(layer, 2, 4)
        with pytest.raises(ValueError, match="groups of 2 images cannot span 2 ranks"):
            layer(torch.zeros(4, 3, 2, 2))

    run_ranks(2, body)


def test_a_rank_shares_nothing_out_where_whole_ranks_share_statistics() -> None:
    layer = CrossGpuBatchNorm2d(3, group=SerialCommunicator())
    for images in (0, 4, 8):
        share_out(layer, images, 4)
        assert layer.images == 0
