"""megdet_hpc: object detectors trained with very large mini-batches on HPC clusters.

Implements MegDet (Peng et al., CVPR 2018) on Horovod and MPI. This module imports next to nothing, so that
tools which only need the packed data format (`data_prep/`) run without torch.
"""

import sys
from importlib import import_module
from typing import Any

if sys.argv[:1] == ["-m"]:  # python -m megdet_hpc.NAME is looking for NAME, whose imports take long
    from megdet_hpc.interrupts import quiet_interrupts

    quiet_interrupts()

__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    """`megdet_hpc.load`, whose imports take long, once it is asked for."""
    if name == "load":
        return import_module("megdet_hpc.predict.detector").load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
