"""What the loading of mpi4py and Horovod says where they cannot be used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megdet_hpc.doctor.software import LACKS, load_libraries, probe_lacks
from megdet_hpc.parallel.libraries import ParallelLibraries, mpi_files, mpi_version
from megdet_hpc.parallel.mpi import may_ask_of_gpu

MPICH = "MPICH Version:      5.0.2\nMPICH Release date: Fri Sep 25 20:45:26 UTC 2026\nMPICH ABI:          18:2:6\n\0"


def test_an_mpi_is_named_in_one_line() -> None:
    assert mpi_version(MPICH) == "MPICH Version: 5.0.2"
    assert mpi_version("Open MPI v4.1.8, package: Open MPI root@host Distribution, ident: 4.1.8") == "Open MPI v4.1.8"
    assert mpi_version("Intel(R) MPI Library 2021.17 for Linux* OS\n") == "Intel(R) MPI Library 2021.17 for Linux* OS"


def test_two_mpis_in_one_process_are_seen() -> None:
    line = "7f00-7f01 r-xp 00000000 00:1d 12   {}\n"
    names = ["/opt/my mpi/lib/libmpi.so.40.30.8", "/opt/my mpi/lib/libmpi.so.40.30.8", "/opt/lib/libmpi_cxx.so.40"]
    one = "".join(map(line.format, names)) + "7f00-7f01 r-xp 00000000 00:00 0\n"
    assert mpi_files(one) == ["/opt/my mpi/lib/libmpi.so.40.30.8"]
    assert mpi_files(one + line.format("/usr/lib/libmpi.so.12")) == [names[0], "/usr/lib/libmpi.so.12"]


@pytest.mark.parametrize(
    ("library", "runs", "may"),
    [
        ("Open MPI v4.1.8", False, True),
        (MPICH, False, False),
        ("Intel(R) MPI Library", False, False),
        (MPICH, True, True),
    ],
)
def test_only_open_mpi_is_asked_of_gpus_before_it_runs(library: str, runs: bool, may: bool) -> None:
    assert may_ask_of_gpu(library, runs) is may


@pytest.mark.parametrize(
    ("body", "verdict"),
    [
        ("raise ModuleNotFoundError('No module named mpi4py', name='mpi4py')", "slow"),
        ("raise RuntimeError('no')", "wrong"),
    ],
)
def test_the_doctor_tells_a_broken_library_from_a_missing_one(
    body: str, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mpi4py.py").write_text(body + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "mpi4py"]:
        monkeypatch.delitem(sys.modules, name)
    libraries, finding = load_libraries()
    if verdict == "slow":
        assert finding is None and libraries is not None and libraries.mpi4py == ""
        lack = probe_lacks(libraries, missing=[])[0]
        assert (lack.verdict, lack.probe, lack.detail) == ("slow", "mpi4py", "not installed")
        return
    assert libraries is None and finding is not None
    assert finding.verdict == verdict and "setup_env.sh" in finding.advice
    assert finding.detail.startswith("not loaded: mpi4py is missing or broken")


def test_the_doctor_says_what_each_lack_costs() -> None:
    lacks = probe_lacks(ParallelLibraries(), missing=list(LACKS))
    assert [lack.verdict for lack in lacks] == ["slow", "fine", *["slow"] * len(LACKS)]
    assert "MASTER_ADDR" in lacks[0].advice and "solver.gradients auto is torch" in lacks[1].detail
    assert all(f"pip install {LACKS[name][0]}" in lack.advice for name, lack in zip(LACKS, lacks[2:], strict=True))


def test_horovod_without_its_part_for_pytorch_is_said_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "horovod").mkdir()
    (tmp_path / "horovod" / "__init__.py").write_text("")
    (tmp_path / "horovod" / "torch.py").write_text("print('Warning! MPI libs are missing')\n")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from megdet_hpc.parallel.libraries import LibraryError, import_horovod
try:
    import_horovod()
except LibraryError as error:
    print(error)
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert shown.stdout.startswith("Horovod was built without its part for PyTorch"), shown.stdout + shown.stderr
    assert shown.stdout.count("\n") == 1
