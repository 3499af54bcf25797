"""`megdet link-check`: the plan's time of a step beside measured ones, over links of set delay and rate."""

from __future__ import annotations

import argparse
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import median

from megdet_hpc.command_line import config_parser, parse_config
from megdet_hpc.errors import UserError
from megdet_hpc.files import write_json
from megdet_hpc.link_check.compare import LinkRow, LinkSetting, compare
from megdet_hpc.link_check.nodes import LinkedNodes
from megdet_hpc.programs import ProgramParser, as_called_here, called_as

DESCRIPTION = """Compare the plan's time of a step with real ranks on nodes that are joined by slow links.

Each node is a network namespace of this host with one rank, which trains a detector on generated images under Open MPI
over TCP. The links get each delay and each rate in turn, by `tc netem`, or by a relay in user space where the kernel
has none. The prediction knows the step of ranks that send nothing, and what a message costs over links without delay.
It needs root, and cores for the ranks. Further options are the trainer's."""
_GIGABIT = 1e9 / 8  # bytes
_GOAL = 0.15  # error of a prediction


def _parser() -> argparse.ArgumentParser:
    parser = ProgramParser(
        prog=called_as("megdet_hpc.link_check"),
        description=as_called_here(DESCRIPTION),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", action="append", help="named config or YAML file, as for training; default: tiny")
    parser.add_argument("--nodes", type=int, default=2, help="nodes of one rank each; default: %(default)s [nodes]")
    parser.add_argument(
        "--delays-ms",
        type=float,
        nargs="+",
        default=[5, 2, 0.5, 0.1],
        help="delays of a link [ms]; default: 5 2 0.5 0.1",
    )
    parser.add_argument(
        "--rates-gbps",
        type=float,
        nargs="+",
        default=[0.1, 1, 10],
        help="rates of a node; default: 0.1 1 10 [Gbit/s]",
    )
    parser.add_argument("--exchanges", nargs="+", choices=("two_stage", "packed"), default=["two_stage", "packed"])
    parser.add_argument("--images-per-rank", type=int, default=2, help="images of a pass; default: %(default)s")
    parser.add_argument("--side", type=int, default=96, help="side of the images; default: %(default)s [pixels]")
    parser.add_argument("--seconds", type=float, default=10, help="time of a setting's steps; default: %(default)s [s]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the rows as JSON")
    return parser


_HEAD = (
    f"{'delay ms':>8} {'Gbit/s':>7} {'alone':>6} {'software':>8} {'gradients':>9} {'CGBN':>7} {'predicted':>9} "
    f"{'measured':>8} {'quickest':>8} {'steps':>5} {'error':>7} {'load':>5}"
)


def _line(row: LinkRow) -> str:
    """A row of the table [ms], under _HEAD."""
    parts = row.predicted
    return (
        f"{row.setting.delay * 1e3:>8g} {row.setting.rate / _GIGABIT:>7g} {row.alone * 1e3:>6.0f} "
        f"{row.software * 1e3:>8.2f} {parts.gradients * 1e3:>9.0f} {parts.cgbn * 1e3:>7.1f} {parts.total * 1e3:>9.0f} "
        f"{row.measured * 1e3:>8.0f} {row.quickest * 1e3:>8.0f} {row.steps:>5} {row.error:>+7.1%} {row.load:>5.1f}"
    )


def _check(options: argparse.Namespace) -> list[LinkSetting]:
    for name, values, least in (
        ("--nodes", [options.nodes], 2),
        ("--delays-ms", options.delays_ms, 0),
        ("--images-per-rank", [options.images_per_rank], 1),
        ("--side", [options.side], 32),
        ("--seconds", [options.seconds], 0),
    ):
        if bad := [value for value in values if not value >= least]:
            raise UserError(f"{name} {bad[0]:g}; accepted: {least} or more")
    if bad := [rate for rate in options.rates_gbps if not rate > 0]:
        raise UserError(f"--rates-gbps {bad[0]:g}; accepted: more than 0")
    delays = sorted(options.delays_ms, reverse=True)
    return [LinkSetting(delay / 1e3, rate * _GIGABIT) for delay in delays for rate in sorted(options.rates_gbps)]


def _run(options: argparse.Namespace, rest: list[str]) -> None:
    settings, rows = _check(options), []
    words = [word for name in options.config or ["tiny"] for word in ("--config", name)]
    words += [*rest, "--data.images_per_rank", str(options.images_per_rank), "--device", "cpu"]
    configs = {
        exchange: parse_config(config_parser("megdet_hpc.link_check", ""), [*words, "--norm.exchange", exchange])[0]
        for exchange in options.exchanges
    }
    for config in configs.values():
        if config.solver.accumulate != 1:
            raise UserError(
                f"solver.accumulate is {config.solver.accumulate}; accepted: 1, since a step here is one pass"
            )
    with LinkedNodes(options.nodes) as nodes:
        from megdet_hpc.bench.step import CATEGORIES
        from megdet_hpc.plan.job_plan import Nodes, TrainingSet, plan_job
        from megdet_hpc.plan.model_size import measure_model
        from megdet_hpc.plan.work import work_of

        print(f"{options.nodes} nodes of one rank, joined by {nodes.kind}", flush=True)
        for exchange, config in configs.items():
            plan = plan_job(config, Nodes(options.nodes, 1), TrainingSet(1000, CATEGORIES, "generated"))
            work = work_of(plan, measure_model(config, CATEGORIES), 1.0, None, here=True)
            own = ["--norm.exchange", exchange, "--side", str(options.side), "--seconds", str(options.seconds)]
            found = compare(nodes, [*words, *own], work, settings)
            rows += [(exchange, row) for row in found]
            print(
                f"norm.exchange {exchange}, solver.gradients {config.solver.gradients}; long messages "
                f"{found[0].long_rate / _GIGABIT:.2f} Gbit/s without limit; times in ms",
                _HEAD,
                *map(_line, found),
                sep="\n",
                flush=True,
            )
            if options.json:  # after each exchange, so that a run that is cut keeps what it measured
                done = [{"exchange": name, **asdict(one), "error": one.error} for name, one in rows]
                write_json(options.json, {"rows": done})
    errors = sorted(abs(row.error) for _, row in rows)
    close = sum(error < _GOAL for error in errors)
    print(f"error: median {median(errors):.1%}, most {errors[-1]:.1%}; {close} of {len(errors)} below {_GOAL:.0%}")
    if options.json:
        print(f"wrote {options.json}")


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    parser = _parser()
    options, rest = parser.parse_known_args(sys.argv[1:] if arguments is None else arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the namespaces are removed then too
    try:
        _run(options, rest)
    except UserError as error:
        parser.exit(2, f"{parser.prog}: error: {as_called_here(str(error))}\n")


if __name__ == "__main__":
    main()
