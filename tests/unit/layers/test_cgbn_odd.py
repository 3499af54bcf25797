"""Odd inputs of the cross-GPU batch norm: what a real training run feeds it sooner or later."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megdet_hpc.bench.counting import CountingCommunicator
from megdet_hpc.layers.cgbn import CrossGpuBatchNorm2d, convert_batchnorm
from megdet_hpc.layers.cgbn_function import Exchange
from megdet_hpc.layers.kernels_cpu import CpuBatch
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.serial import SerialCommunicator
from megdet_hpc.parallel.threads import run_ranks

ALONE = SerialCommunicator()
EXCHANGES = pytest.mark.parametrize("exchange", ["two_stage", "packed"])


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pair(channels: int = 3, **options: Any) -> tuple[CrossGpuBatchNorm2d, nn.BatchNorm2d]:
    """Our layer and torch's with the same weights, float64."""
    theirs = nn.BatchNorm2d(channels, **options).double()
    if theirs.affine:
        nn.init.uniform_(theirs.weight, 0.5, 2)
        nn.init.uniform_(theirs.bias)
    ours = convert_batchnorm(copy.deepcopy(theirs), group=ALONE)
    assert isinstance(ours, CrossGpuBatchNorm2d)
    return ours, theirs


def gradients(layer: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Output and input gradient."""
    x = x.detach().requires_grad_()
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    return y.detach(), dx


def statistics(layer: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    assert layer.running_mean is not None and layer.running_var is not None
    return layer.running_mean, layer.running_var


def test_channels_last_stays_so() -> None:
    ours, theirs = pair()
    x, dy = (draw(4, 3, 5, 7, seed=s).to(memory_format=torch.channels_last) for s in (1, 2))
    y, dx = gradients(ours, x, dy)
    torch.testing.assert_close((y, dx), gradients(theirs, x, dy))
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (y, dx))


@pytest.mark.parametrize("layout", ["strided_x", "strided_dy", "expanded_dy", "transposed", "mixed"])
def test_layouts_that_are_not_dense(layout: str) -> None:
    ours, theirs = pair()
    x, dy = draw(4, 3, 6, 8, seed=1), draw(4, 3, 6, 8, seed=2)
    if layout == "strided_x":
        x = draw(4, 6, 6, 16, seed=3)[:, ::2, :, ::2]
    elif layout == "strided_dy":
        dy = draw(8, 3, 6, 16, seed=3)[::2, :, :, ::2]
    elif layout == "expanded_dy":
        dy = draw(1, 3, 1, 1, seed=3).expand(4, 3, 6, 8)
    elif layout == "transposed":
        x, dy = draw(4, 3, 8, 6, seed=3).transpose(2, 3), draw(6, 3, 4, 8, seed=4).transpose(0, 2)
    else:
        dy = dy.to(memory_format=torch.channels_last)
    before = x.clone()
    torch.testing.assert_close(gradients(ours, x, dy), gradients(theirs, x, dy))
    assert torch.equal(x, before)


@EXCHANGES
def test_gradcheck_over_two_ranks(exchange: Exchange) -> None:
    """Rank 0's and rank 1's gradients against finite differences of the sum of both ranks' losses."""
    shares = (2, 1)
    whole, slope = draw(3, 2, 2, 3), draw(3, 2, 2, 3, seed=1)

    def both(x: Tensor) -> tuple[float, Tensor]:
        def body(comm: Communicator) -> tuple[float, Tensor]:
            layer = CrossGpuBatchNorm2d(2, group=comm, exchange=exchange).double()
            own = x.split(shares)[comm.rank].detach().requires_grad_()
            loss = (layer(own) * slope.split(shares)[comm.rank]).tanh().sum()
            loss.backward()
            assert own.grad is not None
            return loss.item(), own.grad

        results = run_ranks(2, body)
        return sum(loss for loss, _ in results), torch.cat([grad for _, grad in results])

    _, analytic = both(whole)
    step = 1e-6
    numeric = torch.zeros_like(whole)
    for index in range(whole.numel()):
        ends = []
        for sign in (1, -1):
            moved = whole.clone()
            moved.view(-1)[index] += sign * step
            ends.append(both(moved)[0])
        numeric.view(-1)[index] = (ends[0] - ends[1]) / (2 * step)
    torch.testing.assert_close(analytic, numeric, rtol=1e-6, atol=1e-8)


@EXCHANGES
def test_gradcheck_with_affine(exchange: Exchange) -> None:
    layer = CrossGpuBatchNorm2d(2, group=ALONE, exchange=exchange).double()

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))
        return y

    inputs = [draw(3, 2, 2, 2, seed=s) for s in (1,)] + [draw(2, seed=s) for s in (2, 3)]
    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in inputs])


