"""Faults of a real SLURM job, many times, with times: `python -m tests.slurm_faults --help`. Needs root; takes long.

A trial submits jobs/megdet_128gpu.sh for 2 nodes x 1 rank of the tiny detector on a SLURM started here, lets the fault
happen after a drawn step, waits until the script has requeued the job and it is finished, and compares weights and
momenta with an uncut run's, bit for bit. Faults: usr1 (as before the walltime's end), kill (SIGKILL of a drawn rank),
node (all processes of the node without the batch script are killed, and it boots), batch_node (the same of the other,
and SLURM is told that it is down, which it finds out after SlurmdTimeout, 300 s, by itself), frozen (rank and daemon of
the launcher on the node without the batch script are stopped, under srun only the rank: its network is up, it does not
answer).

--launcher torchrun starts torch's launcher on each node by srun, and --gradients torch sends gradients by
torch.distributed. The uncut run is one of the same launcher and the same gradients, without SLURM.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from megdet_hpc.engine.checkpoint import checkpoint_files
from megdet_hpc.log import read_metrics
from megdet_hpc.parallel.transports import GRADIENT_CARRIERS
from tests.conftest import mpirun, run
from tests.faults import generate, same, state_of
from tests.jobs.conftest import log_of
from tests.jobs.slurm import Slurm, missing, running
from tests.jobs.test_training_on_slurm import LONGER, TORCHRUN, rank_process, rank_processes, start
from tests.parallel.test_training import arguments

FAULTS = ("usr1", "kill", "node", "batch_node", "frozen")
LIMIT = 240.0
NUM_STEPS = 30
FREQUENT = ["--log_every", "1"]
WATCHDOG = ["--watchdog_minutes", "0.2"]
LAUNCHERS = ("mpirun", "srun", "torchrun")
# Under torchrun USR1 stops a run by its stop file, for which it looks every 5 seconds, so it must last longer.
LASTING = ["--solver.epochs", "40"]


def wait(ready: Callable[[], Any], what: str) -> float:
    """Wait for a condition; when it came [seconds since the epoch]."""
    until = time.time() + LIMIT
    while not ready():
        assert time.time() < until, f"{what}: not within {LIMIT:.0f} s"
        time.sleep(0.05)
    return time.time()


def last_step(output: Path) -> int:
    """The last update of which the run has written the loss."""
    return max((row["step"] for row in read_metrics(output / "metrics.jsonl") if "loss" in row), default=0)


def inject(kind: str, cluster: Slurm, job_id: str, output: Path, draw: random.Random, launcher: str) -> None:
    """Let the fault happen now."""
    job = cluster.job(job_id)
    if kind == "usr1":
        assert cluster.run("scancel", "--batch", "--signal=USR1", job_id).returncode == 0
    elif kind == "kill":
        os.kill(rank_process(output, draw.randrange(2)), signal.SIGKILL)
    elif kind == "frozen":
        # torchrun gives the nodes their numbers in any order
        rank = next(process for process, node in rank_processes(output).values() if node != job["BatchHost"])
        os.kill(rank, signal.SIGSTOP)
        if launcher != "srun":  # there it is SLURM's own, without which SLURM does not end a job for ever
            os.kill(int(Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[1]), signal.SIGSTOP)
    else:
        nodes = cluster.run("scontrol", "show", "hostnames", job["NodeList"]).stdout.split()
        lost = next(node for node in nodes if (node == job["BatchHost"]) == (kind == "batch_node"))
        cluster.crash_node(lost)
        if kind == "batch_node":
            down, resume = (update_node(cluster, lost, state) for state in ("down", "resume"))
            assert down.returncode == 0, down.stderr
            # a node that has booted in between is up already, and SLURM refuses to resume it
            state = cluster.run("scontrol", "show", "node", lost).stdout
            assert resume.returncode == 0 or "State=DOWN" not in state, resume.stderr + state


def update_node(cluster: Slurm, node: str, state: str) -> subprocess.CompletedProcess[str]:
    """Tell SLURM the state of a node."""
    return cluster.run("scontrol", "update", f"nodename={node}", f"state={state}", "reason=lost")


def follow(cluster: Slurm, job_id: str, output: Path, begin: float) -> dict[str, float]:
    """Wait for the attempt's end, the next one's start and its first update; what each took [seconds]."""
    log = Path(cluster.job(job_id)["StdOut"])
    attempts: Callable[[], list[str]] = lambda: log.read_text(errors="replace").split(": attempt ")[1:]  # noqa: E731
    # where the script itself was lost, only SLURM knows
    ended = wait(lambda: ": status " in log.read_text(errors="replace") or not is_running(cluster, job_id), "the end")
    started = wait(lambda: len(attempts()) > 1, "the next attempt")
    resumed = int(attempts()[1].split("from step ")[1].split(";")[0])

    def goes_on() -> bool:
        path = output / "metrics.jsonl"
        return len(attempts()) > 2 or (path.stat().st_mtime > started and last_step(output) > resumed)

    first = wait(goes_on, "the first step")
    times = {"to the end": ended - begin, "requeue": started - ended, "first step": first - started}
    return {key: round(value, 2) for key, value in times.items()} | {"resumed at": resumed}


def is_running(cluster: Slurm, job_id: str) -> bool:
    return cluster.job(job_id)["JobState"] == "RUNNING"


def trial(
    kind: str, seed: int, cluster: Slurm, data: Path, truth: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """One job, one fault; what came of it, compared with the checkpoint of the uncut run."""
    draw = random.Random(f"{kind} {seed}")
    step = draw.randrange(8, NUM_STEPS - 8)
    folder = data / f"{kind}-{seed}"
    folder.mkdir()
    # under srun nothing but the watchdog tells the rank that is left that the other one's node is gone
    late = kind == "frozen" or (kind == "node" and options.launcher == "srun")
    keys = [*FREQUENT, *(WATCHDOG if late else ()), *keys_of(kind, options)]
    settings = {"MEGDET_SRUN_OPTIONS": options.srun_options} if options.srun_options else {}
    launcher, preflight = options.launcher, str(int(options.preflight))
    job_id, output = start(cluster, data, folder, preflight, *keys, launcher=launcher, **settings)
    found: dict[str, Any] = {"kind": kind, "seed": seed, "step": step, "hang": False}
    try:
        wait(lambda: (output / "metrics.jsonl").exists() and last_step(output) >= step, f"step {step}")
        begin = time.time()
        inject(kind, cluster, job_id, output, draw, launcher)
        found |= follow(cluster, job_id, output, begin)
        wait(lambda: cluster.job(job_id)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED"), "the job's end")
    except AssertionError as error:
        found |= {"hang": True, "why": str(error)}
        cluster.run("scancel", job_id)
    job = cluster.job(job_id)
    found |= {"state": job["JobState"], "restarts": int(job["Restarts"])}
    found["same bits"] = job["JobState"] == "COMPLETED" and same(state_of(output), truth)
    if not found["same bits"]:
        print(log_of(job), file=sys.stderr)
    return found


def table(trials: list[dict[str, Any]]) -> str:
    """Markdown, a row per fault; times as median (most) in seconds."""
    columns = ("to the end", "requeue", "first step")
    head = [
        "fault",
        "trials",
        "hangs",
        "same bits",
        "to the attempt's end [s]",
        "to the next attempt",
        "to its first step",
    ]
    rows = [f"| {' | '.join(head)} |", "|---|---|---|---|---|---|---|"]
    for kind in dict.fromkeys(trial["kind"] for trial in trials):
        mine = [trial for trial in trials if trial["kind"] == kind]
        counts = [len(mine), sum(t["hang"] for t in mine), sum(t["same bits"] for t in mine)]
        seconds = [[t[column] for t in mine if column in t] for column in columns]
        times = [f"{median(values):.1f} ({max(values):.1f})" if values else "-" for values in seconds]
        rows.append(f"| {' | '.join(map(str, [kind, *counts, *times]))} |")
    return "\n".join(rows)


def keys_of(kind: str, options: argparse.Namespace) -> list[str]:
    """The trainer's options for a fault, a launcher and a library of gradients."""
    lasting = LASTING if kind == "usr1" and options.launcher == "torchrun" else []
    return ["--solver.gradients", options.gradients, *lasting]


