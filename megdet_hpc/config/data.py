"""Keys of the data and of what is made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megdet_hpc.config.ranges import AT_LEAST_0, AT_LEAST_1, FRACTION, ranged, require


@dataclass(frozen=True)
class DataConfig:
    """Where the packed images are and how they become batches."""

    train: str = "packed/train"
    """Folder with the packed training set (written by data_prep/pack_coco.py)."""
    val: str | None = "packed/val"
    """Folder with the packed validation set; null: nothing is evaluated."""
    images_per_rank: int = ranged(2, AT_LEAST_1)
    """Images a rank puts through one forward pass [images]."""
    num_workers: int = ranged(2, AT_LEAST_0)
    """Loader processes per rank; 0 decodes in the training process [processes]."""
    memory_map: bool = False
    """Read the packs through memory maps: quicker for files on a local disk; see docs/data_format.md, Reading."""
    decode_on_gpu: bool = False
    """Decode, resize and flip training images on the rank's GPU (nvJPEG); loader processes then only read."""
    short_sides: tuple[int, ...] = (800,)
    """Training short sides; one is drawn per image (multi-scale training) [pixels]."""
    max_side: int = ranged(1333, AT_LEAST_1)
    """Upper bound of the long side, in training and evaluation [pixels]."""
    val_short_side: int = ranged(800, AT_LEAST_1)
    """Short side in evaluation [pixels]."""
    flip_probability: float = ranged(0.5, FRACTION)
    """Probability of a horizontal flip in training [0 to 1]."""
    padding: Literal["batch", "fixed"] = "batch"
    """batch: to the largest image of the rank's batch; fixed: to a square of max_side, which no other image changes."""
    group_by_aspect_ratio: bool = True
    """Batches hold only landscape or only portrait images, which saves padding."""
    sampling: Literal["uniform", "shard_local"] = "uniform"
    """uniform: any image next; shard_local: a node reads few shards, in sequence, for storage slow at random reads."""
    shuffle_buffer: int = ranged(2000, AT_LEAST_1)
    """shard_local: how many images of its sequence a node draws the next one from [images]."""

    def check(self) -> None:
        """Check how the sizes fit each other. Raises UserError."""
        require(
            len(self.short_sides) >= 1 and all(1 <= side <= self.max_side for side in self.short_sides),
            "data.short_sides",
            self.short_sides,
            f"one or more sizes from 1 to data.max_side = {self.max_side}",
        )
        require(
            self.val_short_side <= self.max_side, "data.val_short_side", self.val_short_side, f"1 to {self.max_side}"
        )
