"""Write a trained detector as ONNX or TorchScript, and check the file against the detector.

`python -m megdet_hpc.export --checkpoint RUN --format onnx`
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megdet_hpc.errors import UserError
from megdet_hpc.programs import ProgramParser, called_as

if TYPE_CHECKING:
    from torch import Tensor

    from megdet_hpc.config import Config
    from megdet_hpc.export.graph import Format
    from megdet_hpc.predict.detector import TrainedDetector

DESCRIPTION = """Write a trained detector as a graph that other programs run, and check it.

The graph takes one image, (3, H, W) uint8 RGB of any size, and gives boxes (n, 4) in its pixels, scores, and labels
from 1 on. Normalization, padding and NMS are in it. Resizing is not: the description within the file (megdet_hpc.json)
names the side to resize to, and the category of each label.
The file is then run, by onnxruntime or torch, on three images, one of them without any object, and compared with the
detector."""

_FROM_PACK = 2  # images with objects

FAILED = 1
"""Exit status after a check that failed."""


def _parser() -> argparse.ArgumentParser:
    parser = ProgramParser(
        prog=called_as("megdet_hpc.export"),
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="run's folder, checkpoint or best.json")
    parser.add_argument(
        "--weights",
        choices=("raw", "ema"),
        help="weights of the last update, or their moving average (default: ema where the checkpoint has it)",
    )
    parser.add_argument("--format", choices=("onnx", "torchscript"), default="onnx")
    parser.add_argument("--output", type=Path, help="file to write (default: beside the checkpoint)")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    parser.add_argument("--score", type=float, help="keep objects from this score on (default: the run's)")
    parser.add_argument("--max-detections", type=int, help="objects kept of an image (default: the run's)")
    parser.add_argument(
        "--images", type=Path, nargs="+", metavar="FILE",
        help="images to check with, two at least (default: two of the run's data.val); a grey one is added",
    )  # fmt: skip
    parser.add_argument("--box-tolerance", type=float, default=0.01, help="[pixels] (default: %(default)s)")
    parser.add_argument("--score-tolerance", type=float, default=1e-4, help="(default: %(default)s)")
    return parser


def _detector(options: argparse.Namespace) -> tuple[TrainedDetector, Config, dict[str, Any], Path]:
    """The detector, its configuration, what to write of it into the file, and its checkpoint's file."""
    import torch

    from megdet_hpc.config import from_dict
    from megdet_hpc.engine.checkpoint import checkpoint_of, load_checkpoint, weights_line, with_weights
    from megdet_hpc.parallel.serial import SerialCommunicator
    from megdet_hpc.predict.detector import Asked, TrainedDetector, predicting

    file = checkpoint_of(options.checkpoint)
    state = with_weights(load_checkpoint(file), options.weights, str(file))
    print(weights_line(state), end="", flush=True)
    score = from_dict(state["config"]).evaluation.score_threshold if options.score is None else options.score
    config = predicting(state, Asked(score, options.max_detections))
    if config.evaluation.merges:
        print("evaluation.scales, flip and soft_nms are left out: the file has the plain image and the detector's NMS")
        config = dataclasses.replace(config, evaluation=config.evaluation.plain())
    detector = TrainedDetector(state, str(file), config, torch.device("cpu"), SerialCommunicator())
    names = zip(detector.categories.ids, detector.categories.names, strict=True)
    about = {
        "categories": {label: {"id": key, "name": name} for label, (key, name) in enumerate(names, start=1)},
        "image": "(3, height, width) uint8 RGB",
        "resize": {
            "short_side": config.data.val_short_side,
            "max_side": config.data.max_side,
            "antialias": True,
            "square": config.model.geometry.square,
        },
        "detector": config.model.detector,
        "checkpoint": str(file.resolve()),
        "step": state["step"],
        "weights": state["weights"],
    }
    return detector, config, about, file


def _check_images(options: argparse.Namespace, config: Config, detector: TrainedDetector) -> list[Tensor]:
    """Three images or more as the detector gets them, resized; the last is grey and has no object."""
    import torch

    from megdet_hpc.data.dataset import DetectionDataset
    from megdet_hpc.predict.detector import read_picture, resized_sample

    images = []
    for file in options.images or ():
        try:
            pixels = read_picture(file)
        except UserError as error:
            raise UserError(f"--images {file}: {error}") from error
        images.append(resized_sample(pixels, detector.views[0], 0).image.contiguous())
    if not images and config.data.val and Path(config.data.val).is_dir():
        geometry = config.model.geometry
        dataset = DetectionDataset.open(config.data.val, config.data, training=False, seed=0, geometry=geometry)
        some = itertools.islice((i for i in range(len(dataset)) if len(dataset.pack.annotations(i).ids)), _FROM_PACK)
        images = [dataset[(0, index)].image.contiguous() for index in some]
    if len(images) < _FROM_PACK:
        raise UserError(
            f"the check needs {_FROM_PACK} images, and there are {len(images)}: name them with --images FILE FILE "
            f"(without that they are data.val's, which is {config.data.val})"
        )
    height, width = images[0].shape[1:]
    height = height if config.model.geometry.square else max(height * 3 // 4, 1)
    return [*images, torch.full((3, height, width), 127, dtype=torch.uint8)]


def run(options: argparse.Namespace) -> int:
    """Write, check and tell; the exit status.

    Raises:
        UserError: the checkpoint, the images or the format do not do.
    """
    from megdet_hpc.export.check import compare
    from megdet_hpc.export.graph import SUFFIXES, DetectorGraph, onnx_libraries, read, write

    kind: Format = options.format
    if kind == "onnx":
        onnx_libraries()  # before the work
    detector, config, about, checkpoint = _detector(options)
    model = detector.model
    output: Path = options.output or checkpoint.with_suffix(SUFFIXES[kind])
    if output.is_dir():
        raise UserError(f"--output {output}: is a folder; accepted: the name of a file")
    if output.exists() and not options.overwrite:
        raise UserError(f"--output {output} exists already; name another file, or replace it with --overwrite")
    images = _check_images(options, config, detector)
    unchecked = output.with_name(output.name + ".unchecked")
    graph = DetectorGraph(model, config.model.geometry).eval()
    write(graph, kind, unchecked, images[0], about)
    differences = compare(
        graph,
        read(unchecked, kind),
        images,
        threshold=config.evaluation.score_threshold,
        limit=config.evaluation.max_detections,
        edge=options.score_tolerance,
    )
    for difference in differences:
        print(difference.line())
    if not any(difference.counts[0] for difference in differences):
        print(
            "warning: no object in any of them, so the check says little; name others with --images, or a lower --score"
        )
    if not all(difference.within(options.box_tolerance, options.score_tolerance) for difference in differences):
        print(
            f"the graph differs by more than {options.box_tolerance:g} pixels or {options.score_tolerance:g} of a "
            f"score; it is left in {unchecked}"
        )
        print(f"result: check failed output={unchecked}")
        return FAILED
    unchecked.replace(output)
    print(f"result: check passed images={len(images)} output={output}")
    return 0


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    parser = _parser()
    options = parser.parse_args(arguments)
    for key in ("box_tolerance", "score_tolerance"):
        if not getattr(options, key) >= 0:
            parser.error(f"--{key.replace('_', '-')} is {getattr(options, key)}; accepted: 0 or more")
    try:
        status = run(options)
    except UserError as error:
        parser.error(str(error))
    except OSError as error:
        sys.exit(f"{parser.prog}: error: {error}")
    raise SystemExit(status)


if __name__ == "__main__":
    main()
