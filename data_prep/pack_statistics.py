"""The page of statistics that show_pack.py writes. Crowd regions count only if the page says so."""

from __future__ import annotations

import h5py
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.data.page import plain

SMALL, MEDIUM = 32.0, 96.0  # pixels: square roots of the areas between COCO's size classes
FEWEST_ROWS = 12  # least rows of the bar chart; with fewer, the bars would be too large
MOST_BARS = 100  # categories drawn by name; the rest are summed up


def plain_number(value: float, _position: object = None) -> str:
    """1000000 as 1M, 1500 as 1.5k, 0.05 as 0.05."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def image_file_sizes(pack: PackedCoco) -> NDArray[np.int64]:
    """Bytes of each image file, [images]; from the shards' offsets, so no image is read."""
    sizes = []
    for path in pack.shard_paths:
        with h5py.File(path, "r", locking=False) as file:
            sizes.append(np.diff(file["images/bytes_offset"][()]))
    return np.concatenate(sizes)


def images_per_category(pack: PackedCoco) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Number of images and boxes of each category, in the order of `pack.categories`. Crowd regions do not count.

    Returns:
        Images with at least one such object, and boxes; each [categories].
    """
    position = {int(category["id"]): index for index, category in enumerate(pack.categories)}
    images, boxes = np.zeros(len(position), np.int64), np.zeros(len(position), np.int64)
    for index in range(len(pack)):
        truth = pack.annotations(index)
        ids, counts = np.unique(truth.category_ids[~truth.iscrowd], return_counts=True)
        places = [position[int(category)] for category in ids]
        images[places] += 1
        boxes[places] += counts
    return images, boxes


def _histogram(axes: Axes, values: NDArray[np.float64], log_x: bool, title: str, unit: str) -> None:
    """A histogram with the median marked; `values` [k] are more than 0 where `log_x`."""
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(unit, fontsize=9)
    if not len(values):
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center")
        return
    low, high = float(values.min()), float(values.max())
    if log_x and high < 3 * low:  # a log axis would have no tick to read
        margin = 0.02 * low
        axes.hist(values, bins=np.linspace(low - margin, high + margin, 41).tolist(), color="tab:blue")
    elif log_x:
        low, high = low / 1.05, high * 1.05
        axes.hist(values, bins=np.geomspace(low, high, 41).tolist(), color="tab:blue")
        axes.set_xscale("log")
        if high / low < 30:  # few or no powers of ten
            ticks = [n * 10.0**p for p in range(-4, 10) for n in (1, 1.5, 2, 3, 5, 7)]
            axes.set_xticks([tick for tick in ticks if low <= tick <= high])
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        step = max(1, int(np.ceil((high - low + 1) / 50)))
        axes.hist(values, bins=np.arange(low - 0.5, high + step + 0.5, step).tolist(), color="tab:blue")
    axes.xaxis.set_major_formatter(FuncFormatter(plain_number))
    median = float(np.median(values))
    axes.axvline(median, color="tab:red", linewidth=1, label=f"median {plain_number(float(f'{median:.3g}'))}")
    axes.set_ylim(0, 1.18 * axes.get_ylim()[1])  # room for the legend
    axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=True))
    axes.legend(fontsize=8, loc="upper right")


def _draw_categories(axes: Axes, pack: PackedCoco) -> None:
    """Horizontal bars on a log axis: images and boxes of each category, most images first."""
    images, boxes = images_per_category(pack)
    names = [str(category["name"]) for category in pack.categories]
    order = np.lexsort((np.arange(len(images)), -images))[:MOST_BARS]
    rows = np.arange(len(order))
    axes.barh(rows, boxes[order], height=0.8, color="tab:orange", alpha=0.55, label="boxes")
    axes.barh(rows, images[order], height=0.45, color="tab:blue", label="images")
    axes.set_xlim(0.7, max(10.0, 3.0 * float(boxes.max(initial=1))))
    axes.set_xscale("log")
    for row, index in zip(rows, order, strict=True):
        text = f" {images[index]:,} / {boxes[index]:,}"
        axes.text(max(0.7, float(boxes[index])), float(row), text, va="center", fontsize=6.5)
    axes.set_yticks(
        rows, [plain(names[index] if len(names[index]) < 30 else f"{names[index][:28]}..") for index in order]
    )
    axes.tick_params(axis="y", labelsize=7)
    axes.set_ylim(max(len(order), FEWEST_ROWS) - 0.4, -0.6)
    axes.xaxis.set_major_formatter(FuncFormatter(plain_number))
    more = f", the first {len(order)} of {len(names)}" if len(order) < len(names) else ""
    axes.set_title(f"images and boxes per category{more}", fontsize=10)
    axes.set_xlabel("number", fontsize=9)
    axes.legend(fontsize=8, loc="lower right")


def draw_statistics(pack: PackedCoco, title: str) -> Figure:
    """One page: boxes per image, box sizes and shapes, image shapes, sizes and file sizes, categories.

    Args:
        pack: the set.
        title: above the page.
    """
    truths = [pack.annotations(index) for index in range(len(pack))]
    crowd = np.concatenate([truth.iscrowd for truth in truths])
    boxes = np.concatenate([truth.boxes_xywh for truth in truths])[~crowd]  # [boxes, 4]
    per_image = np.array([np.count_nonzero(~truth.iscrowd) for truth in truths], np.float64)
    real = boxes[(boxes[:, 2:] > 0).all(axis=1)]
    sides = np.sqrt(real[:, 2] * real[:, 3])
    height = max(9.5, 1.5 + 0.165 * min(len(pack.categories), MOST_BARS))
    figure = plt.figure(figsize=(15, height), layout="constrained")
    figure.suptitle(plain(title))
    grid = figure.add_gridspec(3, 3, width_ratios=(1, 1, 1.25))
    left = [figure.add_subplot(grid[row, column]) for row in range(3) for column in range(2)]
    empty = int((per_image == 0).sum())
    _histogram(left[0], per_image, False, f"boxes per image (images without any: {empty:,})", "boxes")
    share = [float(100 * np.mean(part)) if len(sides) else 0.0 for part in (sides < SMALL, sides >= MEDIUM)]
    sizes = f"box size: {share[0]:.0f} % below {SMALL:.0f}, {share[1]:.0f} % from {MEDIUM:.0f} pixels"
    _histogram(left[1], sides, True, sizes, "square root of width x height, pixels")
    for edge in (SMALL, MEDIUM):
        left[1].axvline(edge, color="black", linestyle=":", linewidth=1)
    _histogram(left[2], real[:, 2] / real[:, 3], True, "box shape", "width / height")
    _histogram(left[3], pack.widths / pack.heights, True, "image shape", "width / height")
    long_sides = np.maximum(pack.widths, pack.heights).astype(np.float64)
    _histogram(left[4], long_sides, True, "image size", "longer side, pixels")
    _histogram(left[5], image_file_sizes(pack) / 1024, True, "image file size", "KiB")
    for axes in left:
        axes.set_ylabel("boxes" if axes in left[1:3] else "images", fontsize=9)
        axes.yaxis.set_major_formatter(FuncFormatter(plain_number))
        axes.grid(alpha=0.25)
    _draw_categories(figure.add_subplot(grid[:, 2]), pack)
    flat = len(boxes) - len(real)
    note = f"left out: {int(crowd.sum()):,} crowd regions; of box sizes and shapes also {flat:,} boxes of zero size"
    figure.supxlabel(note, fontsize=8, color="dimgray", x=0.01, ha="left")
    return figure
