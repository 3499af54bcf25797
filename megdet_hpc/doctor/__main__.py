"""`python -m megdet_hpc.doctor`: what is fine, slow or wrong on this host, or on all hosts of a job."""

from __future__ import annotations

import argparse
import io
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from megdet_hpc.devices import DEVICES
from megdet_hpc.doctor.findings import Line
from megdet_hpc.doctor.stage_guard import StageGuard
from megdet_hpc.errors import UserError
from megdet_hpc.parallel.launch import find_launch, is_first_process
from megdet_hpc.parallel.transports import GRADIENT_CARRIERS, TRANSPORTS
from megdet_hpc.programs import ProgramParser, as_called_here, called_as

if TYPE_CHECKING:  # the module imports torch, and the guard must run before that
    from megdet_hpc.doctor.machine import RankPlace

_TIMEOUT, _PREFLIGHT_TIMEOUT = 600.0, 60.0
_OVERLAP_ROUNDS = 200


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = ProgramParser(
        prog=called_as("megdet_hpc.doctor"),
        description=as_called_here(__doc__ or ""),
        epilog="exit status: 0 if nothing is wrong (slow is no failure), 1 if something is, 2 for bad options and "
        "for faults that stay in another attempt. A rank that does not answer in time is killed (signal 9)",
    )
    top.add_argument("--data", metavar="DIR", action="append", default=[], help="a packed set; may be repeated")
    top.add_argument("--output", metavar="DIR", help="folder of the run's output; made if missing")
    top.add_argument("--scratch", metavar="DIR", help="node-local folder; made if missing")
    top.add_argument("--preflight", action="store_true", help="check only what a job needs to start (seconds)")
    top.add_argument("--device", choices=DEVICES, default="auto", help="device of the job (auto)")
    top.add_argument(
        "--transports",
        nargs="+",
        choices=TRANSPORTS,
        help="transports to try: those that the job uses. auto is the one that norm.transport auto uses (default: all "
        "that this job can start)",
    )
    top.add_argument(
        "--gradients",
        choices=("auto", *GRADIENT_CARRIERS),
        help="library that averages the job's gradients (default: solver.gradients after --, else auto)",
    )
    top.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help=f"time limit for one step of a rank; 0: no limit (--preflight {_PREFLIGHT_TIMEOUT:g}, else {_TIMEOUT:g})",
    )
    top.add_argument(
        "--overlap-rounds",
        type=int,
        default=_OVERLAP_ROUNDS,
        metavar="N",
        help="number of backward passes in which gradients and the layers send at once, which may hang; 0: none "
        "(%(default)s; not with --preflight)",
    )
    top.add_argument("--json", metavar="FILE", help="file for the findings as JSON; an older one is replaced")
    top.add_argument("training", nargs="*", metavar="-- OPTION", help="options of the trainer, to be checked too")
    return top


def _gradients(options: argparse.Namespace) -> str:
    """The library that averages the job's gradients. Not a collective.

    Raises:
        SystemExit: the trainer's options ask for a text alone (--help, --print_config). The first process prints it. It
            is raised in every process, before they are joined: one that ended alone would leave the others waiting.
    """
    chosen = "auto"
    if options.training:
        from megdet_hpc.command_line import config_parser, parse_config

        said = io.StringIO()
        try:
            with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stderr(nowhere), redirect_stdout(said):
                config, _ = parse_config(config_parser("megdet_hpc.train", ""), list(options.training))
            chosen = config.solver.gradients
        except UserError:
            pass  # what is wrong with the words is found later (run_start.py)
        except SystemExit as ended:
            if not ended.code:
                if is_first_process():
                    print(said.getvalue(), end="", flush=True)
                raise
    return str(options.gradients or chosen)


def _status(lines: Sequence[Line]) -> int:
    """The exit status: 0 if nothing is wrong, 2 if a fault would stay in another attempt, else 1."""
    wrong = [line.finding for line in lines if line.finding.verdict == "wrong"]
    return 2 if any(finding.lasting for finding in wrong) else 1 if wrong else 0


def _write_json(file: str | None, rows: Sequence[RankPlace], lines: Sequence[Line]) -> None:
    """Write the findings as JSON if a file was given; raises UserError if that fails."""
    from megdet_hpc.files import write_json

    if not file:
        return
    findings = [{"where": line.where, **asdict(line.finding)} for line in lines]
    try:
        write_json(Path(file), {"ranks": [asdict(row) for row in rows], "findings": findings})
    except OSError as error:
        raise UserError(f"--json {file}: cannot be written: {error}") from error


def _report(options: argparse.Namespace, guard: StageGuard) -> int:
    """Join the world, examine it, print on rank 0. Returns the exit status, which is the same on every rank."""
    from megdet_hpc.doctor.examination import examine, examine_overlap
    from megdet_hpc.doctor.findings import summary, table
    from megdet_hpc.doctor.machine import rank_table
    from megdet_hpc.doctor.nccl_log import keep_log
    from megdet_hpc.parallel.start import started

    gradients = _gradients(options)
    nccl_log = keep_log() if not options.preflight and options.device != "cpu" else None
    guard.collective("start of the ranks' libraries")
    with started(device=options.device, gradients=gradients) as runtime:
        rows, lines = examine(options, runtime, guard, nccl_log)
        first = runtime.world.rank == 0
        if first:
            guard.local("printing the findings")
            if not options.preflight:
                print(f"{runtime.description}\n\n{rank_table(rows)}\n")
            print(table(lines), flush=True)
            _write_json(options.json, rows, lines)
        if not options.preflight:
            # last, since it may hang; all other findings are written by now
            more = examine_overlap(options, rows, lines, runtime, guard)
            lines += more
            if first and more:
                guard.local("printing the last findings")
                print(table(more))
                _write_json(options.json, rows, lines)
        if first:
            name = "preflight" if options.preflight else "doctor"
            print(f"{name} of {len(rows)} rank(s): {summary(lines)}", flush=True)
        guard.collective("leaving together: finish")
    return _status(lines)


def main(arguments: list[str] | None = None) -> None:
    """Entry point.

    Raises:
        SystemExit: something is wrong; status 1 or 2 on every rank.
    """
    options = parser().parse_args(sys.argv[1:] if arguments is None else arguments)
    limit = options.timeout
    if limit is None:
        limit = _PREFLIGHT_TIMEOUT if options.preflight else _TIMEOUT
    if not 0 <= limit < float("inf"):
        parser().error(f"--timeout {limit}: accepted are 0 (no limit) and more")
    if options.overlap_rounds < 0:
        parser().error(f"--overlap-rounds {options.overlap_rounds}: accepted are 0 (none) and more")
    launch = None
    with suppress(UserError):  # the start names the fault
        launch = find_launch()
    who = f"rank {launch.rank} of {launch.size} on {socket.gethostname()}" if launch else socket.gethostname()
    guard = StageGuard(who, limit)
    guard.local("loading torch and the package")
    status = _report(options, guard)
    guard.close()
    if status:
        raise SystemExit(status)


if __name__ == "__main__":
    main()
