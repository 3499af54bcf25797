"""Time of a stack of normalization layers, forward then backward, as a network runs them.

Shapes: L layers, R repeats, P ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megdet_hpc.devices import event_on, is_gpu, kind_of, wait_for
from megdet_hpc.parallel.communicator import Communicator

Times = np.ndarray


class Clock:
    """Marks in time, from the host's clock or as events in a GPU's stream. A mark does not wait for the GPU."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device if is_gpu(device) else None
        self._events: list[Any] = []
        self._seconds: list[float] = []

    def mark(self) -> None:
        """Add a mark."""
        if self._gpu:
            event = event_on(self._gpu, timing=True)
            event.record()
            self._events.append(event)
        else:
            self._seconds.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """The time between each mark and the next. Waits until the device has reached the last."""
        if self._gpu:
            wait_for(self._gpu)
            return [begin.elapsed_time(end) for begin, end in pairwise(self._events)]
        return [(end - begin) * 1e3 for begin, end in pairwise(self._seconds)]


class Meter:
    """Seconds of the wall and of the processor of a function's calls, (2,) each time.

    Attributes:
        result: what the last call gave.
        peak: most memory of the GPU in a call; 0 on CPUs [bytes].

    Args:
        body: function that is measured.
        device: device on which it works. A GPU is waited for before and after each call.
    """

    def __init__(self, body: Callable[[], object], device: torch.device) -> None:
        self._body, self._device = body, device
        self._memory = kind_of(device.type).module if is_gpu(device) else None
        self.result: Any = None
        self.peak = 0

    def __call__(self) -> Times:
        wait_for(self._device)
        if self._memory:
            self._memory.reset_peak_memory_stats()
        wall, processor = time.perf_counter(), time.process_time()
        self.result = self._body()
        wait_for(self._device)
        if self._memory:
            self.peak = max(self.peak, self._memory.max_memory_allocated())
        return np.array([time.perf_counter() - wall, time.process_time() - processor])


def layer_times(layers: Sequence[nn.Module], inputs: Sequence[Tensor], slopes: Sequence[Tensor]) -> Times:
    """Time one forward pass through all layers, then one backward pass in the opposite order.

    Every output is kept until its backward pass. So the caches hold a layer's input no more than in a network.

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
    bodies: Mapping[str, Callable[[], Times]], repeats: int, warmup: int, world: Communicator
) -> dict[str, Times]:
    """Run bodies in turns, A B C A B C ..., so that a drift affects all alike. Collective of the world; blocks.

    Every rank starts each body at the same time. So a body without messages also competes with those of other ranks.

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
