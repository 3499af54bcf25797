"""What the set-up chooses, keeps and refuses, and how it shows why a build failed; nothing is installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.test_setup_env import ROOT, SETUP, run


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PATH with this machine's commands, but for those of MPI and CUDA."""
    folder = tmp_path_factory.mktemp("bare")
    for program in [*Path("/bin").iterdir(), *Path("/usr/bin").iterdir()]:
        if not program.name.startswith(("mpi", "nvcc", "orte", "prte")) and not (folder / program.name).is_symlink():
            (folder / program.name).symlink_to(program)
    return folder


def command(folder: Path, name: str, body: str = "") -> Path:
    """A shell script as a command."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def plan(tmp_path: Path, path: str | Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """What the set-up of the environment tmp_path/env would do."""
    return run(
        SETUP,
        "--dry-run",
        **{
            "PATH": str(path),
            "VENV": str(tmp_path / "env"),
            "MEGDET_CACHE": str(tmp_path / "cache"),
            "CUDA_HOME": "",
            "HOROVOD_NCCL_HOME": "",
            "CRAY_MPICH_DIR": "",
            "HOROVOD_BUILD": "auto",
            "MEGDET_MPI": "auto",
            **settings,
        },
    )


BUILT_FOR = {
    "nccl": "horovod0.28.1-torch2.14.1-cuda13.0.1234abcd-cp311-x86_64-glibc-2.36-openmpi4.1.8-wheel-0123456789ab",
    "cpu": "horovod0.28.1-torch2.14.1-cpu-cp311-x86_64-glibc-2.36-openmpi4.1.8-wheel-0123456789ab",
    "none": "none",
}


@pytest.mark.parametrize("cut", ["", "-unfinished"])
@pytest.mark.parametrize("kind", list(BUILT_FOR))
def test_the_kind_that_is_built_stays_until_another_is_named(tmp_path: Path, bare: Path, kind: str, cut: str) -> None:
    """As on a login node, without nvcc and driver; a cut installation counts too."""
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("this machine has an NVIDIA driver")
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / ".megdet_horovod").write_text(f"{BUILT_FOR[kind]}{cut if kind != 'none' else ''}\n")
    # a folder of CUDA that is set here is not what the environment was built from
    kept = plan(tmp_path, bare, CUDA_HOME="/nowhere")
    assert kept.returncode == 0, kept.stderr
    assert f"Horovod: {kind};" in kept.stdout
    assert ("HOROVOD_BUILD=cpu or nccl adds it" in kept.stdout) is (kind == "none")
    for other in BUILT_FOR:
        assert f"Horovod: {other};" in plan(tmp_path, bare, HOROVOD_BUILD=other).stdout


@pytest.mark.parametrize(("built", "kind"), [("True", "nccl"), ("False", "cpu")])
def test_a_horovod_of_another_origin_keeps_its_kind_too(tmp_path: Path, bare: Path, built: str, kind: str) -> None:
    made = run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env")
    assert made.returncode == 0, made.stderr
    packages = next((tmp_path / "env" / "lib").glob("python3*")) / "site-packages"
    for name, text in {
        "horovod/__init__.py": "",
        "horovod/torch.py": f"def nccl_built(): return {built}",
        "horovod-0.28.1.dist-info/METADATA": "Metadata-Version: 2.1\nName: horovod\nVersion: 0.28.1\n",
    }.items():
        (packages / name).parent.mkdir(exist_ok=True)
        (packages / name).write_text(text)
    assert f"Horovod: {kind};" in plan(tmp_path, bare, PYTHONPATH="").stdout
    assert "Horovod: none;" in plan(tmp_path, bare, PYTHONPATH="", HOROVOD_BUILD="none").stdout


def test_a_new_environment_without_a_driver_gets_cpu_and_says_so(tmp_path: Path, bare: Path) -> None:
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("this machine has an NVIDIA driver")
    new = plan(tmp_path, bare)
    assert "Horovod: cpu; MPI: wheel" in new.stdout
    assert "on a login node say HOROVOD_BUILD=nccl" in new.stdout
    assert not (tmp_path / "env").exists()


def test_the_mpi_that_is_built_on_stays_until_another_is_named(tmp_path: Path, bare: Path) -> None:
    built, other = tmp_path / "built", tmp_path / "other"
    for folder in (built, other):
        for name in ("mpirun", "mpicxx", "mpicc"):
            command(folder, name)
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / ".megdet_mpi").write_text(f"path\n{built}\n")
    path = f"{other}:{bare}"
    kept = plan(tmp_path, path)
    assert f"MPI: path ({built})" in kept.stdout
    assert f"the environment keeps {built}; MEGDET_MPI=path takes {other}" in kept.stdout
    assert f"MPI: path ({other})" in plan(tmp_path, path, MEGDET_MPI="path").stdout
    assert "MPI: wheel" in plan(tmp_path, path, MEGDET_MPI="wheel").stdout
    (built / "mpicxx").unlink()
    gone = plan(tmp_path, path)
    assert gone.returncode == 1
    assert f"was built with the MPI in {built}, which is not there now" in gone.stderr


@pytest.mark.parametrize("on_path", [True, False])
def test_an_mpi_without_mpirun_is_asked_about(tmp_path: Path, bare: Path, on_path: bool) -> None:
    cray = tmp_path / "cray" / "bin"
    for name in ("mpicxx", "mpicc"):
        command(cray, name)
    place = {} if on_path else {"CRAY_MPICH_DIR": str(cray.parent)}
    path = f"{cray}:{bare}" if on_path else str(bare)
    asked = plan(tmp_path, path, **place)
    assert asked.returncode == 1
    assert str(cray / "mpicxx") in asked.stderr
    assert "MEGDET_MPI=path: " in asked.stderr and "MEGDET_MPI=wheel: " in asked.stderr
    assert f"MPI: path ({cray})" in plan(tmp_path, f"{cray}:{bare}", MEGDET_MPI="path").stdout
    assert not (tmp_path / "cache").exists()  # --dry-run makes nothing
    assert "MPI: wheel" in plan(tmp_path, path, MEGDET_MPI="wheel", **place).stdout


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("CUDA_HOME", "", "CUDA_HOME is '{folder}', which has no bin/nvcc"),
        ("CUDA_HOME", "nvcc 12.4", "CUDA_HOME is '{folder}', CUDA 12.4; PyTorch"),
        ("HOROVOD_NCCL_HOME", "", "HOROVOD_NCCL_HOME is '{folder}', which has no include/nccl.h"),
        ("HOROVOD_NCCL_HOME", "libnccl.so.2", "HOROVOD_NCCL_HOME is '{folder}', which has no include/nccl.h or no lib"),
    ],
)
def test_a_wrong_folder_is_named_before_anything_is_fetched(
    tmp_path: Path, bare: Path, name: str, content: str, message: str
) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    if content.startswith("nvcc"):
        command(folder / "bin", "nvcc", "echo 'Cuda compilation tools, release 12.4, V12.4.131'")
    elif content:
        for part in ("include/nccl.h", f"lib/{content}"):
            (folder / part).parent.mkdir(exist_ok=True)
            (folder / part).touch()
    message = message.format(folder=folder)
    refused = plan(tmp_path, bare, HOROVOD_BUILD="nccl", **{name: str(folder)})
    assert refused.returncode == 1
    assert message in refused.stderr and "unset" in refused.stderr
    # where it is not used it is only said
    for build in ("auto", "cpu"):
        noted = plan(tmp_path, bare, HOROVOD_BUILD=build, **{name: str(folder)})
        if not Path("/proc/driver/nvidia/version").exists() or build == "cpu":
            assert noted.returncode == 0
        assert (message in noted.stdout + noted.stderr) is (build == "auto")


def test_right_folders_are_taken(tmp_path: Path, bare: Path) -> None:
    command(tmp_path / "cuda" / "bin", "nvcc", "echo 'Cuda compilation tools, release 13.1, V13.1.80'")
    for part in ("include/nccl.h", "lib64/libnccl.so"):
        (tmp_path / "nccl" / part).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "nccl" / part).touch()
    folders = {"CUDA_HOME": str(tmp_path / "cuda"), "HOROVOD_NCCL_HOME": str(tmp_path / "nccl")}
    assert "Horovod: nccl;" in plan(tmp_path, bare, HOROVOD_BUILD="nccl", **folders).stdout


BUILD_LOG = """\
== fetch Horovod: pip download
  error: of a step before, which is none of this one's