@EXCHANGES
@pytest.mark.parametrize("counts", [(1, 0), (0, 0, 1), (1,)])
def test_one_value_in_the_group_is_an_error_on_every_rank(exchange: Exchange, counts: tuple[int, ...]) -> None:
    def body(comm: Communicator) -> str:
        layer = CrossGpuBatchNorm2d(3, group=comm, exchange=exchange, name="roi")
        with pytest.raises(ValueError, match="layer roi: expected more than 1 value per channel over the group"):
            layer(torch.ones(counts[comm.rank], 3, 1, 1))
        return "raised"

    assert run_ranks(len(counts), body) == ["raised"] * len(counts)


@EXCHANGES
def test_one_value_on_each_of_two_ranks_is_enough(exchange: Exchange) -> None:
    x = draw(2, 3, 1, 1)
    _, theirs = pair()
    expected = theirs(x)

    def body(comm: Communicator) -> Tensor:
        layer = CrossGpuBatchNorm2d(3, group=comm, exchange=exchange).double()
        layer.load_state_dict(theirs.state_dict())
        y: Tensor = layer(x[comm.rank : comm.rank + 1])
        return y

    torch.testing.assert_close(torch.cat(run_ranks(2, body)), expected)


@EXCHANGES
def test_a_rank_without_boxes_takes_part(exchange: Exchange) -> None:
    """An empty rank sends what the others send, gets zero gradients and the same statistics."""
    x = draw(3, 4, 2, 2)

    def body(comm: Communicator) -> tuple[list[str], Tensor, Tensor]:
        counter = CountingCommunicator(comm)
        layer = CrossGpuBatchNorm2d(4, group=counter, exchange=exchange).double()
        own = (x if comm.rank else x[:0]).clone().requires_grad_()
        y = layer(own)
        y.square().sum().backward()
        assert own.grad is not None and own.grad.shape == own.shape and y.shape == own.shape
        assert layer.weight.grad is not None
        return counter.names, layer.weight.grad, statistics(layer)[1]

    (names, weight_grad, var), (other_names, other_grad, other_var) = run_ranks(2, body)
    assert names == other_names
    assert weight_grad.tolist() == [0, 0, 0, 0]
    assert other_grad.abs().max() > 0
    assert torch.equal(var, other_var)


def test_a_layer_used_twice_in_a_step() -> None:
    ours, theirs = pair()
    first, second, dy = (draw(2, 3, 4, 4, seed=s) for s in range(3))
    results = []
    for layer in (ours, theirs):
        layer.zero_grad()
        x = first.clone().requires_grad_()
        (layer(layer(x) + second) * dy).sum().backward()
        results.append((x.grad, layer.weight.grad, layer.bias.grad, *layer.state_dict().values()))
    torch.testing.assert_close(*results)


def test_frozen_affine_and_no_affine() -> None:
    x, dy = draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1)
    for frozen in (("weight",), ("bias",), ("weight", "bias")):
        ours, theirs = pair()
        for layer in (ours, theirs):
            for name in frozen:
                getattr(layer, name).requires_grad_(False)
            y = layer(x.requires_grad_())
            y.backward(dy)
        for name in ("weight", "bias"):
            torch.testing.assert_close(getattr(ours, name).grad, getattr(theirs, name).grad)
        assert all(getattr(ours, name).grad is None for name in frozen)
    ours, theirs = pair(affine=False)
    torch.testing.assert_close(gradients(ours, x, dy), gradients(theirs, x, dy))


def test_an_input_without_gradient_still_trains_the_affine() -> None:
    """The first layer behind frozen ones: no dx is made, but the ranks' messages stay the same."""
    counter = CountingCommunicator(ALONE)
    layer, theirs = pair()
    layer.group = counter
    x, dy = draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1)
    for each in (layer, theirs):
        each(x).backward(dy)
    torch.testing.assert_close(layer.weight.grad, theirs.weight.grad)
    assert len(counter.names) == 3


@EXCHANGES
def test_messages_and_their_names(exchange: Exchange) -> None:
    counter = CountingCommunicator(ALONE)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(3)))
    convert_batchnorm(model, group=counter, exchange=exchange)
    y = model(torch.randn(2, 3, 4, 4).requires_grad_())
    forward = {"two_stage": ["mean", "var"], "packed": ["packed"]}[exchange]
    assert counter.names == [f"cgbn.{path}.{part}" for path in ("0", "1.0") for part in forward]
    counter.reset()
    y.sum().backward()
    assert counter.names == ["cgbn.1.0.backward", "cgbn.0.backward"]
    assert counter.num_bytes == 2 * 6 * 8
    counter.reset()
    model.eval()
    model(torch.randn(2, 3, 4, 4).requires_grad_()).sum().backward()
    assert counter.names == []


