"""Fetch the weights of a detector or a backbone that torchvision publishes, on a machine with internet access."""

from __future__ import annotations

from pathlib import Path

from megdet_hpc.models.published import fetch_for_user
from megdet_hpc.models.weights import PUBLISHED, default_file
from megdet_hpc.programs import ProgramParser, called_as

DETECTORS = {
    "fasterrcnn_resnet50_fpn": "--model.detector faster_rcnn --model.backbone resnet50 --norm.kind frozen",
    "maskrcnn_resnet50_fpn": "--model.detector mask_rcnn --model.backbone resnet50 --norm.kind frozen",
    "retinanet_resnet50_fpn": "--model.detector retinanet --model.backbone resnet50 --norm.kind frozen",
}
"""torchvision's detectors that model.weights takes, and the keys of the same detector here."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    parser = ProgramParser(prog=called_as("megdet_hpc.fetch_weights"), description=__doc__)
    parser.add_argument(
        "name", metavar="NAME", choices=(*DETECTORS, *PUBLISHED), help=", ".join((*DETECTORS, *PUBLISHED))
    )
    parser.add_argument("--output", type=Path, help="file (default: weights/NAME.pth)")
    options = parser.parse_args(arguments)
    output = options.output or default_file(options.name)
    keys = DETECTORS.get(options.name)
    fetch_for_user(parser, options.name, output, f"{keys} --model.weights {output}" if keys else "")


if __name__ == "__main__":
    main()
