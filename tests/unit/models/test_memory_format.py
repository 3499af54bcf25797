"""model.memory_format: the layout of the feature maps of every family, and the same losses and gradients in both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.families import DRAWS, FAMILIES, batch, build


def _passed(family: str, memory_format: str) -> tuple[dict[str, Tensor], dict[str, Tensor], list[bool]]:
    """Sums of the losses, gradients, and whether the output of each convolution has its channels last."""
    detector = build(family, memory_format=memory_format)
    last: list[bool] = []

    def look(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        if min(output.shape[1:]) > 1:
            last.append(output.is_contiguous(memory_format=torch.channels_last))

    for module in detector.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(look)
    losses = {key: loss.value for key, loss in detector.losses(batch(), DRAWS).items()}
    sum(losses.values(), torch.zeros(())).backward()
    gradients = {name: p.grad for name, p in detector.named_parameters() if p.grad is not None}
    return {key: value.detach() for key, value in losses.items()}, gradients, last


@pytest.mark.parametrize("family", FAMILIES)
def test_channels_last_is_the_same_but_for_rounding(family: str) -> None:
    losses, gradients, last = _passed(family, "contiguous")
    assert not any(last)
    other_losses, other_gradients, other_last = _passed(family, "channels_last")
    # heads of regions see pooled maps, which RoIAlign makes contiguous
    assert sum(other_last) > len(other_last) / 2
    torch.testing.assert_close(other_losses, losses)
    assert other_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert other_gradients[name].stride() == gradient.stride(), name
        torch.testing.assert_close(other_gradients[name], gradient, atol=1e-9, rtol=1e-6)
