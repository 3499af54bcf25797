"""Fetch ImageNet weights of a backbone, on a machine with internet access. Compute nodes seldom have it."""

from __future__ import annotations

from pathlib import Path

from megdet_hpc.models.published import fetch_for_user
from megdet_hpc.models.weights import PUBLISHED, default_file
from megdet_hpc.programs import ProgramParser, called_as


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    parser = ProgramParser(prog=called_as("megdet_hpc.fetch_backbone"), description=__doc__)
    parser.add_argument("--backbone", choices=PUBLISHED, default="resnet50", help="architecture (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, help="file (default: weights/BACKBONE.pth, which model.backbone_weights auto takes)"
    )
    options = parser.parse_args(arguments)
    output = options.output or default_file(options.backbone)
    fetch_for_user(parser, options.backbone, output)


if __name__ == "__main__":
    main()
