from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Launch

pytestmark = pytest.mark.parallel


@pytest.mark.parametrize(("ranks", "gradients"), [(2, "horovod"), (4, "horovod"), (2, "torch"), (2, "mpi")])
def test_ranks_train_like_one_process_on_the_concatenated_batch(
    launch: Launch, shapes: Path, ranks: int, gradients: str
) -> None:
    words = [str(shapes / "train"), "--solver.gradients", gradients]
    done = launch(ranks, "-m", "tests.parallel.equivalence", *words, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{ranks} ranks, 20 steps: losses differ by" in done.stdout
