"""Keys of the augmentation. With their defaults a training image is resized and flipped, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from megdet_hpc.config.ranges import AT_LEAST_1, BELOW_1, FRACTION, Accepted, ranged, require

_FACTORS = Accepted(
    "two factors above 0 in rising order, or null",
    lambda pair: pair is None or (len(pair) == 2 and 0 < pair[0] <= pair[1]),
)


@dataclass(frozen=True)
class AugmentationConfig:
    """Changes of training images beside resize and flip. All are off by default (docs/augmentation.md)."""

    photometric: float = ranged(0.0, FRACTION)
    """Probability of each of four changes of colour: brightness, contrast, saturation, hue. SSD: 0.5 [0 to 1]."""
    brightness: float = ranged(32.0, Accepted("0 to 255", lambda most: 0 <= most <= 255))
    """Most that is added to each pixel or taken from it. 0: none [of 255]."""
    contrast: float = ranged(0.5, Accepted("0 to 1", lambda most: 0 <= most <= 1))
    """Pixels are multiplied by a factor up to this far from 1. 0: none [0 to 1]."""
    saturation: float = ranged(0.5, Accepted("0 to 1", lambda most: 0 <= most <= 1))
    """Saturation is multiplied by a factor up to this far from 1. 0: none [0 to 1]."""
    hue: float = ranged(18.0, Accepted("0 to 180", lambda most: 0 <= most <= 180))
    """Largest turn of the hue. 0: none [degrees]."""
    large_scale_jitter: tuple[float, float] | None = ranged(None, _FACTORS)
    """Scale each image by a factor of this range, in place of data.short_sides; what is larger than jitter_side is cut.
    Factor 1 is the scale at which the image just fits a square of jitter_side. Copy-Paste: 0.1 to 2. null: off."""
    jitter_side: int | None = ranged(None, AT_LEAST_1.or_null())
    """Largest side after large_scale_jitter. null: data.max_side, and the side of the detector's square where it takes
    squares [pixels]."""
    expand: float = ranged(0.0, FRACTION)
    """Probability of putting the image on a larger one that is filled with the mean. SSD: 0.5 [0 to 1]."""
    expand_ratio: float = ranged(4.0, AT_LEAST_1)
    """Largest ratio of the sides of the larger image to those of the image."""
    iou_crop: bool = False
    """Take the whole image, any crop, or a crop that has a least IoU with some object, as SSD does."""
    crop_ious: tuple[float, ...] = ranged((0.1, 0.3, 0.5, 0.7, 0.9), BELOW_1.each())
    """Least values of the IoU. Each is as likely as the whole image and as any crop [0 to 1]."""
    crop_scale: float = ranged(0.3, Accepted("above 0 to 1", lambda least: 0 < least <= 1))
    """Least scale of a crop, whose square is its share of the image's area [0 to 1]."""
    mosaic: float = ranged(0.0, FRACTION)
    """Probability of a picture of four images in place of one [0 to 1]."""
    copy_paste: float = ranged(0.0, FRACTION)
    """Probability of pasting objects of another image on the image. The pack must have masks [0 to 1]."""
    min_visible: float = ranged(0.1, FRACTION)
    """Least share of an object's box that must be left after large_scale_jitter, mosaic or copy_paste. Objects with
    less are dropped, crowd regions never [0 to 1]."""

    def check(self) -> None:
        """Check that the keys fit each other. Raises UserError."""
        for key, used in (("expand", self.expand > 0), ("iou_crop", self.iou_crop)):
            require(
                not (used and self.large_scale_jitter),
                f"data.augmentation.{key}",
                getattr(self, key),
                "off with data.augmentation.large_scale_jitter, since both change the scale of objects",
            )
        require(
            self.jitter_side is None or self.large_scale_jitter is not None,
            "data.augmentation.jitter_side",
            self.jitter_side,
            "null without data.augmentation.large_scale_jitter",
        )
