"""Layers replaced inside modules whose constructors accept none, such as torchvision's DenseNet and RPNHead.

Whatever both layers have stays: parameters are the same objects under the same names, so state dicts interchange and an
optimizer goes on with what it holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Layer = TypeVar("Layer", bound=nn.Module)
Where = Callable[[str, nn.Module], bool]
"""Choice of convolutions, by path and layer."""


def replace_layers(model: nn.Module, kind: type[Layer], make: Callable[[str, Layer], nn.Module]) -> nn.Module:
    """Replace every layer of a kind.

    Args:
        model: changed in place.
        kind: class of the layers; subclasses count.
        make: gives the layer that takes the place of the layer at a path, which may be the same. It is called once for
            a layer that stands at several paths, with the first of them.

    Returns:
        The model; a new layer where the model itself is of the kind.
    """
    found = [(path, layer) for path, layer in model.named_modules(remove_duplicate=False) if isinstance(layer, kind)]
    made: dict[nn.Module, nn.Module] = {}
    for path, layer in found:
        if layer not in made:
            made[layer] = make(path, layer)
        if path:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, made[layer])
    return made.get(model, model)


def take_over(new: Layer, old: nn.Module) -> Layer:
    """Give a new layer the parameters, buffers, device, type and mode of the layer that it replaces.

    Parameters and buffers match by name; what only one of the layers has stays as it is. A parameter or buffer that is
    None in the old layer becomes None in the new one.

    Returns:
        The new layer.

    Raises:
        ValueError: the old layer has layers of its own, which would be lost.
    """
    if inner := [name for name, _ in old.named_children()]:
        raise ValueError(f"{type(old).__name__} cannot be replaced: {', '.join(inner)} inside it would be lost")
    if (reference := next(iter([*old.parameters(), *old.buffers()]), None)) is not None:
        new.to(device=reference.device, dtype=reference.dtype if reference.is_floating_point() else None)
    for name, parameter in old._parameters.items():
        if name in new._parameters:
            new.register_parameter(name, parameter)
        elif name in new._buffers and parameter is not None:
            setattr(new, name, parameter.detach())
    for name, buffer in old._buffers.items():
        if name in new._buffers:
            setattr(new, name, buffer)
    return new.train(old.training)


def replace_norms(model: nn.Module, make: Callable[[int], nn.Module], *, keep_settings: bool = True) -> nn.Module:
    """Replace every nn.BatchNorm2d, weights and running statistics kept.

    Args:
        model: changed in place.
        make: constructor that takes a number of channels, such as `norm.norm_layer` returns.
        keep_settings: keep eps and momentum of each replaced layer. False: eps and momentum are those that `make`
            gives, such as norm.eps and norm.momentum of a configuration.

    Returns:
        The model; a new layer where the model itself is a batch norm.
    """
    settings = ("affine", "track_running_stats", *(("eps", "momentum") if keep_settings else ()))

    def made(_: str, old: nn.BatchNorm2d) -> nn.Module:
        new = make(old.num_features)
        for setting in settings:
            if hasattr(new, setting):
                setattr(new, setting, getattr(old, setting))
        return take_over(new, old)

    return replace_layers(model, nn.BatchNorm2d, made)


def replace_convs(model: nn.Module, make: Callable[[nn.Conv2d], nn.Module], where: Where) -> nn.Module:
    """Replace chosen convolutions; draws no random numbers, so layers made later begin as they would without it.

    Args:
        model: changed in place.
        make: maker that takes a plain convolution, such as `convolution.conv_layer` returns.
        where: choice of the convolutions that are replaced, such as `convolution.is_3x3`.

    Returns:
        The model; a new layer where the model itself is a convolution that is replaced.
    """
    with torch.random.fork_rng(devices=[]):
        return replace_layers(model, nn.Conv2d, lambda path, conv: make(conv) if where(path, conv) else conv)


def add_norms(model: nn.Module, make: Callable[[int], nn.Module], where: Where) -> nn.Module:
    """Put a normalization layer behind chosen convolutions: "conv, ReLU" becomes "conv, norm, ReLU".

    The layer is the convolution's submodule `norm`, so that the convolution's path and the key of its weight stay. A
    bias before a normalization that subtracts the mean has no effect: it moves into the layer's own offset and leaves
    the convolution, as in torchvision's Conv2dNormActivation. It stays where the layer has no offset. A head that
    several levels share has one layer for all of them: batch statistics are those of each level, running statistics
    mix the levels.

    Args:
        model: changed in place.
        make: constructor that takes a number of channels.
        where: choice among nn.Conv2d and DeformConv2d layers.

    Returns:
        The model.

    Raises:
        ValueError: a chosen convolution has one already.
    """
    from torchvision.ops import DeformConv2d  # late: torchvision takes a second to load, and most callers need none

    chosen = [(p, m) for p, m in model.named_modules() if isinstance(m, nn.Conv2d | DeformConv2d) and where(p, m)]
    for path, conv in chosen:
        if hasattr(conv, "norm"):
            raise ValueError(f"{path or type(conv).__name__} has a normalization layer already")
        norm = make(conv.out_channels).to(conv.weight)
        offset = getattr(norm, "bias", None)
        if conv.bias is not None and isinstance(offset, Tensor):
            with torch.no_grad():
                offset.copy_(conv.bias)
            conv.register_parameter("bias", None)
        conv.add_module("norm", norm.train(conv.training))
        conv.register_forward_hook(_normalize)
    return model


def _normalize(conv: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    normalized: Tensor = conv.get_submodule("norm")(output)
    return normalized