== build Horovod: pip wheel
  Building wheel for horovod (setup.py): finished with status 'error'
  error: subprocess-exited-with-error
  -- Performing Test HAS_FLAG - Failed
  [ 50%] Building CXX object mpi_ops.cc.o
  /tmp/b/horovod/torch/mpi_ops.cc:12:10: fatal error: mpi.h: No such file or directory
     12 | #include "mpi.h"
        |          ^~~~~~~
  compilation terminated.
  make[2]: *** [mpi_ops.cc.o] Error 1
  CMake Error at CMakeLists.txt:107 (message):
    HOROVOD_GPU_OPERATIONS=X is invalid
{traceback}
  subprocess.CalledProcessError: Command '['cmake', '--build', '.']' returned non-zero exit status 2.
  ERROR: Failed building wheel for horovod
"""


def test_a_failed_build_shows_the_compilers_error(tmp_path: Path) -> None:
    log = tmp_path / "log"
    trace = "\n".join(f'  File "/tmp/setup.py", line {number}, in run' for number in range(130))
    log.write_text(BUILD_LOG.format(traceback=trace))
    tail = f'fail() {{ printf "%s\\n" "$@"; exit 1; }}; LOG={log}; source {ROOT}/tools/setup_log.sh; '
    shown = run("bash", "-c", tail + "first_errors 2").stdout
    lines = shown.splitlines()
    assert lines[0].startswith("8:   /tmp/b/horovod/torch/mpi_ops.cc:12:10: fatal error: mpi.h: No such file")
    assert any("HOROVOD_GPU_OPERATIONS=X is invalid" in line for line in lines)
    assert "subprocess-exited" not in shown and "of a step before" not in shown
    assert len(lines) < 15
    failed = run("bash", "-c", tail + "logged 'build it' sh -c 'echo \"x.cc:1: error: no\"; seq 200; exit 1'")
    assert failed.returncode == 1
    assert "x.cc:1: error: no" in failed.stderr and "could not build it" in failed.stdout
    plain = run("bash", "-c", tail + "logged 'fetch it' sh -c 'seq 200; exit 1'")
    assert "--- end of " in plain.stderr and "\n200\n" in plain.stderr


@pytest.mark.parametrize(
    ("header", "name"),
    [
        (
            "#define OMPI_MAJOR_VERSION 4\n#define OMPI_MINOR_VERSION 1\n#define OMPI_RELEASE_VERSION 8\n",
            "openmpi 4.1.8",
        ),
        ('#define MPICH 1\n#define MPICH_NAME 5\n#define MPICH_VERSION "4.0.2"\n', "mpich 4.0.2"),
        ('#define I_MPI_VERSION "2021.18.1"\n#define MPICH_VERSION "3.4a2"\n', "intelmpi 2021.18.1"),
    ],
)
def test_an_mpi_without_mpirun_is_known_by_its_header(tmp_path: Path, header: str, name: str) -> None:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "mpi.h").write_text(header)
    command(tmp_path, "mpicxx", f'exec {compiler} -I{tmp_path} "$@"')
    script = (
        f"fail() {{ exit 1; }}; LOG=/dev/null MPI_PREFIX=here MPI_BIN={tmp_path}; source {ROOT}/tools/setup_mpi.sh; "
    )
    told = run("bash", "-c", script + 'describe_mpi mpi.h "$(mpi_header)"; echo "$MPI_NAME $MPI_VERSION"')
    assert told.stdout.strip() == name, told.stderr


@pytest.mark.parametrize("mpi", ["mpich", "impi"])
def test_a_ready_mpi_takes_no_horovod_and_is_kept(mpi: str, bare: Path, tmp_path: Path) -> None:
    chosen = plan(tmp_path, bare, MEGDET_MPI=mpi)
    assert f"Horovod: none; MPI: {mpi} ({tmp_path}/env/bin)" in chosen.stdout, chosen.stdout + chosen.stderr
    refused = plan(tmp_path, bare, MEGDET_MPI=mpi, HOROVOD_BUILD="cpu")
    assert refused.returncode == 1 and f"MEGDET_MPI={mpi} takes no Horovod" in refused.stderr
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / ".megdet_mpi").write_text(f"{mpi}\n")
    assert f"Horovod: none; MPI: {mpi} " in plan(tmp_path, bare).stdout


def test_a_sites_python_without_pytorch_is_refused_before_anything_is_made(bare: Path, tmp_path: Path) -> None:
    command(tmp_path / "site", "python3", f'exec {sys.executable} -I -S "$@"')
    settings = {"PATH": f"{tmp_path / 'site'}:{bare}", "VENV": str(tmp_path / "env"), "MEGDET_CACHE": str(tmp_path)}
    done = run(SETUP, "--site", PYTHON="python3", **settings)
    assert done.returncode == 1 and "has no PyTorch: load the site's module" in done.stderr, done.stdout + done.stderr
    assert not (tmp_path / "env").exists()


def distribution(folder: Path, name: str, version: str) -> None:
    """An installed package of one empty module."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").touch()
    (folder / f"{name}-{version}.dist-info").mkdir()
    (folder / f"{name}-{version}.dist-info" / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    )


