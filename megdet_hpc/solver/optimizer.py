"""The optimizer of a configuration, and its groups: which parameters decay, adapt and share a rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from megdet_hpc.config import SolverConfig
from megdet_hpc.layers.norm import norm_parameters
from megdet_hpc.solver.lamb import Lamb
from megdet_hpc.solver.lars import Lars


def build_optimizer(
    model: nn.Module,
    config: SolverConfig,
    *,
    decay_norm: bool,
    parts: Mapping[str, Sequence[nn.Parameter]] | None = None,
) -> torch.optim.Optimizer:
    """The optimizer of the trained parameters. The loop sets the rate before each step.

    One group holds weights, one the scales and offsets of normalization layers, one biases. With agvm each part of the
    detector has its own three, named by the group's `part`. LARS and LAMB adapt the rate of weights only.

    Args:
        model: its parameters with requires_grad are trained.
        config: optimizer, momentum, weight decay.
        decay_norm: apply the decay to the scales and offsets of normalization layers too.
        parts: parameters of the detector by part; agvm needs them.
    """
    norm = {id(parameter) for parameter in norm_parameters(model)}
    part_of = {id(p): part for part, found in (parts or {}).items() for p in found} if config.agvm else {}
    decays = {"weights": True, "norm": decay_norm, "biases": config.decay_biases}
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        kind = "norm" if id(parameter) in norm else "biases" if parameter.ndim <= 1 else "weights"
        part = part_of[id(parameter)] if config.agvm else ""
        if kind == "biases" and config.optimizer == "sgd" and config.decay_biases:
            kind = "weights"
        decay = config.weight_decay if decays[kind] else 0.0
        group = groups.setdefault((part, kind), {"params": [], "weight_decay": decay, "part": part})
        if config.optimizer != "sgd":
            group["adapt"] = kind == "weights"
        group["params"].append(parameter)
    rows = [groups[key] for key in sorted(groups, key=_order)]
    if config.optimizer == "lars":
        return Lars(
            rows,
            momentum=config.momentum,
            trust_coefficient=config.trust_coefficient,
            momentum_correction=config.momentum_correction,
        )
    if config.optimizer == "lamb":
        return Lamb(rows, betas=(config.momentum, config.beta2))
    sgd = torch.optim.SGD(rows, lr=0.0, momentum=config.momentum, fused=_fusible(rows))
    sgd.register_load_state_dict_post_hook(_fused_again)
    sgd.register_step_pre_hook(_complete)
    return sgd


def _fusible(rows: Sequence[Mapping[str, Any]]) -> bool | None:
    """True on CUDA, where torch then updates many parameters in one kernel; None, for torch's own choice, elsewhere.

    On CPUs the fused form is quicker too, but gives other last bits where the vector's length does not divide a
    tensor's.
    """
    return all(p.is_cuda for row in rows for p in row["params"]) or None


def _complete(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Begin the momentum of parameters that have their first gradient later than others, which fused SGD fails at."""
    for group in optimizer.param_groups:
        if not group["fused"] or not group["momentum"]:
            continue
        states = {p: optimizer.state[p] for p in group["params"] if p.grad is not None}
        missing = [p for p, state in states.items() if state.get("momentum_buffer") is None]
        if len(missing) < len(states):
            for p in missing:
                states[p]["momentum_buffer"] = torch.zeros_like(p)


def _fused_again(optimizer: torch.optim.Optimizer) -> None:
    """Let the device decide, not the one on which a checkpoint was written."""
    for group in optimizer.param_groups:
        group["fused"] = _fusible([group])


def _order(key: tuple[str, str]) -> tuple[str, int]:
    part, kind = key
    return part, ("weights", "norm", "biases").index(kind)
