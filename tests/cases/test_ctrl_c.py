"""Ctrl-C: the state is saved and said, a second one ends at once, and nothing ever shows a traceback."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from megdet_hpc.engine.checkpoint import checkpoint_files
from megdet_hpc.interrupts import EXIT_INTERRUPTED
from megdet_hpc.log import read_metrics
from tests.conftest import ROOT, environment
from tests.parallel.test_endings import LONG, UNFINISHED
from tests.parallel.test_training import arguments

pytestmark = pytest.mark.parallel
STARTED: list[subprocess.Popen[bytes]] = []


@pytest.fixture(autouse=True)
def nothing_is_left_running() -> Iterator[None]:
    """A test that fails must not leave its programs to the tests after it."""
    yield
    while STARTED:
        with suppress(ProcessLookupError):
            os.killpg(STARTED.pop().pid, signal.SIGKILL)


def hear_ctrl_c() -> None:
    """A checker that runs in the background hands on that Ctrl-C is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def begun(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """A command in a group of processes of its own, as a shell starts it."""
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(),
            stdout=file,
            stderr=file,
            start_new_session=True,
            preexec_fn=hear_ctrl_c,
        )
    STARTED.append(process)
    return process


def interrupt(process: subprocess.Popen[bytes]) -> None:
    """As a terminal does: all of the group."""
    os.killpg(process.pid, signal.SIGINT)