def test_packages_that_a_sites_modules_add_by_pythonpath_are_found_and_kept(bare: Path, tmp_path: Path) -> None:
    first, second, venv = tmp_path / "module", tmp_path / "older", tmp_path / "env"
    distribution(first, "torch", "2.9.0")
    distribution(first, "Some_Package", "2.0")
    distribution(second, "some.package", "1.0")
    site = command(tmp_path / "site", "python3", f'exec {sys.executable} -S "$@"')
    path = f"{first}:{second}:{ROOT}"
    settings = {"PATH": f"{site.parent}:{bare}", "VENV": str(venv), "MEGDET_CACHE": str(tmp_path)}
    done = run(SETUP, "--site", PYTHON="python3", PYTHONPATH=path, **settings)
    assert done.returncode == 1 and "has PyTorch 2.9.0 and no torchvision" in done.stderr, done.stdout + done.stderr
    # the set-up sees no packages of the user's own site
    assert "--user" not in done.stderr and "export PYTHONPATH=FOLDER:$PYTHONPATH" in done.stderr
    made = run(sys.executable, "-m", "venv", "--without-pip", venv)
    assert made.returncode == 0, made.stderr
    script = f"ROOT={ROOT} PYTHON={site} VENV={venv} ENV_PYTHON={venv}/bin/python; source {ROOT}/tools/setup_site.sh; "
    kept = run("bash", "-c", script + "site_constraints", PYTHONPATH=path)
    assert {"some-package==2.0", "torch==2.9.0"} <= set(kept.stdout.split()), kept.stderr
    assert "some-package==1.0" not in kept.stdout
    assert run("bash", "-c", script + "link_site", PYTHONPATH=path).returncode == 0
    [link] = venv.glob("lib/python3*/site-packages/megdet_site.pth")
    assert link.read_text().split() == [str(first), str(second)]
    found = run(venv / "bin" / "python", "-c", "import torch; print(torch.__file__)", PYTHONPATH="")
    assert found.stdout.strip() == f"{first}/torch/__init__.py", found.stderr


