"""The doctor as a site types it, and its preflight on jobs with one bad rank."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megdet_hpc import __version__
from tests.conftest import CARRIERS, HAS_HOROVOD, ROOT, Launch, mpirun, run

pytestmark = pytest.mark.parallel

HOST = socket.gethostname()
DOCTOR = [sys.executable, "-m", "megdet_hpc.doctor", "--device", "cpu"]
# The limit is far above what a busy machine needs to load torch; the test of the limit sets its own.
PREFLIGHT = [*DOCTOR, "--preflight", "--timeout", "220"]


def mpmd(*programs: list[str]) -> subprocess.CompletedProcess[str]:
    """One rank per program, in one MPI job."""
    command = mpirun()
    for number, program in enumerate(programs):
        command += [*([":"] if number else []), "-np", "1", *program]
    return run(command)


def wrong(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The table's lines of what is wrong, blanks as one."""
    return [" ".join(line.split()) for line in done.stdout.splitlines() if line.startswith("wrong ")]


def test_alone(shapes: Path, tmp_path: Path) -> None:
    data = ["--data", str(shapes / "train"), "--data", str(shapes / "val")]
    report = tmp_path / "report.json"
    done = run([*DOCTOR, *data, "--output", str(tmp_path / "out"), "--json", str(report)])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("doctor of 1 rank(s): ")
    found = json.loads(report.read_text())
    assert [row["place"] for row in found["ranks"]] == [{"host": HOST, "rank": 0}]
    probes = {line["probe"] for line in found["findings"]}
    assert {"data", "data read", "data random read", "output write", "ulimit -n", "interfaces", "versions"} <= probes
    assert sum(line["probe"] == "data" for line in found["findings"]) == 2


