"""`python thread_samples.py SECONDS PID...`: what the threads of processes do, until the standard input ends.

It imports nothing but Python's own modules, so that it takes little of the cores that it watches. The system's counters
of a thread (/proc/PID/task/TID/schedstat) tell how long it had a core, and how long it waited for one.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time


def _read(path: str) -> str:
    with open(path) as file:
        return file.read()


def _look(process: str, found: dict[str, dict[str, object]]) -> None:
    """Add the counters of all threads of a process: time, nanoseconds with a core, nanoseconds without."""
    folder = f"/proc/{process}/task"
    for thread in os.listdir(folder):
        try:
            ran, waited, _ = _read(f"{folder}/{thread}/schedstat").split()
            if thread not in found:
                name = _read(f"{folder}/{thread}/comm").strip()
                found[thread] = {"name": "main" if thread == process else name, "samples": []}
        except OSError:  # it has ended
            continue
        found[thread]["samples"].append((time.perf_counter(), int(ran), int(waited)))  # type: ignore[attr-defined]


def main() -> None:
    """Watch, then print {process: {thread: {name, samples}}} as JSON. The times are those of time.perf_counter."""
    interval, processes = float(sys.argv[1]), sys.argv[2:]
    found: dict[str, dict[str, dict[str, object]]] = {process: {} for process in processes}
    while not select.select([sys.stdin], [], [], interval)[0]:
        for process in processes:
            try:
                _look(process, found[process])
            except OSError:
                continue
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
