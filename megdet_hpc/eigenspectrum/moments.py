"""Sums over feature maps that add up over images and ranks, and the dimensions that their covariance has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megdet_hpc.errors import UserError
from megdet_hpc.parallel.communicator import Communicator

SHARES = (90, 95, 99)
"""Parts of the variance whose number of components is counted [%]."""

# Sums in float64 have a relative error near 1e-15. A variance below this part of the second moment is none.
_NOTHING = 1e-12
_SHOWN = 4  # layers that an error names


class ChannelSums:
    """Count, sum of x and sum of x x^T over positions x of a feature map, in float64.

    Args:
        channels: length of x.
        device: where the sums are kept.
    """

    def __init__(self, channels: int, device: torch.device) -> None:
        # one tensor, so that ranks add it in one message: count, C sums, C x C products
        self.channels = channels
        self.values = torch.zeros(1 + channels + channels**2, dtype=torch.float64, device=device)

    def add(self, maps: Tensor) -> None:
        """Take in feature maps: (N, C, H, W), any float type; not kept."""
        x = maps.detach().double().transpose(0, 1).flatten(1)
        self.values[0] += x.shape[1]
        self.values[1 : 1 + self.channels] += x.sum(1)
        self.values[1 + self.channels :] += (x @ x.T).flatten()

    def covariance(self) -> tuple[int, NDArray[np.float64], NDArray[np.float64]]:
        """The number of positions (1 or more), the mean (C,) and the covariance (C, C), divided by that number."""
        values = self.values.cpu().numpy()
        count = values[0]
        mean = values[1 : 1 + self.channels] / count
        products = values[1 + self.channels :].reshape(self.channels, self.channels) / count
        return int(count), mean, products - np.outer(mean, mean)


def add_ranks(sums: Mapping[str, ChannelSums], world: Communicator) -> None:
    """Replace the sums of all layers by those over the ranks, in one message. Collective of the world; blocks."""
    joined = torch.cat([one.values for one in sums.values()])
    world.allreduce_sum_(joined, name="eigenspectrum")
    for one, part in zip(sums.values(), joined.split([len(one.values) for one in sums.values()]), strict=True):
        one.values = part


@dataclass(frozen=True)
class Spectrum:
    """The covariance of one layer's feature maps in numbers. The definitions are this package's own choice.

    Attributes:
        layer: path of the layer.
        channels: number of channels.
        positions: positions of all images together.
        dead: channels with the same value at every position.
        participation_ratio: (sum of eigenvalues)^2 / sum of their squares; 0 where nothing varies, as the next two.
        entropy_dimension: exponential of the entropy of the eigenvalues' parts of their sum.
        stable_rank: sum of eigenvalues / largest.
        components: least number of components that hold 90, 95 and 99 % of the variance.
        eigenvalues: eigenvalues of the covariance, from the largest on.
    """

    layer: str
    channels: int
    positions: int
    dead: int
    participation_ratio: float
    entropy_dimension: float
    stable_rank: float
    components: tuple[int, ...]
    eigenvalues: tuple[float, ...]


def spectrum(layer: str, sums: ChannelSums) -> Spectrum:
    """The numbers of a layer that has seen one position or more.

    Args:
        layer: its path.
        sums: its sums over all ranks.

    Raises:
        UserError: a feature map is not finite.
    """
    if not bool(torch.isfinite(sums.values).all()):
        raise UserError(f"layer {layer}: feature maps are not finite")
    positions, mean, covariance = sums.covariance()
    second = np.diag(covariance) + mean**2
    dead = int(np.sum(np.diag(covariance) <= _NOTHING * second))
    values = np.linalg.eigvalsh(covariance)[::-1]
    # rounding leaves about this much where there is no variance
    values = np.where(values > _NOTHING * second.sum(), values, 0.0)
    return Spectrum(layer, sums.channels, positions, dead, *dimensions(values), tuple(values.tolist()))


def dimensions(values: NDArray[np.floating[Any]]) -> tuple[float, float, float, tuple[int, ...]]:
    """Participation ratio, exponential of the entropy, stable rank, and components for SHARES.

    Args:
        values: (C,) eigenvalues from the largest on, none below 0.
    """
    total = float(values.sum())
    if total == 0:
        return 0.0, 0.0, 0.0, (0,) * len(SHARES)
    parts = values / total
    some = parts[parts > 0]
    held = np.cumsum(parts)
    # the tolerance is for parts that add up to just below a share, such as 9 of 10 equal ones
    components = tuple(int(np.sum(held < share / 100 - 1e-9)) + 1 for share in SHARES)
    return (
        float(1 / np.sum(parts**2)),
        float(np.exp(-np.sum(some * np.log(some)))),
        float(1 / parts[0]),
        components,
    )


def spectra(sums: Mapping[str, ChannelSums]) -> Sequence[Spectrum]:
    """The numbers of every layer that has seen something; see `spectrum`.

    Raises:
        UserError: none has, or a feature map is not finite.
    """
    found = [spectrum(layer, one) for layer, one in sums.items() if float(one.values[0]) > 0]
    if not found:
        shown = ", ".join(list(sums)[:_SHOWN]) + (", ..." if len(sums) > _SHOWN else "")
        raise UserError(f"no image reached any of the {len(sums)} chosen layers, {shown}; choose others by --layers")
    return found
