"""The packed environment: it runs from any folder, and a node unpacks it once, whole or not at all."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACK, NODE_ENV = ROOT / "tools" / "pack_env.sh", ROOT / "jobs" / "node_env.sh"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of a small environment with one script, in a path with a blank; the environment itself is gone."""
    folder = tmp_path_factory.mktemp("packed env")
    origin = folder / "origin"
    venv.create(origin, symlinks=True)
    script = origin / "bin" / "hello"
    script.write_text(f"#!{origin}/bin/python\nimport sys\nprint(sys.prefix, *sys.argv[1:])\n", encoding="utf-8")
    script.chmod(0o755)
    # the form that pip writes for a path with a blank, as here
    long = origin / "bin" / "greet"
    long.write_text(
        f"#!/bin/sh\n'''exec' \"{origin}/bin/python\" \"$0\" \"$@\"\n' '''\nimport sys\nprint('greet', sys.prefix)\n",
        encoding="utf-8",
    )
    long.chmod(0o755)
    before = {path: path.read_bytes() for path in (origin / "bin").iterdir() if path.is_file()}
    archive = folder / "env.tar"
    done = run(PACK, archive, VENV=str(origin))
    assert done.returncode == 0, done.stdout + done.stderr
    # its files were hard links for a while
    assert before == {path: path.read_bytes() for path in (origin / "bin").iterdir() if path.is_file()}
    assert sorted(path.name for path in folder.iterdir()) == ["env.tar", "env.tar.sha256", "origin"]
    shutil.rmtree(origin)
    return archive


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """The disk of a node."""
    folder = tmp_path / "local disk"
    folder.mkdir()
    return folder


def environment(**variables: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("MEGDET", "VENV", "PYTHON"))}
    return {**kept, **variables}


def run(*command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, env=environment(**variables), capture_output=True, text=True, timeout=240)


