"""Sizes of the images that a detector family takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Geometry:
    """How the loader resizes and pads the images of a detector family. No key chooses it.

    Attributes:
        divisible: number that divides the sides of every batch [pixels]; 32 is the stride of the coarsest level of
            ResNet-FPN that is convolved.
        square: whether an image becomes a square of the short side that is drawn, whatever its proportions; otherwise
            its short side gets that length, as far as the long side may grow.
    """

    divisible: int = 32
    square: bool = False

    def padded(self, side: int) -> int:
        """The least side of a batch that holds an image of this side [pixels]."""
        return -(-side // self.divisible) * self.divisible
