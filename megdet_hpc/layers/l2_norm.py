"""L2 normalization over channels with a learned scale (Liu et al., ParseNet, arXiv 1506.04579; SSD's conv4_3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class L2Norm(nn.Module):
    """The vector of each cell divided by its length, times a learned scale of each channel.

    Args:
        channels: C of the (N, C, H, W) input.
        scale: first value of every scale; SSD and DSOD begin at 20.
    """

    def __init__(self, channels: int, scale: float = 20.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), scale))

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, H, W) -> the same shape."""
        return F.normalize(features, dim=1) * self.weight.view(-1, 1, 1)
