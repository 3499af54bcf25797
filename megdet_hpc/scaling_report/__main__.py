"""The report of a scaling benchmark: `python -m megdet_hpc.scaling_report RUNS`."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from megdet_hpc.errors import UserError
from megdet_hpc.plan.network import NETWORKS, choose_network
from megdet_hpc.programs import ProgramParser, called_as, errors_in_one_line

_MODULE = "megdet_hpc.scaling_report"
_LEAST_SIZES = 3
DESCRIPTION = """Print the table of the runs of jobs/bench_scaling, and write the report that centres ask for:
RUNS/scaling.pdf and RUNS/scaling.md, with weak and strong scaling, efficiency beside the site's line, the parts of an
update, and what plan expects. It needs runs on 3 numbers of nodes or more."""


def _parser() -> argparse.ArgumentParser:
    parser = ProgramParser(
        prog=called_as(_MODULE), description=DESCRIPTION, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("runs", type=Path, metavar="RUNS", help="folder with nodes_<N>, and strong_<N> if measured")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="folder of the report; RUNS if not given")
    parser.add_argument("--title", default="Scaling of megdet_hpc", help="title of the report")
    parser.add_argument("--line", type=float, default=75, help="least efficiency that the site wants [percent]")
    parser.add_argument("--network", choices=list(NETWORKS), default="ib-hdr", help="plan's assumptions on the network")
    parser.add_argument("--cores-per-node", type=int, help="cores that the ranks of a CPU node share [cores]")
    parser.add_argument("--table", action="store_true", help="print the table only, of any number of sizes")
    parser.add_argument("--overwrite", action="store_true", help="replace a report that is there")
    return parser


def _write(options: argparse.Namespace, words: list[str]) -> list[str]:
    """Write the report; gives the lines to print.

    Raises:
        UserError: bad options, no runs, fewer than three sizes, or a report that is there.
    """
    # imported late, so that --help is quick
    from megdet_hpc.scaling_report.runs import read_scaling
    from megdet_hpc.scaling_report.text import report_text, table_lines

    if not 0 < options.line <= 100:
        raise UserError(f"--line {options.line:g}; accepted: above 0, up to 100 percent")
    if options.cores_per_node is not None and options.cores_per_node < 1:
        raise UserError(f"--cores-per-node {options.cores_per_node}; accepted: 1 or more")
    scaling = read_scaling(options.runs)
    lines = table_lines(scaling.weak)
    if scaling.strong:
        lines += ["strong scaling:", *table_lines(scaling.strong)]
    if options.table:
        return lines
    sizes = [run.nodes for run in scaling.weak]
    if len(sizes) < _LEAST_SIZES:
        had = ", ".join(map(str, sizes))
        raise UserError(
            f"{options.runs}: runs on {len(sizes)} number(s) of nodes ({had}); accepted: {_LEAST_SIZES} or more, "
            'such as MEGDET_BENCH_NODES="1 2 4"; --table prints the table alone'
        )
    folder = options.output or options.runs
    pdf, text = folder / "scaling.pdf", folder / "scaling.md"
    for file in (pdf, text):
        if file.exists() and not options.overwrite:
            raise UserError(f"{file}: is there already; --overwrite replaces it")
    from megdet_hpc.config import from_dict
    from megdet_hpc.files import atomic_write
    from megdet_hpc.scaling_report.estimate import estimates, stored_config
    from megdet_hpc.scaling_report.figure import draw_report

    network = choose_network(options.network)
    expected = {
        kind: estimates(runs, [from_dict(stored_config(run.folder)) for run in runs], network, options.cores_per_node)
        for kind, runs in (("weak", scaling.weak), ("strong", scaling.strong))
        if runs
    }
    command = shlex.join([called_as(_MODULE), *words])
    try:
        draw_report(scaling, expected, options.line / 100, options.title, pdf)
        with atomic_write(text) as file:
            file.write(report_text(scaling, expected, network, options.line / 100, options.title, command).encode())
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be written ({error.strerror})") from error
    return [*lines, f"wrote {pdf} and {text}"]


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    words = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(words)
    with errors_in_one_line(_MODULE):
        lines = _write(options, words)
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
