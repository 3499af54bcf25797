"""The rank arithmetic of BN groups, whose ranks share batch statistics (paper, section 3.3, "BN size")."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megdet_hpc.errors import UserError


@dataclass(frozen=True)
class BnGroups:
    """BN groups of consecutive ranks, so that a group fills a node before it spans two.

    Launchers give the ranks of a node consecutive numbers (mpirun --map-by slot, block distribution of srun).
    """

    num_ranks: int
    images_per_rank: int
    bn_size: int
    """Images that share statistics; 0 means all."""

    def __post_init__(self) -> None:
        if self.bn_size == 0:
            return
        groups = self.num_ranks * self.images_per_rank / self.bn_size
        whole_ranks = self.bn_size % self.images_per_rank == 0
        if not whole_ranks or groups != int(groups) or groups < 1:
            raise UserError(
                f"norm.size {self.bn_size}: {self.num_ranks} ranks x {self.images_per_rank} images per rank / BN size "
                f"{self.bn_size} = {groups:.4g} groups of {self.bn_size / self.images_per_rank:.4g} ranks; both must "
                f"be whole numbers. Accepted here: {self._accepted()}"
            )

    def _accepted(self) -> str:
        sizes = [n * self.images_per_rank for n in range(1, self.num_ranks + 1) if self.num_ranks % n == 0]
        return ", ".join(map(str, sizes)) + f", or 0 for all {self.num_ranks * self.images_per_rank}"

    @property
    def ranks_per_group(self) -> int:
        return self.bn_size // self.images_per_rank if self.bn_size else self.num_ranks

    @property
    def num_groups(self) -> int:
        return self.num_ranks // self.ranks_per_group

    def group_of(self, rank: int) -> int:
        """The index of a rank's group."""
        return rank // self.ranks_per_group

    def __str__(self) -> str:
        images = self.ranks_per_group * self.images_per_rank
        return f"{self.num_groups} BN group(s) of {self.ranks_per_group} rank(s) = {images} images each"


def rank_ranges(ranks: Iterable[int], separator: str = ",") -> str:
    """Ranks as text, for example "0-2,5" for 0, 1, 2 and 5."""
    runs: list[list[int]] = []
    for rank in sorted(set(ranks)):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return separator.join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
