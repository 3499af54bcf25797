"""Times of the collectives of Open MPI on a network of two levels, by the algorithms that it chooses by size.

Open MPI 4.1 (coll/tuned, fixed rules) sends a short allreduce whole, in log2(p) rounds (recursive doubling). A longer
one it halves and gathers again, in 2 log2(p) rounds (Rabenseifner; between two ranks a ring, which sends the same). The
limits were measured with 2 and 4 ranks, by rounds of 5 ms each; they are assumed for more ranks.

A message of more than 64 KiB over TCP asks before it is sent (rendezvous): request, answer and data pass one after the
other, so its round takes three times the latency.
"""

from __future__ import annotations

import math

from megdet_hpc.plan.network import Network

_EAGER = 65536  # bytes; btl_tcp_eager_limit
_RENDEZVOUS = 3  # latencies of a message that asks before
_WHOLE = 8192  # bytes from which 4 ranks and more halve the message
# Bytes between which two ranks send a message whole.
_WHOLE_OF_TWO = ((0, 4096), (8192, 16384))


def _halves(num_bytes: float, ranks: int) -> bool:
    if ranks < 4:
        return not any(low <= num_bytes < high for low, high in _WHOLE_OF_TWO)
    return num_bytes >= _WHOLE


def mpi_allreduce(network: Network, num_bytes: float, ranks: int, nodes: int) -> float:
    """Time of an allreduce over Open MPI [s].

    Args:
        network: times of a message.
        num_bytes: size of the sum.
        ranks, nodes: size of the group, and the nodes it is on.
    """
    if ranks == 1:
        return 0.0
    if not _halves(num_bytes, ranks):
        return network.short(num_bytes, ranks, nodes)
    own = network.per_node(ranks, nodes)
    inside, own_bytes = _halving(num_bytes, own, network.node_alpha, network.node_bandwidth)
    # of a node's ranks each has its part of the sum by now; together they send it whole
    between, _ = _halving(num_bytes, nodes, network.alpha, network.bandwidth, part=own_bytes / num_bytes)
    return inside + between


def _halving(num_bytes: float, p: int, alpha: float, bandwidth: float, part: float = 1.0) -> tuple[float, float]:
    """Time of the rounds among p, and the bytes that are left to each of them.

    Args:
        num_bytes: bytes that pass a level.
        p: ranks, or nodes.
        alpha, bandwidth: latency and rate of this level.
        part: share of the bytes in the message of one rank, which decides whether it asks before.
    """
    seconds, left = 0.0, num_bytes
    for _ in range(math.floor(math.log2(p))):
        left /= 2
        seconds += 2 * (_latency(left * part, alpha) + left / bandwidth)
    if p & (p - 1):  # not a power of 2: the others give theirs away first, and get the sum at last
        seconds += 2 * (_latency(num_bytes * part, alpha) + num_bytes / bandwidth)
    return seconds, left


def _latency(num_bytes: float, alpha: float) -> float:
    return alpha * (_RENDEZVOUS if num_bytes > _EAGER else 1)
