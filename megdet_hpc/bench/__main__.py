"""`python -m megdet_hpc.bench NAME [options]`: one sub-command per benchmark."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megdet_hpc.bench import cgbn, evaluation, gradients, index, loader, messages, step, threads
from megdet_hpc.bench.report import print_report
from megdet_hpc.files import write_json
from megdet_hpc.parallel.runtime import Runtime
from megdet_hpc.parallel.start import started
from megdet_hpc.programs import ProgramParser, as_called_here, called_as

# Title, options and body of each benchmark. A body runs on every rank and returns the report on rank 0.
Body = Callable[[argparse.Namespace, Runtime], "dict[str, Any] | None"]
BENCHMARKS: Mapping[str, tuple[str, Callable[[argparse.ArgumentParser], None], Body]] = {
    "cgbn": (
        "normalization layers of a backbone: local, cross-GPU, and in a common simple form",
        cgbn.options,
        cgbn.run,
    ),
    "evaluation": (
        "an evaluation: detection beside torchvision, scoring beside pycocotools",
        evaluation.options,
        evaluation.run,
    ),
    "gradients": (
        "a step whose gradients go over Horovod, torch.distributed and MPI in turn",
        gradients.options,
        gradients.run,
    ),
    "index": ("sets of growing size: packing, verifying, opening, planning, scoring", index.options, index.run),
    "loader": ("the data path: this pack, single files, WebDataset, LMDB; decoders", loader.options, loader.run),
    "messages": ("the collectives of a training step: number, bytes, time", messages.options, messages.run),
    "step": ("a training step of Faster R-CNN with FPN beside torchvision's own", step.options, step.run),
    "threads": ("who polls and who waits in a step of several ranks, over time", threads.options, threads.run),
}


def parser() -> argparse.ArgumentParser:
    """The command line of all benchmarks."""
    top = ProgramParser(prog=called_as("megdet_hpc.bench"), description=as_called_here(__doc__ or ""))
    commands = top.add_subparsers(dest="benchmark", required=True, metavar="NAME")
    for name, (help_text, options, body) in BENCHMARKS.items():
        command = commands.add_parser(
            name, help=help_text, description=help_text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        command.add_argument("--json", metavar="FILE", help="file for the report as JSON")
        options(command)
        command.set_defaults(body=body)
    return top


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    options = parser().parse_args(sys.argv[1:] if arguments is None else arguments)
    over_horovod = "horovod" in getattr(options, "transports", ())
    if not over_horovod and options.benchmark not in ("gradients", "messages", "threads"):
        # no gradients are sent there, and Horovod's polling thread would share the rank's core
        os.environ.setdefault("HOROVOD_CYCLE_TIME", "100")
    with started("horovod" if over_horovod else "auto", gradients=getattr(options, "gradients", "auto")) as runtime:
        report = options.body(options, runtime)
        if report is not None:
            print_report(report)
            if options.json:
                write_json(Path(options.json), report)
                print(f"\nwrote {options.json}")


if __name__ == "__main__":
    main()
