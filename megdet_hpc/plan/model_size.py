"""Sizes of a detector, found by building it on torch's meta device: exact shapes, no memory, no arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megdet_hpc.config import Config
from megdet_hpc.layers.cgbn import CrossGpuBatchNorm2d
from megdet_hpc.models.factory import build_detector
from megdet_hpc.parallel.serial import SerialCommunicator

_FLOAT32 = 4  # bytes
# State that an optimizer keeps of each trained parameter: momentum, or LAMB's two moments.
_STATES = {"sgd": 1, "lars": 1, "lamb": 2}


@dataclass(frozen=True)
class ModelSize:
    """Counts and bytes of one rank.

    Attributes:
        parameters, trained: numbers of values.
        gradient_bytes: bytes that the allreduce sends.
        cgbn_channels: channels of each cross-GPU layer.
        state_bytes: weights, gradients and the optimizer's state.
        activation_bytes: what autograd keeps of one pass over the largest batch.
        image_size: padded (height, width) of that batch [pixels].
        regions_per_image: boxes of an image that a second stage computes features for.
    """

    parameters: int
    trained: int
    gradient_bytes: int
    cgbn_channels: tuple[int, ...]
    state_bytes: int
    activation_bytes: int
    image_size: tuple[int, int]
    regions_per_image: int


def largest_input(config: Config) -> tuple[int, int]:
    """Padded (height, width) of the largest batch [pixels]: a landscape one, or a square where both kinds can meet."""
    data, geometry = config.data, config.model.geometry
    short, long = max(data.short_sides), data.max_side
    if geometry.square:
        return geometry.padded(short), geometry.padded(short)
    if data.padding == "fixed" or not data.group_by_aspect_ratio:
        short = long
    return geometry.padded(short), geometry.padded(long)


def measure_model(config: Config, num_categories: int) -> ModelSize:
    """Build a configuration's detector without weights and count.

    Args:
        config: the run's configuration.
        num_categories: categories of the data set, background not counted.
    """
    alone = SerialCommunicator()
    with torch.device("meta"):
        model = build_detector(config, num_categories=num_categories, group=alone, pretrained=False)
    channels = tuple(m.num_features for m in model.modules() if isinstance(m, CrossGpuBatchNorm2d))
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    solver = config.solver
    copies = 1 + _STATES[solver.optimizer] + (1 if solver.agvm else 0)
    return ModelSize(
        parameters=parameters,
        trained=trained,
        gradient_bytes=trained * (_FLOAT32 // 2 if solver.compression == "fp16" else _FLOAT32),
        cgbn_channels=channels,
        state_bytes=_FLOAT32 * (parameters + trained * copies),
        activation_bytes=_activation_bytes(config, num_categories),
        image_size=largest_input(config),
        regions_per_image=model.regions_per_image,
    )


def _activation_bytes(config: Config, num_categories: int) -> int:
    """Bytes of the distinct tensors that autograd saves in the detector's dense part, weights left out."""
    # a local layer keeps what the cross-GPU one keeps (its input and two vectors), and torch knows it on meta
    norm = replace(config.norm, kind="bn") if config.norm.kind == "cgbn" else config.norm
    alone = SerialCommunicator()
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.device("meta"):
        model = build_detector(
            replace(config, norm=norm), num_categories=num_categories, group=alone, pretrained=False
        ).train()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = model.dense(torch.empty(config.data.images_per_rank, 3, *largest_input(config)))
    weights = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
    total = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in weights)
    del outputs  # their graph holds the saved tensors
    return total
