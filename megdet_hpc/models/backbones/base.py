"""What a detector asks of a backbone: named stages, and that it freezes and loads itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from megdet_hpc.errors import UserError
from megdet_hpc.layers.replace import replace_norms
from megdet_hpc.models.tensor_file import read_tensors


@dataclass(frozen=True)
class Stage:
    """A level of features.

    Attributes:
        name: key in the dict that the module returns.
        channels: of its features.
        stride: input pixels between two of its features.
    """

    name: str
    channels: int
    stride: int


class Backbone(nn.Module, ABC):
    """A feature extractor.

    Attributes:
        stages: of the features that `forward` returns, finest first.
    """

    stages: tuple[Stage, ...]

    @abstractmethod
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) -> per stage (N, channels, H / stride, W / stride), rounded up."""

    @abstractmethod
    def freeze(self, num_stages: int) -> None:
        """Make the first stages, the stem counted as one, constant: without gradients or messages. Before `load`."""

    def load(self, file: str) -> None:
        """Load a classifier's weights in torchvision's format; its classifier and counters are left aside.

        Raises:
            UserError: unreadable file, keys or shapes that are not this backbone's, or no running statistics for layers
                that keep theirs.
        """
        state = read_tensors(
            Path(file),
            "model.backbone_weights",
            "; python -m megdet_hpc.fetch_backbone writes one on a machine with internet access",
        )
        own = self.state_dict()
        shapes = [f"{k} {tuple(state[k].shape)}" for k in own if k in state and state[k].shape != own[k].shape]
        # GroupNorm has no running statistics, and older files have no counter
        missing = [k for k in own if k not in state and "running" not in k and "num_batches" not in k]
        if wrong := [*missing, *shapes]:
            raise UserError(
                f"model.backbone_weights {file}: does not fit {type(self).__name__}: {', '.join(wrong[:5])}"
            )
        layers = dict(self.named_modules())
        constant = [k for k in own if "running" in k and isinstance(layers[k.rpartition(".")[0]], FrozenBatchNorm2d)]
        if fixed := [k for k in constant if k not in state]:
            raise UserError(
                f"model.backbone_weights {file}: has no running statistics ({', '.join(fixed[:2])}, ...), which "
                "norm.kind frozen, norm.where without backbone and model.frozen_stages keep as they are; give weights "
                "of a network with batch norm, or another norm.kind"
            )
        self.load_state_dict({k: v for k, v in state.items() if k in own}, strict=False)


def frozen(module: nn.Module) -> nn.Module:
    """A module made constant: no gradients, and batch norm with the statistics that it has now.

    Returns:
        The module, changed in place; a new layer where it is a batch norm itself.
    """
    return replace_norms(module.requires_grad_(False), FrozenBatchNorm2d)
