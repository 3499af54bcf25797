"""What makes the host wait for a GPU in a training step, counted by operators on the CPU.

An operator whose result has a size that the data decides, or that gives a number to Python, makes the host wait for all
that the device has still to do.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import megdet_hpc
from megdet_hpc.engine.passes import RankPasses
from megdet_hpc.parallel.serial import SerialCommunicator
from tests.families import FAMILIES, batch, build

PACKAGE = str(Path(megdet_hpc.__file__).parent)
# On a GPU the layers have other kernels than on a CPU, and a target's flags stay on the CPU.
ELSEWHERE = {"layers/kernels_cpu.py", "data/sample.py"}
TORCHVISION = "torchvision"
ONE = {"models/losses.py": 2}  # the values and the counts of the losses, copied at once where they are on a device
SAMPLES = {"models/heads/rpn.py", "models/heads/boxes.py", "models/heads/cascade.py"}


class Waits(TorchDispatchMode):
    """Counts such operators by the file that asks for them: torchvision as a whole, or one of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        waits = name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal")
        if waits or (name == "index" and any(one is not None and one.dtype == torch.bool for one in args[1])):
            frame = sys._getframe(1)
            while PACKAGE not in (file := frame.f_code.co_filename) and TORCHVISION not in file:
                assert frame.f_back
                frame = frame.f_back
            place = TORCHVISION if TORCHVISION in file else Path(file).relative_to(PACKAGE).as_posix()
            self.found[place] += place not in ELSEWHERE
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_this_package_waits_for_the_losses_alone(family: str) -> None:
    """Besides torchvision's choice of regions, and what is made of it; SSD's families have neither."""
    passes = RankPasses(build(family), SerialCommunicator())
    with Waits() as waits:
        passes.forward_backward([batch()], step=3, seed=0)
    found = {place: number for place, number in waits.found.items() if number}
    assert {place: number for place, number in found.items() if place not in SAMPLES | {TORCHVISION}} == ONE
    two_stages = "rcnn" in family
    assert (set(found) & SAMPLES != set()) == two_stages
    assert (TORCHVISION in found) == (two_stages or family == "retinanet")