def test_an_environment_of_the_other_kind_is_left_alone(bare: Path, tmp_path: Path) -> None:
    (tmp_path / "env").mkdir()
    settings = {"PATH": str(bare), "VENV": str(tmp_path / "env"), "MEGDET_CACHE": str(tmp_path)}
    done = run(SETUP, "--site", **settings)
    assert done.returncode == 1 and "was not made by --site" in done.stderr
    (tmp_path / "env" / ".megdet_site").touch()
    done = run(SETUP, "--dry-run", **settings)
    assert done.returncode == 1 and "was made by --site: repeat with --site" in done.stderr


@pytest.fixture
def site(bare: Path, tmp_path: Path) -> dict[str, str]:
    """Settings of a set-up over a site's Python that has a torch and a torchvision of two lines each."""
    for name, version, body in (
        ("torch", "2.9.0", "class ops:\n    class torchvision:\n        nms = None\n__version__ = '2.9.0'\n"),
        ("torchvision", "0.24.0", ""),
    ):
        distribution(tmp_path / "module", name, version)
        (tmp_path / "module" / name / "__init__.py").write_text(body)
    python = command(tmp_path / "site", "python3", f'exec {sys.executable} "$@"')
    return {
        "PATH": f"{python.parent}:{bare}",
        "PYTHONPATH": str(tmp_path / "module"),
        "PYTHON": "python3",
        "VENV": str(tmp_path / "env"),
        "MEGDET_CACHE": str(tmp_path / "cache"),
    }


@pytest.mark.parametrize("words", [("--site", "--dry-run"), ("--dry-run", "--site")])
def test_a_dry_run_over_a_site_makes_nothing(site: dict[str, str], tmp_path: Path, words: tuple[str, ...]) -> None:
    shown = run(SETUP, *words, **site)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "torch 2.9.0, torchvision 0.24.0" in shown.stdout
    assert f"environment: a run would make {tmp_path}/env\n" in shown.stdout
    assert not (tmp_path / "env").exists() and not (tmp_path / "cache").exists()


def test_a_set_up_over_a_site_that_is_interrupted_can_be_started_again(site: dict[str, str], tmp_path: Path) -> None:
    halt = f'{sys.executable} -m venv --without-pip "{tmp_path}/env"; kill $PPID; exit 1'
    case = f'case "$*" in *system-site-packages*) {halt};; *) exec {sys.executable} "$@";; esac'
    command(tmp_path / "site", "python3", case)
    cut = run(SETUP, "--site", **site)
    assert cut.returncode != 0 and "environment: making" in cut.stdout, cut.stdout + cut.stderr
    again = run(SETUP, "--site", "--dry-run", **site)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"environment: a run would work on {tmp_path}/env\n" in again.stdout
