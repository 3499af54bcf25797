"""`bench messages`: the collectives of a training step, how many there are of each, and what time they take.

The time of a message is the host's, most of it in waiting for the slowest rank. Gradients travel during the backward
pass where the run would let them; their time is what is left to wait for after it.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from megdet_hpc.bench.counting import CountingCommunicator, Tally
from megdet_hpc.bench.report import heading
from megdet_hpc.bench.step import StepPictures, TrainedStep, backbone_option, picture_options, picture_size
from megdet_hpc.config import Config, FasterRcnnConfig, NormConfig, SolverConfig
from megdet_hpc.devices import wait_for
from megdet_hpc.errors import UserError
from megdet_hpc.parallel.buckets import BucketOptimizer
from megdet_hpc.parallel.runtime import Runtime, SynchronizedOptimizer

GRADIENTS = "gradients"
_LAYER = re.compile(r"cgbn\..*\.(\w+)")


def options(parser: argparse.ArgumentParser) -> None:
    """The command line of this benchmark."""
    backbone_option(parser)
    picture_options(parser)
    parser.add_argument("--exchange", choices=("two_stage", "packed"), default="two_stage", help="norm.exchange")
    parser.add_argument("--transport", choices=("auto", "mpi", "torch"), default="auto", help="norm.transport")
    parser.add_argument(
        "--overlap", choices=("auto", "true", "false"), default="auto", help="solver.overlap: gradients in the backward"
    )
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="solver.precision")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or xpu")
    parser.add_argument("--repeats", type=int, default=10, help="measured steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the measured ones")


def kind_of(name: str) -> str:
    """The collective to which a message belongs: those of the layers differ by their path alone."""
    match = _LAYER.fullmatch(name)
    return f"cgbn.*.{match[1]}" if match else name


def _config(arguments: argparse.Namespace) -> Config:
    overlap: Any = {"auto": "auto", "true": True, "false": False}[arguments.overlap]
    return Config(
        model=FasterRcnnConfig(backbone=arguments.backbone, backbone_weights=None, frozen_stages=0),
        norm=NormConfig(where=("backbone", "fpn"), exchange=arguments.exchange, transport=arguments.transport),
        solver=SolverConfig(precision=arguments.precision, overlap=overlap),
    )


def gradient_messages(optimizer: SynchronizedOptimizer, trained: Sequence[nn.Parameter]) -> int:
    """The messages that carry the gradients of an update.

    MPI has one, torch one for each of its buffers, Horovod one for each parameter, which it joins.

    Args:
        optimizer: optimizer that sends them.
        trained: parameters that have gradients.
    """
    return len(optimizer.buckets) if isinstance(optimizer, BucketOptimizer) else len(trained)


class _Measured:
    """A training step whose messages are counted.

    Args:
        config: configuration of the run.
        arguments: command line.
        runtime: this process in the world.
        device: device of this rank.
    """

    def __init__(self, config: Config, arguments: argparse.Namespace, runtime: Runtime, device: torch.device) -> None:
        height, width = picture_size(arguments)
        self.world = CountingCommunicator(runtime.world)
        self.group = CountingCommunicator(runtime.communicator(config.norm.transport, device))
        self.overlap = runtime.overlaps(
            config.solver.overlap,
            device=device,
            transport=config.norm.transport,
            layers_send=runtime.world.size > 1,
        )
        picture = StepPictures.draw(arguments.images, arguments.boxes, height, width, seed=runtime.world.rank)
        self._step = TrainedStep(
            config,
            picture.batch(device),
            world=self.world,
            group=self.group,
            runtime=runtime,
            device=device,
            overlap=self.overlap,
        )
        self._device = device
        self._gradients = Tally()
        trained = [p for p in self._step.model.parameters() if p.requires_grad]
        self._sent = (
            gradient_messages(self._step.optimizer, trained),
            sum(p.numel() * p.element_size() for p in trained),
        )
        self._step.tell_waits(self._note)

    def _note(self, begin: float, end: float) -> None:
        self._gradients = Tally(*self._sent, end - begin)

    def __call__(self, step: int) -> tuple[float, dict[str, Tally]]:
        """Make a step: its time [seconds] and its messages. Collective of the world."""
        for counted in (self.world, self.group):
            counted.reset()
        wait_for(self._device)
        begin = time.perf_counter()
        self._step(step)
        wait_for(self._device)
        took = time.perf_counter() - begin
        found: dict[str, Tally] = {}
        for name, tally in [*self.group.tallies.items(), *self.world.tallies.items(), (GRADIENTS, self._gradients)]:
            own = found.setdefault(kind_of(name), Tally())
            own.messages += tally.messages
            own.num_bytes += tally.num_bytes
            own.seconds += tally.seconds
        return took, found


def _rows(ranks: list[list[tuple[float, dict[str, Tally]]]]) -> list[dict[str, Any]]:
    """A row for each collective, from the (P, R) steps of all ranks, and one for all."""
    steps = np.array([[took for took, _ in rank] for rank in ranks])  # (P, R) seconds
    rows = []
    for name in ranks[0][0][1]:
        seconds = np.array([[found[name].seconds for _, found in rank] for rank in ranks])
        first = ranks[0][0][1][name]
        rows.append(_row(name, first.messages, first.num_bytes, seconds, steps))
    every = np.array([[sum(tally.seconds for tally in found.values()) for _, found in rank] for rank in ranks])
    messages, num_bytes = (sum(row[key] for row in rows) for key in ("messages a step", "bytes"))
    return [*rows, _row("all", messages, num_bytes, every, steps)]


def _row(name: str, messages: int, num_bytes: int, seconds: Any, steps: Any) -> dict[str, Any]:
    """Times are means over the ranks of a step; the median, least and most of the steps are given [milliseconds]."""
    each = 1e3 * seconds.mean(0)
    of_ranks = 1e3 * np.median(seconds, axis=1)
    return {
        "collective": name,
        "messages a step": messages,
        "bytes": num_bytes,
        "ms, median": float(np.median(each)),
        "least": float(each.min()),
        "most": float(each.max()),
        "slowest and quickest rank": f"{of_ranks.max():.3g}, {of_ranks.min():.3g}",
        "share of the step": float(np.median(seconds.mean(0) / steps.max(0))),
    }


def run(arguments: argparse.Namespace, runtime: Runtime) -> dict[str, Any] | None:
    """Measure. Collective of the world; blocks.

    Returns:
        The report on rank 0, None elsewhere.

    Raises:
        UserError: an option is out of its range, or there is one rank, which sends nothing.
    """
    picture_size(arguments)
    world = runtime.world
    if world.size == 1:
        raise UserError("one rank sends no messages; start two or more: mpirun -np 2 megdet bench messages")
    device = runtime.device(arguments.device)
    measured = _Measured(_config(arguments), arguments, runtime, device)
    steps = []
    for number in range(arguments.warmup + arguments.repeats):
        world.barrier(name="bench.start")
        found = measured(number)
        if number >= arguments.warmup:
            steps.append(found)
    ranks = world.allgather_object(steps, name="bench.messages")
    if world.rank:
        return None
    took = 1e3 * np.array([[seconds for seconds, _ in rank] for rank in ranks]).max(0)
    return {
        **heading(arguments, runtime, device),
        "transports": f"layers over {measured.group.transport}, gradients over {runtime.carrier} "
        f"{'during' if measured.overlap else 'after'} the backward pass, losses over {world.transport}",
        "a step, ms": f"{np.median(took):.4g} ({took.min():.4g} to {took.max():.4g})",
        "messages of a step": _rows(ranks),
    }
