"""The kinds of devices, one row each: what torch calls them, and what carries their messages.

torch calls AMD's GPUs `cuda` where it was built for ROCm, so one row serves NVIDIA and AMD. A kind of GPU is asked by
the module that torch has for it, `torch.cuda` or `torch.xpu`; both have the same functions. AMD's and Intel's were
never tried. This file loads torch where it is first needed, since the doctor reads the table before.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Kind:
    """A row of the table."""

    type: str
    """torch's name of the kind, as in `device.type`."""
    backend: str
    """torch.distributed's library for its tensors."""
    shown_by: str = ""
    """Variable of the environment that limits the devices of a process."""

    @property
    def module(self) -> Any:
        """torch's module of a kind of GPU, `torch.cuda` or `torch.xpu`."""
        return getattr(importlib.import_module("torch"), self.type)

    def count(self) -> int:
        """Number of devices that this process sees. They are not touched. On a CPU 0."""
        known = self.type != "cpu" and hasattr(importlib.import_module("torch"), self.type)
        return int(self.module.device_count()) if known else 0

    @property
    def name(self) -> str:
        """The kind with its library of computation as text, for people."""
        torch = importlib.import_module("torch")
        if self.type == "cuda":
            return f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        return "oneAPI (Intel)" if self.type == "xpu" else "CPU"


# The first GPU kind of which there is a device is that of `auto`.
KINDS = (
    Kind("cuda", "nccl", "CUDA_VISIBLE_DEVICES"),  # on ROCm nccl is RCCL
    Kind("xpu", "xccl", "ZE_AFFINITY_MASK"),  # xccl is oneCCL
    Kind("cpu", "gloo"),
)
GPU_TYPES = tuple(kind.type for kind in KINDS if kind.type != "cpu")
DEVICES = ("auto", *(kind.type for kind in reversed(KINDS)))
"""The devices that a command line takes."""


def kind_of(device_type: str) -> Kind:
    """The row of a type of device.

    Raises:
        KeyError: the table has no such type.
    """
    return {kind.type: kind for kind in KINDS}[device_type]


def is_gpu(device: torch.device | str) -> bool:
    """Whether a device, or a type of devices, is a GPU of the table."""
    return (device if isinstance(device, str) else device.type) in GPU_TYPES


def found_type() -> str:
    """The type of device that `auto` takes: a kind of GPU that this process sees, else cpu. No GPU is touched."""
    return next((kind.type for kind in KINDS if kind.count()), "cpu")


def stream_of(device: torch.device) -> Any:
    """The current stream of a GPU."""
    return kind_of(device.type).module.current_stream(device)


def event_on(device: torch.device, *, timing: bool = False) -> Any:
    """A new event of a GPU."""
    return kind_of(device.type).module.Event(enable_timing=timing)


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done all its work. On a CPU nothing is waited for."""
    if is_gpu(device):
        kind_of(device.type).module.synchronize(device)
