"""A sheet of the pictures that a configuration's training sees: `python -m megdet_hpc.augmented --help`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megdet_hpc.errors import UserError
from megdet_hpc.programs import called_as, require_drawing

if TYPE_CHECKING:
    from megdet_hpc.config import Config

DESCRIPTION = """Draw training images as they are packed, and beside each what the first epochs of a run see of it.

The pictures, boxes and masks are those that the run trains on, since the draws depend on seed, epoch and image id
alone. Options are the keys of the training: --config, --data.train, --data.augmentation.mosaic 1 and so on."""

_CELL = 3.2  # inches
_MASK_ALPHA = 0.4


def _draw(axes: Any, pixels: Any, target: Any, names: list[str], title: str) -> None:
    """One picture with boxes, names and masks.

    Args:
        axes: place on the sheet.
        pixels: (3, H, W) uint8.
        target: its annotations.
        names: category names by label, from label 1 on.
        title: line above it.
    """
    import matplotlib
    import numpy as np
    from matplotlib.patches import Rectangle

    from megdet_hpc.data.page import draw_pixels, plain, widen_line

    height, width = pixels.shape[1:]
    draw_pixels(axes, pixels.permute(1, 2, 0).contiguous().numpy())
    colours = matplotlib.colormaps["tab20"]
    for row, label in enumerate(target.labels.tolist()):
        colour = colours((label - 1) * 2 % 20 + (label - 1) // 10 % 2)
        if target.masks is not None:
            layer = np.zeros((height, width, 4), np.float32)
            layer[target.masks[row].numpy()] = (*colour[:3], _MASK_ALPHA)
            axes.imshow(layer, extent=(0, width, height, 0), interpolation="nearest")
        left, top, right, bottom = target.boxes[row].tolist()
        crowd = bool(target.crowd[row])
        style = "--" if crowd else "-"
        axes.add_patch(
            Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, lw=1.2, ls=style)
        )
        text = plain(names[label - 1]) + " (crowd)" * crowd + " (difficult)" * bool(target.difficult[row])
        box = {"facecolor": colour, "alpha": 0.8, "pad": 0.4, "lw": 0}
        axes.text(left, top, text, fontsize=5, va="top", color="white", bbox=box, clip_on=True)
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    widen_line(axes, height, width)
    axes.set_title(title, fontsize=7)
    axes.axis("off")


def draw_augmented(config: Config, picture: Path, num_images: int, epochs: int) -> None:
    """Write the sheet: a row for each image, the image as packed and then what each epoch sees.

    Args:
        config: configuration of the run.
        picture: PNG to write.
        num_images: rows, spread evenly over the set.
        epochs: columns after the first.

    Raises:
        UserError: the set cannot be trained on, or an image does not decode.
    """
    import matplotlib

    matplotlib.use("Agg")  # before pyplot: a login node may have no display
    import matplotlib.pyplot as plt
    import numpy as np

    from megdet_hpc.data.dataset import DetectionDataset
    from megdet_hpc.data.decode import decode_rgb
    from megdet_hpc.data.pack_masks import lacking_masks
    from megdet_hpc.data.packed_coco import PackedCoco
    from megdet_hpc.files import atomic_write

    pack = PackedCoco(config.data.train)
    masks = config.model.needs_masks or not lacking_masks(pack)
    geometry = config.model.geometry
    dataset = DetectionDataset(pack, config.data, training=True, seed=config.seed, masks=masks, geometry=geometry)
    dataset.check_targets("data.train")
    indices = np.unique(np.linspace(0, len(dataset) - 1, min(num_images, len(dataset))).astype(int)).tolist()
    shape = len(indices), epochs + 1
    figure, grid = plt.subplots(
        *shape, figsize=(_CELL * shape[1], _CELL * 0.85 * shape[0]), squeeze=False, layout="constrained"
    )
    names = dataset.categories.names
    for row, index in zip(grid, indices, strict=True):
        stored = decode_rgb(pack.read_image_bytes(index), pack.upright)
        title = f"image {pack.image_ids[index]}, {stored.shape[2]} x {stored.shape[1]}"
        _draw(row[0], stored, dataset.target(index), names, title)
        for epoch, axes in enumerate(row[1:]):
            sample = dataset[epoch, index]
            size = f"{sample.image.shape[2]} x {sample.image.shape[1]}"
            _draw(axes, sample.image, sample.target, names, f"epoch {epoch}: {size}, boxes: {len(sample.target)}")
    with atomic_write(picture) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Entry point.

    Raises:
        SystemExit: 2 after one line that says what is wrong.
    """
    from megdet_hpc.command_line import config_parser, parse_config, refuse_output

    parser = config_parser("megdet_hpc.augmented", DESCRIPTION)
    parser.add_argument("--images", type=int, default=4, help="Images, a row for each.")
    parser.add_argument("--epochs", type=int, default=4, help="Epochs, a column for each.")
    parser.add_argument("--picture", default="augmented.png", help="PNG to write.")
    parser.add_argument("--overwrite", action="store_true", help="Replace the picture if it exists.")
    words = sys.argv[1:] if arguments is None else arguments
    config, options = parse_config(parser, words)
    picture = Path(options.picture)
    try:
        refuse_output(words, config.output, "--picture FILE names the sheet")
        for key in ("images", "epochs"):
            if not 1 <= options[key] <= 50:
                raise UserError(f"--{key} {options[key]}: accepted are 1 to 50")
        if picture.exists() and not options.overwrite:
            raise UserError(f"{picture}: exists already; give another --picture or --overwrite")
        require_drawing(f"--picture {picture}")
        draw_augmented(config, picture, options.images, options.epochs)
    except UserError as error:
        parser.error(str(error))
    except OSError as error:
        sys.exit(f"{called_as('megdet_hpc.augmented')}: error: {error}")
    print(picture)


if __name__ == "__main__":
    main()
