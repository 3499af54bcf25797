"""`model.compile: true`: backbone and neck of a training by torch.compile. Heads and boxes have no fixed shapes."""

from __future__ import annotations

from typing import Any

import torch

from megdet_hpc.errors import UserError
from megdet_hpc.layers.cgbn import CrossGpuBatchNorm2d
from megdet_hpc.models.detector import Detector


def compile_dense(model: Detector) -> None:
    """Compile the module `backbone`, which with an FPN has the FPN too, in place; state dicts keep their keys.

    Cross-GPU layers stay as they are: the graph ends before each and begins anew behind it, so that their messages
    leave in the order of the layers on every rank. The first passes compile, and so do the first of another shape.

    Args:
        model: detector on its device.

    Raises:
        UserError: torch cannot compile on this host.
    """
    _try(model.pixel_mean.device)
    for module in model.modules():
        if isinstance(module, CrossGpuBatchNorm2d):
            module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign]
    backbone = model.get_submodule("backbone")
    plain, compiled = backbone.forward, torch.compile(backbone.forward)

    def forward(*arguments: Any, **words: Any) -> Any:
        # the images of an evaluation have many shapes, and the scores should be those of `megdet evaluate`
        return (compiled if backbone.training else plain)(*arguments, **words)

    # the method, where torch.compile(module) would put _orig_mod before all keys
    backbone.forward = forward


def _try(device: torch.device) -> None:
    """Compile a line, which needs what a whole model needs: a C++ compiler on CPUs, Triton on GPUs."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(3, device=device))
    except Exception as error:  # torch names no common class
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"model.compile is true, but torch {torch.__version__} cannot compile for {device} on this host: "
            f"{said[:200]}; accepted: false, or a host with a C++ compiler (CXX), and on GPUs with Triton"
        ) from error
