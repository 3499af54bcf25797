"""The line of a run whose ranks have no core beside that of Horovod's thread."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megdet_hpc.engine.build import _shared_core
from megdet_hpc.parallel.runtime import HOROVOD


@pytest.mark.parametrize(
    ("size", "carrier", "device", "said"),
    [
        (4096, HOROVOD, "cpu", True),
        (4096, HOROVOD, "cuda", False),
        (4096, "MPI", "cpu", False),
        (1, HOROVOD, "cpu", False),
    ],
)
def test_horovods_thread_takes_a_share_of_the_only_core(size: int, carrier: str, device: str, said: bool) -> None:
    runtime = SimpleNamespace(world=SimpleNamespace(size=size), carrier=carrier, local_size=size)
    line = _shared_core(runtime, torch.device(device))  # type: ignore[arg-type]
    assert ("--solver.gradients mpi" in line) == said and bool(line) == said
