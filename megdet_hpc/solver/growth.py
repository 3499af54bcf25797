"""A mini-batch that grows where the learning rate would drop (Smith, Kindermans, Ying, Le, ICLR 2018).

The noise of an update grows with rate over batch. So where the rate would be multiplied by f, an update may have 1 / f
times as many passes instead, at the same rate. Epochs, and the images in them, stay; there are fewer updates. Where the
passes would exceed solver.grow_to, this drop and all later ones lower the rate, as in the paper's own largest batches.
"""

from __future__ import annotations

from dataclasses import dataclass

from megdet_hpc.config import SolverConfig


@dataclass(frozen=True)
class Growth:
    """The drops of a schedule, divided into those of the rate and growth of the mini-batch.

    Attributes:
        passes: epochs in rising order, each with the factor of `accumulate` from there on.
        drop_epochs: epochs of the drops that lower the rate.
        drop_factors: their factors.
    """

    passes: tuple[tuple[int, int], ...]
    drop_epochs: tuple[float, ...]
    drop_factors: tuple[float, ...]


def grown(config: SolverConfig, epochs: tuple[float, ...], factors: tuple[float, ...]) -> Growth:
    """Divide the drops of a schedule; without solver.grow_to all of them lower the rate.

    Args:
        config: accumulate and its limit.
        epochs: times of the drops; whole numbers where the mini-batch grows.
        factors: factors of the rate, each relative to the rate before it.
    """
    if not config.grow_to:
        return Growth((), epochs, factors)
    passes: list[tuple[int, int]] = []
    factor = 1
    for number, (epoch, drop) in enumerate(zip(epochs, factors, strict=True)):
        times = round(1 / drop)
        if config.accumulate * factor * times > config.grow_to:
            return Growth(tuple(passes), epochs[number:], factors[number:])
        factor *= times
        passes.append((round(epoch), factor))
    return Growth(tuple(passes), (), ())
