from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from tests.conftest import CARRIERS, ROOT, Launch, environment, mpirun, run

pytestmark = pytest.mark.parallel


# world runs every transport in one job, since starting the ranks takes longer than the checks
@pytest.mark.parametrize(
    ("body", "ranks"),
    [
        *(("world", 2), ("world", 4), ("gradients horovod", 2), ("gradients horovod", 4)),
        *(("gradients mpi", 2), ("gradients torch", 2), ("gradients horovod after", 2)),
    ],
)
def test_bodies_on_every_transport(launch: Launch, body: str, ranks: int) -> None:
    done = launch(ranks, "-m", *f"tests.parallel.{body}".split())
    assert done.returncode == 0, done.stderr
    # not by line: unbuffered ranks mix their lines
    passed = re.findall(r"rank \d+ of \d+ passed", done.stdout)
    assert sorted(passed) == [f"rank {rank} of {ranks} passed" for rank in range(ranks)]
    if body == "world":
        assert re.findall(r"^(\w+): [\d.]+ s$", done.stderr, re.MULTILINE) == list(CARRIERS)


@pytest.mark.parametrize(
    ("how", "text"),
    [("raise", "RuntimeError: this rank breaks"), ("user", "error: this value is wrong"), ("exit", "")],
)
def test_a_failing_rank_ends_the_job(launch: Launch, how: str, text: str) -> None:
    begin = time.monotonic()
    done = launch(3, "-m", "tests.parallel.failing", how, timeout=120)
    # bad input is told from a crash by its status; Open MPI hands on the one that ended the job
    assert done.returncode == {"raise": 1, "user": 2, "exit": 7}[how], done.stderr
    assert text in done.stderr
    assert ("Traceback" in done.stderr) == (how == "raise")
    if how != "exit":
        assert "rank 2 of 3 on" in done.stderr
    assert time.monotonic() - begin < 120


@pytest.mark.parametrize("transport", ["horovod", "torch"])
def test_a_failing_rank_ends_the_job_on_every_transport(launch: Launch, transport: str) -> None:
    done = launch(3, "-m", "tests.parallel.world", "fail", transport, timeout=120)
    assert done.returncode != 0
    assert "rank 2 of 3 on" in done.stderr
    assert "RuntimeError: this rank breaks" in done.stderr
    assert "passed" not in done.stdout


def test_what_mpi_says_of_gpu_memory_is_what_it_was_built_with(launch: Launch) -> None:
    tool = shutil.which("ompi_info", path=environment()["PATH"])
    if tool is None:
        pytest.skip("no ompi_info beside mpirun, which knows how Open MPI was built")
    built = re.search(r"opal_built_with_cuda_support:value:(\w+)", run([tool, "--parsable", "--all"]).stdout)
    assert built is not None
    done = launch(1, "-c", "from megdet_hpc.parallel.mpi import mpi_reads_gpu_memory as reads; print(reads())")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == built[1].capitalize()


def _stands_in(folder: Path, library: str, body: str) -> None:
    (folder / library).mkdir()
    (folder / library / "__init__.py").write_text(body)


@pytest.mark.horovod
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no horovod", "horovod is missing or broken (No module named 'horovod')"),
        ("no mpi4py", "mpi4py is missing or broken (No module named 'mpi4py')"),
        ("no MPI for mpi4py", "mpi4py is missing or broken (cannot load MPI library)"),
        ("horovod without PyTorch", "Horovod was built without its part for PyTorch, as a plain pip install does"),
        ("horovod of another PyTorch", "horovod is missing or broken ("),
    ],
)
def test_a_library_that_cannot_be_used_is_one_line(launch: Launch, tmp_path: Path, fault: str, message: str) -> None:
    if fault.startswith("no MPI"):
        # what mpi4py's wheels raise where no MPI is found
        _stands_in(tmp_path, "mpi4py", "raise RuntimeError('cannot load MPI library\\nlibmpi.so.12: no such file')\n")
    elif fault.startswith("no "):
        library = fault.removeprefix("no ")
        body = f"raise ModuleNotFoundError(\"No module named '{library}'\", name='{library}')\n"
        _stands_in(tmp_path, library, body)
    else:
        # the installed one without its extension, or with one that cannot be loaded
        spec = importlib.util.find_spec("horovod")
        assert spec is not None and spec.origin is not None
        shutil.copytree(Path(spec.origin).parent, tmp_path / "horovod", ignore=shutil.ignore_patterns("*.so"))
        if fault.endswith("another PyTorch"):
            extension = f"mpi_lib_v2{sysconfig.get_config_var('EXT_SUFFIX')}"
            (tmp_path / "horovod" / "torch" / extension).write_bytes(b"no library")
    paths = {**environment(), "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [*mpirun(2), sys.executable, "-m", "tests.parallel.world"]
    done = subprocess.run(command, cwd=ROOT, env=paths, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("megdet_hpc:")]
    # where MPI never started, rank 1 may say it too before the launcher has ended it
    assert len({line.partition(" error: ")[2] for line in errors}) == 1, done.stderr
    assert f"mpirun (Open MPI) started 2 rank(s), but {message}" in errors[0]
    assert "tools/setup_env.sh" in errors[0]
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.horovod
def test_horovodrun_over_gloo_is_refused(launch: Launch) -> None:
    done = run(["horovodrun", "--gloo", "-np", "2", sys.executable, "-m", "tests.parallel.world"], timeout=120)
    assert done.returncode != 0
    assert "horovodrun (Gloo) started 2 rank(s) without MPI" in done.stdout + done.stderr
    assert "passed" not in done.stdout
