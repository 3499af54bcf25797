"""Time of an update: compute, gradients that the backward pass does not hide, CGBN's messages, and the losses'.

step     = compute + gradients + CGBN + losses
compute  = accumulate * images_per_rank / (images/s of one rank) * max(1, ranks of a node / its cores)
gradients = max(sum(all bytes) - backward pass, sum(last bytes) + late), where they travel during the last backward
            pass (solver.overlap); else sum(all bytes) + late. The backward pass is its share of the computation and its
            CGBN messages. `late` is half of Horovod's cycle and the short message by which Horovod's threads agree;
            without Horovod (solver.gradients) nothing is late. Torch's last message is what 25 MiB do not divide
CGBN     = accumulate * sum over layers of forward's and backward's messages; over norm.transport horovod each of them
            waits for Horovod's cycle
losses   = accumulate * one short message over all ranks, which MPI carries

Where MPI carries a sum, `collectives.mpi_allreduce` gives its time: layers over norm.transport mpi, gradients over
solver.gradients mpi, and Horovod's on CPUs. Elsewhere (NCCL, Gloo) a long sum is a ring, a short one log2(p) exchanges.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megdet_hpc.parallel.transports import BUCKET_BYTES, Overlap, hides_gradients, horovod_cycle_ms, resolve_transport
from megdet_hpc.plan.collectives import mpi_allreduce
from megdet_hpc.plan.network import Network

# Share of the backward pass in both passes: a convolution has two gradients and one output.
BACKWARD_SHARE = 2 / 3
_DOUBLE, _SINGLE = 8, 4  # bytes; the sums travel in float64, and packed ones of CUDA in float32
_LAST_SUM = 2**16  # bytes of the gradients that Horovod sends last, those of a backbone's first layers
_LOSSES = 10 * _DOUBLE  # bytes of four losses, their counts and two flags


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

    def crowding(self, ranks: int, ranks_per_node: int) -> float:
        """The number of ranks that share a core, 1 or more."""
        return max(1.0, min(ranks, ranks_per_node) / self.cores) if self.cores else 1.0

    @property
    def layers_over_mpi(self) -> bool:
        """Whether MPI adds the layers' sums up, for itself or for Horovod."""
        carrier = resolve_transport(self.transport, self.device_type)
        return carrier == "mpi" or (carrier == "horovod" and self.device_type == "cpu")

    @property
    def gradients_over_mpi(self) -> bool:
        """Whether MPI adds the gradients up, for itself or for Horovod."""
        return self.gradients == "mpi" or (self.over_horovod and self.device_type == "cpu")

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
    losses: float = 0.0

    @property
    def total(self) -> float:
        return self.compute + self.gradients + self.cgbn + self.losses

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
    *,
    wait: float = 0.0,
    over_mpi: bool = True,
    device_type: str = "cpu",
) -> tuple[float, float]:
    """Times of the messages of one forward and one backward pass over all layers [s].

    Args:
        channels: channels of each layer.
        exchange: two messages forward, or one.
        network: times of a message.
        ranks, nodes: size of the group, and the nodes it is on.
        wait: time before a message leaves [s].
        over_mpi: whether MPI adds the sums up.
        device_type: cpu or cuda.
    """
    if ranks == 1:
        return 0.0, 0.0

    number = _SINGLE if (exchange, device_type) == ("packed", "cuda") else _DOUBLE

    def allreduce(values: int) -> float:
        size = number * values
        time = mpi_allreduce(network, size, ranks, nodes) if over_mpi else network.short(size, ranks, nodes)
        return time + wait

    forward = backward = 0.0
    for width in channels:
        if exchange == "two_stage":
            forward += allreduce(width + 1) + allreduce(width)
        else:
            forward += network.gather(number * (2 * width + 1), ranks, nodes) + wait
        backward += allreduce(2 * width)
    return forward, backward


def step_time(
    work: Work, network: Network, *, ranks: int, ranks_per_node: int, group_ranks: int, group_nodes: int
) -> StepTime:
    """The time of an update on `ranks` ranks, `group_ranks` of which, on `group_nodes` nodes, share statistics."""
    one_pass = work.images_per_rank / work.images_per_second * work.crowding(ranks, ranks_per_node)
    cycle = horovod_cycle_ms(work.transport, work.device_type) / 1000
    # the message before left at the start of Horovod's cycle, so this one waits for the next cycle
    wait = cycle if work.transport == "horovod" else 0.0
    forward, backward = cgbn_seconds(
        work.cgbn_channels,
        work.exchange,
        network,
        group_ranks,
        group_nodes,
        wait=wait,
        over_mpi=work.layers_over_mpi,
        device_type=work.device_type,
    )
    gradients = losses = 0.0
    if ranks > 1:
        nodes = math.ceil(ranks / ranks_per_node)
        losses = mpi_allreduce(network, _LOSSES, ranks, nodes)
        gradients = _gradients(work, network, ranks, nodes, BACKWARD_SHARE * one_pass + backward, cycle, group_ranks)
    passes = work.accumulate
    return StepTime(passes * one_pass, gradients, passes * (forward + backward), passes * losses)


def _gradients(
    work: Work, network: Network, ranks: int, nodes: int, backward: float, cycle: float, group_ranks: int
) -> float:
    """Time of the gradients that the last backward pass, which takes `backward`, does not hide [s]."""
    total = work.gradient_bytes
    if work.gradients_over_mpi:
        last = min(_LAST_SUM, total)
        least, every = (mpi_allreduce(network, size, ranks, nodes) for size in (last, total))
    elif work.gradients == "torch":
        others, last = divmod(max(total - 1, 0), BUCKET_BYTES)
        least = network.ring(last + 1, ranks, nodes)
        every = least + others * network.ring(BUCKET_BYTES, ranks, nodes)
    else:
        least, every = (network.ring(size, ranks, nodes) for size in (0, total))
    # on average a message waits for half of Horovod's cycle; then the threads agree on it, by a row of bits over MPI
    late = cycle / 2 + network.short(_DOUBLE, ranks, nodes) if work.over_horovod else 0.0
    if work.hides_gradients(group_ranks):
        return max(every - backward, least + late)
    return every + late


def walltime_pieces(hours: float, limit: float, restart_minutes: float) -> int:
    """Number of jobs of at most `limit` hours that a run of `hours` needs. Each job loses restart_minutes.

    Raises:
        ValueError: a job has no time left to train.
    """
    useful = limit - restart_minutes / 60
    if useful <= 0:
        raise ValueError(f"{limit} h less {restart_minutes} min leave no time to train")
    return max(math.ceil(hours / useful - 1e-9), 1)
