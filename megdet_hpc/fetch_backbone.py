"""Fetch ImageNet weights of a backbone, on a machine with internet access. Compute nodes seldom have it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from megdet_hpc.files import atomic_write
from megdet_hpc.models.weights import PUBLISHED, default_file
from megdet_hpc.programs import called_as


def fetch(name: str, output: Path) -> None:
    """Download torchvision's default ImageNet weights and write their state dict to a file.

    Raises:
        OSError: there is no connection, or the file cannot be written.
    """
    import torchvision

    weights = torchvision.models.get_model_weights(name).DEFAULT
    state = weights.get_state_dict(progress=True, check_hash=True)
    with atomic_write(output) as file:
        torch.save(state, file)
    print(f"{weights} is in {output}; train with --model.backbone {name} --model.backbone_weights {output}")


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog=called_as("megdet_hpc.fetch_backbone"), description=__doc__)
    parser.add_argument("--backbone", choices=PUBLISHED, default="resnet50", help="architecture (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, help="file (default: weights/BACKBONE.pth, which model.backbone_weights auto takes)"
    )
    options = parser.parse_args(arguments)
    output = options.output or default_file(options.backbone)
    if output.exists():
        parser.error(f"--output {output} exists already; name another file or delete it")
    try:
        fetch(options.backbone, output)
    except OSError as error:
        sys.exit(f"{parser.prog}: error: {error}; run this on a machine with internet access (login node)")


if __name__ == "__main__":
    main()
