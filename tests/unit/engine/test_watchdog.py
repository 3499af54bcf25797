"""What a watchdog takes for a hang. tests/parallel/test_endings.py has hangs of real ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megdet_hpc import train
from megdet_hpc.engine import watchdog
from megdet_hpc.parallel.serial import SerialCommunicator
from tests.parallel.test_training import arguments

PROGRAM = """
import ctypes, os, sys, time
from pathlib import Path
from megdet_hpc.engine import watchdog
from megdet_hpc.parallel.serial import SerialCommunicator

world = SerialCommunicator()
if "single" not in sys.argv:
    world.size = 2  # as among several: the other one is not there
    world.allgather_object = lambda value, name: [value, value]
watchdog._BACKSTOP_SECONDS = 0.5
if "blocked" in sys.argv:
    watchdog.write_json = lambda *a: time.sleep(1000)
    watchdog._GATHER_SECONDS = 0.5
minutes = (10 if "patient" in sys.argv else 2) / 60
if "auto" in sys.argv:
    watchdog._MOST_MINUTES, watchdog._LEAST_MINUTES, minutes = 60, 2 / 60, "auto"
dog = watchdog.Watchdog(minutes, Path(sys.argv[1]), world, lambda: os._exit(9))
for step in range(40):
    dog.tick(step)
    if step % 10 == 0:
        dog.learn()
    print(step, flush=True)
    if "held" in sys.argv:
        ctypes.PyDLL(None).sleep(60)  # PyDLL keeps the interpreter
    time.sleep(60 if step > 34 and "hang" in sys.argv else 0.1)
dog.close()
"""


def start(*arguments: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


# its process, as by hand, and all of its job
@pytest.mark.parametrize(("ranks", "send"), [("several", os.killpg), ("single", os.kill)])
def test_a_job_that_was_suspended_goes_on(ranks: str, send: Callable[[int, int], None], tmp_path: Path) -> None:
    """A single process has a guard too, whose limit of 10.5 s the suspension outlasts."""
    process = start(str(tmp_path), ranks, "patient")
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(5)][-1] == "4\n"
    send(process.pid, signal.SIGSTOP)
    time.sleep(12)
    send(process.pid, signal.SIGCONT)
    rest, errors = process.communicate(timeout=60)
    assert (process.returncode, rest.split()[-1], errors) == (0, "39", "")


def test_a_call_that_holds_the_interpreter_of_a_single_process_is_ended_with_its_stack(tmp_path: Path) -> None:
    process = start(str(tmp_path), "single", "held")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    first, *rest = errors.splitlines()
    assert first.startswith("megdet_hpc: watchdog: rank 0 on ")
    assert first.endswith(": a call has held the interpreter for 2 s; ending the job")
    assert any('File "<string>"' in line for line in rest)


def test_a_hang_leaves_its_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGDET_STATUS_FILE", str(tmp_path / "status"))
    process = start(str(tmp_path), "hang")
    process.communicate(timeout=60)
    assert process.returncode == 9
    assert (tmp_path / "status").read_text() == "1\n"


def test_a_hang_is_found_by_the_limit_that_was_learnt(tmp_path: Path) -> None:
    """Without it this one would be found after an hour."""
    process = start(str(tmp_path), "hang", "auto")
    process.communicate(timeout=60)
    assert process.returncode == 9


class _Pair(SerialCommunicator):
    """This rank, and one whose longest step is told."""

    size = 2
    others = 0.0

    def allgather_object(self, value: Any, *, name: str) -> list[Any]:
        return [value, self.others if name == "watchdog.steps" else value]


@pytest.mark.parametrize(
    ("steps", "others", "minutes"),
    [
        ([0.2, 0.3], 0.0, 5),  # ten times as long would be 3 s, less than a file system may stop
        ([50.0, 45.0], 40.0, 500 / 60),
        ([0.2, 45.0], 50.0, 500 / 60),  # both ranks wait as long
        ([0.2, 180.0], 0.0, 15),  # it has been seen to stop for 3 minutes, and may again
    ],
)
def test_the_limit_of_a_step_follows_the_longest(
    steps: list[float], others: float, minutes: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    world = _Pair()
    world.others = others
    dog = watchdog.Watchdog("auto", tmp_path, world, lambda: None)
    dog.close()  # the thread, which would take the clock's jumps for hangs
    dog.tick(0)
    now[0] += 400  # the first steps, which start libraries and loaders, count for nothing
    dog.learn()
    for step, seconds in enumerate(steps, 1):
        dog.tick(step)
        now[0] += seconds
        dog.learn()
    dog.tick(len(steps) + 1)
    dog.learn()
    assert dog.limit == pytest.approx(60 * minutes)
    dog.tick()  # an evaluation
    now[0] += 600
    assert dog.limit == pytest.approx(60 * 15)
    dog.tick(len(steps) + 2)
    dog.learn()
    assert dog.limit == pytest.approx(60 * minutes)


def test_minutes_mean_what_they_say(tmp_path: Path) -> None:
    dog = watchdog.Watchdog(2.0, tmp_path, _Pair(), lambda: None)
    dog.close()
    for step in range(5):
        dog.tick(step)
        dog.learn()
        assert dog.limit == 120


def test_a_file_system_that_hangs_holds_no_watchdog(tmp_path: Path) -> None:
    """It may be why the run hangs."""
    process = start(str(tmp_path), "hang", "blocked")
    process.communicate(timeout=60)
    assert process.returncode == 9


def test_an_error_in_one_process_ends_its_watchdog(shapes: Path, tmp_path: Path) -> None:
    """The process may live on, and 15 minutes later the watchdog would end it."""
    with pytest.raises(SystemExit):
        train.main([*arguments(shapes, tmp_path / "run")[2:], "--model.backbone_weights", str(tmp_path / "none.pth")])
    for thread in [thread for thread in threading.enumerate() if thread.name == "watchdog"]:
        thread.join(timeout=60)  # it has been told to end, for which a busy host may take a moment
        assert not thread.is_alive()
