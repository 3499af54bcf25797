"""`bench cgbn`: which passes its column of messages counts, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from torch import nn

from megdet_hpc.bench.__main__ import main
from megdet_hpc.bench.cgbn import Variant, _row, measured_waits
from megdet_hpc.bench.counting import CountingCommunicator
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.threads import run_ranks
from tests.conftest import Here


def test_the_time_in_messages_is_that_of_the_slowest_rank_in_measured_passes() -> None:
    def body(group: Communicator) -> Variant:
        first = 900.0  # a pass of the warm-up
        own = [1.0, 2.0, 3.0] if group.rank == 0 else [6.0, 1.0, 4.0]
        return Variant("CGBN", nn.BatchNorm2d, CountingCommunicator(group), [first, *own])

    variants = run_ranks(2, body)
    waits = np.array([measured_waits([variant], 1)["CGBN"] for variant in variants])
    times = np.full((2, 3, 2, 1), 5.0)
    assert _row(variants[0], times, times, waits, None)["in_messages_ms"] == 4.0  # of 6, 2, 4


@pytest.mark.parametrize("warmup", ["-1", "-3"])
def test_a_negative_warm_up_is_refused(here: Here, warmup: str) -> None:
    done = here(main, ["cgbn", "--warmup", warmup, "--device", "cpu"])
    assert done.returncode == 2 and f"--warmup {warmup}; accepted: 0 or more" in done.stderr
    assert done.stderr.count("\n") == 1
