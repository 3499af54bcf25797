"""Fixtures: generated data packed once per session, and the way ranks are started.

`make test` first runs the tests that need one core each, in two processes of pytest (pytest-xdist), and then the
others, which ALONE names: those of tests/parallel in one of two processes, the rest in the other.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from filelock import FileLock

from megdet_hpc.parallel.launch import find_launch
from megdet_hpc.parallel.libraries import installed
from megdet_hpc.parallel.local_launch import mpirun_words, rank_launcher

ROOT = Path(__file__).resolve().parent.parent
REAL_DATA = ROOT.parent / "shared" / "data"

HAS_HOROVOD = installed("horovod")
NO_HOROVOD = "Horovod is not installed: it is built for Open MPI alone, and here is another MPI or none"
# What this environment has, as the doctor and the tests of transports list it.
CARRIERS = ("mpi", "horovod", "torch") if HAS_HOROVOD else ("mpi", "torch")

# The rank, local rank and number of ranks, in a shell script that stands in for a rank: Open MPI's, Hydra's, srun's.
SHELL_RANK = "${OMPI_COMM_WORLD_RANK:-${PMI_RANK:-$SLURM_PROCID}}"
SHELL_LOCAL_RANK = "${OMPI_COMM_WORLD_LOCAL_RANK:-${MPI_LOCALRANKID:-$SLURM_LOCALID}}"
SHELL_SIZE = "${OMPI_COMM_WORLD_SIZE:-${PMI_SIZE:-$SLURM_STEP_NUM_TASKS}}"

Launch = Callable[..., subprocess.CompletedProcess[str]]
Here = Callable[[Callable[[list[str]], Any], list[str]], subprocess.CompletedProcess[str]]

# Files whose tests start many processes, measure time, set limits, look at what the whole machine holds, or end
# something that is late. All tests that start ranks are alone too.
ALONE = (
    "tests/jobs/",
    "tests/parallel/",
    "tests/site/",
    "tests/cases/test_ctrl_c.py",
    "tests/cases/test_installed_alone.py",
    "tests/cases/test_torchrun.py",
    "tests/cases/test_two_runs_one_folder.py",
    "tests/unit/bench/",
    "tests/unit/data/test_fetch_coco.py",
    "tests/unit/data/test_shared_block.py",
    "tests/unit/data/test_stage_pack.py",
    "tests/unit/doctor/",
    "tests/unit/engine/test_watchdog.py",
    "tests/unit/log/",
    "tests/unit/record/",
    "tests/unit/test_owner.py",
)

# Two processes share two cores, so neither starts threads of PyTorch's.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that run alone, and skip those of Horovod where it is not installed."""
    for item in items:
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if not HAS_HOROVOD and (item.get_closest_marker("horovod") or any("horovod" in str(v) for v in values)):
            item.add_marker(pytest.mark.skip(reason=NO_HOROVOD))
        file = item.path.relative_to(ROOT).as_posix()
        ranks = item.get_closest_marker("parallel") or "launch" in getattr(item, "fixturenames", ())
        if ranks or file.startswith(ALONE):
            item.add_marker(pytest.mark.alone)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With --dist loadgroup tests/parallel gets one process and all others another one: each about half of the time."""
    from xdist.scheduler import LoadScopeScheduling

    class TwoGroups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "parallel" if nodeid.startswith("tests/parallel/") else "others"

    return TwoGroups(config, log) if config.getoption("dist") == "loadgroup" else None


def environment() -> dict[str, str]:
    """One thread per rank, this interpreter's tools first, and ranks that yield the core while they wait."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_mpi_yield_when_idle": "1",
    }


def mpirun(ranks: int | None = None) -> list[str]:
    """The launcher of this environment's MPI, Open MPI's or Hydra's; None: without its number of ranks."""
    path = environment()["PATH"]
    return mpirun_words(path) if ranks is None else rank_launcher(ranks, path)


def has_open_mpi() -> bool:
    """Whether the launcher of this environment's MPI is Open MPI's."""
    return "--oversubscribe" in mpirun()


def ranks_of(launcher: subprocess.Popen[bytes], module: str = "megdet_hpc.train") -> list[psutil.Process]:
    """The ranks that a launcher started, in rank order."""
    started = psutil.Process(launcher.pid).children()
    # Hydra's ranks are children of its proxy
    started += [rank for proxy in started if "proxy" in proxy.name() for rank in proxy.children()]
    found = [p for p in started if module in p.cmdline()]
    numbers = {p: launch.rank for p in found if (launch := find_launch(p.environ()))}
    return sorted(numbers, key=lambda process: numbers[process])


def run(command: list[str], timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run a command in the repository root with its output captured."""
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="session")
def launch() -> Launch:
    """launch(ranks, "-m", "module", ...) runs Python under mpirun; 0 ranks run it plainly."""
    if not shutil.which("mpirun", path=environment()["PATH"]):
        pytest.skip("no mpirun; tools/setup_env.sh installs one")

    def start(ranks: int, *arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        return run([*mpirun(ranks), sys.executable, *arguments], timeout)

    return start


@pytest.fixture
def here(capfd: pytest.CaptureFixture[str]) -> Here:
    """here(train.main, [...]) runs an entry point in this process, which has loaded torch already."""

    def call(main: Callable[[list[str]], Any], words: list[str]) -> subprocess.CompletedProcess[str]:
        capfd.readouterr()
        try:
            status = main(words) or 0
        except SystemExit as ended:
            status = ended.code or 0
        shown = capfd.readouterr()
        return subprocess.CompletedProcess(words, int(status), shown.out, shown.err)

    return call


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that the first process of the session to need it fills.

    Args:
        factory: pytest's own.
        name: of the folder.
        make: fills the folder, which is new.
    """
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # that of a worker lies in the session's
    folder, done = root / name, root / f"{name}.done"
    with FileLock(root / f"{name}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


def _make_shapes(folder: Path) -> None:
    make = [sys.executable, "data_prep/make_shapes.py", "--output", str(folder / "coco")]
    made = run([*make, "--train", "24", "--val", "10"])
    assert made.returncode == 0, made.stderr
    for split in ("train", "val"):
        annotations = folder / "coco" / "annotations" / f"instances_{split}.json"
        images = folder / "coco" / split
        pack = [sys.executable, "data_prep/pack_coco.py", "--annotations", str(annotations)]
        packed = run([*pack, "--images", str(images), "--output", str(folder / split)])
        assert packed.returncode == 0, packed.stderr


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a small generated set: COCO files in `coco/`, packs in `train/` and `val/`."""
    return made_once(tmp_path_factory, "shapes", _make_shapes)
