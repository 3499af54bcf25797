"""Draws a small detection data set in COCO's format: `python data_prep/make_shapes.py --help`.

The set needs no download. It has what COCO's format allows (polygons, RLE crowd regions, gaps in the category ids,
images without objects, portrait and landscape). A detector learns it from scratch in minutes on a CPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installation

import data_prep  # noqa: F401  first, for Ctrl-C while the others are imported

# isort: split
import argparse
import math
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from megdet_hpc.errors import UserError
from megdet_hpc.files import naming, sync_folder, write_json
from megdet_hpc.programs import ProgramParser, as_called_here, called_as

CATEGORIES = {"circle": 1, "square": 2, "triangle": 4, "star": 7, "ring": 8}  # ids with gaps, as in COCO
SMALLEST_EXTENT = 16.0  # pixels
LARGEST_EXTENT = 0.6  # of the image's short side
LARGEST_TURN = 0.25  # radians, either way
MAX_OBJECTS = 6
SHARE_EMPTY = 0.05  # images without an object
SHARE_CROWD = 0.04  # images with a crowd region
LEAST_VISIBLE = 0.75  # of each object
LEAST_CONTRAST = 110.0  # Euclidean distance in RGB, of 441, between an object and what it is drawn on
CROWD_MEMBER_EXTENT = 8.0  # pixels
SUPERSAMPLING = 4
JPEG_QUALITY = 90

Points = NDArray[np.float64]  # [num_points, 2] x, y
Pixels = NDArray[np.uint8]  # [height, width, 3]
Mask = NDArray[np.bool_]  # [height, width]


def _on_circle(angles: NDArray[np.float64], radius: float | NDArray[np.float64]) -> Points:
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.reshape(radius, (-1, 1))


def outline(name: str, extent: float, angle: float) -> Points:
    """A shape's polygon around the origin.

    Args:
        name: one of CATEGORIES.
        extent: the longer side of its box, in pixels.
        angle: rotation in radians.
    """
    turn = np.linspace(0, 2 * math.pi, 37)
    if name == "circle":
        points = _on_circle(turn[:-1], 1.0)
    elif name == "square":
        points = _on_circle(angle + math.pi * (np.arange(4) + 0.5) / 2, 1.0)
    elif name == "triangle":
        points = _on_circle(angle - math.pi / 2 + 2 * math.pi * np.arange(3) / 3, 1.0)
    elif name == "star":
        points = _on_circle(angle - math.pi / 2 + math.pi * np.arange(10) / 5, np.tile([1.0, 0.42], 5))
    elif (
        name == "ring"
    ):  # COCO's polygons have no holes: along the outer circle, through a seam, back along the inner circle
        points = np.concatenate([_on_circle(turn, 1.0), _on_circle(turn[::-1], 0.55)])
    else:
        raise ValueError(f"shape {name!r}: accepted are {', '.join(CATEGORIES)}")
    low, high = points.min(axis=0), points.max(axis=0)
    return np.asarray((points - (low + high) / 2) * extent / (high - low).max())


def coverage(points: Points, width: int, height: int) -> NDArray[np.float64]:
    """Share of each pixel that a polygon covers, [height, width] from 0 to 1."""
    canvas = Image.new("L", (width * SUPERSAMPLING, height * SUPERSAMPLING))
    ImageDraw.Draw(canvas).polygon([(x, y) for x, y in (points * SUPERSAMPLING).tolist()], fill=255)
    return np.asarray(canvas.reduce(SUPERSAMPLING), np.float64) / 255


def background(rng: np.random.Generator, width: int, height: int) -> Pixels:
    """A background with fine noise: a gradient, blotches, stripes or squares."""
    y, x = np.mgrid[:height, :width].astype(np.float64)
    one, two = rng.uniform(50, 180, (2, 3))  # neither as dark as the rims nor as bright as the shapes
    angle = rng.uniform(0, 2 * math.pi)
    along = (x * math.cos(angle) + y * math.sin(angle)) / math.hypot(width, height)
    kind = rng.integers(4)
    if kind == 0:
        weight = (along - along.min()) / (along.max() - along.min())
    elif kind == 1:
        blotches = Image.fromarray(rng.integers(0, 256, (6, 6), dtype=np.uint8))
        weight = np.asarray(blotches.resize((width, height), Image.Resampling.BICUBIC), np.float64) / 255
    elif kind == 2:
        weight = 0.5 + 0.25 * np.sin(along * rng.uniform(30, 90))
    else:
        side = int(rng.integers(6, 20))
        weight = 0.35 + 0.3 * ((x // side + y // side) % 2)
    ground = one + (two - one) * weight[..., None] * 0.7
    noise = rng.normal(0, rng.uniform(2, 8), (height, width, 3))
    return np.clip(ground + noise, 0, 255).astype(np.uint8)


def contrasting_colour(rng: np.random.Generator, ground: NDArray[np.float64]) -> NDArray[np.float64]:
    """A bright RGB colour [0 to 255] that differs from the mean of the background. It does not depend on the class."""
    tries = rng.uniform(60, 255, (40, 3))
    tries *= 255 / tries.max(axis=1, keepdims=True)
    distance = np.linalg.norm(tries - ground, axis=1)
    good = np.flatnonzero(distance >= LEAST_CONTRAST)
    return np.asarray(tries[good[0] if len(good) else distance.argmax()])


def paint(rng: np.random.Generator, pixels: Pixels, alpha: NDArray[np.float64]) -> None:
    """Draw one colour with a dark rim and a slight grain over `pixels` where `alpha` covers them."""
    weight = alpha[..., None]
    ground = (pixels * weight).sum(axis=(0, 1)) / weight.sum()
    # The rim makes the edges of shapes of all colours similar, so that few images are enough to learn them.
    inside = Image.fromarray((255 * alpha).round().astype(np.uint8)).filter(ImageFilter.MinFilter(3))
    fill = np.asarray(inside, np.float64)[..., None] / 255
    colour = contrasting_colour(rng, ground) * fill + rng.normal(0, 4, pixels.shape)
    pixels[:] = np.clip(pixels * (1 - weight) + colour * weight, 0, 255).round().astype(np.uint8)


def run_lengths(mask: Mask) -> dict[str, Any]:
    """COCO's uncompressed RLE: lengths of runs down the columns, beginning with zeros."""
    flat = np.concatenate([[False], mask.ravel(order="F"), [False]])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    runs = np.diff(np.concatenate([[0], changes, [mask.size]]))
    if changes.size and changes[-1] == mask.size:
        runs = runs[:-1]
    return {"counts": runs.tolist(), "size": list(mask.shape)}


