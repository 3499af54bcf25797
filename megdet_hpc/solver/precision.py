"""Training in half precision: autocast in the forward pass, float32 for coordinates, a scale for the losses.

Weights stay float32. So do their gradients, the allreduce (Horovod has no bfloat16) and the optimizer. float16 has 5
bits of exponent, so gradients of activations below 6e-8 would vanish. Therefore the losses are multiplied by a scale
before the backward pass, and the gradients are divided by it after the allreduce (Micikevicius et al., Mixed Precision
Training, ICLR 2018, section 3.2). torch's GradScaler halves the scale after a gradient that is not finite. It doubles
the scale after 2,000 finite updates in a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megdet_hpc.models.detector import Detector

_HALF = (torch.float16, torch.bfloat16)


class Precision:
    """The type of a run's forward passes and, in float16, the scale of its losses. No method is a collective.

    The scale depends on the averaged gradient, which all ranks have. So it is equal on all ranks.

    Args:
        name: value of solver.precision.
        device: device of the model.

    Attributes:
        scaler: scale of the losses; except in float16 it changes nothing.
    """

    def __init__(self, name: str = "float32", device: torch.device | None = None) -> None:
        self.name = name
        device = device or torch.device("cpu")
        self._device = device.type
        self.scaler = torch.amp.GradScaler(self._device, enabled=name == "float16")
        # the first use makes its state; where ranks are emulated, several threads would do so at once
        self.scaler.scale(torch.zeros((), device=device))

    def autocast(self) -> torch.autocast:
        """The context of a forward pass in training."""
        half = torch.float16 if self.name == "float16" else torch.bfloat16
        return torch.autocast(self._device, half, enabled=self.name != "float32")


def ready_for_half_precision(model: Detector) -> None:
    """Make a detector right under autocast: float32 for coordinates, and whole gradients of narrow maps.

    Without autocast nothing changes. The model is changed in place. Not a collective.
    """
    keep_coordinates_float32(model)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and _output_width(module, 1) == _output_width(module, 2):
            module.register_forward_pre_hook(_wider_map)


def keep_coordinates_float32(model: Detector) -> None:
    """Make modules return float32 under autocast if coordinates or scores come from their outputs.

    torchvision makes anchors and decodes boxes in the type that it is given. bfloat16 has 8 bits, so coordinates beyond
    1,024 px would come in steps of 8. Without autocast nothing changes. The model is changed in place. Not a
    collective.
    """
    for module in model.coordinate_modules():
        module.register_forward_hook(_widen_output)


def _output_width(conv: nn.Conv2d, width: int) -> int:
    """The width of the output for an input of some width; padding "same" and "valid" go with stride 1 or none."""
    padding = 0 if isinstance(conv.padding, str) else int(conv.padding[1])
    return (width + 2 * padding - conv.dilation[1] * (conv.kernel_size[1] - 1) - 1) // conv.stride[1] + 1


def _wider_map(conv: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
    """A map one cell wide with a column of zeros behind it, in bfloat16 on a CPU. The output is the same.

    PyTorch 2.14.1 leaves parts of the weight's gradient unset there: memory's old content, often not finite
    (measured with kernels of 3, 5 and 7, stride 2; tests/unit/solver/test_precision.py).
    """
    (features,) = inputs
    if features.device.type != "cpu" or not torch.is_autocast_enabled("cpu") or features.shape[-1] != 1:
        return None
    return (F.pad(features, (0, 1)),)


def _widen_output(_module: nn.Module, _inputs: Any, output: Any) -> Any:
    return _widened(output)


def _widened(output: Any) -> Any:
    """The output of a module, a tensor or nested dicts, lists and tuples of them, with half precision as float32."""
    if isinstance(output, Tensor):
        return output.float() if output.dtype in _HALF else output
    if isinstance(output, dict):
        return type(output)((key, _widened(value)) for key, value in output.items())
    return type(output)(_widened(value) for value in output)
