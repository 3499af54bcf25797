"""The rank arithmetic of BN groups, whose ranks share batch statistics (paper, section 3.3, "BN size")."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megdet_hpc.errors import UserError


@dataclass(frozen=True)
class BnGroups:
    """BN groups of consecutive ranks, so that a group fills a node before it spans two.

    Launchers give the ranks of a node consecutive numbers (mpirun --map-by slot, block distribution of srun). A BN size
    below a rank's images shares them out: the rank then has `per_rank` groups and exchanges nothing.
    """

    num_ranks: int
    images_per_rank: int
    bn_size: int
    """Images that share statistics; 0 means all."""

    def __post_init__(self) -> None:
        if self.bn_size == 0:
            return
        if self.bn_size not in self._sizes():
            groups = self.num_ranks * self.images_per_rank / self.bn_size
            raise UserError(
                f"norm.size {self.bn_size}: {self.num_ranks} ranks x {self.images_per_rank} images per rank / BN size "
                f"{self.bn_size} = {groups:.4g} groups of {self.bn_size / self.images_per_rank:.4g} ranks; both must "
                f"be whole numbers, or a rank's images whole groups. Accepted here: "
                f"{', '.join(map(str, self._sizes()))}, or 0 for all {self.num_ranks * self.images_per_rank}"
            )

    def _sizes(self) -> list[int]:
        """The BN sizes that can be, in ascending order."""
        own = [size for size in range(1, self.images_per_rank) if self.images_per_rank % size == 0]
        return own + [n * self.images_per_rank for n in range(1, self.num_ranks + 1) if self.num_ranks % n == 0]

    @property
    def images(self) -> int:
        """The images that share statistics."""
        return self.bn_size or self.num_ranks * self.images_per_rank

    @property
    def per_rank(self) -> int:
        """The groups into which the images of a rank are shared out; 1 where whole ranks share statistics."""
        return max(self.images_per_rank // self.images, 1)

    @property
    def ranks_per_group(self) -> int:
        return max(self.images // self.images_per_rank, 1)

    @property
    def num_groups(self) -> int:
        """The groups of ranks."""
        return self.num_ranks // self.ranks_per_group

    def group_of(self, rank: int) -> int:
        """The index of a rank's group."""
        return rank // self.ranks_per_group

    def __str__(self) -> str:
        if self.per_rank > 1:
            groups = self.num_ranks * self.per_rank
            return f"{groups} BN group(s) of {self.images} image(s), {self.per_rank} in each rank"
        return f"{self.num_groups} BN group(s) of {self.ranks_per_group} rank(s) = {self.images} images each"


def rank_ranges(ranks: Iterable[int], separator: str = ",") -> str:
    """Ranks as text, for example "0-2,5" for 0, 1, 2 and 5."""
    runs: list[list[int]] = []
    for rank in sorted(set(ranks)):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return separator.join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