def wait_for(holds: object, process: subprocess.Popen[bytes]) -> None:
    assert callable(holds)
    deadline = time.monotonic() + 120
    while not holds():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def work(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Wait until a process and its own have had so much of a core, however busy the machine is, or it has ended."""
    while process.poll() is None and _core_seconds(process.pid) < seconds:
        time.sleep(0.01)


def _core_seconds(pid: int) -> float:
    parent, total = psutil.Process(pid), 0.0
    for process in (parent, *parent.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:2])
    return total


def test_training_alone_saves_and_says_how_to_go_on_and_a_second_one_ends_at_once(shapes: Path, tmp_path: Path) -> None:
    output, log = tmp_path / "run", tmp_path / "log"
    # loader processes are of the group too, and must not break off
    command = [sys.executable, *arguments(shapes, output, *LONG, "--data.num_workers", "1", "--resume", "auto")]
    run = begun(command, log)
    wait_for(lambda: read_metrics(output / "metrics.jsonl"), run)
    interrupt(run)
    assert run.wait(timeout=60) == UNFINISHED
    said = log.read_text()
    assert "SIGINT: the step or evaluation under way is finished and the state saved" in said
    step = int(checkpoint_files(output / "checkpoints")[-1].stem[5:])
    assert said.splitlines()[-2].startswith(f"stopped after step {step} of ")
    assert said.splitlines()[-1] == f"--resume auto with the same output {output} goes on; exit status 75"
    assert "Traceback" not in said

    again = begun(command, log)
    wait_for(lambda: read_metrics(output / "metrics.jsonl")[-1]["step"] > step, again)
    interrupt(again)
    wait_for(lambda: "SIGINT: " in log.read_text(), again)
    interrupt(again)
    assert again.wait(timeout=60) in (EXIT_INTERRUPTED, UNFINISHED)  # 75: it was faster than the second
    assert "Traceback" not in log.read_text()


def test_training_that_has_not_begun_leaves_nothing(shapes: Path, tmp_path: Path) -> None:
    output, log = tmp_path / "run", tmp_path / "log"
    for ready in (lambda: True, lambda: (output / "owner" / "holder.json").exists()):
        run = begun([sys.executable, *arguments(shapes, output, *LONG)], log)
        work(run, 0.1)  # the interpreter's own start
        wait_for(ready, run)
        interrupt(run)
        assert run.wait(timeout=60) == EXIT_INTERRUPTED
        assert log.read_text().splitlines()[-1] == "megdet_hpc.train: interrupted"
        assert "Traceback" not in log.read_text() and not output.exists()


def run_program(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    """A module of its own, run as `python -m program`."""
    (folder / "program.py").write_text(text)
    env = {**environment(), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "program"]
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=240, preexec_fn=hear_ctrl_c
    )


def test_an_interrupt_within_the_making_of_a_class_leaves_the_status_too(tmp_path: Path) -> None:
    """dataclasses and namedtuple run a text as code; training met it in 3 of 60 starts."""
    program = """
from megdet_hpc.interrupts import EXIT_INTERRUPTED, say_interrupted
try:
    exec("raise KeyboardInterrupt")
except KeyboardInterrupt:
    say_interrupted()
    raise SystemExit(EXIT_INTERRUPTED)
"""
    done = run_program(tmp_path, program)
    assert (done.returncode, done.stderr) == (EXIT_INTERRUPTED, "program: interrupted\n")


DESTRUCTOR = """
class Closing:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
Closing()
time.sleep(30)
"""
LIBRARY = """
try:
    os.kill(os.getpid(), signal.SIGINT)
except BaseException:
    pass
StopRequests(None).listen()
"""


@pytest.mark.parametrize("program", [DESTRUCTOR, LIBRARY])
def test_an_interrupt_that_was_dropped_on_its_way_counts(program: str, tmp_path: Path) -> None:
    """Training ran to its end after one in 1 of 60 starts."""
    start = "import os, signal, time\nfrom megdet_hpc.interrupts import quiet_interrupts\nquiet_interrupts()\n"
    done = run_program(tmp_path, f"{start}from megdet_hpc.engine.stop import StopRequests\n{program}")
    assert (done.returncode, done.stderr) == (EXIT_INTERRUPTED, "program: interrupted\n")


def test_the_destructor_of_a_half_made_object_says_nothing(tmp_path: Path) -> None:
    """tqdm's bar fails so when the interrupt comes while it is made."""
    program = """
import os, signal
from megdet_hpc.interrupts import quiet_interrupts
quiet_interrupts()
class Bar:
    def __init__(self, interrupted):
        if interrupted:
            os.kill(os.getpid(), signal.SIGINT)
        self.place = "first"
    def __del__(self):
        raise ValueError(self.place)
Bar(False)
Bar(True)
"""
    done = run_program(tmp_path, program)
    assert done.returncode == EXIT_INTERRUPTED
    assert "ValueError: first" in done.stderr and "AttributeError" not in done.stderr
    assert done.stderr.endswith("program: interrupted\n")


@pytest.mark.parametrize(("times", "last"), [(1, "the import is over\n"), (2, "")])
def test_an_interrupt_within_an_import_waits_for_its_end_and_a_second_one_does_not(
    tmp_path: Path, times: int, last: str
) -> None:
    """torch's C++ imports modules and aborts the process at an exception from there."""
    imported = "import os, signal, time\n" + "os.kill(os.getpid(), signal.SIGINT)\n" * times
    (tmp_path / "imported.py").write_text(imported + "time.sleep(0.2)\nprint('the import is over')\n")
    start = "import time\nfrom megdet_hpc.interrupts import quiet_interrupts\nquiet_interrupts()\n"
    done = run_program(tmp_path, f"{start}import imported\ntime.sleep(30)\nprint('not interrupted')\n")
    assert (done.returncode, done.stdout, done.stderr) == (EXIT_INTERRUPTED, last, "program: interrupted\n")


def test_an_interrupt_within_an_import_of_the_last_moment_counts(tmp_path: Path) -> None:
    """The alarm that brings it again must not find its handler gone."""
    (tmp_path / "imported.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    start = "import atexit, time\nfrom megdet_hpc.interrupts import quiet_interrupts\nquiet_interrupts()\n"
    slow = "class Slow:\n    def __del__(self):\n        time.sleep(0.5)\nslow = Slow()\n"
    done = run_program(tmp_path, f"{start}{slow}atexit.register(lambda: __import__('imported'))\n")
    assert (done.returncode, done.stderr) == (EXIT_INTERRUPTED, "program: interrupted\n")


def test_an_alarm_of_the_programs_own_is_no_interrupt(tmp_path: Path) -> None:
    start = "import signal\nfrom megdet_hpc.interrupts import quiet_interrupts\nquiet_interrupts()\n"
    done = run_program(tmp_path, f"{start}signal.signal(signal.SIGALRM, lambda *_: None)\n")
    assert (done.returncode, done.stderr) == (0, "")


CHILDREN = """
import signal
from concurrent.futures import ProcessPoolExecutor
from torch.utils.data import DataLoader
from data_prep.workers import WorkerContext, prepare_worker
from megdet_hpc.data.loader import start_server

def deaf(of=None):
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())

class Deaf:
    def __len__(self):
        return 1
    def __getitem__(self, index):
        return deaf()

if __name__ == "__main__":
    loader = DataLoader(Deaf(), num_workers=1, multiprocessing_context=start_server(), collate_fn=list)
    packers = ProcessPoolExecutor(1, WorkerContext(), initializer=prepare_worker)
    print(list(loader), list(packers.map(deaf, range(2))), deaf())
"""


def test_processes_that_start_never_hear_it(tmp_path: Path) -> None:
    """A process that takes no notice by itself has its imports before that, and a traceback from within them."""
    done = run_program(tmp_path, CHILDREN)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[[True]] [True, True] False\n", "")


COCO = "coco/annotations/instances_val.json"
PROGRAMS = {
    "pack_coco": ["data_prep/pack_coco.py", "--annotations", COCO, "--images", "coco/val", "--workers", "2"],
    "verify_pack": ["data_prep/verify_pack.py", "val", "--workers", "2"],
    "make_shapes": ["data_prep/make_shapes.py", "--train", "100000"],
    "show_pack": ["data_prep/show_pack.py", "val"],
    "evaluate": ["-m", "megdet_hpc.evaluate", "--checkpoint", "none.pt"],
    "plan": ["-m", "megdet_hpc.plan", "--config", "tiny", "--ranks", "8", "--images", "100"],
    "doctor": ["-m", "megdet_hpc.doctor"],
    "study": ["-m", "megdet_hpc.study", "bn_size"],
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_ends_with_one_line(shapes: Path, tmp_path: Path, program: str) -> None:
    """Interrupted at several moments, most of them while its modules are imported."""
    words = [str(shapes / word) if (shapes / word).exists() else word for word in PROGRAMS[program]]
    if program in ("pack_coco", "make_shapes", "show_pack", "study"):
        words += ["--output", str(tmp_path / "output")]
    ended = 0
    for turn, seconds in enumerate((0.1, 0.3, 0.8, *[0.1] * 10)):  # a short one is over at once on some days
        if turn > 2 and ended:
            break
        log = tmp_path / "log"
        run = begun([sys.executable, *words], log)
        work(run, seconds)
        if run.poll() is None:
            interrupt(run)
        status, said = run.wait(timeout=60), log.read_text()
        assert "Traceback" not in said and "KeyboardInterrupt" not in said
        if status == EXIT_INTERRUPTED:
            ended += 1
            assert "interrupted" in said.splitlines()[-1]
    assert ended
    assert not list(tmp_path.glob(".output*"))


@pytest.mark.horovod
def test_the_line_reaches_the_terminal_of_a_launcher_that_forwards_nothing_more(shapes: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    command = ["horovodrun", "-np", "2", "python", *arguments(shapes, output, *LONG)]
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(ROOT)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.execvpe(command[0], command, environment())
    shown, typed, deadline = b"", False, time.monotonic() + 120
    while time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                shown += os.read(terminal, 65536)
            except OSError:  # the last process has left the terminal
                break
        if not typed and len(read_metrics(output / "metrics.jsonl")) > 1:
            os.write(terminal, b"\x03")
            typed = True
    os.waitpid(process, 0)
    said = shown.decode(errors="replace")
    assert "SIGTERM: the step or evaluation under way is finished and the state saved if the launcher" in said
    assert "Traceback" not in said
