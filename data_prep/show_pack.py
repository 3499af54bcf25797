"""Pictures of a packed set, its images and its statistics: `python data_prep/show_pack.py --help`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installation

import data_prep  # noqa: F401  first, for Ctrl-C while the others are imported

# isort: split
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")  # before pyplot: a login node may have no display
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from data_prep.pack_statistics import draw_statistics
from megdet_hpc.data.masks import decode_masks, rle_of
from megdet_hpc.data.packed_coco import PackedCoco
from megdet_hpc.data.page import draw_pixels, plain, widen_line
from megdet_hpc.data.pixels import rgb_pixels
from megdet_hpc.errors import UserError
from megdet_hpc.files import atomic_write
from megdet_hpc.programs import ProgramParser, as_called_here, called_as

COLOURS = [matplotlib.colormaps["tab20"](k) for k in (*range(0, 20, 2), *range(1, 20, 2))]  # the strong ones first
CELL = 4.0  # inches, width of the place for one image
CELL_ASPECT = 0.85  # height / width of that place; landscapes fill its width, portraits its height
MASK_ALPHA = 0.4
NAME_POINTS = 6.5


def _draw_segmentation(
    axes: Axes, segmentation: Any, size: tuple[int, int], colour: tuple[float, ...], where: str
) -> None:
    """Fill an object's polygons or RLE in an image of (height, width); None or an empty list draws nothing."""
    try:
        rle = rle_of(segmentation, *size)
        if rle is None:
            return
        if isinstance(segmentation, dict):
            (mask,) = decode_masks([rle], *size)
            layer = np.zeros((*mask.shape, 4))
            layer[mask] = (*colour[:3], MASK_ALPHA)
            axes.imshow(layer, extent=(0, mask.shape[1], mask.shape[0], 0), interpolation="nearest")
        else:
            polygons = [np.asarray(polygon, np.float64).reshape(-1, 2) for polygon in segmentation]
            axes.add_collection(PolyCollection(polygons, facecolors=[(*colour[:3], MASK_ALPHA)], edgecolors="none"))
    except ValueError as error:
        raise UserError(f"{where}: its segmentation cannot be drawn: it {error}") from error


def _draw_image(axes: Axes, pack: PackedCoco, index: int, names: dict[int, str], place: dict[int, int]) -> None:
    """One image with its boxes, masks and category names, decoded as for training."""
    where = f"{pack.directory}: image id {pack.image_ids[index]}"
    try:
        pixels = rgb_pixels(pack.read_image_bytes(index), pack.upright)
    except OSError as error:
        raise UserError(f"{where}: cannot be decoded ({error})") from error
    height, width = pixels.shape[:2]
    draw_pixels(axes, pixels)
    truth = pack.annotations(index)
    segmentations = pack.segmentations(index)
    unit = max(width, height / CELL_ASPECT) / CELL / 72  # image pixels per point of the page, about
    named: list[tuple[float, float, float, float]] = []  # where there are names: left, top, right, bottom
    for k in np.argsort(-truth.areas, kind="stable"):
        category, crowd = int(truth.category_ids[k]), bool(truth.iscrowd[k])
        colour = COLOURS[place[category] % len(COLOURS)]
        _draw_segmentation(axes, segmentations[k], (height, width), colour, f"{where}, annotation id {truth.ids[k]}")
        x, y, box_width, box_height = truth.boxes_xywh[k]
        style: dict[str, Any] = {"linestyle": "--"} if crowd else {}
        axes.add_patch(Rectangle((x, y), box_width, box_height, fill=False, edgecolor=colour, linewidth=1.3, **style))
        text = names[category] + (" (crowd)" if crowd else "")
        text_width, text_height = 0.62 * NAME_POINTS * len(text) * unit, 1.5 * NAME_POINTS * unit
        left, top = max(min(x, width - text_width), 0), max(min(y, height - text_height), 0)
        right, bottom = left + text_width, top + text_height
        if any(left < other[2] and right > other[0] and top < other[3] and bottom > other[1] for other in named):
            continue  # it would hide the name of a larger object
        named.append((left, top, right, bottom))
        axes.text(
            left,
            top,
            plain(text),
            fontsize=NAME_POINTS,
            va="top",
            color="black" if np.dot(colour[:3], (0.299, 0.587, 0.114)) > 0.5 else "white",
            bbox={"facecolor": colour, "alpha": 0.85, "pad": 0.6, "linewidth": 0},
            clip_on=True,
        )
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    widened = ", widened" if widen_line(axes, height, width) else ""
    axes.set_title(f"id {pack.image_ids[index]}, {width} x {height}, boxes: {len(truth.ids)}{widened}", fontsize=8)
    axes.axis("off")


