"""Layers that run a second time in the backward pass, so that what they compute need not be kept.

A normalization layer must then neither move its running statistics again nor send messages. So the first run keeps what
its messages brought, a few kilobytes a layer, and the second run takes it from there. It computes the same bits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Result = TypeVar("Result", Tensor, tuple[Tensor, ...])


class Messages(Protocol):
    """The messages of a normalization layer's forward pass; a communicator has them."""

    def allreduce_sum_(self, tensor: Tensor, *, name: str) -> None:
        """Replace a tensor by its sum over the group."""

    def allgather_tensor(self, tensor: Tensor, *, name: str) -> Tensor:
        """The tensors of all ranks of the group, stacked."""


class _Run(threading.local):
    """The state of this thread: the answers that are kept, or those that are left of the first run."""

    kept: list[Tensor] | None = None
    left: Iterator[Tensor] | None = None


_run = _Run()


class _Keeping:
    """Messages that are sent, and whose answers are kept."""

    def __init__(self, group: Messages, kept: list[Tensor]) -> None:
        self._group, self._kept = group, kept

    def allreduce_sum_(self, tensor: Tensor, *, name: str) -> None:
        self._group.allreduce_sum_(tensor, name=name)
        self._kept.append(tensor.clone())

    def allgather_tensor(self, tensor: Tensor, *, name: str) -> Tensor:
        self._kept.append(self._group.allgather_tensor(tensor, name=name).clone())
        return self._kept[-1].clone()


class _Again:
    """Messages that are not sent: the answers are those of the first run, in its order."""

    def __init__(self, left: Iterator[Tensor]) -> None:
        self._left = left

    def allreduce_sum_(self, tensor: Tensor, *, name: str) -> None:
        tensor.copy_(next(self._left))

    def allgather_tensor(self, tensor: Tensor, *, name: str) -> Tensor:
        return next(self._left).clone()


def messages(group: Messages) -> Messages:
    """The messages that a layer's forward pass uses: the group's own outside of `recomputed`."""
    if _run.left is not None:
        return _Again(_run.left)
    return group if _run.kept is None else _Keeping(group, _run.kept)


def is_second_run() -> bool:
    """Whether this thread runs layers a second time."""
    return _run.left is not None


def normalized(norm: nn.Module, features: Tensor) -> Tensor:
    """The output of a normalization layer within `recomputed`; nn.BatchNorm2d moves its statistics once only."""
    if is_second_run() and type(norm) is nn.BatchNorm2d and norm.training and norm.running_mean is not None:
        unused = norm.running_mean.clone(), norm.running_var.clone()  # type: ignore[union-attr]
        return F.batch_norm(features, *unused, norm.weight, norm.bias, True, norm.momentum or 0.0, norm.eps)
    found: Tensor = norm(features)
    return found


def recomputed(run: Callable[..., Result], *inputs: Tensor) -> Result:
    """The result of `run`, whose inputs alone are kept for the backward pass, which runs it again.

    The first run sends the messages of its cross-GPU layers; the second sends none. Their own message of the backward
    pass is sent as ever.

    Args:
        run: function of the inputs that draws nothing at random, and calls nn.BatchNorm2d by `normalized`.
        inputs: tensors.
    """
    if not torch.is_grad_enabled():
        return run(*inputs)
    kept: list[Tensor] = []
    found: Result = checkpoint(
        run,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (_first(kept), _second(kept)),
    )
    return found


@contextmanager
def _first(kept: list[Tensor]) -> Iterator[None]:
    before = _run.kept, _run.left
    _run.kept, _run.left = kept, None
    try:
        yield
    finally:
        _run.kept, _run.left = before


@contextmanager
def _second(kept: list[Tensor]) -> Iterator[None]:
    before = _run.kept, _run.left
    _run.kept, _run.left = None, iter(kept)
    try:
        yield
    finally:
        _run.kept, _run.left = before
