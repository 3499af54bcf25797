"""Run under mpirun: megdet_hpc.train with one fault at one step of one rank: `faulty.py KIND RANK STEP OPTIONS...`.

raise: the rank raises; hang: it never comes back; disk: from then on no file of it may grow beyond a few kilobytes, as
on a full disk; overflow: its gradient of one parameter is infinite; none: nothing.
"""

from __future__ import annotations

import math
import resource
import signal
import sys
import time
from typing import Any

from megdet_hpc import train
from megdet_hpc.config import DETECTORS
from megdet_hpc.engine import loop
from megdet_hpc.models.factory import BUILDERS
from megdet_hpc.parallel.launch import find_launch
from tests.toy import ToyConfig, build

FULL_BYTES = 16384


def with_fault(kind: str, rank: int, step: int) -> None:
    """Wrap the loop's step of this process, if it is the rank's."""
    launch = find_launch()
    if kind == "none" or launch is None or launch.rank != rank:
        return
    unfaulted = loop.train_step

    def faulty(*arguments: Any, **keywords: Any) -> Any:
        if keywords["step"] == step:
            # stderr, since standard output is the run's own
            print(f"fault: {kind} at {time.time():.3f}", file=sys.stderr, flush=True)
            if kind == "raise":
                raise RuntimeError("injected fault")
            if kind == "disk":
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_BYTES, FULL_BYTES))
            while kind == "hang":
                time.sleep(0.1)
            if kind == "overflow":
                trained = next(p for p in arguments[0].parameters() if p.requires_grad)
                hook = trained.register_hook(lambda gradient: gradient * math.inf)
                try:
                    return unfaulted(*arguments, **keywords)
                finally:
                    hook.remove()
        return unfaulted(*arguments, **keywords)

    loop.train_step = faulty


if __name__ == "__main__":
    DETECTORS["toy"], BUILDERS["toy"] = ToyConfig, build
    with_fault(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    train.main(sys.argv[4:])
