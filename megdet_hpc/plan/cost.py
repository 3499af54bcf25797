"""Time of an update: compute, gradients that the backward pass does not hide, and CGBN's messages.

step     = compute + gradients + CGBN
compute  = accumulate * images_per_rank / (images/s of one rank) * max(1, ranks of a node / its cores)
gradients = max(ring(all bytes) - backward share of the last pass, ring(no bytes) + half of Horovod's cycle), where they
            travel during the backward pass (solver.overlap); else ring(all bytes) + half of Horovod's cycle
CGBN     = accumulate * sum over layers of forward's and backward's messages; over norm.transport horovod each of them
            waits for Horovod's cycle
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megdet_hpc.parallel.transports import Overlap, hides_gradients, horovod_cycle_ms
from megdet_hpc.plan.network import Network

# The backward pass's share of both passes: a convolution has two gradients and one output.
BACKWARD_SHARE = 2 / 3
_DOUBLE = 8  # bytes; the sums travel in float64


@dataclass(frozen=True)
class Work:
    """What one rank does in an update.

    Attributes:
        images_per_second: speed of one rank that has its GPU, or core, for itself and sends nothing.
        images_per_rank: images of a pass.
        accumulate: passes of an update.
        gradient_bytes: size of all gradients as they travel.
        cgbn_channels: channels of each cross-GPU layer.
        exchange: CGBN's messages forward, two or one.
        cores: cores of a node that trains on CPUs; None: each rank has a device of its own.
        overlap, transport: solver.overlap and norm.transport.
        device_type: cpu, or cuda with a Horovod that has NCCL.
    """

    images_per_second: float
    images_per_rank: int
    accumulate: int
    gradient_bytes: int
    cgbn_channels: tuple[int, ...]
    exchange: Literal["two_stage", "packed"] = "two_stage"
    cores: int | None = None
    overlap: Overlap = "auto"
    transport: str = "auto"
    device_type: str = "cpu"

    def hides_gradients(self, group_ranks: int) -> bool:
        """Whether gradients travel during the backward pass where so many ranks share statistics."""
        return hides_gradients(
            self.overlap,
            device_type=self.device_type,
            transport=self.transport,
            layers_send=group_ranks > 1,
            gradients_over_nccl=self.device_type == "cuda",
        )


@dataclass(frozen=True)
class StepTime:
    """Parts of an update [s]."""

    compute: float
    gradients: float
    cgbn: float

    @property
    def total(self) -> float:
        return self.compute + self.gradients + self.cgbn

    @property
    def efficiency(self) -> float:
        """Share of the ranks' computing power that is left beside the messages [0 to 1]."""
        return self.compute / self.total


def cgbn_seconds(
    channels: tuple[int, ...],
    exchange: Literal["two_stage", "packed"],
    network: Network,
    ranks: int,
    nodes: int,
    wait: float = 0.0,
) -> float:
    """Messages of one forward and backward pass over all layers [s]; a group of `ranks` ranks on `nodes` nodes.

    Args:
        channels: channels of each layer.
        exchange: two messages forward, or one.
        network: times of a message.
        ranks, nodes: size of the group, and the nodes it is on.
        wait: time before a message leaves [s].
    """
    if ranks == 1:
        return 0.0
    total = 0.0
    for width in channels:
        if exchange == "two_stage":
            forward = network.short(_DOUBLE * (width + 1), ranks, nodes)
            forward += network.short(_DOUBLE * 2 * width, ranks, nodes) + wait
        else:
            forward = network.gather(_DOUBLE * (2 * width + 1), ranks, nodes)
        total += forward + network.short(_DOUBLE * 2 * width, ranks, nodes) + 2 * wait
    return total


def step_time(
    work: Work, network: Network, *, ranks: int, ranks_per_node: int, group_ranks: int, group_nodes: int
) -> StepTime:
    """The time of an update on `ranks` ranks, `group_ranks` of which, on `group_nodes` nodes, share statistics."""
    crowding = max(1.0, min(ranks, ranks_per_node) / work.cores) if work.cores else 1.0
    one_pass = work.images_per_rank / work.images_per_second * crowding
    gradients = 0.0
    cycle = horovod_cycle_ms(work.transport, work.device_type) / 1000
    if ranks > 1:
        nodes = math.ceil(ranks / ranks_per_node)
        all_bytes, none = (network.ring(size, ranks, nodes) for size in (work.gradient_bytes, 0))
        gradients = all_bytes + cycle / 2  # half of Horovod's cycle is waited on average
        if work.hides_gradients(group_ranks):
            gradients = max(all_bytes - BACKWARD_SHARE * one_pass, none + cycle / 2)
    # the message before left at one meeting of Horovod's threads, so this one waits for the next
    wait = cycle if work.transport == "horovod" else 0.0
    cgbn = cgbn_seconds(work.cgbn_channels, work.exchange, network, group_ranks, group_nodes, wait)
    return StepTime(work.accumulate * one_pass, gradients, work.accumulate * cgbn)


def walltime_pieces(hours: float, limit: float, restart_minutes: float) -> int:
    """Jobs of at most `limit` hours that a run of `hours` needs, each losing restart_minutes to start-up and saving.

    Raises:
        ValueError: a job has no time left to train.
    """
    useful = limit - restart_minutes / 60
    if useful <= 0:
        raise ValueError(f"{limit} h less {restart_minutes} min leave no time to train")
    return max(math.ceil(hours / useful - 1e-9), 1)
