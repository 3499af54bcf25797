"""Backbones from torchvision, with a normalization layer of choice and weights from a local file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.ops import FrozenBatchNorm2d

from megdet_hpc.config import ModelConfig
from megdet_hpc.errors import UserError
from megdet_hpc.models.norm import NormLayer
from megdet_hpc.models.weights import find_weights

# torchvision's stages in order; model.frozen_stages counts from the front. bn1 belongs to the stem.
_STAGES = (("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",))


def build_resnet(config: ModelConfig, norm: NormLayer | None) -> ResNet:
    """A torchvision ResNet, its weights loaded and its first stages frozen as configured."""
    if config.backbone == "resnet10":
        resnet = ResNet(BasicBlock, [1, 1, 1, 1], norm_layer=norm)
    else:
        resnet = torchvision.models.get_model(config.backbone, weights=None, norm_layer=norm)
    if file := find_weights(config):
        load_backbone_weights(resnet, str(file), frozen_stages=config.frozen_stages)
    for stage in _STAGES[: config.frozen_stages]:
        for name in stage:
            setattr(resnet, name, _freeze(getattr(resnet, name)))
    return resnet


def _freeze(stage: nn.Module) -> nn.Module:
    """Make a stage constant: no gradients, and batch norm with the statistics it was loaded with."""
    stage.requires_grad_(False)
    if isinstance(stage, nn.BatchNorm2d):
        frozen = FrozenBatchNorm2d(stage.num_features, stage.eps)
        frozen.load_state_dict(stage.state_dict())
        return frozen
    for name, child in stage.named_children():
        setattr(stage, name, _freeze(child))
    return stage


def _without_statistics(resnet: ResNet, state: dict[str, Any], frozen_stages: int) -> list[str]:
    """Running statistics that the backbone would keep for ever as they are now, and that a file does not bring."""
    kept = [name for stage in _STAGES[:frozen_stages] for name in stage]
    layers = dict(resnet.named_modules())
    return [
        key
        for key in resnet.state_dict()
        if "running" in key
        and key not in state
        and (key.split(".")[0] in kept or isinstance(layers[key.rpartition(".")[0]], FrozenBatchNorm2d))
    ]


def load_backbone_weights(resnet: ResNet, file: str, *, frozen_stages: int = 0) -> None:
    """Load an ImageNet checkpoint in torchvision's format, its classifier and counters left aside.

    Args:
        resnet: whose normalization layers are those of the run.
        file: of tensors by name.
        frozen_stages: that are about to become constant.

    Raises:
        UserError: unreadable file, keys or shapes that are not this backbone's, or no running statistics for layers
            that keep theirs.
    """
    if not Path(file).is_file():
        raise UserError(
            f"model.backbone_weights {file}: no such file; python -m megdet_hpc.fetch_backbone writes one on a "
            "machine with internet access"
        )
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"model.backbone_weights {file}: not a file of tensors saved by torch ({error})") from error
    own = resnet.state_dict()
    shapes = [f"{k} {tuple(state[k].shape)}" for k in own if k in state and state[k].shape != own[k].shape]
    # GroupNorm has no running statistics, and older files have no counter
    missing = [k for k in own if k not in state and "running" not in k and "num_batches" not in k]
    wrong = [k for k in [*missing, *shapes] if not k.startswith("fc.")]
    if wrong:
        raise UserError(f"model.backbone_weights {file}: does not fit {type(resnet).__name__}: {', '.join(wrong[:5])}")
    if fixed := _without_statistics(resnet, state, frozen_stages):
        raise UserError(
            f"model.backbone_weights {file}: has no running statistics ({', '.join(fixed[:2])}, ...), which norm.kind "
            "frozen, norm.where without backbone and model.frozen_stages keep as they are; give weights of a network "
            "with batch norm, or another norm.kind"
        )
    resnet.load_state_dict({k: v for k, v in state.items() if k in own and not k.startswith("fc.")}, strict=False)
