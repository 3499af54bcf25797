"""`bench threads`: two real ranks, and the arithmetic of a thread's shares."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megdet_hpc.bench.__main__ import main
from megdet_hpc.bench.threads_figure import Span, ThreadTrack, title_of
from tests.conftest import Here, Launch


def test_shares_of_a_thread() -> None:
    """It has a core in the first second, waits for one in the second, and sleeps in the third."""
    track = ThreadTrack("horovod", np.array([[10, 0, 0], [11, 1e9, 0], [12, 1e9, 1e9], [13, 1e9, 1e9]]))
    assert track.shares([Span(10, 11, "step")]) == (1, 0)
    assert track.shares([Span(10.5, 11.5, "step")]) == (0.5, 0.5)
    assert track.shares([Span(10, 11, "step"), Span(12, 13, "step")]) == (0.5, 0)
    assert ThreadTrack("horovod", np.zeros((0, 3))).shares([Span(0, 1, "step")]) == (None, None)


@pytest.mark.timeout(400)
def test_threads_of_a_step(launch: Launch, tmp_path: Path) -> None:
    small = ["--images", "1", "--image-size", "64", "--repeats", "1", "--warmup", "1"]
    files = ["--json", str(tmp_path / "r.json"), "--figure", str(tmp_path / "threads.png")]
    done = launch(2, "-m", "megdet_hpc.bench", "threads", *small, *files)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    assert [row["step"] for row in report["steps"]] == ["nothing sent", "gradients", "layers' messages", "both"]
    waits = {(row["rank"], row["waits for"]): row for row in report["what the ranks waited for"]}
    assert waits[0, "layers' messages"]["a step"] == 60 and waits[1, "gradients"]["a step"] == 1
    assert all(0 < row["share of the step"] < 1 for row in waits.values())
    threads = {(row["rank"], row["thread"]) for row in report["threads, share of the time"]}
    assert {(0, "main"), (1, "main")} <= threads
    with Image.open(tmp_path / "threads.png") as picture:
        assert picture.width > 800


def test_no_time_between_two_looks_is_refused(here: Here) -> None:
    done = here(main, ["threads", "--interval-ms", "0"])
    assert done.returncode == 2 and "--interval-ms 0.0; accepted: more than 0" in done.stderr


def test_the_title_of_one_rank_speaks_of_no_messages() -> None:
    assert title_of(1).endswith("of one rank do in a step, which sends nothing") and "sends gradients" in title_of(2)
