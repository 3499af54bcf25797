"""Two jobs in one folder, the stop file, and what may be sourced from there; PBS is stood in for as in test_pbs.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megdet_hpc import owner
from tests.jobs.conftest import set_program
from tests.jobs.test_pbs import RANK, PbsJob, needs_namespaces

pytestmark = [pytest.mark.parallel, needs_namespaces]


def job_in(checkout: Path) -> tuple[PbsJob, Path]:
    folder = checkout / "runs/mine"
    job = PbsJob(checkout, ["pbsnode1"] * 2)
    job.variables["MEGDET_OUTPUT"] = str(folder)
    return job, folder


def submitted(job: PbsJob) -> bool:
    return (job.tools / "qsub.calls").exists()


def test_a_job_is_refused_where_another_lives_and_touches_nothing(checkout: Path) -> None:
    set_program(checkout, f'{RANK}echo trained >>"$output/ranks/log"')
    job, folder = job_in(checkout)
    held = owner.take(folder, {"PBS_JOBID": "11.server", "MEGDET_RUN_COUNT": "1"}, claim="theirs")
    refused = job.run()
    assert refused.returncode == 2 and not submitted(job)
    assert re.search(rf"error: output {folder} is held by PBS job 11\.server, process \d+ on ", refused.stderr)
    assert "not this job's: nothing is started there and nothing submitted again" in refused.stdout
    assert [path.name for path in folder.iterdir()] == ["owner"]
    held.check()
    held.release()
    assert job.run().returncode == 0
    assert owner.current(folder) is not None and not list((folder / "owner").glob("beat-*"))
    assert not list((folder / "job").glob("status*")) and not list((folder / "job").glob("launched*"))


def test_the_servers_rerun_and_the_scripts_successor_do_not_both_train(checkout: Path) -> None:
    """A job that PBS runs again displaces what is left of its first run; its successor then finds it alive."""
    set_program(checkout, "exit 1")
    job, folder = job_in(checkout)
    qstat = job.tools / "qstat.txt"
    qstat.write_text(qstat.read_text() + "    run_count = 1\n")
    assert job.run().returncode == 1
    words = (job.tools / "qsub.calls").read_text().split("\0")
    claim = re.search(r"MEGDET_CONTINUES=([0-9a-f]+)", " ".join(words))
    assert claim
    (job.tools / "qsub.calls").unlink()
    # the ranks of the first run still write
    old = owner.take(folder, {"PBS_JOBID": "12.server", "MEGDET_RUN_COUNT": "1"}, claim=claim[1])
    rerun = owner.take(folder, {"PBS_JOBID": "12.server", "MEGDET_RUN_COUNT": "2"}, claim="again")
    with pytest.raises(owner.DisplacedError):
        old.check()
    successor = {"PBS_JOBID": "13.server", "MEGDET_CONTINUES": claim[1]}
    qstat.write_text(qstat.read_text().replace("12.server", "13.server"))
    job._tool("qstat", f'[[ $1 == -f && $2 == 13.server ]] && cat "{qstat}"')
    refused = job.run(**successor)
    assert refused.returncode == 2 and not submitted(job)
    assert "is held by PBS job 12.server" in refused.stderr
    rerun.check()
    for claimed in (rerun, old):
        claimed.release()


@pytest.mark.parametrize("told", [True, False])
def test_a_job_that_was_displaced_is_not_submitted_again(checkout: Path, told: bool) -> None:
    """By the status of its training, or by the mark where that died of something else."""
    mark = 'sed -i "s/\\"claim\\": \\"[0-9a-f]*\\"/\\"claim\\": \\"theirs\\"/" "$output/owner/holder.json"'
    set_program(checkout, f"{RANK}save 00000010; " + ("exit 76" if told else f"{mark}; exit 1"))
    job, folder = job_in(checkout)
    assert job.run().returncode == 76
    log = (folder / "job/log").read_text()
    assert f"status 76: another start owns {folder} now" in log and "not submitted again" in log
    assert not submitted(job)


def test_the_stop_file_ends_the_chain_until_a_user_submits_again(checkout: Path) -> None:
    set_program(checkout, f'{RANK}[[ -d $output/checkpoints ]] && exit 0; save 00000010; : >"$output/stop"; exit 75')
    job, folder = job_in(checkout)
    assert job.run().returncode == 75 and not submitted(job)
    log = (folder / "job/log").read_text()
    assert f"{folder}/stop is there: not submitted again; to go on, submit with the same options and" in log
    # neither what was submitted before it, nor what the server runs again
    waiting = job.run(MEGDET_CONTINUES="5eed")
    assert waiting.returncode == 75 and "stop is there: not started" in (folder / "job/log").read_text()
    # a submission by hand has another job id
    (folder / "job/attempts").write_text("10 1 7\n")
    assert job.run().returncode == 0 and not (folder / "stop").exists()
    assert "stop removed: it is from before this submission" in (folder / "job/log").read_text()


def test_a_stop_file_of_a_script_that_was_killed_stops_nothing(checkout: Path) -> None:
    set_program(checkout, f"{RANK}save 00000010; exit 0")
    job, folder = job_in(checkout)
    (folder / "job").mkdir(parents=True)
    (folder / "stop").write_text("owner 5eed5eed5eed5eed\n")
    assert job.run(MEGDET_CONTINUES="5eed5eed5eed5eed").returncode in (0, 2)  # 2: nothing was submitted before
    (folder / "job/submission.sh").write_text("arguments=()\n")
    assert job.run(MEGDET_CONTINUES="5eed5eed5eed5eed").returncode == 0
    assert not (folder / "stop").exists() and "finished" in (folder / "job/log").read_text()


def test_what_lies_beside_checkpoints_and_an_empty_count_stop_no_script(checkout: Path) -> None:
    """A user's copies of checkpoints, and a file that a lost node left empty."""
    set_program(checkout, f"{RANK}save 00000010; exit 0")
    job, folder = job_in(checkout)
    (folder / "job").mkdir(parents=True)
    (folder / "job/attempts").touch()
    (folder / "checkpoints").mkdir()
    for name in ("step_best.pt", "step_old_00000001.pt", "step_00000005_ema.pt"):
        (folder / "checkpoints" / name).touch()
    assert job.run().returncode == 0
    log = (folder / "job/log").read_text()
    assert "attempt 1 of" in log and "from step 0;" in log and "finished" in log


