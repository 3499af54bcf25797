"""A run in the terminal: `python -m megdet_hpc.watch RUN`."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from megdet_hpc.errors import UserError
from megdet_hpc.programs import ProgramParser, called_as, errors_in_one_line

_MODULE = "megdet_hpc.watch"
DESCRIPTION = """Show a run in the terminal: progress and the time that is left, losses, rate, images/s, AP, the slowest
rank, the starts of the run and what the watchdog sees. It reads the run's files alone, so it works from any host that
sees the folder, and for a run that has not begun, has ended or has died. It ends with the run's last step; Ctrl-C
leaves it before, and the run goes on."""


def _parser() -> argparse.ArgumentParser:
    parser = ProgramParser(prog=called_as(_MODULE), description=DESCRIPTION)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run, its --output")
    parser.add_argument("--once", action="store_true", help="print the page and end; so it is where no terminal is")
    parser.add_argument(
        "--interval",
        type=float,
        default=2.0,
        metavar="S",
        help="time between two looks [seconds] (default: %(default)g)",
    )
    return parser


def watch(options: argparse.Namespace) -> None:
    """Show the page, once or until the run is finished or the user leaves.

    Raises:
        UserError: bad options, no run, or no library for terminal pages.
    """
    if not 0.2 <= options.interval <= 3600:
        raise UserError(f"--interval {options.interval:g}; accepted: 0.2 to 3600 seconds")
    # imported late, so that --help is quick
    from megdet_hpc.record.run_record import read_run

    record = read_run(options.run)
    if find_spec("rich") is None:
        raise UserError("the page is drawn by rich, which is not installed; pip install '.[watch]' installs it")
    from rich.console import Console
    from rich.live import Live

    from megdet_hpc.watch.page import page

    console = Console(highlight=False)
    unicode = (console.encoding or "").lower().startswith("utf")
    if options.once or not console.is_terminal:
        console.print(page(record, unicode=unicode))
        return
    # a run that has stopped or died may go on in its next job; only one that is finished does not
    with (
        suppress(KeyboardInterrupt),
        Live(page(record, unicode=unicode), console=console, auto_refresh=False, screen=True) as live,
    ):
        while record.state()[0] != "finished":
            time.sleep(options.interval)
            record = read_run(options.run)
            live.update(page(record, unicode=unicode), refresh=True)
    console.print(page(record, unicode=unicode))  # the screen is gone with its last page


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    options = _parser().parse_args(sys.argv[1:] if arguments is None else arguments)
    with errors_in_one_line(_MODULE):
        watch(options)


if __name__ == "__main__":
    main()
