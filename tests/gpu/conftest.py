"""Tests of this folder need a GPU, and are skipped elsewhere. `make gpu-check` runs them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip these tests where torch shows no GPU."""
    for item in items:
        if item.path.is_relative_to(HERE) and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="torch shows no GPU"))


@pytest.fixture
def gpu() -> torch.device:
    """The first GPU."""
    return torch.device("cuda", 0)
