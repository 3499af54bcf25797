"""SSD's heads: a convolution for boxes and one for classes on each map, with normalization behind them if asked for.

Shapes: N images, A default boxes of an image on all maps, K labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megdet_hpc.layers.norm import NormLayer

# DSOD's code: gaussian weights where normalization follows; SSD's: xavier where none does.
_DEVIATION = 0.01


class SsdHead(nn.Module):
    """The scores and the offsets of all default boxes.

    Args:
        channels: channels of each map, finest first.
        boxes_per_cell: default boxes in a cell of each map.
        num_labels: number of categories, the background included.
        norm: constructor of the normalization behind each convolution, which then has no bias; None: none.
        kernel: side of the convolutions, odd; 3 in SSD.
    """

    def __init__(
        self,
        channels: Sequence[int],
        boxes_per_cell: Sequence[int],
        num_labels: int,
        norm: NormLayer | None = None,
        kernel: int = 3,
    ) -> None:
        super().__init__()
        self.num_labels = num_labels
        self.boxes_per_cell = tuple(boxes_per_cell)
        each = list(zip(channels, boxes_per_cell, strict=True))
        self.boxes = nn.ModuleList(_predictor(width, 4 * number, norm, kernel) for width, number in each)
        self.classes = nn.ModuleList(_predictor(width, num_labels * number, norm, kernel) for width, number in each)

    def forward(self, levels: Sequence[Tensor]) -> dict[str, Tensor]:
        """`bbox_regression` (N, A, 4) and `cls_logits` (N, A, K), in the order of the default boxes."""
        boxes = [_in_rows(head(level), 4) for head, level in zip(self.boxes, levels, strict=True)]
        classes = [_in_rows(head(level), self.num_labels) for head, level in zip(self.classes, levels, strict=True)]
        return {"bbox_regression": torch.cat(boxes, dim=1), "cls_logits": torch.cat(classes, dim=1)}


def _predictor(channels: int, outputs: int, norm: NormLayer | None, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(channels, outputs, kernel, padding=kernel // 2, bias=norm is None)
    if conv.bias is None:
        nn.init.normal_(conv.weight, std=_DEVIATION)
    else:
        nn.init.xavier_uniform_(conv.weight)
        nn.init.zeros_(conv.bias)
    return nn.Sequential(conv, *([] if norm is None else [norm(outputs)]))


def _in_rows(output: Tensor, width: int) -> Tensor:
    """(N, boxes of a cell * width, H, W) -> (N, H * W * boxes of a cell, width)."""
    # channels last first: the gradient then has strides with which nn.BatchNorm2d computes rightly for one image too
    return output.permute(0, 2, 3, 1).reshape(len(output), -1, width)
