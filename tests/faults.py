"""Inject every fault many times, resume, compare with an uncut run: `python -m tests.faults --help`. Takes long.

A trial trains the tiny detector on 2 ranks under mpirun, lets the fault happen at a drawn step of a drawn rank, resumes
with the same command and compares the weights and momenta with an uncut run's, bit for bit. Faults: kill (SIGKILL of a
rank), stop (SIGSTOP), raise, hang (in Python), disk (writes fail), corrupt (the newest checkpoint is cut or a byte
flipped before resuming), usr1 (SIGUSR1 to a rank), time (max_minutes).
"""

from __future__ import annotations

import argparse
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from megdet_hpc.engine.checkpoint import checkpoint_files, load_checkpoint
from tests.conftest import ROOT, environment, mpirun, ranks_of, run
from tests.parallel.test_training import SMALL

STEPS = 12
WATCHDOG_MINUTES = 0.2
# start-up of two loaded cores, then the watchdog's limit and what it takes to gather the reports [seconds]
LIMIT_SECONDS = 240.0
FAULTS = ("kill", "stop", "raise", "hang", "disk", "corrupt", "usr1", "time")
UNFINISHED = 75


def command(data: Path, output: Path, kind: str = "none", rank: int = 0, step: int = 0, *more: str) -> list[str]:
    """A training on 2 ranks that saves every second step."""
    folders = ["--data.train", str(data / "train"), "--data.val", "null", "--output", str(output), "--resume", "auto"]
    every = ["--max_steps", str(STEPS), "--log_every", "1", "--watchdog_minutes", str(WATCHDOG_MINUTES)]
    often = ["--solver.epochs", "8", "--checkpoints.every_epochs", str(2 / 6.5), "--checkpoints.keep", "3"]
    launcher = [*mpirun(2), sys.executable, "-m", "tests.parallel.faulty"]
    return [*launcher, kind, str(rank), str(step), *SMALL, *folders, *every, *often, *more]


