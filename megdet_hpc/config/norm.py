"""Keys of the normalization layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megdet_hpc.config.ranges import ABOVE_0, AT_LEAST_0, FRACTION, ranged, require


@dataclass(frozen=True)
class NormConfig:
    """Normalization layers: the paper's cross-GPU batch normalization, or one of its rivals."""

    kind: Literal["cgbn", "bn", "frozen", "gn"] = "cgbn"
    """Kind of the layers. cgbn: statistics of a group of ranks; bn: statistics of each rank; frozen: constants; gn:
    group normalization, 32 groups of channels."""
    size: int = ranged(0, AT_LEAST_0)
    """BN size: the images that share statistics (paper, section 3.3). 0: those of all ranks. Fewer than
    data.images_per_rank: the images of each rank are shared out, and no messages are needed [images, or ranks: see
    norm.unit]."""
    unit: Literal["images", "ranks"] = "images"
    """Unit of norm.size."""
    where: tuple[Literal["backbone", "fpn", "rpn", "heads"], ...] = ("backbone",)
    """Parts that have normalization layers of this kind. Other parts have none, but the backbone then has frozen
    ones. A head that all levels share, such as the RPN's, has statistics of each level."""
    parameters: Literal["decay", "no_decay", "frozen"] = "decay"
    """Scales and offsets of the layers. decay: trained with weight decay; no_decay: trained without; frozen:
    constant."""
    exchange: Literal["two_stage", "packed"] = "two_stage"
    """Messages of a cgbn layer in the forward pass. two_stage: two, as in the paper; packed: one larger, for networks
    of high latency."""
    transport: Literal["auto", "mpi", "horovod", "torch"] = "auto"
    """Library that carries the messages of cgbn layers. auto: mpi on CPUs and torch (NCCL) on GPUs."""
    momentum: float = ranged(0.1, FRACTION)
    """Weight of the newest batch in the running statistics, as in torch [0 to 1]."""
    eps: float = ranged(1e-5, ABOVE_0)
    """Number added to the variance before the square root."""

    def images(self, images_per_rank: int) -> int:
        """The images that share statistics, whatever unit norm.size has. 0: those of all ranks."""
        return self.size * (images_per_rank if self.unit == "ranks" else 1)

    def check(self) -> None:
        """Check that the keys fit each other. Raises UserError."""
        require(self.kind != "cgbn" or len(self.where) > 0, "norm.where", self.where, "one or more parts")
