"""Lines on rank 0's terminal: progress bars, and warnings beside them."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

# Time between two states of a progress bar in a log file, which keeps them all [seconds].
_LOG_FILE_INTERVAL = 10.0


def progress_bar(iterable: Any = None, **keywords: Any) -> Any:
    """tqdm's bar on standard error. In a log file it is redrawn seldom."""
    interval = 0.2 if sys.stderr.isatty() else _LOG_FILE_INTERVAL
    return tqdm(iterable, mininterval=interval, maxinterval=2 * interval, dynamic_ncols=True, **keywords)


def warn(text: str) -> None:
    """Print a warning on standard error, above a bar if there is one."""
    tqdm.write(f"warning: {text}", file=sys.stderr)
    sys.stderr.flush()
