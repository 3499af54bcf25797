from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.ops import FrozenBatchNorm2d

from megdet_hpc.layers.frozen import FrozenNorm

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def layers() -> tuple[FrozenNorm, FrozenBatchNorm2d]:
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.rand(5, generator=generator) + 0.5 for name in ("weight", "bias", "running_mean")}
    ours, theirs = FrozenNorm(5), FrozenBatchNorm2d(5)
    for layer in (ours, theirs):
        layer.load_state_dict({**state, "running_var": torch.full((5,), 0.3)})
    return ours, theirs


def run(layer: FrozenBatchNorm2d, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output and gradient of the input."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(torch.ones_like(y))
    assert x.grad is not None
    return y.detach(), x.grad


def test_float32_has_torchvisions_bits_and_state() -> None:
    ours, theirs = layers()
    x = torch.randn(2, 5, 7, 9)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for own, other in zip(run(ours, x), run(theirs, x), strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_stays_and_is_rounded_once(dtype: torch.dtype, layout: str) -> None:
    ours, theirs = layers()
    x = torch.randn(2, 5, 7, 9).to(dtype).contiguous(memory_format=FORMATS[layout])
    with torch.autocast("cpu", torch.bfloat16):
        y, gradient = run(ours, x)
    wanted, slope = run(theirs, x.float())
    assert y.dtype == gradient.dtype == dtype and y.is_contiguous(memory_format=FORMATS[layout])
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(y.float(), wanted, rtol=step, atol=step / 8)
    torch.testing.assert_close(gradient.float(), slope, rtol=step, atol=0)
    assert theirs(x).dtype == torch.float32  # the reason for the class


def test_half_precision_keeps_a_number_a_channel_for_the_gradient() -> None:
    """torch's kernel alone would keep the whole input."""
    ours, _ = layers()
    kept: list[int] = []
    x = torch.randn(2, 5, 7, 9).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        ours(x)
    assert kept == [5]
