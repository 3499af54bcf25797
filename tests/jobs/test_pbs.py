"""jobs/*.pbs under an environment as an OpenPBS server makes it, with real mpirun. No server runs here.

What is PBS's own is stood in for by small programs that record their calls: qstat, qsub, and pbs_tmrsh, which starts
a command, without a shell, on "another node": in a UTS namespace with that host name and a bare environment. What a
command leaves behind is killed when it ends, on each node, as by the real one (pbs_task.py).
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import SHELL_LOCAL_RANK, SHELL_RANK, environment, has_open_mpi
from tests.jobs.conftest import JOBS, set_program

pytestmark = pytest.mark.parallel

QSTAT = """Job Id: 12.server
    Job_Name = megdet_8gpu
    Job_Owner = user@login
    resources_used.walltime = 00:01:30
    job_state = R
    queue = gpu_exec
    Account_Name = my project
    project = vision
    group_list = hpc
    Error_Path = login:/home/user/megdet_8gpu.e12
    Join_Path = oe
    Keep_Files = n
    Mail_Points = abe
    Mail_Users = me@site.org,you@site.org
    Output_Path = login:/home/user/logs/12.server.OU
    Priority = 100
    Rerunable = False
    umask = 22
    Resource_List.award_category = INCITE
    Resource_List.filesystems = home:eagle
    Resource_List.ncpus = 80
    Resource_List.ngpus = 16
    Resource_List.nodect = 2
    Resource_List.place = scatter:excl
    Resource_List.select = 2:ncpus=40:mpiprocs=2:ngpus=8:host_group=a_long_name_th
\tat_is_folded
    Resource_List.walltime = {walltime}
    Submit_arguments = -A my -l filesystems=home:eagle,walltime={walltime}
\t -l select=2:system=polaris jobs/megdet_8gpu.pbs
    Variable_List = PBS_O_HOME=/home/user,PBS_O_LANG=C.UTF-8,