def test_no_grad_in_training_mode_moves_the_statistics_alike() -> None:
    ours, theirs = pair()
    x = draw(2, 3, 4, 4)
    with torch.no_grad():
        y = ours(x)
        torch.testing.assert_close(y, theirs(x))
    assert not y.requires_grad
    torch.testing.assert_close(statistics(ours), statistics(theirs))
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x))


@EXCHANGES
def test_activation_checkpointing(exchange: Exchange) -> None:
    """Recomputation sends the forward's messages again, in the same order on every rank.

    The running statistics then move twice in a step, in torch's layer as in ours: a step's batch counts as two.
    """
    x, dy = draw(4, 3, 4, 4), draw(4, 3, 4, 4, seed=1)
    _, theirs = pair()
    start = copy.deepcopy(theirs.state_dict())
    whole = x.clone().requires_grad_()
    checkpoint(theirs, whole, use_reentrant=False).backward(dy)
    assert theirs.num_batches_tracked is not None and int(theirs.num_batches_tracked) == 2

    def body(comm: Communicator) -> tuple[list[str], Tensor]:
        counter = CountingCommunicator(comm)
        layer = CrossGpuBatchNorm2d(3, group=counter, exchange=exchange, name="c").double()
        layer.load_state_dict(start)
        own = x.chunk(2)[comm.rank].clone().requires_grad_()
        checkpoint(layer, own, use_reentrant=False).backward(dy.chunk(2)[comm.rank])
        torch.testing.assert_close(layer.state_dict(), theirs.state_dict())
        assert own.grad is not None
        return counter.names, own.grad

    (names, first), (other_names, second) = run_ranks(2, body)
    forward = ["c.mean", "c.var"] if exchange == "two_stage" else ["c.packed"]
    assert names == other_names == [*forward, *forward, "c.backward"]
    torch.testing.assert_close(torch.cat([first, second]), whole.grad)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 3, 4), (2, 3, 4, 4, 4)])
def test_other_ranks_of_tensors_are_refused_as_torch_does(shape: tuple[int, ...]) -> None:
    counter = CountingCommunicator(ALONE)
    ours, theirs = CrossGpuBatchNorm2d(3, group=counter), nn.BatchNorm2d(3)
    for layer in (ours, theirs):
        with pytest.raises(ValueError, match="expected 4D input"):
            layer(torch.zeros(shape))
    assert counter.names == []


def test_saving_needs_the_state_dict_alone() -> None:
    ours, theirs = pair()
    ours(draw(2, 3, 4, 4)), theirs(draw(2, 3, 4, 4))
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    fresh = nn.BatchNorm2d(3).double()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(fresh.state_dict(), theirs.state_dict())
    again = copy.deepcopy(ours)
    assert again.group.size == 1
    assert torch.equal(again(draw(2, 3, 4, 4, seed=1)), ours(draw(2, 3, 4, 4, seed=1)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mean", [0.0, 3.0, 100.0])
def test_bfloat16_input(weights: torch.dtype, mean: float, layout: torch.memory_format) -> None:
    """Statistics and factors in float32: only the output and the gradient's two terms and their sum are rounded."""
    x, dy = (draw(4, 3, 8, 8, seed=s, dtype=torch.float32) for s in (0, 1))
    x, dy = (t.bfloat16().to(memory_format=layout) for t in (x + mean, dy))
    layer, reference = CrossGpuBatchNorm2d(3, group=ALONE).to(weights), nn.BatchNorm2d(3).double()
    y, dx = gradients(layer, x, dy)
    exact_y, exact_dx = gradients(reference, x.double(), dy.double())
    assert y.dtype == dx.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact_y, rtol=2**-8, atol=1e-4)
    # each rounding errs by at most 2^-9 of its result, and neither term is larger than |scale * dy| and |dx| together
    scale = x.double().var((0, 2, 3), correction=0).add(reference.eps).rsqrt().view(-1, 1, 1)
    bound = 2**-8 * ((scale * dy.double()).abs() + exact_dx.abs()) + 0.02
    assert ((dx.double() - exact_dx).abs() <= bound).all()
    assert float((dx.double() - exact_dx).square().mean().sqrt()) < 2**-8
    for ours, theirs in zip(statistics(layer), statistics(reference), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2**-7 if weights == torch.bfloat16 else 1e-5, atol=1e-5)


@EXCHANGES
def test_bfloat16_over_ranks(exchange: Exchange) -> None:
    """Uneven and empty batches of three ranks give the statistics and the outputs of one batch."""
    shares = (3, 0, 2)
    whole = (draw(5, 4, 6, 5, dtype=torch.float32) * 3 + 20).bfloat16()
    reference = nn.BatchNorm2d(4).double()
    expected = reference(whole.double())

    def body(group: Communicator) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        layer = CrossGpuBatchNorm2d(4, group=group, exchange=exchange)
        return layer(whole.split(shares)[group.rank]).detach(), statistics(layer)

    found = run_ranks(3, body)
    torch.testing.assert_close(torch.cat([y for y, _ in found]).double(), expected.detach(), rtol=2**-8, atol=1e-3)
    for _, own in found:
        torch.testing.assert_close([s.double() for s in own], list(statistics(reference)), rtol=1e-5, atol=1e-5)


def test_autocast() -> None:
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    ours = convert_batchnorm(copy.deepcopy(theirs), group=ALONE)
    x = draw(2, 3, 6, 6, dtype=torch.float32)
    for model in (ours, theirs):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    # 2 ** -7: torch's layer rounds its own intermediate results to bfloat16
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=2**-5, atol=2**-6 * float(b.grad.abs().max()))
    torch.testing.assert_close(statistics(ours[1]), statistics(theirs[1]), rtol=1e-3, atol=1e-5)