def test_a_folder_that_cannot_be_taken_at_once_is_tried_again(checkout: Path) -> None:
    """The file system fails once: that says nothing of an owner."""
    set_program(checkout, f"{RANK}save 00000010; exit 0")
    job, _ = job_in(checkout)
    program = checkout / ".venv/bin/python"
    own, text = "if [[ ${2-} == megdet_hpc.owner ]]; then", program.read_text()
    for times, status, said in ((1, 0, "trying again"), (3, 1, "could not be taken in 3 attempts (1)")):
        once = f'echo x >>"{checkout}/tries"; if (($(wc -l <"{checkout}/tries") <= {times})); then echo 1; exit 1; fi;'
        program.write_text(text.replace(own, f"{own} {once}"))
        (checkout / "tries").unlink(missing_ok=True)
        shown = job.run(MEGDET_RETRY_SECONDS="0")
        assert (shown.returncode, said in shown.stdout) == (status, True), shown.stdout + shown.stderr
        assert "not this job's" not in shown.stdout


@pytest.mark.parametrize("shared", ["job/submission.sh", "job"])
def test_what_others_may_write_is_not_sourced(checkout: Path, shared: str) -> None:
    set_program(checkout, "exit 1")
    job, folder = job_in(checkout)
    assert job.run().returncode == 1
    (folder / "job/submission.sh").write_text("touch sourced\narguments=()\n")
    (folder / shared).chmod(0o775)
    refused = job.run(MEGDET_CONTINUES="5eed")
    assert refused.returncode == 2 and not (checkout / "sourced").exists()
    assert f"{folder / shared} is another user's, or others may write there" in refused.stderr
    (folder / shared).chmod(0o755)
    assert job.run(MEGDET_CONTINUES="5eed").returncode == 1 and (checkout / "sourced").exists()
