"""Losses with their own counts, and their means over the samples of all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megdet_hpc.parallel.communicator import Communicator

Number = Tensor | float


@dataclass(frozen=True)
class Loss:
    """A loss over one rank's micro-batch, not yet divided by the number of samples on all ranks.

    `Loss(total, count)` holds a sum. `Loss.mean` holds a mean, as torch's functions return it.

    Attributes:
        value: scalar, the sum over this rank's samples divided by `divided_by`.
        count: samples of this rank, such as sampled or positive boxes. The loss is divided by their sum over all ranks.
        divided_by: number by which `value` is divided already.
    """

    value: Tensor
    count: Number
    divided_by: Number = 1.0

    @classmethod
    def mean(cls, value: Tensor, count: Number) -> Loss:
        """A loss that is the mean over `count` samples of this rank."""
        return cls(value, count, count)


Losses = dict[str, Loss]


@dataclass(frozen=True)
class WorldLosses:
    """The losses of a micro-batch as all ranks know them after one message.

    Attributes:
        shares: this rank's share of each loss's mean over all ranks' samples, times the number of ranks. The
            gradient allreduce averages the shares, which gives the loss of the concatenated batch.
        means: mean of each loss over all ranks' samples.
        finite: whether every loss of every rank is finite.
        flags: sum over the ranks of each flag.
    """

    shares: dict[str, Tensor]
    means: dict[str, float]
    finite: bool
    flags: tuple[float, ...] = ()


def scaled(losses: Losses, divided: Sequence[float], counts: Sequence[float], size: int) -> dict[str, Tensor]:
    """This rank's share of the mean over `size` ranks, times `size`, for each loss.

    Args:
        losses: losses of this rank.
        divided: number by which the value of each loss is divided already.
        counts: samples of all ranks, for each loss.
        size: number of ranks.
    """
    rows = zip(losses.items(), divided, counts, strict=True)
    return {key: loss.value * (own * size / max(count, 1.0)) for (key, loss), own, count in rows}


def mean_over_world(losses: Losses, world: Communicator, flags: Sequence[float] = ()) -> WorldLosses:
    """Exchange totals, counts, the finite flag and further flags in one message, with one wait for the device.

    Collective of the world, name `losses`. It blocks. At size 1 nothing is sent.

    Args:
        losses: losses of this rank; every rank has the same keys in the same order.
        world: all ranks.
        flags: numbers of this rank; every rank has equally many.
    """
    values, counts, divided = fetch(losses)
    further = torch.tensor([float(not values.isfinite().all()), *flags], dtype=torch.float64)
    message = torch.cat([values * divided, counts, further])
    world.allreduce_sum_(message, name="losses")
    totals, sums, rest = message.split([len(losses), len(losses), len(further)])
    means = (totals / sums.clamp(min=1)).tolist()
    return WorldLosses(
        scaled(losses, divided.tolist(), sums.tolist(), world.size),
        dict(zip(losses, means, strict=True)),
        not rest[0],
        tuple(rest[1:].tolist()),
    )


def fetch(losses: Losses) -> tuple[Tensor, Tensor, Tensor]:
    """Values, counts and divisors as float64 vectors on the CPU; the device is waited for once."""
    rows = [(loss.value.detach(), loss.count, loss.divided_by) for loss in losses.values()]
    numbers = [torch.as_tensor(number) for row in rows for number in row]
    device = next((number.device for number in numbers if number.device.type != "cpu"), torch.device("cpu"))
    table = torch.stack([number.to(device, torch.float64, non_blocking=True) for number in numbers]).cpu()
    values, counts, divided = table.view(-1, 3).unbind(1)
    return values, counts, divided
