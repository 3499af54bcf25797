"""`megdet eigenspectrum` on two ranks gives the figures of one process."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megdet_hpc.eigenspectrum.__main__ import main
from tests.conftest import Here, Launch


@pytest.mark.parallel
def test_two_ranks_give_the_figures_of_one_process(launch: Launch, here: Here, shapes: Path, tmp_path: Path) -> None:
    data = ["--data.train", str(shapes / "train"), "--data.val", "null"]
    run = ["--max_steps", "1", "--device", "cpu", "--output", str(tmp_path / "run")]
    trained = launch(0, "-m", "megdet_hpc.train", "--config", "tiny", *data, *run)
    assert trained.returncode == 0, trained.stderr
    found = []
    for ranks in (0, 2):
        output = tmp_path / f"of_{ranks}"
        words = [
            "--checkpoint",
            str(tmp_path / "run"),
            "--data",
            str(shapes / "val"),
            "--images",
            "3",
            "--device",
            "cpu",
            "--output",
            str(output),
        ]
        done = launch(ranks, "-m", "megdet_hpc.eigenspectrum", *words)
        assert done.returncode == 0, done.stderr
        assert (output / "eigenspectrum.png").stat().st_size > 1000
        ((_, layers),) = json.loads((output / "eigenspectrum.json").read_text()).items()
        found.append(layers)
        few = [own for own in layers if own["positions"] <= own["channels"]]
        assert (
            few and f"{len(few)} of {len(layers)} layers saw no more positions than they have channels" in done.stderr
        )
    one, two = found
    assert len(one) > 10 and [own["layer"] for own in one] == [own["layer"] for own in two]
    for alone, shared in zip(one, two, strict=True):
        assert (alone["positions"], alone["dead"]) == (shared["positions"], shared["dead"])
        largest = alone["eigenvalues"][0]
        np.testing.assert_allclose(alone["eigenvalues"], shared["eigenvalues"], rtol=1e-9, atol=1e-9 * largest)
    refused = tmp_path / "refused"
    for words, said in (
        (["--data", str(shapes / "val"), "--layers", "nope"], "--layers nope: fits none of"),
        (["--data", str(tmp_path / "nowhere")], "nowhere"),
        (["--checkpoint", str(*tmp_path.glob("run/checkpoints/*.pt"))], "name two different"),
    ):
        done = here(main, ["--checkpoint", str(tmp_path / "run"), "--output", str(refused), "--device", "cpu", *words])
        assert done.returncode == 2 and said in done.stderr and not refused.exists()