def state_of(output: Path) -> dict[str, Any]:
    """The newest checkpoint."""
    return load_checkpoint(checkpoint_files(output / "checkpoints")[-1])


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two runs are at the same step with the same bits."""
    momenta = [[s["momentum_buffer"] for s in state["optimizer"]["state"].values()] for state in (one, other)]
    return (
        one["step"] == other["step"]
        and all(torch.equal(value, other["model"][key]) for key, value in one["model"].items())
        and all(map(torch.equal, *momenta))
    )


def corrupt(path: Path, draw: random.Random) -> str:
    """Cut a file short or flip a byte in the middle of it."""
    data = bytearray(path.read_bytes())
    if draw.random() < 0.5:
        path.write_bytes(data[: draw.randrange(len(data))])
        return "cut"
    # the archive's own checks cover every byte of a tensor
    data[draw.randrange(len(data) // 4, len(data) // 2)] ^= 0xFF
    path.write_bytes(data)
    return "flipped"


def fault(kind: str, data: Path, output: Path, draw: random.Random) -> dict[str, Any]:
    """Start a run and let the fault happen; how and how fast it ended."""
    rank, step = draw.randrange(2), draw.randrange(3, STEPS - 2)
    injected = kind if kind in ("raise", "hang", "disk") else "none"
    rank = 0 if kind == "disk" else rank  # which alone writes
    more = ["--max_steps", str(step)] if kind == "corrupt" else []
    more += ["--max_minutes", f"{draw.uniform(0.05, 0.09):.3f}"] if kind == "time" else []
    log = output.with_suffix(".log")
    with open(log, "wb") as file:
        line = command(data, output, injected, rank, step, *more)
        job = subprocess.Popen(line, cwd=ROOT, env=environment(), stdout=file, stderr=file)
        signals = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "usr1": signal.SIGUSR1}
        begin = time.time()
        if kind in signals:
            metrics = output / "metrics.jsonl"
            while not (metrics.exists() and metrics.read_text().count('"loss"') >= step) and job.poll() is None:
                time.sleep(0.02)
            begin = time.time()
            if job.poll() is None:
                ranks_of(job, "tests.parallel.faulty")[rank].send_signal(signals[kind])
        try:
            status: int | None = job.wait(LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            status = None
            job.kill()
    ended = time.time()
    text = log.read_text(errors="replace")
    told = re.search(r"fault: \w+ at ([\d.]+)", text)
    begin = float(told[1]) if told else begin
    found = {"kind": kind, "rank": rank, "step": step, "status": status, "seconds": round(ended - begin, 2)}
    if kind == "corrupt":
        found["how"] = corrupt(checkpoint_files(output / "checkpoints")[-1], draw)
    found["saved"] = max((int(file.stem.split("_")[1]) for file in checkpoint_files(output / "checkpoints")), default=0)
    return found


def trial(kind: str, seed: int, data: Path, folder: Path, truth: dict[str, Any]) -> dict[str, Any]:
    """One fault, one resumption; what came of it."""
    draw = random.Random(f"{kind} {seed}")
    output = folder / f"{kind}-{seed}"
    found = {"seed": seed, **fault(kind, data, output, draw)}
    again = run(command(data, output), timeout=LIMIT_SECONDS)
    early = {"usr1": UNFINISHED, "time": UNFINISHED, "corrupt": 0}
    found["hang"] = found["status"] is None
    found["ended as it should"] = found["status"] == early[kind] if kind in early else found["status"] not in (0, 75)
    # on a fast machine the run may be over before its time is
    found["ended as it should"] |= kind == "time" and found["status"] == 0 and found["saved"] == STEPS
    found["resumed"] = again.returncode == 0
    found["same bits"] = again.returncode == 0 and same(state_of(output), truth)
    found["said"] = "trying the one before" in again.stdout if kind == "corrupt" else True
    if not (found["ended as it should"] and found["same bits"] and found["said"]):
        (folder / f"{kind}-{seed}.resumed.log").write_text(again.stdout + again.stderr)
    return found


def generate(folder: Path) -> None:
    """Draw a small set into `folder` and pack it: packs `train` and `val`."""
    make = [sys.executable, "data_prep/make_shapes.py", "--output", str(folder / "coco"), "--train", "24"]
    assert run([*make, "--val", "4"]).returncode == 0
    for split in ("train", "val"):
        source = str(folder / f"coco/annotations/instances_{split}.json")
        pack = [sys.executable, "data_prep/pack_coco.py", "--images", str(folder / f"coco/{split}")]
        assert run([*pack, "--annotations", source, "--output", str(folder / split)]).returncode == 0


def table(trials: list[dict[str, Any]]) -> str:
    """Markdown, a row per fault."""
    head = (
        "| fault | trials | hangs | ended as it should | resumed to the same bits | seconds to the end, median (most) |"
    )
    rows = [head, "|---|---|---|---|---|---|"]
    for kind in dict.fromkeys(trial["kind"] for trial in trials):
        mine = [trial for trial in trials if trial["kind"] == kind]
        count: Callable[[str], int] = lambda key, mine=mine: sum(bool(t[key]) for t in mine)  # noqa: E731
        seconds = [t["seconds"] for t in mine]
        timed = f"{median(seconds):.1f} ({max(seconds):.1f})" if kind not in ("corrupt", "time") else "-"
        counts = [count(key) for key in ("hang", "ended as it should", "same bits")]
        rows.append(f"| {' | '.join(map(str, [kind, len(mine), *counts, timed]))} |")
    return "\n".join(rows)


def main() -> int:
    """Run the trials; 0 if every one went as it should."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the first trial; the others follow")
    parser.add_argument("--json", type=Path, help="file for every trial's record")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generate(folder)
        whole = run(command(folder, folder / "whole"), timeout=LIMIT_SECONDS)
        assert whole.returncode == 0, whole.stderr
        truth = state_of(folder / "whole")
        trials = []
        for seed in range(options.seed, options.seed + options.repeats):
            for kind in options.faults:
                found = trial(kind, seed, folder, folder, truth)
                trials.append(found)
                print(json.dumps(found), flush=True)
                if options.json:
                    options.json.write_text(json.dumps(trials, indent=1) + "\n")
        print(table(trials))
    good = all(t["ended as it should"] and t["same bits"] and t["said"] and not t["hang"] for t in trials)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
