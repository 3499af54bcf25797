"""predictions.png: validation images with ground truth and detections side by side, and masks where there are any."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # before pyplot: compute nodes have no display
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from megdet_hpc.data.dataset import DetectionDataset
from megdet_hpc.data.decode import decode_rgb
from megdet_hpc.data.masks import Rle, decode_masks
from megdet_hpc.data.pack_masks import masks_of
from megdet_hpc.data.page import draw_pixels, plain, widen_line
from megdet_hpc.evaluation.detections import DetectionTable
from megdet_hpc.files import atomic_write

_SHOWN_SCORE = 0.5  # with weaker detections nothing else would be visible; AP counts them all
_COLUMNS = 3
_GAP = 0.02  # gap between the two copies, as a share of the image's width
_MASK_ALPHA = 0.4  # opacity of masks


def draw_box(axes: Axes, xywh: NDArray[np.float64], text: str, color: str) -> None:
    """Draw a box, x, y, width, height in pixels, with its text above it."""
    x, y, width, height = xywh
    axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=color, linewidth=1.2))
    axes.text(x, y, text, fontsize=5, color="white", va="bottom", bbox={"facecolor": color, "pad": 0.4, "lw": 0})


def draw_masks(axes: Axes, masks: Sequence[Rle], height: int, width: int, left: float, color: str) -> None:
    """Colour all pixels of some masks of an image (height x width pixels) that begins at `left`."""
    covered = np.zeros((height, width), np.bool_)
    for mask in masks:  # one at a time: a hundred of a large image would take gigabytes
        covered |= decode_masks([mask], height, width)[0]
    layer = np.zeros((height, width, 4), np.uint8)
    layer[covered] = np.array(to_rgba(color, _MASK_ALPHA)) * 255
    draw_pixels(axes, layer, left)


def _draw(axes: Axes, dataset: DetectionDataset, index: int, found: DetectionTable) -> None:
    """Draw one image twice, with ground truth on the left and detections on the right."""
    image = decode_rgb(dataset.pack.read_image_bytes(index), dataset.pack.upright).permute(1, 2, 0).numpy()
    height, width = image.shape[:2]
    right = width + _GAP * width  # where the second one begins
    for left in (0.0, right):
        draw_pixels(axes, image, left)
    axes.set_xlim(0, right + width)
    widen_line(axes, height, width)
    shown = found.rows(found.scores >= _SHOWN_SCORE)
    if shown.masks is not None:
        own = [mask for mask in masks_of(dataset.pack, index) if mask is not None]
        draw_masks(axes, own, height, width, 0.0, "tab:green")
        draw_masks(axes, list(shown.masks), height, width, right, "tab:red")
    name = dict(zip(dataset.categories.ids, map(plain, dataset.categories.names), strict=True))
    truth = dataset.pack.annotations(index)
    for box, category, crowd in zip(truth.boxes_xywh, truth.category_ids, truth.iscrowd, strict=True):
        draw_box(axes, box, name[int(category)] + (" (crowd)" if crowd else ""), "tab:green")
    for box, category, score in zip(shown.boxes_xywh, shown.category_ids, shown.scores, strict=True):
        draw_box(axes, box + np.array([right, 0, 0, 0]), f"{name[int(category)]} {score:.2f}", "tab:red")
    axes.set_title(f"image {dataset.pack.image_ids[index]}", fontsize=7)
    axes.axis("off")


def draw_predictions(
    dataset: DetectionDataset, detections: DetectionTable | NDArray[np.float64], picture: Path, *, num_images: int = 12
) -> None:
    """Draw a grid of images spread evenly over the data set.

    Args:
        dataset: validation set.
        detections: detections in it; see DetectionTable.of.
        picture: PNG to write.
        num_images: images of the grid.
    """
    count, found = min(num_images, len(dataset)), DetectionTable.of(detections)
    indices = np.unique(np.linspace(0, len(dataset) - 1, count).astype(int))
    rows = -(-len(indices) // _COLUMNS)
    figure, grid = plt.subplots(rows, _COLUMNS, figsize=(5 * _COLUMNS, 2.2 * rows), squeeze=False, layout="constrained")
    figure.suptitle(f"ground truth (left, green) and detections of score {_SHOWN_SCORE} and more (right, red)")
    for axes in grid.flat:
        axes.axis("off")
    for axes, index in zip(grid.flat, indices, strict=False):
        _draw(axes, dataset, int(index), found.of_image(int(dataset.pack.image_ids[index])))
    with atomic_write(picture) as file:
        figure.savefig(file, format="png", dpi=120)
    plt.close(figure)
