"""Tools that prepare data sets; run as scripts, see README.md."""

import sys
from pathlib import Path

from megdet_hpc.interrupts import quiet_interrupts

if Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent:  # one of the scripts, or its worker process
    quiet_interrupts()
