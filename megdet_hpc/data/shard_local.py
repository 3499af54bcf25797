"""Shard-local order: each node reads few shards from begin to end, for storage that is slow at random reads.

The shards are put into an order drawn from (seed, epoch) and laid end to end; each node takes a run of this sequence,
in proportion to its ranks. So two nodes share at most the shard at their border, and every rank has the same number
of steps whatever the shards' sizes. A node shuffles its run through a buffer and builds its micro-batches from that.
Images that fill no micro-batch of their node are pooled over the nodes, so that as few come twice as in uniform mode.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, cycle, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megdet_hpc.errors import UserError


@dataclass(frozen=True)
class ShardLocal:
    """Where ranks and shards lie.

    Attributes:
        node_of_rank: the node of each rank, numbered from 0 in the order of their first ranks.
        images_per_shard: images of each shard, in the pack's order.
        shuffle_buffer: images a node holds indices of to draw the next from; 1 keeps the shard's order [images].
    """

    node_of_rank: tuple[int, ...]
    images_per_shard: tuple[int, ...]
    shuffle_buffer: int

    @classmethod
    def of(cls, values: dict[str, Any]) -> ShardLocal:
        """The object from the plain values of `dataclasses.asdict`."""
        return cls(tuple(values["node_of_rank"]), tuple(values["images_per_shard"]), values["shuffle_buffer"])

    def check(self, *, num_images: int, num_ranks: int) -> None:
        """Raises UserError unless the nodes hold all ranks and the shards all images."""
        if len(self.node_of_rank) != num_ranks:
            raise UserError(f"shard_local: {len(self.node_of_rank)} ranks on nodes, {num_ranks} in the world")
        if sum(self.images_per_shard) != num_images:
            raise UserError(f"shard_local: {sum(self.images_per_shard)} images in shards, {num_images} in the set")
        if self.shuffle_buffer < 1:
            raise UserError(f"data.shuffle_buffer is {self.shuffle_buffer}; accepted: 1 or more")


def number_nodes(hosts: list[str]) -> tuple[int, ...]:
    """Each rank's node from its host's name, numbered in the order of the first ranks."""
    numbers = {host: number for number, host in enumerate(dict.fromkeys(hosts))}
    return tuple(numbers[host] for host in hosts)


def shard_local_batches(
    local: ShardLocal,
    portrait: NDArray[np.bool_],
    left: NDArray[np.bool_],
    generator: np.random.Generator,
    shape: tuple[int, int, int, int],
) -> NDArray[np.int64]:
    """One epoch's micro-batches.

    Args:
        local: nodes and shards.
        portrait: (images,) bool, the group of each image; a micro-batch holds images of one group.
        left: (images,) bool, the images to deal out.
        generator: this epoch's generator.
        shape: (steps, accumulate, ranks, images_per_rank); steps as many as uniform sampling takes.

    Returns:
        Image indices in that shape.
    """
    steps, accumulate, num_ranks, size = shape
    first = np.concatenate([[0], np.cumsum(local.images_per_shard)])
    shards = generator.permutation(len(local.images_per_shard))
    sequence = np.concatenate([np.arange(first[shard], first[shard + 1]) for shard in shards])
    sequence = sequence[left[sequence]]
    ranks_of_node = np.bincount(local.node_of_rank)
    # floor of each border: a node has at most ceil(images * its ranks / ranks), and its batches fit its slots
    group_of = portrait.astype(np.int64).tolist()
    borders = np.concatenate([[0], np.cumsum(ranks_of_node)]) * len(sequence) // num_ranks
    whole: list[list[list[int]]] = []  # per node
    rest: tuple[list[int], list[int]] = ([], [])  # per group
    for node in range(len(ranks_of_node)):
        run = _shuffled(sequence[borders[node] : borders[node + 1]].tolist(), local.shuffle_buffer, generator)
        open_batches: tuple[list[int], list[int]] = ([], [])
        batches: list[list[int]] = []
        for image in run:
            batch = open_batches[group_of[image]]
            batch.append(image)
            if len(batch) == size:
                batches.append(batch.copy())
                batch.clear()
        whole.append(batches)
        for group in (0, 1):
            rest[group].extend(open_batches[group])
    pooled = _fill_up(rest, whole, portrait, size)
    order = np.empty(shape, np.int64)
    everything = [*chain.from_iterable(whole), *pooled]
    for node, batches in enumerate(whole):
        slots = steps * accumulate * int(ranks_of_node[node])
        free = slots - len(batches)
        batches, pooled = batches + pooled[:free], pooled[free:]
        filled = list(islice(cycle(batches or everything), slots)) if slots else []
        ranks = [rank for rank, its_node in enumerate(local.node_of_rank) if its_node == node]
        order[:, :, ranks] = np.array(filled, np.int64).reshape(steps, accumulate, len(ranks), size)
    return order


def _shuffled(run: list[int], buffer_size: int, generator: np.random.Generator) -> list[int]:
    """A run in the order in which a shuffle buffer gives it out: each time one of the buffer's images at random."""
    buffer, result = run[:buffer_size], []
    for image, slot in zip(
        run[buffer_size:], generator.integers(buffer_size, size=max(len(run) - buffer_size, 0)).tolist(), strict=True
    ):
        result.append(buffer[slot])
        buffer[slot] = image
    return result + [buffer[place] for place in generator.permutation(len(buffer))]


def _fill_up(
    rest: tuple[list[int], list[int]], whole: list[list[list[int]]], portrait: NDArray[np.bool_], size: int
) -> list[list[int]]:
    """Micro-batches of the images that the nodes left over; the last of a group takes more images of its group."""
    result = []
    for group, images in enumerate(rest):
        if len(images) % size:
            dealt = chain.from_iterable(chain.from_iterable(whole))
            same_group = chain((image for image in dealt if portrait[image] == group), images)
            images = [*images, *islice(cycle(same_group), -len(images) % size)]
        result += [images[begin : begin + size] for begin in range(0, len(images), size)]
    return result
