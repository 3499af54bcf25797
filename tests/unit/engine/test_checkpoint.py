from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from megdet_hpc.engine.checkpoint import (
    checkpoint_files,
    checkpoint_name,
    load_checkpoint,
    load_newest,
    remove_unfinished,
    save_checkpoint,
)
from megdet_hpc.errors import MachineError, UserError
from megdet_hpc.files import atomic_write
from megdet_hpc.owner import DisplacedError


def save(folder: Path, step: int, keep: int = 3) -> Path:
    return save_checkpoint(folder, step, {"step": step, "model": {"w": torch.full((3,), float(step))}}, keep=keep)


def test_round_trip_and_pruning(tmp_path: Path) -> None:
    for step in (5, 10, 100):
        save(tmp_path, step, keep=2)
    assert [f.name for f in checkpoint_files(tmp_path)] == ["step_00000010.pt", "step_00000100.pt"]
    newest = load_newest(tmp_path)
    assert newest is not None
    assert newest[0].name == "step_00000100.pt" and newest[1]["model"]["w"].tolist() == [100.0] * 3


def test_a_damaged_newest_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 1)
    bad = save(tmp_path, 2)
    bad.write_bytes(bad.read_bytes()[:-100])
    newest = load_newest(tmp_path)
    assert newest is not None and newest[1]["step"] == 1
    assert "step_00000002.pt: damaged" in capsys.readouterr().out


def test_the_run_that_holds_the_folder_sets_damaged_ones_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under their names they would count as the newest for a job's script and for megdet evaluate."""

    def displaced() -> None:
        raise DisplacedError("another start holds it")

    for step in (1, 2, 3):
        save(tmp_path, step)
    for step in (2, 3):
        (tmp_path / f"step_{step:08d}.pt").write_bytes(b"cut")
    names = sorted(os.listdir(tmp_path))
    with pytest.raises(DisplacedError):
        load_newest(tmp_path, displaced)
    assert load_newest(tmp_path) and sorted(os.listdir(tmp_path)) == names
    found = load_newest(tmp_path, lambda: None)
    assert found is not None and found[1]["step"] == 1
    assert sorted(os.listdir(tmp_path)) == [names[0], f"{names[1]}.damaged", f"{names[2]}.damaged"]
    assert checkpoint_files(tmp_path) == [found[0]]
    assert "step_00000003.pt: renamed to step_00000003.pt.damaged" in capsys.readouterr().out
    # none is whole: they stay as they are
    found[0].write_bytes(b"cut")
    with pytest.raises(UserError, match="none of its 1 checkpoint"):
        load_newest(tmp_path, lambda: None)
    assert checkpoint_files(tmp_path) == [found[0]]


def test_a_new_checkpoint_is_never_pruned_and_what_lies_ahead_stays(tmp_path: Path) -> None:
    """A run resumed before a damaged newest file must not lose what it writes."""
    for step in (1, 90, 91):
        save(tmp_path, step)
    save(tmp_path, 4, keep=1)
    assert [f.name for f in checkpoint_files(tmp_path)] == [f"step_{step:08d}.pt" for step in (4, 90, 91)]


def test_a_configuration_that_kept_one_is_still_read(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, {"step": 1, "config": {"checkpoints": {"keep": 1}}}, keep=2)
    assert load_checkpoint(path)["config"]["checkpoints"]["keep"] == 2


def test_a_displaced_run_leaves_the_folder_as_it_is(tmp_path: Path) -> None:
    def displaced() -> None:
        raise DisplacedError("another start holds it")

    for step in (1, 2):
        save(tmp_path, step)
    with pytest.raises(DisplacedError):
        save_checkpoint(tmp_path, 3, {"step": 3}, keep=2, check=displaced)
    assert sorted(os.listdir(tmp_path)) == ["step_00000001.pt", "step_00000002.pt"]


def test_none_and_only_damaged(tmp_path: Path) -> None:
    assert load_newest(tmp_path) is None
    (tmp_path / "step_00000001.pt").write_bytes(b"")
    with pytest.raises(UserError, match="none of its 1 checkpoint"):
        load_newest(tmp_path)


def test_other_versions_and_code_are_refused(tmp_path: Path) -> None:
    torch.save({"format_version": 99}, tmp_path / "new.pt")
    with pytest.raises(UserError, match="format version 99"):
        load_checkpoint(tmp_path / "new.pt")
    torch.save({"format_version": 1, "hook": Path}, tmp_path / "code.pt")
    with pytest.raises(UserError, match=r"code\.pt: damaged or not a checkpoint"):
        load_checkpoint(tmp_path / "code.pt")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="disk full"), atomic_write(path) as file:
        file.write(b"new")
        raise OSError("disk full")
    assert path.read_bytes() == b"old"
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


def test_processes_with_equal_numbers_do_not_share_an_unfinished_file(tmp_path: Path) -> None:
    """As those of two hosts may have."""
    path = tmp_path / checkpoint_name(7)
    with pytest.raises(OSError, match="cut"), atomic_write(path) as late:
        late.write(b"late")
        with atomic_write(path) as file:
            file.write(b"whole")
        left = list(tmp_path.glob(".*"))
        assert [file.name for file in left] and path.read_bytes() == b"whole"
        remove_unfinished(tmp_path)
        assert not left[0].exists()
        raise OSError("cut")
    assert path.read_bytes() == b"whole" and os.listdir(tmp_path) == [path.name]


def test_a_flipped_bit_in_a_tensor_is_found_and_the_one_before_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"step": step, "model": {"w": torch.full((1000,), float(step))}}, keep=2)
    path = tmp_path / "step_00000002.pt"
    data = bytearray(path.read_bytes())
    place = data.index(torch.full((1000,), 2.0).numpy().tobytes()) + 2002
    data[place] ^= 1
    path.write_bytes(data)
    found = load_newest(tmp_path)
    assert found is not None and found[1]["step"] == 1
    assert "differs from its CRC-32" in capsys.readouterr().out


def test_a_failing_file_system_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Going on from the checkpoint before would lose work that another attempt finds."""
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"step": step}, keep=2)

    def fails(path: Path) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr("megdet_hpc.engine.checkpoint._check_bytes", fails)
    with pytest.raises(MachineError, match=r"step_00000002.pt: cannot be read \(\[Errno 116\]"):
        load_newest(tmp_path)
