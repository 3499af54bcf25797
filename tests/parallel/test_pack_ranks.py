"""data_prep/pack_coco.py under mpirun: every rank writes, a failure ends the job, a killed job resumes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import ROOT, Launch, environment, mpirun, ranks_of

sys.path.insert(0, str(ROOT))  # data_prep of this checkout

from data_prep.make_shapes import make_shapes
from data_prep.pack_coco import main

pytestmark = pytest.mark.parallel
SCRIPT = "data_prep/pack_coco.py"
NUM_SHARDS = 5


class Set:
    """A generated set of 60 images, 12 or 13 to a shard, and its pack by one process."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.folder = folder
        self.annotations = source / "annotations" / "instances_train.json"
        self.images = folder / "images"
        shutil.copytree(source / "train", self.images)

    def arguments(self, output: str) -> list[str]:
        paths = ["--annotations", str(self.annotations), "--images", str(self.images)]
        return [*paths, "--output", str(self.folder / output), "--shard-mib", "0.05"]

    def files(self, output: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (self.folder / output).iterdir()}

    def image(self, index: int) -> Path:
        return self.images / json.loads(self.annotations.read_bytes())["images"][index]["file_name"]

    @contextmanager
    def blocked(self, *indices: int) -> Iterator[list[Path]]:
        """Pipes without a writer in the place of images: who packs them waits there until it is killed."""
        contents = {self.image(index): self.image(index).read_bytes() for index in indices}
        try:
            for path in contents:
                path.unlink()
                os.mkfifo(path)
            yield list(contents)
        finally:
            for path, data in contents.items():
                path.unlink()
                path.write_bytes(data)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generated") / "shapes"
    make_shapes(folder, num_train=60, num_val=1, seed=3, size=96)
    return folder


@pytest.fixture
def small(source: Path, tmp_path: Path) -> Set:
    return Set(source, tmp_path)


def open_if_read(pipe: Path) -> int | None:
    """The pipe's other end, where a process is opening it or has it open; while it is held, that one waits."""
    try:
        return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return None


@pytest.mark.parametrize("ranks", [2, 8])
def test_ranks_write_the_same_bytes(launch: Launch, ranks: int, small: Set) -> None:
    """With 8 there are fewer shards than ranks."""
    done = launch(ranks, SCRIPT, *small.arguments("ranks"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("shards ") == 1
    assert main(small.arguments("one")) == 0
    assert small.files("ranks") == small.files("one")
    assert len(small.files("one")) == NUM_SHARDS + 2  # and the manifest and the index


@pytest.mark.parametrize(("blocked", "failing"), [(6, 2), (30, 0)], ids=["rank 0 fails", "rank 1 fails"])
def test_a_failing_rank_ends_the_job(launch: Launch, blocked: int, failing: int, small: Set) -> None:
    """Rank 1 of 2 is handed shards 0 and 1, rank 0 takes shard 2; the other rank waits for ever."""
    first = small.image(0)
    data = first.read_bytes()
    first.write_bytes(bytes(len(data)))
    assert main(small.arguments("out")) == 1  # the plan is stored
    first.write_bytes(data)
    for path in (small.folder / "out.partial").glob("shard-*.h5"):
        path.unlink()
    (small.folder / "out.partial" / f"shard-0000{failing}.h5.tmp").mkdir()  # in the place of a file
    with small.blocked(blocked):
        done = launch(2, SCRIPT, *small.arguments("out"), timeout=60)
    assert done.returncode != 0
    assert done.stderr.count("pack_coco: error: ") == 1
    assert f"shard-0000{failing}.h5: cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (small.folder / "out").exists()


def test_bad_images_of_all_ranks_are_named_at_once(launch: Launch, small: Set) -> None:
    """In shards 0, 2 and 4; the shards without any are kept."""
    bad = [small.image(index) for index in (3, 30, 59)]
    for path in bad:
        path.write_bytes(path.read_bytes()[:100])
    done = launch(2, SCRIPT, *small.arguments("out"), timeout=60)
    assert done.returncode != 0
    error = done.stderr[done.stderr.index("pack_coco: error: ") :]
    assert "3 faults (unreadable_image 3)" in error
    assert all(path.name in error for path in bad)
    assert "Traceback" not in done.stderr
    assert len(list((small.folder / "out.partial").glob("shard-*.h5"))) == NUM_SHARDS - 3


@pytest.mark.parametrize("resumed_with", [1, 3])
def test_killed_ranks_resume_to_the_same_bytes(launch: Launch, resumed_with: int, small: Set) -> None:
    assert main(small.arguments("whole")) == 0
    first = small.image(0)
    first_data = first.read_bytes()
    first.write_bytes(bytes(len(first_data)))
    assert main(small.arguments("out")) == 1  # the plan is stored, with the sizes of whole files
    first.write_bytes(first_data)
    partial = small.folder / "out.partial"
    with small.blocked(30, 42) as pipes:  # in shards 2 and 3
        words = [*mpirun(2), sys.executable, SCRIPT, *small.arguments("out")]
        process = subprocess.Popen(words, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 60
            finished = [partial / "resume" / f"shard-0000{index}.json" for index in (0, 1)]
            ends: dict[Path, int] = {}
            while time.monotonic() < deadline and not (len(ends) == 2 and all(path.exists() for path in finished)):
                ends |= {pipe: end for pipe in pipes if pipe not in ends and (end := open_if_read(pipe)) is not None}
                time.sleep(0.02)
        finally:
            for rank in ranks_of(process, SCRIPT):
                rank.kill()
            assert process.wait(timeout=60) != 0
            for end in ends.values():
                os.close(end)
        assert len(ends) == 2, "both ranks write shards at the same time"
    assert not (small.folder / "out").exists()
    times = [(partial / f"shard-0000{index}.h5").stat().st_mtime_ns for index in (0, 1)]
    done = launch(resumed_with, SCRIPT, *small.arguments("out"))
    assert done.returncode == 0, done.stderr
    assert [(small.folder / "out" / f"shard-0000{index}.h5").stat().st_mtime_ns for index in (0, 1)] == times
    assert small.files("out") == small.files("whole")