def test_large_mean_leaves_output_and_gradient_exact() -> None:
    """float32 at mean 1e4: the layer keeps the mean in two numbers, so only the input's own rounding is left."""
    x = draw(4, 3, 16, 16, dtype=torch.float32) + 1e4
    dy = draw(4, 3, 16, 16, seed=1, dtype=torch.float32)
    exact = gradients(nn.BatchNorm2d(3).double(), x.double(), dy.double())
    for exchange in ("two_stage", "packed"):
        layer = CrossGpuBatchNorm2d(3, group=ALONE, exchange=exchange)  # type: ignore[arg-type]
        for value, truth in zip(gradients(layer, x, dy), exact, strict=True):
            assert (value.double() - truth).abs().max() < 1e-5


@pytest.mark.parametrize("mean", [0.0, 3.9, 4.1, 100.0])
@pytest.mark.parametrize("exchange", ["two_stage", "packed"])
def test_means_near_and_far_from_zero_are_as_exact(mean: float, exchange: Exchange) -> None:
    """Up to 4 standard deviations x itself is summed and scaled, further away x - mean is; one channel decides."""
    x = draw(4, 3, 16, 16, dtype=torch.float32)
    x[:, 1] += mean
    dy = draw(4, 3, 16, 16, seed=1, dtype=torch.float32)
    exact = gradients(nn.BatchNorm2d(3).double(), x.double(), dy.double())
    layer = CrossGpuBatchNorm2d(3, group=ALONE, exchange=exchange)
    for value, truth in zip(gradients(layer, x, dy), exact, strict=True):
        # 4 standard deviations of mean cost two of float32's 24 bits
        torch.testing.assert_close(value.double(), truth, rtol=2e-6, atol=2e-6 * float(truth.abs().max()))


def test_which_means_count_as_near() -> None:
    x = draw(4, 3, 16, 16, dtype=torch.float32)
    near = CpuBatch(x)
    assert near.near
    far = CpuBatch(x + torch.tensor([0.0, 5.0, 0.0]).view(3, 1, 1))
    assert not far.near
    # the variance does not depend on the path
    torch.testing.assert_close(far.own_var, near.own_var, rtol=1e-5, atol=0)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(3, 5, 16, 16), (1, 5, 40, 1), (2, 1, 1, 7), (4, 5, 1, 1)])
def test_moments_where_the_sample_misleads(shape: tuple[int, ...], memory_format: torch.memory_format) -> None:
    """The few pixels from which the layer guesses a mean may lie far from all others."""
    x = draw(*shape, dtype=torch.float32).contiguous(memory_format=memory_format)
    x[shape[0] // 2] += 50
    batch = CpuBatch(x)
    axes = (0, 2, 3)
    torch.testing.assert_close(batch.own_mean, x.double().mean(axes), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(batch.own_var, x.double().var(axes, correction=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", ["x", "gradient"])
def test_one_image_of_channels_last_with_another_stride(layer: str) -> None:
    """torch's batch norm on CPUs finds a wrong gradient for such an image."""
    values = [torch.randn(1, 16, 8, 8, dtype=torch.float64) for _ in range(2)]
    odd = torch.randn(1024, dtype=torch.float64).as_strided((1, 16, 8, 8), (16, 1, 128, 16))
    assert odd.is_contiguous(memory_format=torch.channels_last)
    values[layer == "gradient"] = odd
    found = []
    for x, dy in (values, [value.clone(memory_format=torch.contiguous_format) for value in values]):
        x = x.detach().requires_grad_()
        CrossGpuBatchNorm2d(16, group=SerialCommunicator()).double()(x).backward(dy)
        assert x.grad is not None
        found.append(x.grad)
    assert torch.allclose(found[0], found[1], atol=1e-12)
