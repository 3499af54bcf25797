"""Fixtures of the cases."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cases.records import RecordSet


@pytest.fixture
def records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> RecordSet:
    """A small set whose annotation file a test changes."""
    return RecordSet(tmp_path, capsys)