def draw_images(pack: PackedCoco, indices: Sequence[int], title: str) -> Figure:
    """A grid of images with boxes, category names and masks; crowd regions have a dashed box.

    A name that would cover the name of a larger object is left out. The colour shows the category.

    Args:
        pack: the set.
        indices: images, in the order they are shown.
        title: title of the page.

    Raises:
        UserError: an image or a segmentation that cannot be decoded; PackError for damaged bytes.
    """
    names = {int(category["id"]): str(category["name"]) for category in pack.categories}
    place = {category: position for position, category in enumerate(sorted(names))}
    columns = int(np.ceil(np.sqrt(len(indices))))
    rows = -(-len(indices) // columns)
    size = (CELL * columns, (CELL * CELL_ASPECT + 0.25) * rows + 0.4)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    figure.suptitle(plain(title))
    for axes in grid.flat:
        axes.axis("off")
    for axes, index in zip(grid.flat, indices, strict=False):
        _draw_image(axes, pack, int(index), names, place)
    return figure


def show_pack(
    directory: Path, output: Path, num_images: int = 16, seed: int = 0, overwrite: bool = False
) -> list[Path]:
    """Write images.png and statistics.png of a packed set.

    Args:
        directory: the folder that pack_coco.py wrote.
        output: folder for the pictures, made if missing.
        num_images: number of pictures in images.png, 1 to 100; all images if the set has fewer.
        seed: seed of the choice of images, 0 or more.
        overwrite: whether to replace existing pictures.

    Returns:
        The two files.

    Raises:
        UserError: a value out of range, a picture that is there already, or data that cannot be shown.
        OSError: the pictures cannot be written.
    """
    if not 1 <= num_images <= 100:
        raise UserError(f"--images {num_images}: accepted are 1 to 100")
    if seed < 0:
        raise UserError(f"--seed {seed}: accepted are 0 or more")
    paths = [output / "images.png", output / "statistics.png"]
    for path in paths:
        if path.exists() and not overwrite:
            raise UserError(f"{path}: exists already; give another --output or --overwrite")
    pack = PackedCoco(directory)
    rng = np.random.default_rng(seed)
    indices = np.sort(rng.choice(len(pack), min(num_images, len(pack)), replace=False))
    name = pack.manifest["source"]["file"]
    title = f"{directory.resolve().name} ({name}): {len(pack):,} images, {pack.num_annotations:,} annotations"
    figures = [draw_images(pack, indices.tolist(), title), draw_statistics(pack, title)]
    pack.close()
    for figure, path in zip(figures, paths, strict=True):
        with atomic_write(path) as file:
            figure.savefig(file, format="png", dpi=100)
        plt.close(figure)
    return paths


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = ProgramParser(
        prog=called_as("data_prep.show_pack"),
        description="Write two pictures: images.png has random images with boxes, names and masks, statistics.png "
        "has distributions over the whole set.",
        epilog=as_called_here("example: python data_prep/show_pack.py packed/val --output pictures"),
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="folder that pack_coco.py wrote")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="folder for the pictures (default: DIR-pictures)")
    parser.add_argument(
        "--images", type=int, default=16, metavar="N", help="pictures in images.png (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of images (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace existing pictures")
    arguments = parser.parse_args(argv)
    directory: Path = arguments.directory
    if directory.name in ("", ".."):  # such as "."
        directory = directory.resolve()
    output = arguments.output or directory.with_name(f"{directory.name}-pictures")
    try:
        for path in show_pack(directory, output, arguments.images, arguments.seed, arguments.overwrite):
            print(path)
    except (UserError, OSError) as error:
        print(f"{called_as('data_prep.show_pack')}: error: {as_called_here(str(error))}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
