"""The process of one tracker: `python -m megdet_hpc.log.follow NAME FOLDER` hands metrics.jsonl to it as it grows.

It ends once its standard input has ended, which is the end of the training, whatever ended that. The last word there is
finished, stopped or failed; no word means that the training was killed. The training starts it; nobody else need.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import yaml

from megdet_hpc.files import write_json
from megdet_hpc.log.libraries import LIBRARIES, Library
from megdet_hpc.log.metrics import METRICS, config_files, read_row
from megdet_hpc.log.trackers import FOLDER

_LOOK_SECONDS = 1.0
# A library that waits for its network is given up so long after the training has ended [seconds].
_GIVE_UP_SECONDS = 60.0


class Note:
    """What a tracker remembers over the starts of a run: the name of its run, and the last step of each metric.

    Args:
        path: file of the note.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.run: str | None = None
        self.steps: dict[str, int] = {}
        with suppress(OSError, ValueError, TypeError):
            content = json.loads(path.read_bytes())
            self.run, self.steps = content["run"], dict(content["steps"])

    def new(self, row: dict[str, Any]) -> dict[str, float]:
        """The numbers of a row that the tracker has not had."""
        step = row["step"]
        points = {key: value for key, value in row.items() if key != "step" and value is not None}
        return {key: value for key, value in points.items() if self.steps.get(key, -1) < step}

    def write(self, step: int, keys: Iterator[str]) -> None:
        """Note that the tracker has had these metrics up to a step."""
        self.steps |= dict.fromkeys(keys, step)
        write_json(self._path, {"run": self.run, "steps": self.steps})


def lines_until(file: TextIO, ended: threading.Event) -> Iterator[str]:
    """The whole lines of a file that grows, until the training has ended and all are read."""
    part = ""
    while True:
        last = ended.is_set()  # before the read, so that what came before the end is read
        for line in file:
            part += line
            if part.endswith("\n"):
                yield part
                part = ""
        if last:
            return
        ended.wait(_LOOK_SECONDS)


def follow(name: str, folder: Path, said: list[str], ended: threading.Event) -> None:
    """Hand the rows of a run to a library until the run has ended.

    Args:
        name: name of the tracker.
        folder: folder of the run.
        said: last word of the training, once `ended` is set.
        ended: set when the training has ended.
    """
    # opened first: another start of the run would write a file of its own
    with open(folder / METRICS, encoding="utf-8", errors="replace") as file:
        note = Note(folder / FOLDER / f"{name}.json")
        library: Library = LIBRARIES[name](folder, _configuration(folder), note.run)
        note.run = library.run
        note.write(0, iter(()))
        for line in lines_until(file, ended):
            row = read_row(line)
            if row and (points := note.new(row)):
                library.log(row["step"], points)
                note.write(row["step"], iter(points))
    library.end(said[0] if said and said[0] else "failed")


def _configuration(folder: Path) -> dict[str, Any]:
    files = config_files(folder)
    content = yaml.safe_load(files[-1][1].read_text()) if files else {}
    return content if isinstance(content, dict) else {}


def main() -> None:
    """Entry point."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a job's signals are for the ranks, whose rows it must bring out yet
    name, folder = sys.argv[1:]
    said: list[str] = []
    ended = threading.Event()

    def wait_for_end() -> None:
        said.append(sys.stdin.read().strip())
        ended.set()
        ended_at = threading.Timer(_GIVE_UP_SECONDS, os._exit, (1,))
        ended_at.daemon = True
        ended_at.start()

    threading.Thread(target=wait_for_end, daemon=True).start()
    status = 0
    try:
        follow(name, Path(folder), said, ended)
    except BaseException as error:
        text = " ".join(str(error).split())
        print(f"{type(error).__name__}: {text[:300]}", flush=True)
        status = 1
    # a library may wait at the exit of its interpreter for a network that does not answer
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
