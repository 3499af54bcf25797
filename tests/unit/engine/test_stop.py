"""The stop file: a new one stops, an old one does not and is removed by the run that holds the folder."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from megdet_hpc.engine import stop as module
from megdet_hpc.engine.stop import StopRequests
from megdet_hpc.owner import OWNER_VARIABLE
from megdet_hpc.parallel.serial import SerialCommunicator


def reason(stop: StopRequests) -> str:
    """Why a run of one rank stops after its next step."""
    return stop.reason(stop.flags(0, 1.0), SerialCommunicator())


def test_a_new_stop_file_asks_and_an_old_one_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.0)
    monkeypatch.delenv(OWNER_VARIABLE, raising=False)
    file = tmp_path / "stop"
    file.touch()
    stop = StopRequests(None, tmp_path)
    try:
        assert reason(stop) == ""
        os.utime(file, ns=(1, 1))  # touched again: this time it is meant
        assert reason(stop) == f"{file} is there"
    finally:
        stop.close()
    stop = StopRequests(None, tmp_path)
    try:
        stop.remove_old_file()
        assert not file.exists()
        assert "removed; it was there before this start, which it does not stop" in capsys.readouterr().out
        assert reason(stop) == ""
        file.touch()
        assert reason(stop) == f"{file} is there"
    finally:
        stop.close()


def test_a_file_made_during_the_preflight_of_a_job_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OWNER_VARIABLE, "0123456789abcdef")
    file = tmp_path / "stop"
    file.touch()
    stop = StopRequests(None, tmp_path)
    try:
        stop.remove_old_file()
        assert file.exists() and reason(stop) == f"{file} is there"
    finally:
        stop.close()


def test_ctrl_c_is_an_interruption_until_there_is_something_to_save(tmp_path: Path) -> None:
    # a checker in the background hands on that it is ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.getsignal(signal.SIGINT)
    stop = StopRequests(None, tmp_path)
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        stop.listen()
        signal.raise_signal(signal.SIGINT)
        assert reason(stop) == "SIGINT received by rank 0"
    finally:
        stop.close()
    assert signal.getsignal(signal.SIGINT) == before
