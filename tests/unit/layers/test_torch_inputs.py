"""torch's own inputs of nn.BatchNorm2d, with which torch tests it: the layer alone in its group gives the same."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megdet_hpc.layers.cgbn import CrossGpuBatchNorm2d, convert_batchnorm
from megdet_hpc.layers.cgbn_function import Exchange
from megdet_hpc.parallel.serial import SerialCommunicator

with pytest.MonkeyPatch.context() as patch:
    # torch's test tools forbid the whole process to set flags of cuDNN, which other tests do
    patch.setattr(torch.backends, "disable_global_flags", lambda: None)
    from torch.testing._internal.common_modules import module_db

INFO = next(info for info in module_db if info.module_cls is nn.BatchNorm2d)


def inputs(dtype: torch.dtype, requires_grad: bool, training: bool) -> list[Any]:
    torch.manual_seed(0)
    found: list[Any] = INFO.module_inputs_func(
        INFO, device="cpu", dtype=dtype, requires_grad=requires_grad, training=training
    )
    return found


def run(layer: nn.Module, x: Tensor, training: bool) -> dict[str, Tensor | None]:
    """The output, all gradients and all buffers of one forward and backward pass."""
    layer.train(training)
    x = x.detach().clone().requires_grad_(x.requires_grad)
    y = layer(x)
    if y.requires_grad:
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    gradients = {f"gradient of {name}": p.grad for name, p in layer.named_parameters()}
    return {"y": y.detach(), "gradient of x": x.grad, **gradients, **dict(layer.named_buffers())}


@pytest.mark.parametrize("number", range(len(inputs(torch.float32, True, True))))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exchange", ["two_stage", "packed"])
def test_is_batchnorm_on_torchs_own_inputs(number: int, dtype: torch.dtype, exchange: Exchange) -> None:
    for requires_grad, training in itertools.product((True, False), (True, False)):
        given = inputs(dtype, requires_grad, training)[number]
        arguments, keywords = given.constructor_input.args, given.constructor_input.kwargs
        theirs = nn.BatchNorm2d(*arguments, **keywords, dtype=dtype)
        ours = CrossGpuBatchNorm2d(*arguments, **keywords, dtype=dtype, group=SerialCommunicator(), exchange=exchange)
        x = given.forward_input.args[0]
        expected, found = run(theirs, x, training), run(ours, x, training)
        assert found.keys() == expected.keys()
        torch.testing.assert_close(found, expected)


def test_a_layer_without_offset_is_converted_and_stays_without() -> None:
    layer = nn.BatchNorm2d(3)
    layer.register_parameter("bias", None)
    ours = convert_batchnorm(layer, group=SerialCommunicator())
    assert isinstance(ours, CrossGpuBatchNorm2d) and ours.bias is None and ours.weight is not None