def uncut(kind: str, data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The last checkpoint of the run without a fault and without SLURM; runs with the same options are made once."""
    keys = keys_of(kind, options)
    output = data / f"whole{len(keys)}"
    if not output.exists():
        alone = TORCHRUN if options.launcher == "torchrun" else [*mpirun(2), sys.executable]
        whole = run([*alone, *arguments(data, output, *LONGER, *keys)], timeout=1200)
        assert whole.returncode == 0, whole.stderr
    truth = state_of(output)
    assert truth["step"] >= NUM_STEPS, checkpoint_files(output / "checkpoints")
    return truth


def main() -> int:
    """Run the trials; 0 if every one went as it should."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the first trial; the others follow")
    parser.add_argument("--launcher", choices=LAUNCHERS, default="mpirun")
    parser.add_argument("--gradients", choices=("auto", *GRADIENT_CARRIERS), default="auto")
    parser.add_argument("--srun-options", metavar="WORDS", help="MEGDET_SRUN_OPTIONS of the jobs, such as --mpi=pmi2")
    parser.add_argument("--preflight", action="store_true", help="with the preflight before each attempt")
    parser.add_argument("--json", type=Path, help="file for every trial's record")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        data = Path(name)
        (data / "slurm").mkdir()
        reason = missing(data / "slurm")
        if reason:
            parser.error(f"no SLURM here: {reason}")
        generate(data)
        truths = {kind: uncut(kind, data, options) for kind in options.faults}
        trials = []
        with running(data / "slurm") as cluster:
            for seed in range(options.seed, options.seed + options.repeats):
                for kind in options.faults:
                    found = trial(kind, seed, cluster, data, truths[kind], options)
                    trials.append(found)
                    print(json.dumps(found), flush=True)
                    if options.json:
                        options.json.write_text(json.dumps(trials, indent=1) + "\n")
        print(table(trials))
    return 0 if all(t["same bits"] and not t["hang"] for t in trials) else 1


if __name__ == "__main__":
    sys.exit(main())
