"""The interface of a backbone: it names its stages, freezes itself and loads its weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

from megdet_hpc.errors import UserError
from megdet_hpc.layers.convolution import ConvKind, DeformableConv2d, conv_layer, is_3x3
from megdet_hpc.layers.frozen import FrozenNorm
from megdet_hpc.layers.replace import replace_convs, replace_norms
from megdet_hpc.models.tensor_file import read_tensors


@dataclass(frozen=True)
class Stage:
    """A level of features.

    Attributes:
        name: key in the dict that the module returns.
        channels: channels of the features.
        stride: distance of two features [pixels of the input].
    """

    name: str
    channels: int
    stride: int


class Backbone(nn.Module, ABC):
    """A feature extractor.

    Attributes:
        stages: levels of the features that `forward` returns, finest first.
        modules_by_stage: paths of the modules of each stage, the stem first, as model.frozen_stages counts them.
    """

    stages: tuple[Stage, ...]
    modules_by_stage: tuple[tuple[str, ...], ...]

    @abstractmethod
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) -> for each stage (N, channels, H / stride, W / stride), sizes rounded up."""

    def use_convs(self, kind: ConvKind, stages: Sequence[int]) -> None:
        """Replace the convolutions of some stages: all by weight-standardized ones, those of 3 x 3 by deformable ones.

        Called before `freeze` and `load`.

        Args:
            kind: kind of the new layers.
            stages: numbers of the stages; 1 is the stem.
        """
        chosen = tuple(f"{path}." for stage in stages for path in self.modules_by_stage[stage - 1])

        def where(path: str, conv: nn.Module) -> bool:
            return f"{path}.".startswith(chosen) and (kind != "deformable" or is_3x3(path, conv))

        replace_convs(self, conv_layer(kind), where)

    def freeze(self, num_stages: int) -> None:
        """Make the first stages constant, without gradients and messages. The stem is one. Called before `load`."""
        for path in (path for stage in self.modules_by_stage[:num_stages] for path in stage):
            parent, _, name = path.rpartition(".")
            setattr(self.get_submodule(parent), name, frozen(self.get_submodule(path)))

    def renamed(self, key: str) -> str:
        """The name that this backbone gives a tensor of a file."""
        return key

    def load(self, file: str) -> None:
        """Load weights in torchvision's format. The file's classifier and counters are not used.

        The offsets of deformable convolutions, which such a file has not, stay zero, and squeeze and excitation random.

        Raises:
            UserError: the file cannot be read, its keys or shapes are not this backbone's, or it lacks running
                statistics that this backbone keeps constant.
        """
        state = read_tensors(
            Path(file),
            "model.backbone_weights",
            "; python -m megdet_hpc.fetch_backbone writes one on a machine with internet access",
        )
        state = {self.renamed(key): value for key, value in state.items()}
        own = self.state_dict()
        layers = dict(self.named_modules())
        added = tuple(f"{path}.offset." for path, m in layers.items() if isinstance(m, DeformableConv2d))
        added += tuple(f"{path}." for path, m in layers.items() if isinstance(m, SqueezeExcitation))
        shapes = [f"{k} {tuple(state[k].shape)}" for k in own if k in state and state[k].shape != own[k].shape]
        # GroupNorm has no running statistics, and older files have no counter
        missing = [k for k in own if k not in state and "running" not in k and "num_batches" not in k]
        missing = [k for k in missing if not k.startswith(added)]
        if wrong := [*missing, *shapes]:
            raise UserError(
                f"model.backbone_weights {file}: does not fit {type(self).__name__}: {', '.join(wrong[:5])}"
            )
        constant = [k for k in own if "running" in k and isinstance(layers[k.rpartition(".")[0]], FrozenNorm)]
        if fixed := [k for k in constant if k not in state]:
            raise UserError(
                f"model.backbone_weights {file}: has no running statistics ({', '.join(fixed[:2])}, ...), which "
                "norm.kind frozen, norm.where without backbone and model.frozen_stages keep as they are; give weights "
                "of a network with batch norm, or another norm.kind"
            )
        self.load_state_dict({k: v for k, v in state.items() if k in own}, strict=False)


def frozen(module: nn.Module) -> nn.Module:
    """Make a module constant: it gets no gradients, and its batch norm keeps the statistics that it has now.

    Returns:
        The module, changed in place; a new layer where it is a batch norm itself.
    """
    return replace_norms(module.requires_grad_(False), FrozenNorm)
