"""LAMB: the step of Adam, scaled to the norm of the weights, one scale for each parameter tensor.

You et al., Large Batch Optimization for Deep Learning: Training BERT in 76 minutes (ICLR 2020), algorithm 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megdet_hpc.solver.lars import ratio_or_one
from megdet_hpc.solver.lists import in_lists


class Lamb(torch.optim.Optimizer):
    """LAMB, for each tensor w with gradient g at update t, which counts from 1.

    m = beta1 * m + (1 - beta1) * g, s = beta2 * s + (1 - beta2) * g^2,
    r = (m / (1 - beta1^t)) / (sqrt(s / (1 - beta2^t)) + eps) + decay * w, w = w - lr * |w| / |r| * r.

    Args:
        params: parameters or groups of them; a group with adapt=False has 1 in place of |w| / |r|.
        lr: rate of the next step.
        betas: beta1 and beta2.
        eps: number that keeps the quotient finite.
        weight_decay: decay, which is not part of the moments.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        adapt: bool = True,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "adapt": adapt})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. Not a collective: gradients are averaged already."""
        assert closure is None
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameters, gradients in in_lists(group["params"]):
                states = [self.state[parameter] for parameter in parameters]
                for parameter, state in zip(parameters, states, strict=True):
                    if "count" not in state:
                        state["count"] = 0
                        state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                    state["count"] += 1
                means, squares = ([state[key] for state in states] for key in ("mean", "square"))
                torch._foreach_lerp_(means, gradients, 1 - beta1)
                torch._foreach_mul_(squares, beta2)
                torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2)
                scales = torch._foreach_div(squares, [1 - beta2 ** state["count"] for state in states])
                torch._foreach_sqrt_(scales)
                torch._foreach_add_(scales, group["eps"])
                update = torch._foreach_div(means, [1 - beta1 ** state["count"] for state in states])
                torch._foreach_div_(update, scales)
                torch._foreach_add_(update, parameters, alpha=group["weight_decay"])
                if group["adapt"]:
                    weights, norms = (torch.stack(torch._foreach_norm(tensors)) for tensors in (parameters, update))
                    torch._foreach_mul_(update, ratio_or_one(weights, norms).unbind())
                torch._foreach_sub_(parameters, update, alpha=group["lr"])
