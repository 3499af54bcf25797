"""Keys of the normalization layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megdet_hpc.config.ranges import ABOVE_0, AT_LEAST_0, FRACTION, ranged, require


@dataclass(frozen=True)
class NormConfig:
    """Normalization layers: the paper's cross-GPU batch normalization, or one of its rivals."""

    kind: Literal["cgbn", "bn", "frozen", "gn"] = "cgbn"
    """cgbn: statistics over a group of ranks; bn: this rank's own; frozen: constants; gn: 32 channel groups."""
    size: int = ranged(0, AT_LEAST_0)
    """BN size: images that share statistics (paper, section 3.3); 0 means all ranks' [images, or ranks: see unit]."""
    unit: Literal["images", "ranks"] = "images"
    """What norm.size counts."""
    where: tuple[Literal["backbone", "fpn", "heads"], ...] = ("backbone",)
    """Parts with normalization layers of this kind; parts left out have none, the backbone then has frozen ones."""
    parameters: Literal["decay", "no_decay", "frozen"] = "decay"
    """Scales and offsets of the layers: trained with weight decay, trained without, or kept as they are."""
    exchange: Literal["two_stage", "packed"] = "two_stage"
    """cgbn's messages forward: two_stage, the paper's two; packed, one larger, for networks of high latency."""
    transport: Literal["auto", "mpi", "horovod", "torch"] = "auto"
    """What carries cgbn's messages: auto is mpi on CPUs and torch (NCCL) on GPUs."""
    momentum: float = ranged(0.1, FRACTION)
    """Weight of the newest batch in the running statistics, as in torch [0 to 1]."""
    eps: float = ranged(1e-5, ABOVE_0)
    """Added to the variance before the square root."""

    def check(self) -> None:
        """Check how the keys fit each other. Raises UserError."""
        require(self.kind != "cgbn" or len(self.where) > 0, "norm.where", self.where, "one or more parts")