def test_two_ranks(launch: Launch, shapes: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    folders = ["--data", str(shapes / "train"), "--output", str(tmp_path), "--scratch", str(tmp_path)]
    done = launch(2, *DOCTOR[1:], *folders, "--json", str(report), "--overlap-rounds", "6")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = json.loads(report.read_text())["findings"]
    assert not [line for line in lines if line["verdict"] == "wrong"]
    details = {probe: [x["detail"] for x in lines if x["probe"] == probe] for probe in {x["probe"] for x in lines}}
    assert details["MPI threads"] == ["MPI_THREAD_MULTIPLE"]
    assert details["collectives"] == [f"{', '.join(CARRIERS)} answered on 2 ranks, device cpu"]
    for transport in CARRIERS:
        sizes = [text.split(" in ")[0] for text in details[f"allreduce, {transport}"]]
        assert set(sizes) >= {"0.5 KB", "2.0 KB", "16.0 KB", "25 MB"}
    for transport in ("mpi", "torch"):  # Horovod's own messages have no other library beside them
        (text,) = details[f"overlap, {transport}"]
        carrier = "Horovod" if HAS_HOROVOD else "torch.distributed"
        assert text.startswith(f"6 backward passes with {carrier}'s gradients at once: ") and "same gradients" in text
    assert "overlap, horovod" not in details
    for rank in range(2):
        assert f"\n{rank}     {HOST}" in done.stdout


def test_each_bad_rank_is_named_not_only_the_first(shapes: Path, tmp_path: Path) -> None:
    good = shapes / "train"
    cut = tmp_path / "cut"
    shutil.copytree(good, cut)
    shard = sorted(cut.glob("*.h5"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1])
    (tmp_path / "file").touch()
    done = mpmd(
        [*PREFLIGHT, "--data", str(good), "--data", str(good), "--output", str(tmp_path / "out")],
        [*PREFLIGHT, "--data", str(cut), "--data", str(good), "--output", str(tmp_path / "file")],
        [
            *PREFLIGHT,
            "--data",
            str(tmp_path / "gone"),
            "--data",
            str(shapes / "val"),
            "--output",
            str(tmp_path / "out"),
        ],
    )
    assert done.returncode != 0
    found = wrong(done)
    assert len(found) == 4, done.stdout + done.stderr
    for text in (
        f"wrong {HOST} rank 1 data {shard}: {shard.stat().st_size} bytes, manifest.json says",
        f"wrong {HOST} rank 1 output folder {tmp_path}/file: cannot be written: ",
        f"wrong {HOST} rank 2 data {tmp_path}/gone: no such folder",
        f"wrong {HOST} rank 2 differs manifest of {good} is ",
    ):
        assert any(line.startswith(text) for line in found), (text, done.stdout)
    assert f"{', '.join(CARRIERS)} answered on 3 ranks" in done.stdout


def test_an_image_that_is_damaged_is_found_by_its_crc(shapes: Path, tmp_path: Path) -> None:
    spoiled = tmp_path / "spoiled"
    shutil.copytree(shapes / "train", spoiled)
    for shard in spoiled.glob("*.h5"):
        # the first bytes of every JPEG; the size stays
        shard.write_bytes(shard.read_bytes().replace(b"\xff\xd8\xff", b"\xff\xd8\xfe"))
    done = run([*PREFLIGHT, "--data", str(spoiled)])
    assert done.returncode == 1
    assert "differ from their CRC-32" in wrong(done)[0]


def test_a_host_with_another_source_is_named(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "megdet_hpc", tmp_path / "megdet_hpc", ignore=shutil.ignore_patterns("__pycache__"))
    with open(tmp_path / "megdet_hpc" / "seeds.py", "a") as file:
        file.write("# changed\n")
    done = mpmd(PREFLIGHT, ["-wdir", str(tmp_path), *PREFLIGHT])
    assert done.returncode != 0
    assert len(wrong(done)) == 1, done.stdout + done.stderr
    (line,) = wrong(done)
    assert line.startswith(f"wrong {HOST} rank 1 differs megdet_hpc is {__version__}, source ")


def test_a_rank_that_never_comes_ends_the_job_within_the_limit() -> None:
    sleeper = [sys.executable, "-c", "import time; time.sleep(200)"]
    done = mpmd([*PREFLIGHT, "--timeout", "8"], sleeper)
    assert done.returncode != 0
    assert f"megdet_hpc.doctor: rank 0 of 2 on {HOST}: wrong: " in done.stderr


@pytest.mark.horovod
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a Horovod without CUDA")
def test_a_cpu_horovod_in_a_job_for_gpus_ends_the_preflight_for_good(launch: Launch) -> None:
    done = launch(2, "-m", "megdet_hpc.doctor", "--preflight", "--device", "cuda", "--transports", "mpi")
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = [line for line in wrong(done) if " Horovod " in line]
    assert line.startswith(f"wrong {HOST} ranks 0-1 Horovod this Horovod was built without CUDA")
    assert "HOROVOD_BUILD=nccl tools/setup_env.sh" in done.stdout


def test_libraries_that_block_each_other_end_with_the_verdict(tmp_path: Path) -> None:
    """A rank that makes fewer passes leaves the other waiting in the middle of one, as a hang would."""
    report = tmp_path / "report.json"
    few = [*DOCTOR, "--transports", "mpi", "--timeout", "20", "--json", str(report), "--overlap-rounds"]
    done = mpmd([*few, "3"], [*few, "1"])
    assert done.returncode != 0
    assert f"rank 0 of 2 on {HOST}: wrong: backward pass 2 of 3 with both libraries at once did not end in 20 s" in (
        done.stderr
    )
    assert "leave solver.overlap at false on these nodes" in done.stderr
    # what was found before is not lost
    assert "mpi answered on 2 ranks" in done.stdout and json.loads(report.read_text())["findings"]


def test_a_limit_that_is_none_is_refused() -> None:
    done = run([*PREFLIGHT, "--timeout", "-1"])
    assert done.returncode == 2
    assert "--timeout -1.0: accepted are 0 (no limit) and more" in done.stderr


@pytest.mark.parametrize("word", ["--help", "--print_config"])
def test_a_text_of_the_trainer_is_printed_once_and_ends_every_rank(launch: Launch, word: str) -> None:
    done = launch(2, *PREFLIGHT[1:], "--", word, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("solver:" if word == "--print_config" else "--print_config") == 1, done.stdout
    assert "preflight of" not in done.stdout
