"""The norms of an update's averaged gradient, read without an extra wait for the device."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from megdet_hpc.devices import event_on, is_gpu

_CLIP_EPSILON = 1e-6  # as in nn.utils.clip_grad_norm_


class GradientNorms:
    """The norms of each parameter's gradient and of all together, during their copy from the device to the host.

    The constructor starts the copy and does not wait for it. The first read waits for the copy. After a later wait for
    the same device the read costs nothing. Not a collective: the averaged gradient is the same on every rank, and so
    are its norms.

    Args:
        model: its parameters hold the averaged gradient.
    """

    def __init__(self, model: nn.Module) -> None:
        named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
        self._names = [name for name, _ in named]
        norms = torch.stack(torch._foreach_norm([gradient for _, gradient in named]))
        self._total = torch.linalg.vector_norm(norms)  # on the device, for clip_
        self._values = torch.cat([norms, self._total.view(1)])  # (parameters + 1,)
        self._arrived: Any = None
        if is_gpu(norms.device):
            on_device, self._values = self._values, torch.empty(len(named) + 1, dtype=norms.dtype, pin_memory=True)
            self._values.copy_(on_device, non_blocking=True)
            self._arrived = event_on(norms.device)
            self._arrived.record()

    def clip_(self, model: nn.Module, bound: float) -> None:
        """Scale the gradient in place so that the norm of all together is at most `bound`; no wait for the device.

        The same bits as nn.utils.clip_grad_norm_, which would make the norms a second time.

        Args:
            model: the same whose norms these are, its gradients unchanged since.
            bound: largest norm, over 0.
        """
        # the gradients are not kept: the result of an update outlives them
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, (bound / (self._total + _CLIP_EPSILON)).clamp(max=1.0))

    @cached_property
    def _read(self) -> Tensor:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.cpu()

    @property
    def total(self) -> float:
        """The norm of all gradients together, before clipping."""
        return float(self._read[-1])

    @property
    def finite(self) -> bool:
        """Whether the whole gradient is finite."""
        return math.isfinite(self.total)

    @property
    def not_finite(self) -> list[str]:
        """The parameters whose gradient is not finite."""
        return [name for name, norm in zip(self._names, self._read.tolist(), strict=False) if not math.isfinite(norm)]