@dataclass
class Placed:
    """An object on the canvas."""

    name: str
    points: Points
    alpha: NDArray[np.float64]  # [height, width], share of each pixel that it covers
    mask: Mask
    visible: Mask


def _place(rng: np.random.Generator, placed: list[Placed], taken: Mask) -> Placed | None:
    """An object inside the image that leaves LEAST_VISIBLE of each other object visible; None after 30 tries."""
    height, width = taken.shape
    largest = LARGEST_EXTENT * min(width, height)
    for _ in range(30):
        name = str(rng.choice(list(CATEGORIES)))
        extent = rng.uniform(SMALLEST_EXTENT, largest)
        points = outline(name, extent, rng.uniform(-LARGEST_TURN, LARGEST_TURN))
        half = np.abs(points).max(axis=0) + 1
        points = points + rng.uniform(half, np.array([width, height]) - half)
        alpha = coverage(points, width, height)
        mask = alpha >= 0.5
        hides = any((other.visible & ~mask).sum() < LEAST_VISIBLE * other.mask.sum() for other in placed)
        if not hides and not (mask & taken).any():
            for other in placed:
                other.visible &= ~mask
            return Placed(name, points, alpha, mask, mask.copy())
    return None


def _annotation(category: str, box: Sequence[float], area: float, segmentation: Any, iscrowd: int) -> dict[str, Any]:
    """An annotation without its ids; the box is x, y, width, height in pixels."""
    return {
        "segmentation": segmentation,
        "area": area,
        "iscrowd": iscrowd,
        "bbox": [round(float(value), 2) for value in box],
        "category_id": CATEGORIES[category],
    }


def _draw_crowd(rng: np.random.Generator, pixels: Pixels, taken: Mask) -> dict[str, Any]:
    """Draw tiny shapes of one class that are annotated as one crowd region, and mark its box in `taken`."""
    height, width = taken.shape
    name = str(rng.choice(list(CATEGORIES)))
    side = np.maximum(rng.uniform(0.3, 0.45, 2) * (width, height), 3 * CROWD_MEMBER_EXTENT)
    corner = rng.uniform((2, 2), np.array([width, height]) - side - 2)
    region = np.zeros_like(taken)
    for _ in range(int(rng.integers(8, 16))):
        centre = corner + rng.uniform(CROWD_MEMBER_EXTENT, side - CROWD_MEMBER_EXTENT)
        alpha = coverage(
            outline(name, CROWD_MEMBER_EXTENT, rng.uniform(-LARGEST_TURN, LARGEST_TURN)) + centre, width, height
        )
        paint(rng, pixels, alpha)
        region |= alpha >= 0.5
    rows, columns = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
    x, y = int(columns[0]), int(rows[0])
    box = [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y]
    taken[y : y + box[3], x : x + box[2]] = True
    return _annotation(name, box, int(region.sum()), run_lengths(region), iscrowd=1)


