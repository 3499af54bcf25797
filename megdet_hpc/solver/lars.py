"""LARS: each parameter tensor has its own rate, in proportion to the norm of its weights over that of its gradient.

You, Gitman, Ginsburg, Large Batch Training of Convolutional Networks (2017), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megdet_hpc.solver.lists import in_lists


def ratio_or_one(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient of two tensors; 1 where one of them is 0, which gives no scale."""
    usable = (numerator > 0) & (denominator > 0)
    return torch.where(usable, numerator / denominator.clamp(min=torch.finfo(denominator.dtype).tiny), 1.0)


class Lars(torch.optim.Optimizer):
    """LARS, for each tensor w with gradient g.

    local = trust * |w| / (|g| + decay * |w|), u = local * (g + decay * w), v = momentum * v + lr * u, w = w - v.

    This is the paper's form: v holds each step at the rate at which it was taken. With momentum_correction the form is
    that of torch's SGD, v = momentum * v + u, w = w - lr * v: a change of the rate acts on all of v at once. Both are
    equal while the rate is constant (docs/recipe.md).

    Args:
        params: parameters or groups of them; a group with adapt=False keeps local = 1.
        lr: rate of the next step.
        momentum: weight of the past in v.
        weight_decay: decay, part of the gradient.
        trust_coefficient: trust.
        momentum_correction: use the form of torch's SGD. A change of it starts v anew.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        momentum_correction: bool = False,
        adapt: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "momentum_correction": momentum_correction,
            "adapt": adapt,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. Not a collective: gradients are averaged already."""
        assert closure is None
        for group in self.param_groups:
            lr, correction = group["lr"], group["momentum_correction"]
            key, other = ("momentum_buffer", "velocity") if correction else ("velocity", "momentum_buffer")
            for parameters, gradients in in_lists(group["params"]):
                update = torch._foreach_add(gradients, parameters, alpha=group["weight_decay"])
                if group["adapt"]:
                    weights = torch.stack(torch._foreach_norm(parameters))
                    decayed = torch.stack(torch._foreach_norm(gradients)) + group["weight_decay"] * weights
                    local = ratio_or_one(group["trust_coefficient"] * weights, decayed)
                    torch._foreach_mul_(update, local.unbind())
                past = []
                for parameter in parameters:
                    state = self.state[parameter]
                    state.pop(other, None)
                    if key not in state:
                        state[key] = torch.zeros_like(parameter)
                    past.append(state[key])
                torch._foreach_mul_(past, group["momentum"])
                torch._foreach_add_(past, update, alpha=1.0 if correction else lr)
                torch._foreach_sub_(parameters, past, alpha=lr if correction else 1.0)
