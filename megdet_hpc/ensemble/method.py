"""How an ensemble merges: the choice, read without loading torch."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from megdet_hpc.errors import UserError

METHODS = ("wbf", "nms", "soft_nms", "nmw")
"""Names of the methods, the default first."""
BY_LIBRARY = ("wbf", "nmw")
"""Methods of ensemble-boxes."""
SOFT_LEAST_SCORE = 0.001
"""Score below which soft-NMS drops a detection."""


@dataclass(frozen=True)
class Fusion:
    """How detections are merged.

    Attributes:
        method: one of METHODS.
        weights: trust in each file, one number each, above 0.
        iou: IoU above which two boxes are of one object.
        sigma: width of the factor of soft-NMS, exp(-IoU^2 / sigma).
        max_detections: the best so many of an image are kept.
    """

    method: str
    weights: tuple[float, ...]
    iou: float
    sigma: float
    max_detections: int


def require_library(method: str) -> None:
    """Raises UserError where a method needs ensemble-boxes, which is not installed."""
    if method in BY_LIBRARY and importlib.util.find_spec("ensemble_boxes") is None:
        others = " and ".join(other for other in METHODS if other not in BY_LIBRARY)
        raise UserError(
            f"--method {method} needs ensemble-boxes, which is not installed: pip install ensemble-boxes, or "
            f"'.[ensemble]' in a checkout; {others} do without"
        )
