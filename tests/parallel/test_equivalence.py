from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Launch

pytestmark = pytest.mark.parallel


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_train_like_one_process_on_the_concatenated_batch(launch: Launch, shapes: Path, ranks: int) -> None:
    done = launch(ranks, "-m", "tests.parallel.equivalence", str(shapes / "train"), timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{ranks} ranks, 20 steps: losses differ by" in done.stdout
