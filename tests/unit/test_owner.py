"""One live holder a folder: races, the dead, other hosts, jobs that start again."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megdet_hpc import owner
from megdet_hpc.errors import UserError
from tests.conftest import environment

SLURM = {"SLURM_JOB_ID": "7"}


def held(folder: Path, claim: str) -> subprocess.Popen[str]:
    """A process of a job's script that takes the folder, or is refused."""
    command = [sys.executable, "-m", "megdet_hpc.owner", str(folder), claim]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment())


def elsewhere(folder: Path) -> None:
    """Let the holder's mark be another machine's."""
    path = folder / "owner" / "holder.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "machine": "other", "host": "far"}))


@pytest.mark.parametrize("leftover", ["nothing", "killed", "chosen"])
def test_of_several_at_once_one_wins_and_the_dead_are_no_obstacle(tmp_path: Path, leftover: str) -> None:
    folder = tmp_path / "run"
    if leftover != "nothing":
        first = held(folder, "dead")
        assert first.stdout and first.stdout.readline() == "held\n"
        first.kill()
        first.wait()
    if leftover == "chosen":  # and killed before it could say so in holder.json
        (folder / "owner" / "holder.json").rename(folder / "owner" / "after-start")
    starts = [held(folder, f"claim{number}") for number in range(4)]
    said = [start.stdout.readline() for start in starts if start.stdout]
    assert sorted(said) == ["2\n", "2\n", "2\n", "held\n"]
    winner = starts[said.index("held\n")]
    mark = owner.current(folder)
    assert mark and mark.pid == winner.pid
    for start in starts:
        _, errors = start.communicate()
        assert start.returncode == (0 if start is winner else 2)
        if start is not winner:
            assert f"output {folder} is held by process {winner.pid} on " in errors and errors.count("\n") == 1
    assert not folder.exists()


def test_a_folder_that_was_left_is_free_and_says_who_had_it(tmp_path: Path) -> None:
    first = owner.take(tmp_path, {})
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UserError, match=rf"is held by process {os.getpid()} on \S+, since .*; wait for its end"):
        owner.take(tmp_path, {})
    first.release()
    assert os.listdir(tmp_path / "owner") == ["holder.json"]
    second = owner.take(tmp_path, {})
    second.check()
    with pytest.raises(owner.DisplacedError):
        first.check()
    second.release()


def test_a_number_given_out_anew_and_a_damaged_mark_are_no_holders(tmp_path: Path) -> None:
    first = owner.take(tmp_path, {})
    path = tmp_path / "owner" / "holder.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "started": "1"}))
    second = owner.take(tmp_path, {})
    path.write_text(path.read_text()[:30])
    third = owner.take(tmp_path, {})
    third.check()
    for claim in (first, second, third):
        claim.release()


def test_a_holder_elsewhere_lives_while_its_count_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(owner, "_BEAT_SECONDS", 0.2)
    first = owner.take(tmp_path, SLURM)
    elsewhere(tmp_path)
    with pytest.raises(UserError, match=r"is held by SLURM job 7, process \d+ on far, .* which is alive"):
        owner.take(tmp_path, {})
    first._end.set()  # it counts no more, as on a host that is gone
    first._thread.join()
    monkeypatch.setattr(owner, "DEAD_SECONDS", 0.5)
    second = owner.take(tmp_path, {})
    assert "watching for at most 0 s whether it lives" in capsys.readouterr().err
    with pytest.raises(owner.DisplacedError, match=rf"taken over by process {os.getpid()} on"):
        first.check()
    second.release()


def test_a_job_started_again_takes_over_from_what_still_writes(tmp_path: Path) -> None:
    first = owner.take(tmp_path, SLURM)
    elsewhere(tmp_path)
    again = owner.take(tmp_path, {**SLURM, "SLURM_RESTART_COUNT": "1"})
    with pytest.raises(owner.DisplacedError, match="taken over by SLURM job 7"):
        first.check()
    for late in (SLURM, {"SLURM_JOB_ID": "8"}, {**SLURM, "SLURM_RESTART_COUNT": "1"}):
        with pytest.raises(UserError, match="which is alive"):
            owner.take(tmp_path, late)
    again.check()
    again.release()
    first.release()


def test_a_successor_and_the_rerun_of_its_predecessor_do_not_both_go_on(tmp_path: Path) -> None:
    """Whichever is first displaces the job before; the other is refused."""
    for order in ((0, 1), (1, 0)):
        folder = tmp_path / str(order[0])
        before = owner.take(folder, {"PBS_JOBID": "5.server", "MEGDET_RUN_COUNT": "1"}, claim="five")
        starts = [
            ({"PBS_JOBID": "5.server", "MEGDET_RUN_COUNT": "2"}, "five-again"),
            ({"PBS_JOBID": "6.server", "MEGDET_RUN_COUNT": "1", "MEGDET_CONTINUES": "five"}, "six"),
        ]
        wins = owner.take(folder, starts[order[0]][0], claim=starts[order[0]][1])
        with pytest.raises(UserError, match=r"held by PBS job [56]\.server"):
            owner.take(folder, starts[order[1]][0], claim=starts[order[1]][1])
        wins.check()
        for claim in (before, wins):
            claim.release()


def test_a_training_joins_the_claim_of_its_script_only(tmp_path: Path) -> None:
    script = owner.take(tmp_path, SLURM, claim="mine")
    training = owner.take(tmp_path, {**SLURM, "MEGDET_OWNER": "mine"})
    script.check()
    training.check()
    with pytest.raises(owner.DisplacedError, match="taken over by SLURM job 7") as displaced:
        owner.take(tmp_path, {"SLURM_JOB_ID": "6", "MEGDET_OWNER": "theirs"})
    assert displaced.value.status == owner.EXIT_DISPLACED
    training.release()
    script.check()
    script.release()


def test_without_hard_links_one_wins_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(source: Path, target: Path) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "link", no_links)
    won, refused = [], []

    def start() -> None:
        try:
            won.append(owner.take(tmp_path, {}))
        except UserError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and len(refused) == 5
    won[0].check()
    won[0].release()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/run: cannot be made"):
        owner.take(tmp_path / "file" / "run", {})


def test_a_mark_that_was_removed_ends_the_run(tmp_path: Path) -> None:
    claim = owner.take(tmp_path, {})
    (tmp_path / "owner" / "holder.json").unlink()
    with pytest.raises(owner.DisplacedError, match="the mark of its owner was removed"):
        claim.check()
    claim.release()
    assert not (tmp_path / "owner").exists()
