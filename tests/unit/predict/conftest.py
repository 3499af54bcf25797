"""A run that was trained for two steps: its detections are many and mean nothing, which is enough to compare them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.conftest import made_once, run


@pytest.fixture(scope="session")
def trained(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run."""
    return made_once(tmp_path_factory, "predict", lambda folder: _train(shapes, folder / "run")) / "run"


def _train(shapes: Path, output: Path) -> None:
    keys = ["--data.train", str(shapes / "train"), "--data.val", "null", "--data.images_per_rank", "2"]
    words = [sys.executable, "-m", "megdet_hpc", "train", "--config", "tiny", "--device", "cpu", "--max_steps", "2"]
    done = run([*words, *keys, "--data.num_workers", "0", "--output", str(output)])
    assert done.returncode == 0, done.stderr
