"""One rank of a linked node: real training steps on generated images, timed under each setting of the links.

`compare.py` starts it. Rank 0 prints `{"ready": true}` and waits for a line on standard input, which comes when the
links are set: `long_messages` or `steps`, answered by a line of JSON, or `end`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from megdet_hpc.bench.step import StepPictures, TrainedStep
from megdet_hpc.command_line import Parser, config_parser, parse_config
from megdet_hpc.config import Config
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.runtime import Runtime
from megdet_hpc.parallel.serial import SerialCommunicator
from megdet_hpc.parallel.start import started

_SIDE = 512  # of the matrices that are multiplied between two messages: some ms, as a layer of a small detector takes
_IN_A_ROW = 10
_SHORT = 1032  # bytes: the sums of a layer of 128 channels and their count
_LONG, _LONG_ONES = 2**24, 9  # bytes, messages
_LEAST_STEPS = 3
_BOXES = 7


def _parser() -> Parser:
    parser = config_parser("megdet_hpc.link_check.ranks", __doc__ or "")
    parser.add_argument("--side", type=int, required=True, help="side of the generated images [pixels]")
    parser.add_argument("--seconds", type=float, required=True, help="time for the steps of a setting [s]")
    return parser


def row_seconds(group: Communicator, *, sends: bool) -> float:
    """Mean time of some work [s], with or without a short message after it. Collective of the group; blocks."""
    values = torch.zeros(_SHORT // 8, dtype=torch.float64)
    left, right = torch.zeros(_SIDE, _SIDE), torch.zeros(_SIDE, _SIDE)
    group.barrier(name="link_check.row")
    begin = time.perf_counter()
    for _ in range(_IN_A_ROW):
        torch.mm(left, right)
        if sends:
            group.allreduce_sum_(values, name="link_check.message")
    return (time.perf_counter() - begin) / _IN_A_ROW


class _Rank:
    """The steps of this rank: real ones, and some of the same work that send nothing. A collective of the world."""

    def __init__(self, runtime: Runtime, config: Config, side: int) -> None:
        self.runtime = runtime
        device = torch.device("cpu")
        self._group = runtime.communicator(config.norm.transport, device)
        overlap = runtime.overlaps(
            config.solver.overlap,
            device=device,
            transport=config.norm.transport,
            layers_send=runtime.world.size > 1,
        )
        # the same images on each rank, so that all have the same work
        batch = StepPictures.draw(config.data.images_per_rank, _BOXES, side, side, seed=0).batch(device)
        self._together = TrainedStep(
            config, batch, world=runtime.world, group=self._group, runtime=runtime, device=device, overlap=overlap
        )
        nobody = SerialCommunicator()
        self._alone = TrainedStep(config, batch, world=nobody, group=nobody, runtime=Runtime(nobody), device=device)

    def _timed(self, step: TrainedStep) -> float:
        self.runtime.world.barrier(name="link_check.step")
        begin = time.perf_counter()
        step()
        return time.perf_counter() - begin

    def long_messages(self) -> dict[str, float]:
        """The rate of long messages, such as those of the gradients [bytes/s]. Collective of the world; blocks."""
        world = self.runtime.world
        long = torch.zeros(_LONG // 4)
        times = []
        for _ in range(_LONG_ONES):
            world.barrier(name="link_check.long")
            begin = time.perf_counter()
            world.allreduce_sum_(long, name="link_check.long")
            times.append(time.perf_counter() - begin)
        return {"bandwidth": 2 * (world.size - 1) / world.size * _LONG / median(self._slowest(times))}

    def _slowest(self, times: list[float]) -> list[float]:
        """The time of the slowest rank, for each. Collective of the world; blocks."""
        everyone = self.runtime.world.allgather_object(times, name="link_check.times")
        return [max(own) for own in zip(*everyone, strict=True)]

    def steps(self, seconds: float) -> dict[str, Any]:
        """Make steps that send nothing, rows of messages, and real steps in turn, for the given time.

        So other load on the machine disturbs all of them alike. Collective of the world; blocks.

        Returns:
            Times of the slowest rank: `alone` and `together` of steps, `work` of a row's work, `message` with messages.
        """
        world = self.runtime.world
        kinds: dict[str, Callable[[], float]] = {
            "alone": lambda: self._timed(self._alone),
            "work": lambda: row_seconds(self._group, sends=False),
            "message": lambda: row_seconds(self._group, sends=True),
            "together": lambda: self._timed(self._together),
        }
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        begin = time.perf_counter()
        self._together()
        while True:
            for kind, measure in kinds.items():
                times[kind].append(measure())
            enough = len(times["alone"]) >= _LEAST_STEPS and time.perf_counter() - begin > seconds
            if world.broadcast_object(enough, name="link_check.enough"):
                break
        return {kind: self._slowest(own) for kind, own in times.items()}


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    config, options = parse_config(_parser(), sys.argv[1:] if arguments is None else arguments)
    torch.set_num_threads(1)
    with started(config.norm.transport, "cpu", gradients=config.solver.gradients) as runtime:
        rank, world = _Rank(runtime, replace(config, norm=replace(config.norm, size=0)), options.side), runtime.world
        while True:
            line = ""
            if world.rank == 0:
                print(json.dumps({"ready": True}), flush=True)
                line = sys.stdin.readline().strip()
            line = world.broadcast_object(line, name="link_check.command")
            if line in ("", "end"):
                return
            found = rank.long_messages() if line == "long_messages" else rank.steps(options.seconds)
            if world.rank == 0:
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
