"""Time of an update: compute, gradients that the backward pass does not hide, and CGBN's messages.

step     = compute + gradients + CGBN
compute  = accumulate * images_per_rank / (images/s of one rank) * max(1, ranks of a node / its cores)
gradients = max(ring(all bytes) - backward share of the last pass, ring(no bytes) + half of Horovod's cycle), where they
            travel during the backward pass (solver.overlap); else ring(all bytes) + half of Horovod's cycle. Without
            Horovod (solver.gradients) nothing waits for a cycle
CGBN     = accumulate * sum over layers of forward's and backward's messages; over norm.transport horovod each of them
            waits for Horovod's cycle
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megdet_hpc.parallel.transports import Overlap, hides_gradients, horovod_cycle_ms
from megdet_hpc.plan.network import Network

# Share of the backward pass in both passes: a convolution has two gradients and one output.
BACKWARD_SHARE = 2 / 3
_DOUBLE = 8  # bytes; the sums travel in float64


@dataclass(frozen=True)
class Work:
    """What one rank does in an update.

    Attributes:
        images_per_second: speed of one rank that sends nothing and shares its GPU or core with no other.
        images_per_rank: images of a pass.
        accumulate: passes of an update.
        gradient_bytes: size of all gradients as they are sent.
        cgbn_channels: channels of each cross-GPU layer.
        exchange: number of CGBN's messages in a forward pass, as norm.exchange names it.
        cores: cores of a node that trains on CPUs; None: each rank has its own device.
        overlap, transport, gradients: solver.overlap, norm.transport and solver.gradients.
        device_type: cpu, or cuda with gradients over NCCL.
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
    gradients: str = "auto"

    @property
    def over_horovod(self) -> bool:
        """Whether Horovod carries the gradients, which wait for its cycle."""
        return self.gradients in ("auto", "horovod")

    def hides_gradients(self, group_ranks: int) -> bool:
        """Whether gradients are sent during the backward pass if this number of ranks shares statistics."""
        if self.gradients == "mpi":  # one message after the backward pass
            return False
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
        """Share of an update that is computation and not messages [0 to 1]."""
        return self.compute / self.total


def cgbn_seconds(
    channels: tuple[int, ...],
    exchange: Literal["two_stage", "packed"],
    network: Network,
    ranks: int,
    nodes: int,
    wait: float = 0.0,
) -> float:
    """Time of the messages of one forward and backward pass over all layers [s].

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
            forward += network.short(_DOUBLE * width, ranks, nodes) + wait
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
        late = cycle / 2 if work.over_horovod else 0.0  # on average a message waits for half of Horovod's cycle
        gradients = all_bytes + late
        if work.hides_gradients(group_ranks):
            gradients = max(all_bytes - BACKWARD_SHARE * one_pass, none + late)
    # the message before left at the start of Horovod's cycle, so this one waits for the next cycle
    wait = cycle if work.transport == "horovod" else 0.0
    cgbn = cgbn_seconds(work.cgbn_channels, work.exchange, network, group_ranks, group_nodes, wait)
    return StepTime(work.accumulate * one_pass, gradients, work.accumulate * cgbn)


def walltime_pieces(hours: float, limit: float, restart_minutes: float) -> int:
    """Number of jobs of at most `limit` hours that a run of `hours` needs. Each job loses restart_minutes.

    Raises:
        ValueError: a job has no time left to train.
    """
    useful = limit - restart_minutes / 60
    if useful <= 0:
        raise ValueError(f"{limit} h less {restart_minutes} min leave no time to train")
    return max(math.ceil(hours / useful - 1e-9), 1)
