"""The watchdog ends a process that is late, says what it was doing, and leaves a punctual one alone."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
BEGIN = (
    "import time\nfrom megdet_hpc.doctor.stage_guard import StageGuard\ndog = StageGuard('rank 3 of 8 on node05', 1)\n"
)


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", BEGIN + program], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_a_rank_that_waits_is_ended_even_where_it_holds_pythons_lock() -> None:
    # PyDLL keeps the lock during the call, as mpi4py does during MPI_Init
    done = run("dog.collective('first allreduce')\nimport ctypes\nctypes.PyDLL(None).sleep(50)\n")
    assert done.returncode == -signal.SIGKILL
    assert done.stderr.startswith(
        "megdet_hpc.doctor: rank 3 of 8 on node05: wrong: waited 1 s for other ranks at: first allreduce; "
    )
    assert len(done.stderr.splitlines()) == 1


def test_the_last_stage_is_the_one_that_is_named() -> None:
    done = run("dog.collective('start')\ndog.local('reading /data')\ntime.sleep(50)\n")
    assert done.returncode == -signal.SIGKILL
    assert "wrong: stuck for 1 s at: reading /data; repair this host" in done.stderr


def test_stages_in_time_and_a_closed_watchdog_end_nothing() -> None:
    done = run(
        "for part in range(8):\n    dog.local(f'part {part}')\n    time.sleep(0.2)\n"
        "dog.close()\ntime.sleep(1.5)\nprint('done')\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