def draw_image(rng: np.random.Generator, size: int) -> tuple[Pixels, list[dict[str, Any]]]:
    """One image and its annotations, without ids."""
    long_side = int(rng.integers(size, size * 5 // 4 + 1))
    short_side = int(rng.integers(size * 3 // 4, size + 1))
    width, height = (long_side, short_side) if rng.uniform() < 0.5 else (short_side, long_side)
    pixels = background(rng, width, height)
    annotations: list[dict[str, Any]] = []
    if rng.uniform() < SHARE_EMPTY:
        return pixels, annotations
    taken = np.zeros((height, width), np.bool_)
    if rng.uniform() < SHARE_CROWD:
        annotations.append(_draw_crowd(rng, pixels, taken))
    placed: list[Placed] = []
    for _ in range(int(rng.integers(1, MAX_OBJECTS + 1))):
        new = _place(rng, placed, taken)
        if new is None:
            continue
        placed.append(new)
        paint(rng, pixels, new.alpha)
        points = new.points.round(2)
        low, high = points.min(axis=0), points.max(axis=0)
        segmentation = [points.ravel().tolist()]
        annotations.append(_annotation(new.name, [*low, *(high - low)], float(new.mask.sum()), segmentation, iscrowd=0))
    return pixels, annotations


def _draw_split(folder: Path, split: str, num_images: int, seed: int, size: int) -> int:
    """Draw one split into `folder`; returns the number of annotations."""
    (folder / split).mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(num_images):
        # Each image has its own random stream, so a larger split begins with the images of a smaller one.
        rng = np.random.default_rng([seed, 0 if split == "train" else 1, index])
        pixels, drawn = draw_image(rng, size)
        image_id = 1000 + 7 * index  # as in COCO, ids are not positions
        file_name = f"{image_id:012d}.jpg"
        Image.fromarray(pixels).save(folder / split / file_name, quality=JPEG_QUALITY)
        height, width = pixels.shape[:2]
        image = {"license": 1, "file_name": file_name, "height": height, "width": width, "id": image_id}
        images.append(image)
        for record in drawn:
            annotations.append({**record, "image_id": image_id, "id": len(annotations) + 1})
    write_json(
        folder / "annotations" / f"instances_{split}.json",
        {
            "info": {"description": "generated shapes", "version": "1.0", "seed": seed},
            "licenses": [{"id": 1, "name": "generated, no rights reserved", "url": ""}],
            "images": images,
            "annotations": annotations,
            "categories": [{"supercategory": "shape", "id": i, "name": name} for name, i in CATEGORIES.items()],
        },
    )
    return len(annotations)


def make_shapes(
    output: Path, num_train: int = 300, num_val: int = 80, seed: int = 0, size: int = 128
) -> dict[str, tuple[int, int]]:
    """Draw the set into a new folder, which appears when it is complete.

    Args:
        output: new or empty folder.
        num_train, num_val: images, 1 or more each.
        seed: equal seeds give equal bytes (with equal versions of Pillow and numpy).
        size: pixels. One side of an image is `size` to 1.25 `size` long, the other 0.75 `size` to `size`.

    Returns:
        Images and annotations of each split.

    Raises:
        UserError: a value out of range, or a folder that is not empty.
    """
    if min(num_train, num_val) < 1:
        raise UserError(f"--train {num_train} --val {num_val}: accepted are 1 or more images each")
    if not 64 <= size <= 2048:
        raise UserError(f"--size {size}: accepted are 64 to 2048 pixels")
    if seed < 0:
        raise UserError(f"--seed {seed}: accepted are 0 or more")
    output = output.resolve()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: exists and is not an empty folder; give a new one")
    output.parent.mkdir(parents=True, exist_ok=True)
    # named before it exists, so that Ctrl-C at any moment finds what to remove
    building = output.parent / f".{output.name}.{secrets.token_hex(4)}"
    try:
        with naming(output):
            building.mkdir()
            (building / "annotations").mkdir()
            counts = {
                split: (number, _draw_split(building, split, number, seed, size))
                for split, number in (("train", num_train), ("val", num_val))
            }
            building.rename(output)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    sync_folder(output.parent)
    return counts


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = ProgramParser(
        prog=called_as("data_prep.make_shapes"),
        description="Draw a small COCO-format detection set: circles, squares, triangles, stars and rings.",
        epilog=as_called_here("example: python data_prep/make_shapes.py --output shapes --train 300 --val 80"),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder for the set")
    parser.add_argument("--train", type=int, default=300, metavar="N", help="images to train on")
    parser.add_argument("--val", type=int, default=80, metavar="N", help="images to validate on")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds give equal files")
    parser.add_argument("--size", type=int, default=128, metavar="PIXELS", help="approximate side of the images")
    arguments = parser.parse_args(argv)
    try:
        counts = make_shapes(arguments.output, arguments.train, arguments.val, arguments.seed, arguments.size)
    except (UserError, OSError) as error:
        print(f"{called_as('data_prep.make_shapes')}: error: {as_called_here(str(error))}", file=sys.stderr)
        return 1
    for split, (num_images, num_annotations) in counts.items():
        path = arguments.output / "annotations" / f"instances_{split}.json"
        print(f"{path}: {num_images} images, {num_annotations} annotations")
    return 0


if __name__ == "__main__":
    sys.exit(main())
