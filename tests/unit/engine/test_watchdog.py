"""What a watchdog takes for a hang. tests/parallel/test_endings.py has hangs of real ranks."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = """
import os, sys, time
from pathlib import Path
from megdet_hpc.engine import watchdog
from megdet_hpc.parallel.serial import SerialCommunicator

world = SerialCommunicator()
world.size = 2  # as among several: the other one is not there
world.allgather_object = lambda value, name: [value, value]
if "blocked" in sys.argv:
    watchdog.write_json = lambda *a: time.sleep(1000)
    watchdog._GATHER_SECONDS = 0.5
dog = watchdog.Watchdog(2 / 60, Path(sys.argv[1]), world, lambda: os._exit(9))
for step in range(40):
    dog.tick(step)
    print(step, flush=True)
    time.sleep(0.1 if step < 35 or len(sys.argv) < 3 else 60)
dog.close()
"""


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], stdout=subprocess.PIPE, text=True)


def test_a_job_that_was_suspended_goes_on(tmp_path: Path) -> None:
    process = start(str(tmp_path))
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(5)][-1] == "4\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(6)
    process.send_signal(signal.SIGCONT)
    rest = process.communicate(timeout=60)[0].split()
    assert process.returncode == 0 and rest[-1] == "39"


def test_a_hang_leaves_its_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGDET_STATUS_FILE", str(tmp_path / "status"))
    process = start(str(tmp_path), "hang")
    process.communicate(timeout=60)
    assert process.returncode == 9
    assert (tmp_path / "status").read_text() == "1\n"


def test_a_file_system_that_hangs_holds_no_watchdog(tmp_path: Path) -> None:
    """It may be why the run hangs."""
    process = start(str(tmp_path), "hang", "blocked")
    process.communicate(timeout=60)
    assert process.returncode == 9
