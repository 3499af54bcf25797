"""Sizes of a detector, found by building it on torch's meta device: exact shapes, no memory, no arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megdet_hpc.config import Config, jitter_side
from megdet_hpc.layers.cgbn import CrossGpuBatchNorm2d
from megdet_hpc.models.backbones.base import Backbone
from megdet_hpc.models.detector import Detector
from megdet_hpc.models.factory import build_detector
from megdet_hpc.parallel.serial import SerialCommunicator

_FLOAT32 = 4  # bytes
# State that an optimizer keeps of each trained parameter: momentum, or LAMB's two moments.
_STATES = {"sgd": 1, "lars": 1, "lamb": 2}
# Images whose statistics a map of 1 x 1 cells needs; a rank may have fewer, since the others' count too.
_LEAST_BATCH = 2


@dataclass(frozen=True)
class ModelSize:
    """Counts and bytes of one rank.

    Attributes:
        parameters, trained: numbers of values.
        gradient_bytes: bytes that the allreduce sends.
        cgbn_channels: channels of each cross-GPU layer.
        state_bytes: weights, gradients, the optimizer's state and the moving average of the weights.
        activation_bytes: bytes that autograd keeps of one pass over the largest batch.
        macs: multiplications of a forward pass over one image of that size, each with an addition. Convolutions and
            fully connected layers count.
        backbone_macs: those of the backbone without its neck; None where the family has no `Backbone`.
        image_size: padded (height, width) of that batch [pixels].
        regions_per_image: boxes of an image for which a second stage computes features.
    """

    parameters: int
    trained: int
    gradient_bytes: int
    cgbn_channels: tuple[int, ...]
    state_bytes: int
    activation_bytes: int
    macs: int
    backbone_macs: int | None
    image_size: tuple[int, int]
    regions_per_image: int


def largest_input(config: Config) -> tuple[int, int]:
    """Padded (height, width) of the largest batch [pixels]: landscape, or square if orientations can mix."""
    data, geometry = config.data, config.model.geometry
    short, long = max(data.short_sides), data.max_side
    if data.augmentation.large_scale_jitter:
        short = long = jitter_side(data, square=geometry.square)
    if geometry.square:
        return geometry.padded(short), geometry.padded(short)
    if data.padding == "fixed" or not data.group_by_aspect_ratio:
        short = long
    return geometry.padded(short), geometry.padded(long)


def message_sizes(config: Config, num_categories: int) -> tuple[int, tuple[int, ...]]:
    """The bytes of all gradients as they are sent, and the channels of each cross-GPU layer. It is quick.

    Args:
        config: the run's configuration.
        num_categories: categories of the data set, background not counted.
    """
    _, trained, channels = _counts(_without_memory(config, num_categories))
    return _gradient_bytes(config, trained), channels


def _gradient_bytes(config: Config, trained: int) -> int:
    return trained * (_FLOAT32 // 2 if config.solver.compression == "fp16" else _FLOAT32)


def _without_memory(config: Config, num_categories: int) -> Detector:
    alone = SerialCommunicator()
    with torch.device("meta"):
        return build_detector(config, num_categories=num_categories, group=alone, pretrained=False)


def _counts(model: Detector) -> tuple[int, int, tuple[int, ...]]:
    """Numbers of all parameters and of the trained ones, and the channels of each cross-GPU layer."""
    channels = tuple(m.num_features for m in model.modules() if isinstance(m, CrossGpuBatchNorm2d))
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained), channels


def measure_model(config: Config, num_categories: int) -> ModelSize:
    """Build a configuration's detector without weights and count.

    Args:
        config: the run's configuration.
        num_categories: categories of the data set, background not counted.
    """
    model = _without_memory(config, num_categories)
    parameters, trained, channels = _counts(model)
    solver = config.solver
    runnable = _runnable(config, num_categories)
    macs, backbone_macs = count_macs(runnable, largest_input(config))
    copies = 1 + _STATES[solver.optimizer] + (1 if solver.agvm else 0) + (1 if solver.ema_decay else 0)
    return ModelSize(
        parameters=parameters,
        trained=trained,
        gradient_bytes=_gradient_bytes(config, trained),
        cgbn_channels=channels,
        state_bytes=_FLOAT32 * (parameters + trained * copies),
        activation_bytes=_activation_bytes(runnable, config),
        macs=macs,
        backbone_macs=backbone_macs,
        image_size=largest_input(config),
        regions_per_image=model.regions_per_image,
    )


def count_model(config: Config, num_categories: int) -> tuple[int, int]:
    """Parameters of a configuration's detector, and multiplications of a forward pass over its largest image."""
    model = _runnable(config, num_categories)
    return sum(p.numel() for p in model.parameters()), count_macs(model, largest_input(config))[0]


def _runnable(config: Config, num_categories: int) -> Detector:
    """The detector on the meta device, in training mode.

    Its cross-GPU layers are local ones, which keep the same for the backward pass: their input and two vectors.
    """
    norm = replace(config.norm, kind="bn") if config.norm.kind == "cgbn" else config.norm
    alone = SerialCommunicator()
    with torch.device("meta"):
        return build_detector(
            replace(config, norm=norm), num_categories=num_categories, group=alone, pretrained=False
        ).train()


def _deformable_flops(_x: Any, weight: Sequence[int], *_further: Any, out_shape: Sequence[int], **_named: Any) -> int:
    """The operations of a deformable convolution: those of the plain one, without the interpolation."""
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


def count_macs(model: Detector, size: tuple[int, int]) -> tuple[int, int | None]:
    """The multiplications of a training pass over one image, forward: all of them, and the backbone's.

    Args:
        model: detector on the meta device.
        size: (height, width) of the image [pixels].
    """
    with torch.device("meta"):
        images = torch.empty(_LEAST_BATCH, 3, *size)
        body = next((module for module in model.modules() if isinstance(module, Backbone)), None)
        whole = macs_of(model.dense, images) // _LEAST_BATCH
        return whole, None if body is None else macs_of(body, images) // _LEAST_BATCH


def macs_of(run: Callable[[Tensor], Any], images: Tensor) -> int:
    """The multiplications of a function of images on the meta device, such as a module."""
    with FlopCounterMode(
        display=False, custom_mapping={torch.ops.torchvision.deform_conv2d: _deformable_flops}
    ) as counter:
        run(images)
    total: int = counter.get_total_flops() // 2
    return total


def _activation_bytes(model: Detector, config: Config) -> int:
    """Bytes of the distinct tensors, without weights, that autograd saves in the detector's dense part."""
    kept: dict[int, Tensor] = {}
    images = max(config.data.images_per_rank, _LEAST_BATCH)

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = model.dense(torch.empty(images, 3, *largest_input(config)))
    weights = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
    total = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in weights)
    del outputs  # their graph holds the saved tensors
    return total * config.data.images_per_rank // images
