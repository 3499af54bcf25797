"""Times of collectives by an alpha-beta model: a message costs alpha, a byte costs 1 / bandwidth."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from megdet_hpc.errors import UserError

_GIGABIT = 1e9 / 8  # bytes


@dataclass(frozen=True)
class Network:
    """Two levels: inside a node, and between nodes.

    Attributes:
        node_alpha, alpha: time of one message of no length, inside a node and between nodes [s].
        node_bandwidth: bandwidth of a rank inside its node [bytes/s].
        bandwidth: bandwidth of a whole node to the others [bytes/s].
    """

    name: str
    node_alpha: float
    node_bandwidth: float
    alpha: float
    bandwidth: float

    def __str__(self) -> str:
        return (
            f"{self.name}: inside a node {self.node_alpha * 1e6:.3g} us and {self.node_bandwidth / _GIGABIT:.4g} "
            f"Gbit/s, between nodes {self.alpha * 1e6:.3g} us and {self.bandwidth / _GIGABIT:.4g} Gbit/s a node"
        )

    def ring(self, num_bytes: float, ranks: int, nodes: int) -> float:
        """Time of a long allreduce [s]: rings inside the nodes, then one between them.

        A ring of p sends 2 (p - 1) / p of the bytes.
        """

        def time(p: int, alpha: float, bandwidth: float) -> float:
            return 2 * (p - 1) * alpha + 2 * (p - 1) / p * num_bytes / bandwidth

        own = self.per_node(ranks, nodes)
        return time(own, self.node_alpha, self.node_bandwidth) + time(nodes, self.alpha, self.bandwidth)

    def short(self, num_bytes: float, ranks: int, nodes: int) -> float:
        """Time of a short allreduce [s]: exchanges of the whole message, inside nodes and then between them.

        A power of 2 takes log2(p) of them. Of other numbers the ranks above the power give their message away first,
        and get the sum at last.
        """
        inside, between = exchanges(self.per_node(ranks, nodes)), exchanges(nodes)
        return inside * (self.node_alpha + num_bytes / self.node_bandwidth) + between * (
            self.alpha + num_bytes / self.bandwidth
        )

    def gather(self, num_bytes: float, ranks: int, nodes: int) -> float:
        """Time of a short allgather [s]: log2(p) messages, by which each rank gets num_bytes of every rank."""
        own = self.per_node(ranks, nodes)
        inside = math.ceil(math.log2(own)) * self.node_alpha + (own - 1) * num_bytes / self.node_bandwidth
        return inside + math.ceil(math.log2(nodes)) * self.alpha + (ranks - own) * num_bytes / self.bandwidth

    @staticmethod
    def per_node(ranks: int, nodes: int) -> int:
        """Ranks of a node."""
        return max(-(-ranks // nodes), 1)


def exchanges(p: int) -> int:
    """Messages one after another in a short allreduce of p ranks: log2(p), and two more if p is no power of 2."""
    whole = int(math.log2(p))
    return whole + (2 if p > 1 << whole else 0)


# Assumptions, neither measured nor published. Links reach about 80 % of their nominal rate. Latencies are those
# expected of a library on GPUs (10 us a hop), or of MPI in the memory of one host.
NETWORKS = {
    "ib-hdr": Network("ib-hdr", 8e-6, 1000 * _GIGABIT, 12e-6, 160 * _GIGABIT),
    "ib-edr": Network("ib-edr", 8e-6, 1000 * _GIGABIT, 15e-6, 80 * _GIGABIT),
    "10gbe": Network("10gbe", 10e-6, 80 * _GIGABIT, 50e-6, 8 * _GIGABIT),
    "one-host-cpu": Network("one-host-cpu", 8e-6, 12 * _GIGABIT, 8e-6, 12 * _GIGABIT),
}


def choose_network(
    name: str,
    *,
    alpha_us: float | None = None,
    bandwidth_gbps: float | None = None,
    node_alpha_us: float | None = None,
    node_bandwidth_gbps: float | None = None,
) -> Network:
    """A preset in which the user's values replace assumptions [microseconds, Gbit/s].

    Raises:
        UserError: a latency below 0, or a bandwidth of 0 or less.
    """
    changes: dict[str, float] = {}
    for key, option, value, factor in (
        ("alpha", "--alpha-us", alpha_us, 1e-6),
        ("node_alpha", "--node-alpha-us", node_alpha_us, 1e-6),
        ("bandwidth", "--bandwidth-gbps", bandwidth_gbps, _GIGABIT),
        ("node_bandwidth", "--node-bandwidth-gbps", node_bandwidth_gbps, _GIGABIT),
    ):
        if value is None:
            continue
        if not (value > 0 or (value == 0 and factor == 1e-6)):
            raise UserError(f"{option} {value}; accepted: {'0 or more' if factor == 1e-6 else 'more than 0'}")
        changes[key] = value * factor
    if changes:
        changes_name = f"{name} with {', '.join(sorted(changes))} given"
        return replace(NETWORKS[name], name=changes_name, **changes)
    return NETWORKS[name]
