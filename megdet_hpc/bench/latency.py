"""Time of one message through our interface, compared with the MPI call alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from megdet_hpc.devices import wait_for
from megdet_hpc.parallel.communicator import Communicator

_ROUNDS = 20
_MESSAGES_PER_ROUND = 50
_BARE = "bare mpi4py"


def _microseconds(send: Callable[[], object], device: torch.device, world: Communicator) -> float:
    world.barrier(name="bench.latency")
    begin = time.perf_counter()
    for _ in range(_MESSAGES_PER_ROUND):
        send()
    wait_for(device)
    return (time.perf_counter() - begin) / _MESSAGES_PER_ROUND * 1e6


def _bare_allreduce(world: Communicator, num_values: int) -> Callable[[], object] | None:
    """mpi4py's own Allreduce on a numpy array, the lower limit for any interface; None where ranks meet without MPI."""
    mpi = getattr(world, "_comm", None)
    if mpi is None or not hasattr(mpi, "Allreduce"):
        return None
    source, target = np.zeros(num_values), np.empty(num_values)
    return lambda: mpi.Allreduce(source, target)


def latency_rows(
    groups: list[Communicator], channels: list[int], device: torch.device, world: Communicator
) -> list[dict[str, Any]]:
    """Time of the first message of a forward pass, C sums and a count in float64. Collective of the world; blocks.

    Transports take turns, as the layers do.

    Returns:
        A row for each width and sender: the fastest round, the median round, and the ratio of the fastest round to that
        of the bare call. Other load disturbs the fastest rounds least. No rows at size 1.
    """
    rows: list[dict[str, Any]] = []
    for width in channels if world.size > 1 else []:
        tensor = torch.zeros(width + 1, dtype=torch.float64, device=device)
        senders: dict[str, Callable[[], object]] = {}
        bare = _bare_allreduce(world, width + 1)
        if bare:
            senders[_BARE] = bare
        for group in groups:

            def send(group: Communicator = group, tensor: torch.Tensor = tensor) -> None:
                group.allreduce_sum_(tensor, name="bench.message")

            senders[group.transport] = send
        times: dict[str, list[float]] = {name: [] for name in senders}
        for _ in range(_ROUNDS):
            for name, sender in senders.items():
                times[name].append(_microseconds(sender, device, world))
        for name, values in times.items():
            rows.append(
                {
                    "sender": name,
                    "channels": width,
                    "bytes": tensor.numel() * tensor.element_size(),
                    "quickest": round(min(values), 1),
                    "median": round(float(np.median(values)), 1),
                    "to_bare": round(min(values) / min(times[_BARE]), 2) if bare else None,
                }
            )
    return rows
