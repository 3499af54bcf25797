"""Training in half precision: autocast around the forward, float32 where coordinates are formed, loss scaling.

Weights stay float32, so their gradients, the allreduce (Horovod has no bfloat16) and the optimizer do too.
float16 has 5 bits of exponent: gradients of activations below 6e-8 would vanish. The losses are therefore multiplied
by a scale before the backward pass and the gradients divided by it after the allreduce (Micikevicius et al., Mixed
Precision Training, ICLR 2018, section 3.2). torch's GradScaler halves the scale after a gradient that is not finite,
and doubles it after 2,000 updates in a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megdet_hpc.models.detector import Detector

_HALF = (torch.float16, torch.bfloat16)


class Precision:
    """The type of a run's forward passes and, in float16, the scale of its losses; no method is a collective.

    The scale moves by the averaged gradient, which all ranks have, so it is equal on all of them.

    Args:
        name: as solver.precision.
        device: of the model.

    Attributes:
        scaler: of the losses; in other types than float16 it changes nothing.
    """

    def __init__(self, name: str = "float32", device: torch.device | None = None) -> None:
        self.name = name
        device = device or torch.device("cpu")
        self._device = device.type
        self.scaler = torch.amp.GradScaler(self._device, enabled=name == "float16")
        # its state is made at the first use, which would be that of several threads where ranks are emulated
        self.scaler.scale(torch.zeros((), device=device))

    def autocast(self) -> torch.autocast:
        """The context of a training forward."""
        half = torch.float16 if self.name == "float16" else torch.bfloat16
        return torch.autocast(self._device, half, enabled=self.name != "float32")


def keep_coordinates_float32(model: Detector) -> None:
    """Let what becomes coordinates or scores leave its module in float32 under autocast, in place.

    torchvision makes anchors and decodes boxes in the type it is given; bfloat16 has 8 bits, so that coordinates
    beyond 1,024 px would come in steps of 8. Without autocast nothing changes. Not a collective.
    """
    for module in model.coordinate_modules():
        module.register_forward_hook(_widen_output)


def _widen_output(_module: nn.Module, _inputs: Any, output: Any) -> Any:
    return _widened(output)


def _widened(output: Any) -> Any:
    """Half-precision tensors in float32, in whatever dict, list or tuple a module returns."""
    if isinstance(output, Tensor):
        return output.float() if output.dtype in _HALF else output
    if isinstance(output, dict):
        return type(output)((key, _widened(value)) for key, value in output.items())
    return type(output)(_widened(value) for value in output)
