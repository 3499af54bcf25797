"""The arithmetic of a GPU for a run: TF32, the search for cuDNN's quickest algorithms, deterministic operators.

On CPUs nothing changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megdet_hpc.config import Config
from megdet_hpc.engine.deterministic import make_deterministic


def set_arithmetic(config: Config) -> None:
    """Choose the arithmetic of this process, before it first uses its GPU.

    Raises:
        UserError: see `make_deterministic`.
    """
    torch.backends.cudnn.allow_tf32 = config.solver.tf32 != "none"
    torch.backends.cuda.matmul.allow_tf32 = config.solver.tf32 == "all"
    if config.deterministic:
        make_deterministic()


def has_fixed_shapes(config: Config) -> bool:
    """Whether all convolutions of training passes have the same shapes in each update.

    Images have one size, and no convolution runs on regions, whose number is another in each batch.
    """
    model, data = config.model, config.data
    squares = model.geometry.square and len(data.short_sides) == 1 and data.augmentation.large_scale_jitter is None
    on_regions = model.needs_masks or getattr(model, "box_head", "") == "4conv1fc"
    return (squares or data.padding == "fixed") and not on_regions


@contextmanager
def quickest_convolutions(config: Config) -> Iterator[None]:
    """Training passes of fixed shapes, for which cuDNN tries its algorithms once and keeps the quickest.

    Other shapes would each begin with such a search. So it holds for the update alone and not for evaluations. It does
    not hold with `deterministic` either, since the winner may differ from run to run.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = has_fixed_shapes(config) and not config.deterministic
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
