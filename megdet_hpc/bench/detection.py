"""Detection for scoring beside torchvision's: the same Faster R-CNN with the same weights on the same images."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megdet_hpc.bench.step import CATEGORIES, StepPictures, backbone_option, torchvision_detector
from megdet_hpc.bench.timing import Meter, Times, interleaved
from megdet_hpc.config import Config, EvaluationConfig, FasterRcnnConfig, NormConfig
from megdet_hpc.data.batch import Batch
from megdet_hpc.data.categories import Categories, match_labels
from megdet_hpc.evaluation.inference import detect_batch
from megdet_hpc.models.detector import Detector
from megdet_hpc.models.factory import build_detector
from megdet_hpc.parallel.runtime import Runtime
from megdet_hpc.parallel.serial import SerialCommunicator
from megdet_hpc.solver.precision import Precision, keep_coordinates_float32

REFERENCE = "torchvision, one image at a time"
_SPREAD = 2.0  # standard deviation of the classes' logits, so that boxes pass the score threshold and none has score 1


def options(parser: argparse.ArgumentParser) -> None:
    """The options of this part."""
    parser.add_argument(
        "--detect", type=int, default=8, metavar="IMAGES", help="images in a pass of detection; 0: none"
    )
    backbone_option(parser)
    parser.add_argument(
        "--image-size", type=int, nargs="+", default=[320], metavar="PIXELS", help="side, or height and width"
    )
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1, 4], metavar="IMAGES", help="evaluation.images_per_batch of ours"
    )
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="type of ours")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or xpu")
    parser.add_argument("--detect-repeats", type=int, default=5, help="measured passes of detection")


def measure_detection(arguments: argparse.Namespace, runtime: Runtime) -> dict[str, Any]:
    """The parts of the report: images/s of ours in each size of batch and of torchvision's, in turn.

    Decoding and resizing are left out: both get pixels. Both end with boxes on the host. Collective of the world.
    """
    device, world = runtime.device(arguments.device), runtime.world
    height, width = arguments.image_size[0], arguments.image_size[-1]
    pictures = StepPictures.draw(arguments.detect, 0, height, width, seed=world.rank)
    torch.manual_seed(0)
    parts = FasterRcnnConfig(backbone=arguments.backbone, backbone_weights=None, frozen_stages=0)
    config = Config(model=parts, norm=NormConfig(kind="bn", where=("backbone",)), evaluation=EvaluationConfig())
    model = build_detector(config, num_categories=CATEGORIES, group=SerialCommunicator(), pretrained=False)
    _spread_scores(model.eval(), pictures.batch(torch.device("cpu")))
    reference = torchvision_detector(arguments.backbone, height, width)
    reference.load_state_dict(model.state_dict())
    keep_coordinates_float32(model.to(device).eval())
    reference.to(device).eval()
    names = [str(number) for number in range(CATEGORIES)]
    categories = Categories([{"id": key, "name": name} for key, name in enumerate(names, start=1)])
    labels = match_labels(categories, categories, "a", "b")
    precision = Precision(arguments.precision, device)
    scores: dict[str, list[Any]] = {}

    def ours(size: int, name: str) -> None:
        whole = pictures.batch(torch.device("cpu"))
        found = []
        for first in range(0, arguments.detect, size):
            with precision.autocast():
                found.append(detect_batch(model, _part(whole, first, size), device, labels).scores)
        scores[name] = [np.sort(np.concatenate(found))]

    @torch.no_grad()
    def theirs() -> None:
        found: list[Tensor] = []
        for image in pictures.torchvision(torch.device("cpu"))[0]:
            for one in reference([image.to(device)]):
                found.append({key: value.cpu() for key, value in one.items()}["scores"])
        scores[REFERENCE] = [np.sort(torch.cat(found).double().numpy())]

    bodies = {REFERENCE: Meter(theirs, device)}
    for size in arguments.batches:
        name = f"ours, {size} at a time"
        bodies[name] = Meter(lambda size=size, name=name: ours(size, name), device)  # type: ignore[misc]
    times = interleaved(bodies, arguments.detect_repeats, 1, world)
    return {
        "detection": f"{arguments.backbone}, {arguments.detect} images of {height} x {width} a rank, {device}, "
        f"ours in {arguments.precision}, {len(scores[REFERENCE][0]) / arguments.detect:.0f} boxes an image",
        "images/s": [
            _row(name, own, times[REFERENCE], arguments.detect * world.size)
            | {"largest difference of scores": _difference(scores[name][0], scores[REFERENCE][0])}
            for name, own in times.items()
        ],
    }


@torch.no_grad()
def _spread_scores(model: Detector, batch: Batch) -> None:
    """Scale the weights of the classifier, which are random, so that scores are as spread as a trained one's."""
    spread: list[float] = []
    classifier = model.get_submodule("roi_heads.box_predictor.cls_score")
    handle = classifier.register_forward_hook(lambda _module, _inputs, logits: spread.append(float(logits.std())))
    model.detect(_part(batch, 0, 1))
    handle.remove()
    classifier.get_parameter("weight").mul_(_SPREAD / spread[0])


def _part(batch: Batch, first: int, size: int) -> Batch:
    """Some images of a batch."""
    part = slice(first, first + size)
    columns = ("images", "sizes", "scales", "image_ids", "targets")
    return replace(batch, **{column: getattr(batch, column)[part] for column in columns})


def _row(name: str, own: Times, reference: Times, images: int) -> dict[str, Any]:
    """Speed by the wall and by the processor; the ratio is that of the passes side by side, with its quartiles."""
    wall, processor = own[..., 0].max(0), own[..., 1].sum(0)
    ratios = reference[..., 1].sum(0) / processor if name != REFERENCE else np.ones(len(wall))
    low, high = np.quantile(ratios, [0.25, 0.75])
    return {
        "detector": name,
        "median": images / float(np.median(wall)),
        "least": images / float(wall.max()),
        "most": images / float(wall.min()),
        "speed to torchvision, processor": float(np.median(ratios)),
        "quartiles": f"{low:.2f} to {high:.2f}",
        "wall": float(np.median(reference[..., 0].max(0) / wall)),
    }


def _difference(own: Any, reference: Any) -> float | None:
    """The largest difference of the sorted scores; None where their number differs."""
    return float(np.abs(own - reference).max(initial=0.0)) if len(own) == len(reference) else None
