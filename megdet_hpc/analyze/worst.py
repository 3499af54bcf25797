"""The worst images: ground truth beside detections, each in the colour of what became of it."""

from __future__ import annotations

import io

import matplotlib

matplotlib.use("Agg")  # before pyplot: compute nodes have no display
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from megdet_hpc.analyze.analysis import Analysis
from megdet_hpc.analyze.charts import short
from megdet_hpc.data.page import draw_pixels, widen_line
from megdet_hpc.data.pixels import rgb_pixels
from megdet_hpc.errors import MachineError, UserError
from megdet_hpc.report.pictures import draw_box

FOUND, MISSED, RIGHT, WRONG, CROWD = "tab:green", "tab:orange", "tab:blue", "tab:red", "grey"
_WIDTH = 9.0  # inches of a pair
_TALLEST = 8.0


def draw_image(analysis: Analysis, index: int) -> bytes:
    """JPEG of an image twice, left with its boxes, right with its detections from the threshold on.

    Raises:
        UserError: the image cannot be decoded; PackError: its bytes are damaged.
    """
    subject, outcome, score = analysis.subject, analysis.outcome, analysis.threshold.score
    pack = subject.truth.pack
    try:
        pixels = rgb_pixels(pack.read_image_bytes(index), pack.upright)
    except OSError as error:
        raise UserError(f"{pack.directory}: image id {pack.image_ids[index]}: cannot be decoded ({error})") from error
    height, width = pixels.shape[:2]
    tall = float(np.clip(_WIDTH / 2 * height / width, 0.8, _TALLEST))
    figure, grid = plt.subplots(1, 2, figsize=(_WIDTH, tall), layout="constrained")
    for axes in grid:
        draw_pixels(axes, pixels)
        axes.set(xlim=(0, width), ylim=(height, 0))
        widen_line(axes, height, width)
        axes.axis("off")
    for k in np.flatnonzero(subject.truth.boxes.images == index):
        name = short(subject.truth.names[subject.truth.boxes.classes[k]])
        found = outcome.best[k] >= score
        colour = CROWD if subject.truth.boxes.crowd[k] else FOUND if found else MISSED
        draw_box(
            grid[0],
            subject.truth.boxes.boxes_xywh[k],
            name + (" (crowd)" if subject.truth.boxes.crowd[k] else ""),
            colour,
        )
    for k in np.flatnonzero((subject.found.images == index) & outcome.counted & (subject.found.scores >= score)):
        text = f"{short(subject.truth.names[subject.found.classes[k]])} {subject.found.scores[k]:.2f}"
        draw_box(grid[1], subject.found.boxes_xywh[k], text, RIGHT if outcome.right[k] else WRONG)
    return _jpeg(figure)


def _jpeg(figure: plt.Figure) -> bytes:
    drawn, file = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=100)
    plt.close(figure)
    Image.open(drawn).convert("RGB").save(file, "JPEG", quality=88)
    return file.getvalue()


def worst_pictures(analysis: Analysis, count: int) -> list[tuple[dict[str, object], bytes | str]]:
    """The worst images' rows, each with its JPEG, or with the reason why it cannot be shown.

    Images without an error are not among them.

    Raises:
        MachineError: the file system failed.
    """
    place = {int(image_id): index for index, image_id in enumerate(analysis.subject.truth.pack.image_ids.tolist())}
    pictures: list[tuple[dict[str, object], bytes | str]] = []
    for row in [row for row in analysis.images if row["missed"] + row["wrong"]][:count]:
        try:
            pictures.append((row, draw_image(analysis, place[row["image_id"]])))
        except MachineError:
            raise
        except UserError as error:
            pictures.append((row, str(error)))
    return pictures
