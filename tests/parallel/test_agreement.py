"""Ranks that do not mean the same run: refused at the start, by name, instead of a hang or other images."""

from __future__ import annotations

import shutil
import socket
import sys
from pathlib import Path

import pytest

from tests.parallel.test_doctor import mpmd
from tests.parallel.test_training import arguments

pytestmark = pytest.mark.parallel

PYTHON = [sys.executable]
HOST = socket.gethostname()


def test_another_pack_and_another_setting_are_named(shapes: Path, tmp_path: Path) -> None:
    stale = shutil.copytree(shapes / "val", tmp_path / "train")
    ours, theirs = arguments(shapes, tmp_path / "run"), arguments(shapes, tmp_path / "run")
    theirs = [str(stale) if word == str(shapes / "train") else word for word in theirs]
    done = mpmd([*PYTHON, *ours], [*PYTHON, *theirs, "--norm.size", "2"])
    assert done.returncode == 2, done.stdout + done.stderr
    line = next(line for line in done.stderr.splitlines() if "error: " in line)
    assert f"norm.size is 0 on {HOST} (rank 0), 2 on {HOST} (rank 1)" in line
    assert f"data.train is {shapes / 'train'} with 24 images, manifest " in line
    assert f"{stale} with 10 images, manifest " in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_same_pack_in_another_folder_trains(shapes: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(shapes / "train", tmp_path / "local")
    further = ["--max_steps", "1", "--data.val", "null"]
    ours = arguments(shapes, tmp_path / "run", *further)
    theirs = [str(copy) if word == str(shapes / "train") else word for word in ours]
    done = mpmd([*PYTHON, *ours], [*PYTHON, *theirs])
    assert done.returncode == 0, done.stderr
    assert "trained 1 steps" in done.stdout


def test_a_pack_that_one_rank_cannot_open_ends_the_job(shapes: Path, tmp_path: Path) -> None:
    cut = shutil.copytree(shapes / "train", tmp_path / "cut")
    shard = sorted(cut.glob("*.h5"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1])
    ours = arguments(shapes, tmp_path / "run")
    theirs = [str(cut) if word == str(shapes / "train") else word for word in ours]
    done = mpmd([*PYTHON, *ours], [*PYTHON, *theirs])
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"rank 1 of 2 on {HOST}: error: {shard}: " in done.stderr


def test_the_layers_check_compares_its_options(tmp_path: Path) -> None:
    check = [*PYTHON, "-m", "megdet_hpc.bn_check", "--device", "cpu", "--transport", "mpi"]
    done = mpmd(check, [*check, "--exchange", "packed"])
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"--exchange is two_stage on {HOST} (rank 0), packed on {HOST} (rank 1)" in done.stderr
