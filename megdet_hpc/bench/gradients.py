"""`bench gradients`: seconds of a training step whose gradients go over each library in turn, in one run.

Each path has its own copy of a network, and the paths take turns step by step. So other programs disturb all alike.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torchvision
from torch import nn

from megdet_hpc.bench.report import heading
from megdet_hpc.bench.timing import Times, interleaved
from megdet_hpc.devices import wait_for
from megdet_hpc.errors import UserError
from megdet_hpc.parallel.mpi_runtime import PlainRuntime
from megdet_hpc.parallel.runtime import HOROVOD, Runtime
from megdet_hpc.parallel.transports import GRADIENT_CARRIERS

NOTHING = "nothing sent"


def options(parser: argparse.ArgumentParser) -> None:
    """The command line of this benchmark."""
    parser.add_argument("--backbone", default="resnet18", help="torchvision classifier that is trained")
    parser.add_argument("--images", type=int, default=2, help="images per rank")
    parser.add_argument("--image-size", type=int, default=96, metavar="PIXELS", help="side of an image")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or xpu")
    parser.add_argument("--repeats", type=int, default=20, help="measured steps of each path")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the measured ones")


def paths(runtime: Runtime) -> dict[str, Runtime]:
    """The runtimes whose gradients this job can send, by value of solver.gradients. On one rank there are none."""
    if runtime.world.size == 1:
        return {}
    found: dict[str, Runtime] = {"horovod": runtime} if runtime.carrier == HOROVOD else {}
    objects = getattr(runtime, "mpi_world", None) or getattr(runtime, "comm", None)
    for name in ("torch", "mpi"):
        if name in runtime.transports:
            found[name] = PlainRuntime(runtime.world, comm=objects, gradients=name)
    return {name: found[name] for name in GRADIENT_CARRIERS if name in found}


def _stepper(
    runtime: Runtime, arguments: argparse.Namespace, device: torch.device, overlap: bool
) -> Callable[[], Times]:
    """A function that makes one step, and gives its time [seconds]. Collective of the runtime's world; blocks."""
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.get_model(arguments.backbone, weights=None).to(device)
    optimizer = runtime.distribute(torch.optim.SGD(model.parameters(), lr=1e-3), model, 1, overlap=overlap)
    images = torch.randn(arguments.images, 3, arguments.image_size, arguments.image_size, device=device)

    def step() -> Times:
        begin = time.perf_counter()
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.synchronize()
        optimizer.step()
        wait_for(device)
        return np.array(time.perf_counter() - begin)

    return step


def run(arguments: argparse.Namespace, runtime: Runtime) -> dict[str, Any] | None:
    """Measure. Collective of the world; blocks.

    Returns:
        The report on rank 0, None elsewhere.

    Raises:
        UserError: an option is out of its range.
    """
    if min(arguments.images, arguments.image_size, arguments.repeats) < 1 or arguments.warmup < 0:
        raise UserError("--images, --image-size and --repeats must be 1 or more, --warmup 0 or more")
    device, world = runtime.device(arguments.device), runtime.world
    steps = {NOTHING: _stepper(Runtime(world), arguments, device, overlap=True)}
    for name, carrier in paths(runtime).items():
        if carrier.may_overlap:
            steps[f"{name}, during the backward pass"] = _stepper(carrier, arguments, device, overlap=True)
        steps[f"{name}, after it"] = _stepper(carrier, arguments, device, overlap=False)
    times = interleaved(steps, arguments.repeats, arguments.warmup, world)
    if world.rank:
        return None
    slowest = {name: own.max(0) for name, own in times.items()}  # (R,) seconds
    base = float(np.median(slowest[NOTHING]))
    rows = [
        {
            "gradients": name,
            "median_s": float(np.median(own)),
            "quartile_1_s": float(np.quantile(own, 0.25)),
            "quartile_3_s": float(np.quantile(own, 0.75)),
            "quickest_s": float(own.min()),
            "to_nothing": float(np.median(own)) / base,
        }
        for name, own in slowest.items()
    ]
    return {
        **heading(arguments, runtime, device),
        "a step of the slowest rank": rows,
    }
