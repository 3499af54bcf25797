"""The options that `plan` and `submit` share: the places of the ranks. All other options are the trainer's."""

from __future__ import annotations

import argparse
import math
from typing import NoReturn

from megdet_hpc.command_line import config_parser, parse_config
from megdet_hpc.config import Config
from megdet_hpc.errors import UserError
from megdet_hpc.plan.job_plan import JobPlan, find_training_set, place_ranks, plan_job
from megdet_hpc.programs import ProgramParser, as_called_here, called_as

_EPILOG = "Every key of the training is accepted too, such as --norm.size 32: python -m megdet_hpc.train --help."


def rank_options(module: str, description: str) -> argparse.ArgumentParser:
    """A parser with --ranks and related options. Unknown options are for `checked_plan`."""
    parser = ProgramParser(
        prog=called_as(module),
        description=as_called_here(description),
        epilog=as_called_here(_EPILOG),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", action="append", required=True, help="named config or YAML file, as for training")
    parser.add_argument("--ranks", type=int, required=True, help="total number of ranks, one per GPU [ranks]")
    parser.add_argument("--nodes", type=int, help="number of nodes [nodes]")
    parser.add_argument("--ranks-per-node", type=int, help="default: 8, or all ranks if fewer [ranks]")
    parser.add_argument("--images-per-rank", type=int, help="short for --data.images_per_rank [images]")
    parser.add_argument(
        "--images",
        type=int,
        help="size of the training set; default: that of data.train if it is here, else of COCO [images]",
    )
    return parser


def training_arguments(options: argparse.Namespace, rest: list[str]) -> list[str]:
    """The trainer's command line. Configurations come first, so that all other options override them."""
    arguments = [word for name in options.config for word in ("--config", name)] + rest
    if options.images_per_rank is not None:
        if any(word.split("=")[0] == "--data.images_per_rank" for word in rest):
            raise UserError("--images-per-rank is short for --data.images_per_rank; accepted: one of them")
        arguments += ["--data.images_per_rank", str(options.images_per_rank)]
    return arguments


def checked_plan(module: str, options: argparse.Namespace, rest: list[str]) -> JobPlan:
    """The plan that a command line asks for.

    Raises:
        SystemExit: the configuration is wrong; the status is 2.
        UserError: the ranks do not fit the configuration.
    """
    config, _ = parse_config(config_parser(module, ""), training_arguments(options, rest))
    return plan_of(config, options)


def plan_of(config: Config, options: argparse.Namespace) -> JobPlan:
    """The plan of a checked configuration; raises UserError if the ranks do not fit it."""
    nodes = place_ranks(options.ranks, options.nodes, options.ranks_per_node)
    return plan_job(config, nodes, find_training_set(config, options.images))


def require_number(option: str, value: float, *, least: bool = False) -> None:
    """Raise UserError unless a value is a finite number above 0, or with `least` of 0 or more."""
    if not math.isfinite(value) or value < 0 or (value == 0 and not least):
        raise UserError(f"{option} {value:g}; accepted: a number {'of 0 or more' if least else 'above 0'}")


def refuse(parser: argparse.ArgumentParser, error: UserError) -> NoReturn:
    """Print one line and leave with status 2."""
    parser.exit(2, f"{parser.prog}: error: {as_called_here(str(error))}\n")