\tPBS_O_QUEUE=gpu
"""
MOM = f"{shlex.quote(sys.executable)} {shlex.quote(str(Path(__file__).with_name('pbs_task.py')))}"
SELECT = "2:ncpus=40:mpiprocs=2:ngpus=8:host_group=a_long_name_that_is_folded"


class PbsJob:
    """A checkout, a folder of stand-ins, and the variables of a job on the given hosts."""

    def __init__(self, checkout: Path, hosts: list[str], walltime: str = "08:00:00") -> None:
        self.checkout = checkout
        self.tools = checkout.parent / "pbs"
        self.tools.mkdir()
        (self.tools / "qstat.txt").write_text(QSTAT.format(walltime=walltime), encoding="utf-8")
        self._tool("qstat", f'[[ $1 == -f && $2 == 12.server ]] && cat "{self.tools}/qstat.txt"')
        self._tool("qsub", f'printf "%s\\0" "$PWD" "$@" >>"{self.tools}/qsub.calls"; echo 13.server')
        bare = "PATH=/usr/bin:/bin HOME=/ OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"
        self._tool(
            "pbs_tmrsh",
            # as host_match() of OpenPBS compares: a short name is not a full one
            f'host=$1; shift; grep -qxF "$host" "$PBS_NODEFILE" || exit 255\n'
            f'echo "$host" >>"{self.tools}/tmrsh.calls"; cd /\n'
            f'exec env -i {bare} {MOM} unshare --uts bash -c \'hostname "$0"; exec "$@"\' "$host" "$@"',
        )
        self.hosts = hosts
        nodefile = self.tools / "nodefile"
        nodefile.write_text("".join(f"{host}\n" for host in hosts), encoding="utf-8")
        (self.tools / "tmp").mkdir()
        self.variables = {
            "PATH": f"{self.tools}:{environment()['PATH']}",
            "HOME": str(self.tools),
            "LANG": "C.UTF-8",
            "PBS_ENVIRONMENT": "PBS_BATCH",
            "PBS_JOBID": "12.server",
            "PBS_JOBNAME": "megdet_8gpu",
            "PBS_NODEFILE": str(nodefile),
            "PBS_O_WORKDIR": str(checkout),
            "PBS_O_QUEUE": "gpu",
            "PBS_QUEUE": "gpu_exec",
            "NCPUS": "40",
            "OMP_NUM_THREADS": "40",
            "TMPDIR": str(self.tools / "tmp"),
            "MEGDET_PREFLIGHT": "0",
            "HYDRA_IFACE": "lo",  # the names of the pretend nodes have no addresses
            **{key: value for key, value in environment().items() if key.startswith("OMPI_ALLOW")},
        }

    def _tool(self, name: str, text: str) -> None:
        path = self.tools / name
        path.write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
        path.chmod(0o755)

    def run(self, script: str = "megdet_8gpu.pbs", **variables: str) -> subprocess.CompletedProcess[str]:
        """The script as PBS runs it: a copy, in the home folder, in its own session, on the first host, to its end."""
        copy = self.tools / "12.server.SC"
        copy.write_bytes((self.checkout / "jobs" / script).read_bytes())
        on_host = ["unshare", "--uts", "bash", "-c", 'hostname "$0"; exec bash "$1"', self.hosts[0]]
        process = subprocess.Popen(
            [*shlex.split(MOM), *(on_host if os.geteuid() == 0 else ["bash"]), str(copy)],
            env={**self.variables, **variables},
            cwd=self.tools,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            out, err = process.communicate(timeout=40)
        except subprocess.TimeoutExpired:
            process.terminate()
            raise AssertionError(f"the job hangs: {self.log()}{process.communicate()}") from None
        return subprocess.CompletedProcess(script, process.returncode, out, err)

    def log(self) -> str:
        """What the job wrote."""
        return "".join(path.read_text(encoding="utf-8") for path in self.checkout.glob("runs/*/job/log"))

    def submitted(self) -> list[str]:
        """The words of the one call of qsub, after its folder."""
        words = (self.tools / "qsub.calls").read_text(encoding="utf-8").split("\0")[:-1]
        assert words[0] == str(self.checkout)
        return words[1:]


RANK = r"""
rank=SHELL_RANK
for word; do printf '%q ' "$word"; done >"$TMPDIR/words.$rank"
printf '%s' "${NCCL_SOCKET_IFNAME:-}" >"$TMPDIR/interface.$rank"
while (($#)); do case $1 in --output) output=$2 ;; esac; shift; done
mkdir -p "$output/ranks"
printf '%s ' "SHELL_LOCAL_RANK" "$(hostname)" "$OMP_NUM_THREADS" >"$output/ranks/$rank"
save() { mkdir -p "$output/checkpoints"; ((rank)) || : >"$output/checkpoints/step_$1.pt"; }
""".replace("SHELL_RANK", SHELL_RANK).replace("SHELL_LOCAL_RANK", SHELL_LOCAL_RANK)
needs_namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode != 0,
    reason="host names of pretend nodes need root and unshare",
)


needs_open_mpi = pytest.mark.skipif(not has_open_mpi(), reason="it is about Open MPI's daemons; here is another MPI")


def link_mpi(checkout: Path) -> None:
    """Let the checkout's environment, in a path with a blank, have the MPI."""
    mpirun = shutil.which("mpirun", path=environment()["PATH"])
    assert mpirun is not None
    real = Path(mpirun).parent.parent
    (checkout / ".venv/bin").mkdir(parents=True, exist_ok=True)
    tools = ("mpirun", "orterun", "orterun_wrapper", "orted", "ompi_info", "prterun", "prted", "prte_info")
    tools += ("mpiexec", "mpiexec.hydra", "hydra_pmi_proxy", "hydra_bstrap_proxy")
    for name in [*(f"bin/{tool}" for tool in tools), "lib", "share", "etc"]:
        if (real / name).exists():
            (checkout / ".venv" / name).symlink_to(real / name)


def values(words: list[str], option: str) -> set[str]:
    """All values of an option."""
    return {word for before, word in itertools.pairwise(words) if before == option}


def printed_command(log: str) -> list[str]:
    """The words of the qsub command that the log gives for a login node."""
    [line] = re.findall(r"from a login node: (qsub .*)", log)
    return shlex.split(line)


def directives(script: Path) -> list[str]:
    return re.findall(r"^#PBS (.*)$", script.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("script", sorted(JOBS.glob("*.pbs")), ids=lambda path: path.name)
def test_directives_follow_the_grammar(script: Path) -> None:
    """qsub(1B) and pbs_resources(7B): -l select=[N:]chunk[+...], a chunk is RESOURCE=VALUE[:...]."""
    lines = script.read_text(encoding="utf-8").splitlines()
    first_code = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#PBS") for line in lines[first_code:])
    size = {"size": r"\d+(kb|mb|gb|tb)", "number": r"\d+"}
    kinds = {"ncpus": "number", "mpiprocs": "number", "ngpus": "number", "mem": "size"}
    chunk = "|".join(f"{name}={size[kind]}" for name, kind in kinds.items())
    accepted = {
        "-N": r"[A-Za-z][\w-]{0,229}",
        "-j": r"oe|eo|n",
        "-r": r"y|n",
        "-l": rf"select=(\d+:)?({chunk})(:({chunk}))*"
        r"|place=(free|pack|scatter|vscatter)?(:?(excl|exclhost|shared))?|walltime=\d\d:[0-5]\d:[0-5]\d",
    }
    found = directives(script)
    assert any(line.startswith("-l select=") for line in found) and any("walltime=" in line for line in found)
    for line in found:
        option, value = line.split(maxsplit=1)
        assert re.fullmatch(accepted[option], value), line


def test_the_128_gpu_job_asks_for_16_nodes_with_8_ranks_and_gpus() -> None:
    found = directives(JOBS / "megdet_128gpu.pbs")
    assert "-l select=16:ncpus=40:mpiprocs=8:ngpus=8" in found
    assert "-l place=scatter:excl" in found


@needs_namespaces
@pytest.mark.parametrize("domain", ["", ".hpc.example.org"])
def test_ranks_start_on_every_node_of_the_node_file(checkout: Path, domain: str) -> None:
    """Though PBS kills what leaves an agent's session, and the checkout and its MPI lie in a path with a blank."""
    session = "session=$(cut -d ' ' -f 6 /proc/$$/stat)"
    leader = "tr '\\0' ' ' </proc/$session/cmdline >\"$TMPDIR/leader.$rank\""
    set_program(checkout, f'{RANK}{session}; {leader}; sleep 1; echo up >>"$output/ranks/$rank"')
    link_mpi(checkout)
    first, second = f"pbsnode1{domain}", f"pbsnode2{domain}"
    job = PbsJob(checkout, [first] * 2 + [second] * 2)
    done = job.run()
    assert done.returncode == 0, job.log() + done.stderr
    assert "the output is in" in done.stdout
    assert (job.tools / "tmrsh.calls").read_text() == f"{second}\n"
    ranks = {int(path.name): path.read_text().split() for path in checkout.glob("runs/megdet_8gpu-12/ranks/*")}
    # PBS's OMP_NUM_THREADS of 40 is not the ranks'
    assert ranks == {
        0: ["0", first, "1", "up"],
        1: ["1", first, "1", "up"],
        2: ["0", second, "1", "up"],
        3: ["1", second, "1", "up"],
    }
    # in the job on the second node too: its session is that of the agent's command, which PBS suspends and ends; Hydra
    # gives each rank a session of its own
    leader_of_ranks = "/(orted|prted) " if has_open_mpi() else "/python "
    for rank in (2, 3):
        assert re.search(leader_of_ranks, (job.tools / f"tmp/leader.{rank}").read_text())
    # 480 minutes less 1.5 used and the margin of 10
    assert "--max_minutes 468" in (job.tools / "tmp/words.0").read_text()
    assert not (job.tools / "qsub.calls").exists()


@needs_open_mpi
def test_the_daemons_stay_in_the_session_of_the_agents_command(checkout: Path) -> None:
    """All at once, since Open MPI refuses attached ones beyond its limit of 128."""
    shown = PbsJob(checkout, [f"node{number}" for number in range(200)]).run(MEGDET_DRY_RUN="1")
    words = shlex.split(shown.stdout)
    assert "--leave-session-attached" in words, shown.stderr
    limit = next(words[place + 1] for place, word in enumerate(words) if word.endswith("_num_concurrent"))
    assert limit == "200"


@needs_open_mpi
def test_an_open_mpi_with_pbs_support_needs_no_agent(checkout: Path) -> None:
    """It says so in the list of its parts."""
    link_mpi(checkout)
    for name in ("ompi_info", "prte_info"):
        real, listed = checkout / ".venv/bin" / name, checkout.parent / name
        if real.exists():
            listed.symlink_to(real.resolve())
            real.unlink()
            real.write_text(
                f'#!/bin/sh\n"{listed}" "$@"\necho "                 MCA plm: tm (MCA v2.1.0, API v2.0.0)"\n'
            )
            real.chmod(0o755)
    shown = PbsJob(checkout, ["node1", "node2"]).run(MEGDET_DRY_RUN="1")
    assert "mpirun" in shown.stdout and "--hostfile" not in shown.stdout, shown.stdout + shown.stderr


@needs_open_mpi
def test_an_agent_of_the_sites_own_in_a_path_with_blanks_is_refused(checkout: Path) -> None:
    """Only jobs/pbs_rsh.sh puts the quotes where mpirun leaves them out."""
    link_mpi(checkout)
    refused = PbsJob(checkout, ["node1", "node2"]).run(MEGDET_PBS_AGENT="ssh -x", MEGDET_DRY_RUN="1")
    assert refused.returncode == 2
    assert f"mpirun hands its folder '{checkout}/.venv' on without quotes" in refused.stderr


@needs_namespaces
def test_a_run_stopped_before_the_walltime_is_submitted_again_and_finishes(checkout: Path) -> None:
    set_program(checkout, RANK + "[[ -d $output/checkpoints ]] && exit 0; sleep 0.3; save 00000010; sleep 0.3; exit 75")
    job = PbsJob(checkout, ["pbsnode1"] * 2)
    options = "--solver.epochs 18 --data.short_sides '[640, 800]'"
    first = {"MEGDET_DATA": str(checkout / "packed"), "MEGDET_MARGIN_MINUTES": "7", "MEGDET_INTERFACE": "lo"}
    first |= {"MEGDET_OUTPUT": "runs/mine", "APPTAINER_BIND": "/data"}
    done = job.run(MEGDET_ARGS=options, **first)
    assert done.returncode == 75, job.log() + done.stderr
    words = job.submitted()
    assert words[-1] == str(checkout / "jobs/megdet_8gpu.pbs")
    named = dict(zip(words[:-1:2], words[1:-1:2], strict=True))
    assert (named["-N"], named["-q"], named["-A"]) == ("megdet_8gpu", "gpu", "my project")
    # what the chunks add up to is no request of its own, nor what the server has set
    filesystems = {"filesystems=home:eagle"}
    assert values(words, "-l") == {f"select={SELECT}", "place=scatter:excl", "walltime=08:00:00"} | filesystems
    assert values(words, "-W") == {"depend=afterany:12.server", "group_list=hpc", "umask=22"}
    assert (named["-P"], named["-p"], named["-r"], named["-j"]) == ("vision", "100", "n", "oe")
    assert (named["-m"], named["-M"]) == ("abe", "me@site.org,you@site.org")
    # a folder of its own; the names that PBS has made of the job's id are the old job's
    assert named["-o"] == "login:/home/user/logs/" and "-e" not in named and "-k" not in named
    # qsub -v: a list at commas, a value with blanks in quotes
    variables = dict(item.split("=", 1) for item in shlex.split(named["-v"].replace(",", " ")))
    assert re.fullmatch("[0-9a-f]{16}", variables["MEGDET_CONTINUES"])
    assert variables == {
        "MEGDET_CONTINUES": variables["MEGDET_CONTINUES"],
        "MEGDET_ROOT": str(checkout),
        "MEGDET_OUTPUT": str(checkout / "runs/mine"),
    }
    again = job.run(**variables)
    assert again.returncode == 0, job.log() + again.stderr
    assert "from step 10" in job.log() and "finished; results in" in job.log()
    second = shlex.split((job.tools / "tmp/words.0").read_text())
    place = second.index("--solver.epochs")
    assert second[place : place + 4] == ["--solver.epochs", "18", "--data.short_sides", "[640, 800]"]
    # what jobs/env.sh makes of the first submission's settings reaches every rank again
    assert (job.tools / "tmp/interface.1").read_text() == "lo"
    # the settings of the first submission, too
    assert second[second.index("--max_minutes") + 1] == "471"
    assert second[second.index("--output") + 1] == variables["MEGDET_OUTPUT"]


@needs_namespaces
def test_a_server_that_is_away_for_a_moment_ends_no_run(checkout: Path) -> None:
    set_program(checkout, "exit 1")
    job = PbsJob(checkout, ["pbsnode1"] * 2)
    for name in ("qstat", "qsub"):
        tool = job.tools / name
        later = tool.read_text().removeprefix("#!/bin/bash\n")
        away = f'if [[ ! -e "{tool}.asked" ]]; then : >"{tool}.asked"; exit 1; fi'
        tool.write_text(f"#!/bin/bash\n{away}\n{later}")
    assert job.run(MEGDET_RETRY_SECONDS="0").returncode == 1
    assert f"select={SELECT}" in job.submitted()


@needs_namespaces
def test_the_command_for_a_login_node_waits_for_no_job(checkout: Path) -> None:
    """A server without a history has forgotten the job by then: it answers 0 and drops what waits for it."""
    set_program(checkout, "exit 1")
    job = PbsJob(checkout, ["pbsnode1"] * 2)
    job._tool("qsub", "exit 1")
    assert job.run(MEGDET_RETRY_SECONDS="0").returncode == 1
    words = printed_command(job.log())
    assert {f"select={SELECT}", "place=scatter:excl", "walltime=08:00:00"} <= values(words, "-l")
    assert values(words, "-W") == {"group_list=hpc", "umask=22"}
    assert words[-1] == str(checkout / "jobs/megdet_8gpu.pbs")


@needs_namespaces
def test_without_qstat_the_jobs_resources_are_remembered(checkout: Path) -> None:
    set_program(checkout, "exit 1")
    job = PbsJob(checkout, ["pbsnode1"] * 2 + ["pbsnode2"] * 2)
    again = {"MEGDET_OUTPUT": str(checkout / "runs/megdet_8gpu-12"), "MEGDET_CONTINUES": "1"}
    assert job.run().returncode == 1
    (job.tools / "qsub.calls").unlink()
    job._tool("qstat", "exit 1")
    assert job.run(MEGDET_RETRY_SECONDS="0", **again).returncode == 1
    asked = {f"select={SELECT}", "place=scatter:excl", "walltime=08:00:00", "filesystems=home:eagle"}
    assert values(job.submitted(), "-l") == asked
    assert "the next job has select, place and walltime of the run's job before" in job.log()


@needs_namespaces
def test_without_qstat_the_directives_count_where_they_are_the_jobs(checkout: Path) -> None:
    """Never another number of ranks than those that the job has."""
    set_program(checkout, "exit 1")
    job = PbsJob(checkout, ["pbsnode1"] * 8)
    job._tool("qstat", "exit 1")
    away = {"MEGDET_RETRY_SECONDS": "0", "MEGDET_WALLTIME_MINUTES": "90"}
    assert job.run(**away).returncode == 1
    asked = {"select=1:ncpus=40:mpiprocs=8:ngpus=8", "place=excl", "walltime=1:30:00"}
    assert values(job.submitted(), "-l") == asked
    assert "account, project, mail and other options of the first qsub are not known" in job.log()


@needs_namespaces
def test_without_qstat_no_job_of_another_size_is_submitted(checkout: Path) -> None:
    set_program(checkout, "exit 1")
    job = PbsJob(checkout, ["pbsnode1"] * 4)
    job._tool("qstat", "exit 1")
    assert job.run(MEGDET_RETRY_SECONDS="0", MEGDET_WALLTIME_MINUTES="90").returncode == 1
    assert not (job.tools / "qsub.calls").exists()
    assert "has other than this job's 4 ranks on 1 node(s): not submitted again" in job.log()
    assert "place=excl" in values(printed_command(job.log()), "-l")


@needs_namespaces
def test_what_qsub_refuses_is_left_out(checkout: Path) -> None:
    set_program(checkout, "exit 1")
    job = PbsJob(checkout, ["pbsnode1"] * 2)
    tool = job.tools / "qsub"
    later = tool.read_text().removeprefix("#!/bin/bash\n")
    tool.write_text(f'#!/bin/bash\n[[ "$*" != *filesystems* ]] || exit 1\n{later}')
    assert job.run(MEGDET_RETRY_SECONDS="0").returncode == 1
    words = job.submitted()
    assert f"select={SELECT}" in words and "walltime=08:00:00" in words
    assert "submitted again, without -l filesystems=home:eagle, which qsub refuses" in job.log()


@needs_namespaces
def test_a_preflight_that_hangs_is_ended(checkout: Path) -> None:
    set_program(checkout, '[[ " $* " != *" --preflight "* ]] || sleep 60')
    job = PbsJob(checkout, ["pbsnode1"] * 2)
    assert job.run(MEGDET_PREFLIGHT="1", MEGDET_PREFLIGHT_SECONDS="1").returncode not in (0, 2, 75)
    assert "the preflight has not ended in 3 s: ended" in job.log()
    assert "submitted again" in job.log()


@needs_namespaces
@pytest.mark.parametrize("preflight", ["0", "1"])
def test_a_launch_that_does_not_reach_a_node_is_ended_and_tried_again(checkout: Path, preflight: str) -> None:
    set_program(checkout, RANK + "exec sleep 1000")  # it waits for the others
    job = PbsJob(checkout, ["pbsnode1", "pbsnode2", "pbsnode3"])
    tool = job.tools / "pbs_tmrsh"
    job._tool("pbs_tmrsh", f"[[ $1 != pbsnode3 ]] || exec sleep 1000\n{tool.read_text()}")
    done = job.run(MEGDET_PREFLIGHT=preflight, MEGDET_LAUNCH_SECONDS="2")
    assert done.returncode == 1, job.log()
    name = "preflight" if int(preflight) else "training"
    assert (
        f"no rank reported within 2 s of the {name}'s launch: pbs_rsh.sh gets no answer from pbsnode3: ended"
        in job.log()
    )
    assert "submitted again" in job.log()
    # without it the next launch would hang as well
    assert "MEGDET_PREFLIGHT=0" not in job.log()
    # Hydra starts the ranks of a node as soon as it reaches it
    assert not list(checkout.glob("runs/*/ranks/*")) or not has_open_mpi()


@needs_namespaces
def test_a_rank_that_reports_may_take_longer_than_the_launch(checkout: Path) -> None:
    set_program(checkout, RANK + '((rank)) || : >"$MEGDET_LAUNCH_FILE"; sleep 4')
    job = PbsJob(checkout, ["pbsnode1", "pbsnode2"])
    assert job.run(MEGDET_LAUNCH_SECONDS="2").returncode == 0, job.log()


@needs_namespaces
def test_a_frozen_node_does_not_hold_the_job(checkout: Path) -> None:
    """Once a rank has said that it failed, mpirun would wait for ever for the daemon of a node that does not answer."""
    pids = checkout / "frozen"
    freeze = f'echo "$PPID" "$$" >"{pids}.new"; mv "{pids}.new" "{pids}"; kill -STOP "$PPID" "$$"; exit 0'
    left = f'until [[ -e "{pids}" ]]; do sleep 0.1; done; sleep 0.5; echo 1 >"$MEGDET_STATUS_FILE"; exit 1'
    set_program(checkout, f"{RANK}if ((rank)); then {freeze}; fi; {left}")
    job = PbsJob(checkout, ["pbsnode1", "pbsnode2"])
    done = job.run(MEGDET_LEAVE_SECONDS="1")
    assert done.returncode == 1, job.log()
    assert "a rank left with status 1, and the launcher has not ended in 1 s: ended" in job.log()
    assert "submitted again" in job.log()


@needs_namespaces
@pytest.mark.parametrize(("status", "submissions"), [(2, 0), (1, 1)])
def test_bad_input_is_not_submitted_again_and_a_crash_is(checkout: Path, status: int, submissions: int) -> None:
    set_program(checkout, f"exit {status}")
    job = PbsJob(checkout, ["pbsnode1"] * 2)
    assert job.run().returncode == status
    assert (job.tools / "qsub.calls").exists() == bool(submissions)


@needs_namespaces
def test_crashes_without_progress_end_at_the_limit(checkout: Path) -> None:
    set_program(checkout, "exit 1")
    job = PbsJob(checkout, ["pbsnode1"] * 2)
    again = {"MEGDET_OUTPUT": str(checkout / "runs/megdet_8gpu-12"), "MEGDET_CONTINUES": "1"}
    assert job.run().returncode == 1
    for _ in range(2):
        (job.tools / "qsub.calls").unlink()
        assert job.run(**again).returncode == 1
    assert not (job.tools / "qsub.calls").exists()
    assert "3 attempts in a row ended at step 0: not submitted again" in job.log()


def test_a_walltime_too_short_is_named(checkout: Path) -> None:
    done = PbsJob(checkout, ["pbsnode1"] * 2, walltime="00:10:00").run()
    assert done.returncode == 2
    assert "walltime leaves -2 minutes after a margin of 10" in done.stderr


def test_nodes_with_unequal_ranks_are_refused(checkout: Path) -> None:
    done = PbsJob(checkout, ["a", "a", "b"]).run()
    assert done.returncode == 2
    assert "unequal numbers of ranks" in done.stderr
