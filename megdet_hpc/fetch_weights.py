"""Fetch the weights of a detector or a backbone that torchvision publishes, on a machine with internet access."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megdet_hpc.models.published import fetch
from megdet_hpc.models.weights import PUBLISHED, default_file
from megdet_hpc.programs import called_as

DETECTORS = {"fasterrcnn_resnet50_fpn": "--model.detector faster_rcnn --model.backbone resnet50 --norm.kind frozen"}
"""torchvision's detectors that model.weights takes, and the keys of the same detector here."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog=called_as("megdet_hpc.fetch_weights"), description=__doc__)
    parser.add_argument(
        "name", metavar="NAME", choices=(*DETECTORS, *PUBLISHED), help=", ".join((*DETECTORS, *PUBLISHED))
    )
    parser.add_argument("--output", type=Path, help="file (default: weights/NAME.pth)")
    options = parser.parse_args(arguments)
    output = options.output or default_file(options.name)
    if output.exists():
        parser.error(f"--output {output} exists already; name another file or delete it")
    keys = DETECTORS.get(options.name)
    use = f"{keys} --model.weights {output}" if keys else ""
    try:
        fetch(options.name, output, use)
    except OSError as error:
        sys.exit(f"{parser.prog}: error: {error}; run this on a machine with internet access (login node)")


if __name__ == "__main__":
    main()