def on_node(archive: Path, disk: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return run(NODE_ENV, *command, MEGDET_ENV_ARCHIVE=str(archive), MEGDET_ENV_FOLDER=str(disk), **variables)


def unpacked(disk: Path) -> list[Path]:
    """All folders on the disk of the node, those of a start that was killed included."""
    return sorted(path for path in disk.glob("megdet_env-*/*") if path.is_dir())


def test_eight_ranks_of_a_node_unpack_once(packed: Path, disk: Path) -> None:
    variables = environment(MEGDET_ENV_ARCHIVE=str(packed), MEGDET_ENV_FOLDER=str(disk))
    ranks = [
        subprocess.Popen(
            [str(NODE_ENV), "hello", str(rank)],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(8)
    ]
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * 8
    [folder] = unpacked(disk)
    assert [out for out, _ in outputs] == [f"{folder} {rank}\n" for rank in range(8)]
    assert "".join(error for _, error in outputs).count("unpacked into") == 1


def test_it_runs_without_the_original(packed: Path, disk: Path) -> None:
    program = (
        "import os, shutil, sys, encodings, decimal\n"
        "print(sys.prefix, sys.executable, os.environ['VENV'], shutil.which('hello'), sep='\\n')\n"
        "print(*sys.path, encodings.__file__, sep='\\n')"
    )
    shown = on_node(packed, disk, "python", "-I", "-c", program)
    assert shown.returncode == 0, shown.stderr
    [folder] = unpacked(disk)
    prefix, executable, env, hello, *places = shown.stdout.splitlines()
    assert (prefix, env, hello) == (str(folder), str(folder), f"{folder}/bin/hello")
    assert executable.startswith(f"{folder}/bin/python")
    if not os.path.realpath(sys.executable).startswith("/usr/bin/"):
        assert all(place.startswith(str(folder)) for place in places)
    assert on_node(packed, disk, "greet").stdout == f"greet {folder}\n"
    # activate names its own folder
    activated = run("bash", "-c", f"source {shlex.quote(str(folder))}/bin/activate; hello; echo $VIRTUAL_ENV")
    assert activated.stdout == f"{folder} \n{folder}\n".replace(" \n", "\n"), activated.stderr


def test_a_half_unpacked_folder_is_never_used(packed: Path, disk: Path) -> None:
    variables = environment(MEGDET_ENV_ARCHIVE=str(packed), MEGDET_ENV_FOLDER=str(disk))
    started = subprocess.Popen([str(NODE_ENV), "hello"], env=variables, start_new_session=True)
    until = time.monotonic() + 60
    while not (found := unpacked(disk)) and time.monotonic() < until:
        time.sleep(0.001)
    os.killpg(started.pid, signal.SIGKILL)
    started.wait(timeout=60)
    assert found and ".part." in found[0].name
    shown = on_node(packed, disk, "hello")
    assert shown.returncode == 0 and "unpacked into" in shown.stderr
    [folder] = unpacked(disk)
    assert ".part." not in folder.name
    # a cleaner of /tmp takes old files one by one
    (folder / "bin" / "hello").unlink()
    os.utime(f"{folder}.whole", (0, 0))  # the folder was last looked through long ago
    again = on_node(packed, disk, "hello")
    assert (again.returncode, again.stdout) == (0, f"{folder}\n")
    assert "unpacked into" in again.stderr and "unpacked into" not in on_node(packed, disk, "hello").stderr


def test_a_damaged_archive_is_refused(packed: Path, disk: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "env.tar"
    content = bytearray(packed.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    shown = on_node(damaged, disk, "hello")
    assert shown.returncode == 2 and "has" not in shown.stdout and f"no {damaged}.sha256" in shown.stderr
    shutil.copy(f"{packed}.sha256", f"{damaged}.sha256")
    shown = on_node(damaged, disk, "hello")
    assert shown.returncode == 2 and f"{damaged} is damaged" in shown.stderr and len(shown.stderr.splitlines()) == 1
    assert unpacked(disk) == []


def test_an_archive_that_is_being_replaced_is_no_wrong_setting(packed: Path, disk: Path, tmp_path: Path) -> None:
    """tools/pack_env.sh replaces two files, and a job may start between them."""
    archive, sums = tmp_path / "env.tar", Path(f"{packed}.sha256").read_text(encoding="utf-8")
    shutil.copy(packed, archive)
    older = re.sub(r"[0-9a-f]{64}", "0" * 64, sums)
    Path(f"{archive}.sha256").write_text(older, encoding="utf-8")
    variables = environment(MEGDET_ENV_ARCHIVE=str(archive), MEGDET_ENV_FOLDER=str(disk))
    started = subprocess.Popen([str(NODE_ENV), "hello"], env=variables, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not list(disk.glob("megdet_env-*/*.users")) and time.monotonic() < until:  # the older one is read by then
        time.sleep(0.001)
    (tmp_path / "new.sha256").write_text(sums, encoding="utf-8")
    os.replace(tmp_path / "new.sha256", f"{archive}.sha256")
    _, error = started.communicate(timeout=60)
    assert started.returncode == 1 and "is being replaced by another one: start again" in error
    assert on_node(archive, disk, "hello").returncode == 0


def test_a_full_disk_is_no_wrong_setting(packed: Path, disk: Path, tmp_path: Path) -> None:
    """Status 2 would end a run of many nodes for one of them."""
    huge = tmp_path / "env.tar"
    huge.symlink_to(packed)
    sums = Path(f"{packed}.sha256").read_text(encoding="utf-8")
    Path(f"{huge}.sha256").write_text(re.sub(r"unpacked \d+", "unpacked 999999999999", sums), encoding="utf-8")
    shown = on_node(huge, disk, "hello")
    assert shown.returncode == 1 and "are free: set MEGDET_ENV_FOLDER" in shown.stderr
    gone = on_node(tmp_path / "unmounted" / "env.tar", disk, "hello")
    assert gone.returncode == 1 and "is it mounted here?" in gone.stderr


def test_the_environment_of_another_archive_goes_once_unused(packed: Path, disk: Path, tmp_path: Path) -> None:
    if not shutil.which("zstd"):
        pytest.skip("no zstd")
    other = tmp_path / "env.tar.zst"
    subprocess.run(["zstd", "-q", str(packed), "-o", str(other)], check=True)
    sums = Path(f"{packed}.sha256").read_text(encoding="utf-8").splitlines()
    sha256 = subprocess.run(["sha256sum", str(other)], check=True, capture_output=True, text=True).stdout
    Path(f"{other}.sha256").write_text(f"{sums[0]}\n{sha256}", encoding="utf-8")
    variables = environment(MEGDET_ENV_ARCHIVE=str(packed), MEGDET_ENV_FOLDER=str(disk))
    user = subprocess.Popen(
        [str(NODE_ENV), "bash", "-c", "echo ready; read"], env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert user.stdout is not None and user.stdout.readline() == b"ready\n"
    assert on_node(other, disk, "hello").returncode == 0
    assert len(unpacked(disk)) == 2
    user.communicate(b"\n", timeout=60)
    shutil.rmtree(next(path for path in unpacked(disk) if (path.name in sha256[:16])))
    assert on_node(other, disk, "hello").returncode == 0
    assert [path.name for path in unpacked(disk)] == [sha256[:16]]


def test_a_mounted_archive_goes_with_its_last_user(packed: Path, disk: Path, tmp_path: Path) -> None:
    missing = [name for name in ("mksquashfs", "squashfuse", "fusermount") if not shutil.which(name)]
    if missing or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip(f"not here: {', '.join(missing) or '/dev/fuse'}")
    content, archive = tmp_path / "content", tmp_path / "env.sqfs"
    content.mkdir()
    subprocess.run(["tar", "-C", str(content), "-xf", str(packed)], check=True)
    subprocess.run(
        ["mksquashfs", str(content), str(archive), "-quiet", "-no-progress", "-noI", "-noD", "-noF", "-noX"],
        check=True,
        stdout=-3,
    )
    sums = Path(f"{packed}.sha256").read_text(encoding="utf-8").splitlines()
    sha256 = subprocess.run(["sha256sum", str(archive)], check=True, capture_output=True, text=True).stdout
    Path(f"{archive}.sha256").write_text(f"{sums[0]}\n{sha256}", encoding="utf-8")
    for _ in range(2):
        shown = on_node(archive, disk, "hello", "1", MEGDET_ENV_MOUNT="1")
        [place] = unpacked(disk)
        assert shown.stdout == f"{place} 1\n", shown.stderr
        until = time.monotonic() + 30
        while os.path.ismount(place) and time.monotonic() < until:
            time.sleep(0.05)
        assert not os.path.ismount(place)


def test_names_and_folders_that_cannot_be(packed: Path, tmp_path: Path) -> None:
    for words, venv_folder, message in (
        ([tmp_path / "env.zip"], sys.prefix, "accepted: a name that ends in .sqfs, .tar.zst or .tar"),
        ([tmp_path / "env.tar"], str(tmp_path / "nothing"), f"no environment in {tmp_path}/nothing"),
        ([tmp_path / "nowhere" / "env.tar"], sys.prefix, f"no folder {tmp_path}/nowhere"),
    ):
        shown = run(PACK, *words, VENV=venv_folder)
        assert shown.returncode == 2 and message in shown.stderr and len(shown.stderr.splitlines()) == 1
    shown = run(NODE_ENV, "true")
    assert shown.returncode == 2 and "set MEGDET_ENV_ARCHIVE" in shown.stderr
    assert list(tmp_path.iterdir()) == []
