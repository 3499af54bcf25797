"""Probe of a backward pass in which gradients and the layers' messages travel at once.

It shows whether the pass ends, and with the right sums.

N: images, C: channels, H, W: pixels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor, nn

from megdet_hpc.devices import is_gpu
from megdet_hpc.doctor.findings import ALL, Finding
from megdet_hpc.doctor.stage_guard import StageGuard
from megdet_hpc.errors import UserError
from megdet_hpc.layers.cgbn import CrossGpuBatchNorm2d, name_layers
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.libraries import horovod_built
from megdet_hpc.parallel.runtime import HOROVOD, Runtime, SynchronizedOptimizer
from megdet_hpc.parallel.transports import gpu_build_fault

_LAYERS, _CHANNELS, _GPU_CHANNELS = 8, 8, 256
# Sides of the images, one a round [pixels]. They vary, so that GPU memory is allocated anew as in training.
_SIDES = (32, 48, 40, 64)
_ROUND_SECONDS = 60.0
# Error relative to the largest gradient. It is not 0, since the order of a sum may change between two passes.
_TOLERANCE = 1e-3


def _network(group: Communicator, device: torch.device) -> nn.Module:
    """Convolutions with cross-GPU layers, the same on every rank: (N, 3, H, W) to (N, C, H, W)."""
    channels = _GPU_CHANNELS if is_gpu(device) else _CHANNELS
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1)]
        for _ in range(_LAYERS):
            layer = CrossGpuBatchNorm2d(channels, group=group)
            parts += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), layer, nn.ReLU()]
    network = nn.Sequential(*parts)
    name_layers(network)
    return network.to(device)


class _Passes:
    """Forward and backward passes that give averaged gradients and leave the weights as they are."""

    def __init__(self, runtime: Runtime, group: Communicator, device: torch.device, overlap: bool) -> None:
        self._rank, self._device = runtime.world.rank, device
        self._network = _network(group, device)
        sgd = torch.optim.SGD(self._network.parameters(), lr=0.0)
        self._optimizer: SynchronizedOptimizer = runtime.distribute(sgd, self._network, 1, overlap=overlap)

    def gradient(self, number: int) -> tuple[Tensor, float]:
        """All gradients of a round as one vector on the CPU, and its time [s]. Collective of the world; blocks."""
        side = _SIDES[number % len(_SIDES)]
        generator = torch.Generator().manual_seed(len(_SIDES) * self._rank + number % len(_SIDES))
        images = torch.randn(2, 3, side, side, generator=generator).to(self._device)
        begin = time.perf_counter()
        self._optimizer.zero_grad()
        self._network(images).square().mean().backward()
        self._optimizer.synchronize()
        gradients = [p.grad.flatten() for p in self._network.parameters() if p.grad is not None]
        return torch.cat(gradients).cpu(), time.perf_counter() - begin


def probe_overlap(
    runtime: Runtime, transports: Sequence[str], device: torch.device, rounds: int, guard: StageGuard
) -> list[Finding]:
    """Try both libraries at once. Collective of the world; blocks; names doctor.overlap.*.

    If a round does not end, the guard kills the rank and prints what that means.

    Args:
        transports: some of mpi, horovod, torch. horovod is left out, since Horovod would then send both.
        rounds: backward passes over each transport.

    Returns:
        The same findings on every rank.
    """
    world, found = runtime.world, []
    if world.size == 1 or not rounds or not runtime.may_overlap:
        return []
    guard.collective("allgather of objects, doctor.overlap.ready")
    fault = gpu_build_fault(device.type, horovod_built()) if runtime.carrier == HOROVOD else None
    if any(world.allgather_object(fault, name="doctor.overlap.ready")):
        return []  # the probe of the libraries reports it
    for transport in (name for name in transports if name != "horovod"):
        guard.collective(f"start of transport {transport}")
        try:
            group = runtime.communicator(transport, device)
        except UserError:
            continue
        found.append(_try(runtime, group, transport, device, rounds, guard))
    return found


def _try(
    runtime: Runtime, group: Communicator, transport: str, device: torch.device, rounds: int, guard: StageGuard
) -> Finding:
    """The finding of one transport. Collective of the world; blocks."""
    guard.collective(f"{runtime.carrier}'s gradients after the layers' messages over {transport}")
    apart = _Passes(runtime, group, device, overlap=False)
    expected = [apart.gradient(number) for number in range(len(_SIDES))]
    together = _Passes(runtime, group, device, overlap=True)
    verdict = (
        f"{runtime.carrier}'s gradients and the messages of norm.transport {transport} block each other here; leave "
        "solver.overlap at false on these nodes; --overlap-rounds 0 leaves this probe out"
    )
    errors, seconds = [], []
    for number in range(rounds):
        guard.at_risk(f"backward pass {number + 1} of {rounds} with both libraries at once", verdict, _ROUND_SECONDS)
        gradient, time_of_round = together.gradient(number)
        reference = expected[number % len(_SIDES)][0]
        errors.append(float((gradient - reference).abs().max() / reference.abs().max()))
        seconds.append(time_of_round)
    guard.collective("allgather of objects, doctor.overlap.results")
    worst = math.nan if any(map(math.isnan, errors)) else max(errors)
    own = (worst, median(seconds), median(time_apart for _, time_apart in expected))
    everyone = runtime.world.allgather_object(own, name="doctor.overlap.results")
    return judge_overlap(transport, rounds, everyone, runtime.carrier)


def judge_overlap(
    transport: str, rounds: int, everyone: Sequence[tuple[float, float, float]], carrier: str = HOROVOD
) -> Finding:
    """What the rounds showed.

    Args:
        transport: transport of the layers' messages.
        rounds: number of rounds that were made.
        everyone: three numbers of each rank: the largest error, relative to the largest gradient; the median time of a
            round [s]; the same with gradients sent after the backward pass [s].
        carrier: library of the gradients.
    """
    bad = [rank for rank, (error, _, _) in enumerate(everyone) if not error <= _TOLERANCE]
    slowest, apart = max(at_once for _, at_once, _ in everyone), max(apart for _, _, apart in everyone)
    probe = f"overlap, {transport}"
    if bad:
        worst = everyone[bad[0]][0]
        text = f"gradients differ by {worst:.1e} where both libraries send at once, first on rank {bad[0]}"
        return Finding("wrong", probe, text, "leave solver.overlap at false, and report this", about=ALL)
    text = (
        f"{rounds} backward passes with {carrier}'s gradients at once: {slowest * 1e3:.0f} ms each, "
        f"{apart * 1e3:.0f} ms with gradients after it; same gradients"
    )
    return Finding("fine", probe, text, about=ALL)
