"""Input shapes of a backbone's normalization layers, from a forward pass on the meta device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torchvision
from torch import Tensor, nn

from megdet_hpc.errors import UserError


@dataclass(frozen=True)
class NormInput:
    """The path of a layer in the backbone, and its input (N, C, H, W)."""

    path: str
    shape: tuple[int, ...]


def norm_inputs(backbone: str, num_images: int, height: int, width: int) -> list[NormInput]:
    """The input of each nn.BatchNorm2d of a torchvision model, in the order of the forward pass.

    Raises:
        UserError: torchvision has no such model, it has no batch norm, or the image is too small for it.
    """
    if backbone not in torchvision.models.list_models(module=torchvision.models):
        raise UserError(f"--backbone {backbone}: torchvision.models has no such classifier; for example resnet50")
    found: list[NormInput] = []

    def record(path: str) -> None:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found.append(NormInput(path, tuple(inputs[0].shape)))

        modules[path].register_forward_pre_hook(hook)

    with torch.device("meta"), torch.no_grad():
        model = torchvision.models.get_model(backbone, weights=None).eval()
        modules = dict(model.named_modules())
        for path, module in modules.items():
            if isinstance(module, nn.BatchNorm2d):
                record(path)
        try:
            model(torch.empty(num_images, 3, height, width))
        except RuntimeError as error:
            raise UserError(f"--image-size {height} {width}: {backbone} cannot take it ({error})") from error
    if not found:
        raise UserError(f"--backbone {backbone}: it has no nn.BatchNorm2d")
    return found
