"""The guard ends a process that is late, and only that one: no suspension, no signal to the job, no end before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
BEGIN = "import ctypes, os, sys, time\nfrom megdet_hpc.guard import Guard\n"


def start(program: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", BEGIN + program]
    return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def test_a_process_that_is_late_is_ended_although_it_holds_the_interpreter() -> None:
    process = start(
        # the signal for the stacks ends the first sleep
        "guard = Guard(stacks=True)\nguard.expect(0.5, 'late')\nwhile True:\n    ctypes.PyDLL(None).sleep(60)\n"
    )
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert errors.startswith("late\n") and 'File "<string>"' in errors


def test_the_last_limit_counts_and_a_rest_has_none() -> None:
    process = start(
        "guard = Guard()\nguard.expect(4, 'late')\nguard.expect(60, 'late')\ntime.sleep(5.5)\nguard.expect(4, 'late')\n"
        "guard.rest()\ntime.sleep(5.5)\nguard.close()\nguard.close()\nprint('done')\n"
    )
    assert process.communicate(timeout=60) == ("done\n", "")
    assert process.returncode == 0


def test_a_suspension_does_not_count() -> None:
    """Of a limit of 10 s most is left to a busy machine, which starts and stops three processes within it."""
    how: tuple[tuple[Callable[[int, int], None], bool], ...] = ((os.killpg, False), (os.killpg, True), (os.kill, True))
    processes = [
        start(
            f"guard = Guard(spares_stopped={spares})\nguard.expect(10, 'late')\nprint('begun', flush=True)\n"
            "sys.stdin.readline()\nguard.close()\nprint('done')\n"
        )
        for _, spares in how
    ]
    for process, (send, _) in zip(processes, how, strict=True):
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        send(process.pid, signal.SIGSTOP)
    time.sleep(12)
    for process, (send, _) in zip(processes, how, strict=True):
        send(process.pid, signal.SIGCONT)
    for process in processes:
        assert process.communicate("\n", timeout=60) == ("done\n", "")


def test_a_process_that_alone_stands_still_is_late_if_nobody_spares_it() -> None:
    process = start("guard = Guard()\nguard.expect(1, 'late')\nprint('begun', flush=True)\ntime.sleep(60)\n")
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGSTOP)
    assert process.wait(timeout=60) == -signal.SIGKILL


def test_a_signal_to_the_whole_job_leaves_the_guard_at_work() -> None:
    """A launcher passes SIGUSR1 on to the process group of a rank, which saves its state and goes on for a while."""
    process = start(
        "import signal\nsignal.signal(signal.SIGUSR1, lambda *_: print('told', flush=True))\nguard = Guard()\n"
        "guard.expect(2, 'late')\nos.killpg(0, signal.SIGUSR1)\nctypes.PyDLL(None).sleep(60)\n"
        "ctypes.PyDLL(None).sleep(60)\n"
    )
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (-signal.SIGKILL, "late\n")


def test_a_guard_goes_with_its_process_though_a_loader_holds_the_pipe() -> None:
    process = start("guard = Guard()\nif not os.fork():\n    time.sleep(60)\ntime.sleep(60)\n")
    deadline = time.monotonic() + 60
    while len(found := psutil.Process(process.pid).children()) < 2:
        assert time.monotonic() < deadline, "not started"
        time.sleep(0.02)
    guard = next(child for child in found if any("guard.py" in word for word in child.cmdline()))
    loader = next(child for child in found if child != guard)
    process.kill()
    process.wait()
    try:
        psutil.wait_procs([guard], timeout=30)
        assert not guard.is_running()
    finally:
        loader.kill()
        process.communicate()
