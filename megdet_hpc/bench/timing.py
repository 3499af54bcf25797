"""Time of a stack of normalization layers, forward then backward, as a network runs them.

Shapes: L layers, R repeats, P ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from megdet_hpc.parallel.communicator import Communicator

Times = np.ndarray


class Clock:
    """Marks in time, from the host's clock, or as events in a GPU's stream, for which nothing waits."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._events: list[torch.cuda.Event] = []
        self._seconds: list[float] = []

    def mark(self) -> None:
        """Add a mark."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
        else:
            self._seconds.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """The time between each mark and the next. Waits until the device has reached the last."""
        if self._cuda:
            torch.cuda.synchronize()
            return [begin.elapsed_time(end) for begin, end in pairwise(self._events)]
        return [(end - begin) * 1e3 for begin, end in pairwise(self._seconds)]


def layer_times(layers: Sequence[nn.Module], inputs: Sequence[Tensor], slopes: Sequence[Tensor]) -> Times:
    """Time one forward pass through all layers, then one backward pass in the opposite order.

    Every output lives until its backward pass, so a layer finds its input in the caches no more than in a network.

    Args:
        layers: L layers, each with its own input.
        inputs: (N, C, H, W) each, with requires_grad.
        slopes: gradients of the outputs.

    Returns:
        (2, L) milliseconds: forward, backward.
    """
    clock = Clock(inputs[0].device)
    outputs: list[Tensor] = []
    clock.mark()
    for layer, x in zip(layers, inputs, strict=True):
        outputs.append(layer(x))
        clock.mark()
    for index in reversed(range(len(layers))):
        wanted = [inputs[index], *layers[index].parameters()]
        torch.autograd.grad(outputs.pop(), wanted, slopes[index])
        clock.mark()
    times = np.array(clock.milliseconds()).reshape(2, len(layers))
    times[1] = times[1, ::-1]
    return times


def interleaved(
    bodies: dict[str, Callable[[], Times]], repeats: int, warmup: int, world: Communicator
) -> dict[str, Times]:
    """Run bodies in turns, A B C A B C ..., so that all suffer alike from a drift. Collective of the world; blocks.

    Every rank starts each body at the same time. So even a body without messages competes with its copies.

    Returns:
        For each body, the (P, R, ...) results of all ranks, without the warm-up.
    """
    own: dict[str, list[Times]] = {name: [] for name in bodies}
    for repeat in range(warmup + repeats):
        for name, body in bodies.items():
            world.barrier(name="bench.start")
            times = body()
            if repeat >= warmup:
                own[name].append(times)
    everyone = world.allgather_object({name: np.stack(times) for name, times in own.items()}, name="bench.times")
    return {name: np.stack([ranks[name] for ranks in everyone]) for name in bodies}
