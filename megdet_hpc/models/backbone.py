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
        load_backbone_weights(resnet, str(file))
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


def load_backbone_weights(resnet: ResNet, file: str) -> None:
    """Load an ImageNet checkpoint in torchvision's format, its classifier and counters left aside.

    Raises:
        UserError: unreadable file, or keys or shapes that are not this backbone's.
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
    resnet.load_state_dict({k: v for k, v in state.items() if k in own and not k.startswith("fc.")}, strict=False)
