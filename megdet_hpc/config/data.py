"""Keys of the data: the packs, and how images become batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megdet_hpc.config.augmentation import AugmentationConfig
from megdet_hpc.config.ranges import AT_LEAST_0, AT_LEAST_1, FRACTION, ranged, require


@dataclass(frozen=True)
class DataConfig:
    """The packed images, and how they become batches."""

    train: str = "packed/train"
    """Folder of the packed training set, which data_prep/pack_coco.py writes."""
    val: str | None = "packed/val"
    """Folder of the packed validation set. null: nothing is evaluated."""
    images_per_rank: int = ranged(2, AT_LEAST_1)
    """Images in one forward pass of a rank [images]."""
    num_workers: int = ranged(2, AT_LEAST_0)
    """Loader processes of each rank. 0: the training process decodes [processes]."""
    memory_map: bool = False
    """Read the packs through memory maps, which is faster on a local disk (docs/data_format.md, Reading)."""
    cache: Literal["none", "decoded", "resized"] = "none"
    """Pictures that each process keeps in memory, uncompressed, after their first use; for sets that fit. decoded: as
    the pack has them; resized: after the resize, where it is the first step and has one size."""
    decode_on_gpu: bool = False
    """Decode, resize and flip training images on the rank's GPU (nvJPEG). Loader processes then only read."""
    short_sides: tuple[int, ...] = (800,)
    """Short sides in training. One is drawn for each image (multi-scale training) [pixels]."""
    max_side: int = ranged(1333, AT_LEAST_1)
    """Largest long side, in training and evaluation [pixels]."""
    val_short_side: int = ranged(800, AT_LEAST_1)
    """Short side in evaluation [pixels]."""
    flip_probability: float = ranged(0.5, FRACTION)
    """Probability of a horizontal flip in training [0 to 1]."""
    padding: Literal["batch", "fixed"] = "batch"
    """Size to which images are padded. batch: the largest image of the rank's batch; fixed: a square of max_side."""
    group_by_aspect_ratio: bool = True
    """Put only landscape or only portrait images into a batch, which saves padding."""
    sampling: Literal["uniform", "shard_local"] = "uniform"
    """Order of the images. uniform: all images are shuffled; shard_local: each node reads few shards in sequence, for
    storage that is slow at random reads."""
    shuffle_buffer: int = ranged(2000, AT_LEAST_1)
    """Images from which shard_local draws the next one [images]."""
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    """Further augmentation of training images."""

    def check(self) -> None:
        """Check that the sizes fit each other. Raises UserError."""
        require(
            len(self.short_sides) >= 1 and all(1 <= side <= self.max_side for side in self.short_sides),
            "data.short_sides",
            self.short_sides,
            f"one or more sizes from 1 to data.max_side = {self.max_side}",
        )
        require(
            self.val_short_side <= self.max_side, "data.val_short_side", self.val_short_side, f"1 to {self.max_side}"
        )
        self.augmentation.check()
        wanted = self.augmentation
        for key in ("mosaic", "copy_paste"):
            value = getattr(wanted, key)
            alone = "0 with data.decode_on_gpu, which reads one image at a time"
            require(not (self.decode_on_gpu and value), f"data.augmentation.{key}", value, alone)
        require(
            self.cache == "none" or not self.decode_on_gpu,
            "data.cache",
            self.cache,
            "none with data.decode_on_gpu, which keeps nothing",
        )
        if self.cache == "resized":
            varied = [
                f"data.augmentation.{key}"
                for key in ("mosaic", "copy_paste", "photometric", "expand", "iou_crop", "large_scale_jitter")
                if getattr(wanted, key)
            ]
            varied += ["data.short_sides of several sizes"] * (len(self.short_sides) > 1)
            others = f"none or decoded with {', '.join(varied)}: the resized picture is another each time"
            require(not varied, "data.cache", self.cache, others)
        if wanted.large_scale_jitter is not None:
            require(
                len(self.short_sides) == 1,
                "data.short_sides",
                self.short_sides,
                "one size with data.augmentation.large_scale_jitter, which draws the scale in its place",
            )
        require(
            (wanted.jitter_side or 1) <= self.max_side,
            "data.augmentation.jitter_side",
            wanted.jitter_side,
            f"1 to data.max_side = {self.max_side}",
        )


def jitter_side(config: DataConfig, *, square: bool) -> int:
    """The largest side that large-scale jitter leaves [pixels].

    Args:
        config: keys of the data.
        square: whether the detector takes squares, of the one short side.
    """
    return config.augmentation.jitter_side or (max(config.short_sides) if square else config.max_side)
