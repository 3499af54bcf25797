"""`bench threads`: who polls and who waits in a training step, thread by thread and over time.

Four kinds of step take turns: one that sends nothing, one that sends gradients, one that sends the layers' messages,
and one that sends both, as in training. So what each adds is told from what ranks cost each other by sharing cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megdet_hpc.bench import thread_samples
from megdet_hpc.bench.counting import CountingCommunicator
from megdet_hpc.bench.report import heading
from megdet_hpc.bench.step import StepPictures, TrainedStep, picture_options, picture_size
from megdet_hpc.bench.threads_figure import GRADIENTS, Span, ThreadTrack, draw_threads
from megdet_hpc.command_line import config_parser, parse_config
from megdet_hpc.errors import UserError
from megdet_hpc.parallel.cores import usable_cores
from megdet_hpc.parallel.runtime import Runtime
from megdet_hpc.parallel.serial import SerialCommunicator
from megdet_hpc.parallel.transports import GRADIENT_CARRIERS

NOTHING, LAYERS, BOTH = "nothing sent", "layers' messages", "both"
_DRAWN = 3  # steps in the picture


def options(parser: argparse.ArgumentParser) -> None:
    """The command line of this benchmark."""
    parser.add_argument("--config", default="tiny", help="named configuration or YAML file of the detector")
    picture_options(parser, side=128)
    parser.add_argument("--exchange", choices=("two_stage", "packed"), default="two_stage", help="norm.exchange")
    parser.add_argument("--transport", choices=("auto", "mpi", "torch"), default="auto", help="norm.transport")
    parser.add_argument(
        "--gradients", choices=("auto", *GRADIENT_CARRIERS), default="auto", help="library that averages gradients"
    )
    parser.add_argument("--repeats", type=int, default=10, help="measured steps of each kind")
    parser.add_argument("--warmup", type=int, default=2, help="steps of each kind before the measured ones")
    parser.add_argument("--interval-ms", type=float, default=5.0, help="time between two looks at the threads")
    parser.add_argument("--figure", metavar="FILE", help="PNG: what the threads did in the last steps that send both")


class _Recorded(CountingCommunicator):
    """A communicator whose messages are kept with their times.

    Attributes:
        spans: begin, end [s of time.perf_counter] and name of each message.
    """

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.spans: list[Span] = []

    def _note(self, name: str, begin: float, num_bytes: int = 0) -> float:
        took = super()._note(name, begin, num_bytes)
        self.spans.append(Span(begin, begin + took, name))
        return took


class _Step:
    """A kind of training step. Making it is a collective of the world.

    Attributes:
        spans: what the rank's own thread waited for since they were cleared.
    """

    def __init__(
        self, arguments: argparse.Namespace, runtime: Runtime, device: torch.device, *, layers: bool, gradients: bool
    ) -> None:
        given, _ = parse_config(config_parser("megdet_hpc.bench", ""), ["--config", arguments.config])
        config = replace(given, norm=replace(given.norm, exchange=arguments.exchange))
        height, width = picture_size(arguments)
        picture = StepPictures.draw(arguments.images, arguments.boxes, height, width, seed=runtime.world.rank)
        alone = SerialCommunicator()
        self._group = _Recorded(runtime.communicator(arguments.transport, device) if layers else alone)
        self._step = TrainedStep(
            config,
            picture.batch(device),
            world=alone,
            group=self._group,
            runtime=runtime if gradients else Runtime(alone),
            device=device,
            overlap=runtime.overlaps(
                config.solver.overlap, device=device, transport=arguments.transport, layers_send=layers
            ),
        )
        self.spans: list[Span] = []
        if gradients:
            self._step.tell_waits(lambda begin, end: self.spans.append(Span(begin, end, GRADIENTS)))

    def __call__(self, number: int) -> Span:
        """Make a step. Collective of the world; blocks."""
        self._group.spans.clear()
        begin = time.perf_counter()
        self._step(number)
        span = Span(begin, time.perf_counter(), "step")
        self.spans += self._group.spans if self._group.size > 1 else []
        return span


@dataclass
class _Found:
    """What a rank saw: its steps of each kind, and the waits of those that send both."""

    steps: dict[str, list[Span]]
    waits: list[Span]


def _measure(arguments: argparse.Namespace, runtime: Runtime, kinds: dict[str, _Step]) -> _Found:
    """Let the kinds of step take turns. Collective of the world; blocks."""
    found: dict[str, list[Span]] = {name: [] for name in kinds}
    for number in range(arguments.warmup + arguments.repeats):
        for name, step in kinds.items():
            if number == arguments.warmup:
                step.spans.clear()
            runtime.world.barrier(name="bench.start")
            span = step(number)
            if number >= arguments.warmup:
                found[name].append(span)
    return _Found(found, kinds[BOTH].spans if BOTH in kinds else [])


class _Watch:
    """A process that watches the threads of all ranks on this host; only rank 0 has one."""

    def __init__(self, processes: list[int], interval: float) -> None:
        command = [sys.executable, "-I", "-S", thread_samples.__file__, str(interval), *map(str, processes)]
        self._watcher = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def end(self) -> dict[str, dict[str, ThreadTrack]]:
        """{process: {thread: what it did}}."""
        text, _ = self._watcher.communicate()
        return {
            process: {thread: ThreadTrack(own["name"], np.array(own["samples"])) for thread, own in threads.items()}
            for process, threads in json.loads(text).items()
        }


def _step_rows(ranks: list[_Found]) -> list[dict[str, Any]]:
    """A row for each kind of step. A step takes as long as its slowest rank; ratios are those of turns."""
    rows = []
    seconds = {  # (P, R)
        name: np.array([[span.end - span.begin for span in rank.steps[name]] for rank in ranks]).max(0)
        for name in ranks[0].steps
    }
    for name, own in seconds.items():
        ratios = own / seconds[NOTHING]
        low, high = np.quantile(ratios, [0.25, 0.75])
        rows.append(
            {
                "step": name,
                "ms, median": 1e3 * float(np.median(own)),
                "least": 1e3 * float(own.min()),
                "most": 1e3 * float(own.max()),
                "to nothing sent": float(np.median(ratios)),
                "quartiles": f"{low:.2f} to {high:.2f}",
                "least to least": float(own.min() / seconds[NOTHING].min()),
            }
        )
    return rows


def _thread_rows(
    ranks: list[_Found], processes: list[int], tracks: dict[str, dict[str, ThreadTrack]]
) -> list[dict[str, Any]]:
    """A row for each thread that had a core for a hundredth of the time or more, in the steps of one kind."""
    rows = []
    for rank, (found, process) in enumerate(zip(ranks, processes, strict=True)):
        for track in tracks.get(str(process), {}).values():
            shares: dict[str, float | None] = {}
            for name, steps in found.steps.items():
                ran, waited = track.shares(steps)
                shares |= {f"{name}: runs": ran, "waits for a core": waited} if name == BOTH else {f"{name}: runs": ran}
            if max(share or 0 for share in shares.values()) >= 0.01:
                rows.append({"rank": rank, "thread": track.name, **shares})
    return rows


def _wait_rows(ranks: list[_Found]) -> list[dict[str, Any]]:
    """What each rank's own thread waited for in the steps that send both, as a share of them."""
    rows = []
    for rank, found in enumerate(ranks):
        whole = sum(span.end - span.begin for span in found.steps[BOTH])
        for kind in (LAYERS, GRADIENTS):
            own = [span for span in found.waits if (span.name == GRADIENTS) == (kind == GRADIENTS)]
            took = np.array([span.end - span.begin for span in own] or [0.0])
            rows.append(
                {
                    "rank": rank,
                    "waits for": kind,
                    "a step": len(own) / len(found.steps[BOTH]),
                    "share of the step": float(took.sum() / whole),
                    "us, median": 1e6 * float(np.median(took)),
                    "longest tenth, share": float(np.sort(took)[-max(len(took) // 10, 1) :].sum() / (took.sum() or 1)),
                }
            )
    return rows


def run(arguments: argparse.Namespace, runtime: Runtime) -> dict[str, Any] | None:
    """Measure. Collective of the world; blocks.

    Returns:
        The report on rank 0, None elsewhere.

    Raises:
        UserError: an option is out of its range, or ranks are on several hosts, whose clocks differ.
    """
    picture_size(arguments)
    if arguments.interval_ms <= 0:
        raise UserError(f"--interval-ms {arguments.interval_ms}; accepted: more than 0")
    if runtime.num_hosts > 1:
        raise UserError(f"the ranks are on {runtime.num_hosts} hosts, whose clocks differ; start them on one")
    if not Path("/proc/self/schedstat").is_file():
        raise UserError("this system has no /proc/PID/schedstat, which tells when a thread had a core")
    world, device = runtime.world, torch.device("cpu")
    send = {NOTHING: (False, False)}
    if world.size > 1:
        send |= {GRADIENTS: (False, True), LAYERS: (True, False), BOTH: (True, True)}
    kinds = {
        name: _Step(arguments, runtime, device, layers=layers, gradients=gradients)
        for name, (layers, gradients) in send.items()
    }
    processes = world.allgather_object(os.getpid(), name="bench.processes")
    watch = _Watch(processes, arguments.interval_ms / 1e3) if world.rank == 0 else None
    ranks = world.allgather_object(_measure(arguments, runtime, kinds), name="bench.threads")
    if watch is None:
        return None
    tracks = watch.end()
    report = {
        **heading(arguments, runtime, device),
        "cores": f"{usable_cores()} that rank 0 may use, for {world.size} rank(s); load {os.getloadavg()[0]:.1f}",
        "steps": _step_rows(ranks),
        "threads, share of the time": _thread_rows(ranks, processes, tracks),
    }
    if world.size > 1:
        report["what the ranks waited for"] = _wait_rows(ranks)
    if arguments.figure:
        last = [rank.steps[BOTH if world.size > 1 else NOTHING][-_DRAWN:] for rank in ranks]
        own = [tracks.get(str(process), {}) for process in processes]
        draw_threads(last, [rank.waits for rank in ranks], own, Path(arguments.figure))
        report["picture"] = arguments.figure
    return report
