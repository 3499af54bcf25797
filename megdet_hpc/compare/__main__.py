"""Runs beside each other: `python -m megdet_hpc.compare RUN RUN...`."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from megdet_hpc.errors import UserError
from megdet_hpc.programs import ProgramParser, called_as, errors_in_one_line, require_drawing

_MODULE = "megdet_hpc.compare"
DESCRIPTION = """Print a table of runs: the keys of the configuration that differ, mini-batch, updates, AP, time, speed.
On request write it as CSV or JSON, and draw AP and losses over the images seen and over time. The runs may be
running, finished, failed or of an older version. Time is that of the steps, without start, evaluation and saving."""


def _parser() -> argparse.ArgumentParser:
    parser = ProgramParser(prog=called_as(_MODULE), description=DESCRIPTION)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, its --output")
    parser.add_argument(
        "--ap",
        type=float,
        nargs="+",
        default=[],
        metavar="AP",
        help="APs, 0 to 1, whose first time is shown; default: evaluation.targets, else the highest all runs reached",
    )
    parser.add_argument(
        "--gpus",
        action="store_true",
        help="the plan's hours on 8 to 128 GPUs for the updates until each AP, and the paper's; needs torch",
    )
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="picture to draw")
    parser.add_argument("--csv", type=Path, metavar="FILE.csv", help="table to write, a line for each run")
    parser.add_argument("--json", type=Path, metavar="FILE.json", help="table to write, an object for each run")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    return parser


def _check_files(options: argparse.Namespace) -> None:
    """Raise UserError where a file to write has a wrong name or is there already."""
    files = {".png": options.picture, ".csv": options.csv, ".json": options.json}
    for suffix, file in files.items():
        if file is None:
            continue
        option = "--picture" if suffix == ".png" else f"--{suffix[1:]}"
        if file.suffix.lower() != suffix:
            raise UserError(f"{option} {file}; accepted: a name that ends in {suffix}")
        if file.is_dir():
            raise UserError(f"{option} {file}: is a folder; accepted: the name of a file")
        if file.exists() and not options.overwrite:
            raise UserError(f"{option} {file}: is there already; --overwrite replaces it")
    if options.picture:
        require_drawing(f"--picture {options.picture}")


def compare(options: argparse.Namespace) -> list[str]:
    """Read, write what was asked for, and give the lines to print.

    Raises:
        UserError: bad options, or a folder that holds no run.
    """
    _check_files(options)
    for target in options.ap:
        if not 0 <= target <= 1:
            raise UserError(f"--ap {target:g}; accepted: 0 to 1")
    twice = [
        run for number, run in enumerate(options.runs) if run.resolve() in map(Path.resolve, options.runs[:number])
    ]
    if twice:
        raise UserError(f"{twice[0]}: named twice; accepted: each run once")
    # imported late, so that --help is quick
    from megdet_hpc.compare.table import names_of, rows_of, text_of
    from megdet_hpc.files import atomic_write, csv_text, write_json
    from megdet_hpc.record.run_record import read_run

    records = [read_run(run) for run in options.runs]
    rows = rows_of(records, options.ap)
    lines = [text_of(rows, shutil.get_terminal_size((120, 24)).columns)]
    if options.gpus:
        from megdet_hpc.compare.gpus import gpu_lines

        lines += gpu_lines(rows)
    files = [str(file) for file in (options.csv, options.json, options.picture) if file]
    try:
        if options.csv:
            with atomic_write(options.csv) as file:
                file.write(csv_text(rows).encode())
        if options.json:
            write_json(options.json, rows)
        if options.picture:
            from megdet_hpc.compare.figure import draw_comparison

            draw_comparison(records, names_of(records), options.picture)
    except OSError as error:
        raise UserError(f"{error.filename or ', '.join(files)}: cannot be written ({error.strerror})") from error
    return [*lines, *([f"\nwrote {', '.join(files)}"] if files else [])]


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    options = _parser().parse_args(sys.argv[1:] if arguments is None else arguments)
    with errors_in_one_line(_MODULE):
        lines = compare(options)
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
