"""Plan a run before queueing it: `python -m megdet_hpc.plan --config megdet_r50_fpn_256 --ranks 128`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megdet_hpc.errors import UserError
from megdet_hpc.plan.describe import (
    describe_cost,
    describe_memory,
    describe_run,
    hours_of,
    marks,
    time_of,
)
from megdet_hpc.plan.failures import describe_saving
from megdet_hpc.plan.job_plan import JobPlan, Nodes, plan_job
from megdet_hpc.plan.network import NETWORKS, Network, choose_network
from megdet_hpc.plan.noise import describe_noise, describe_probes
from megdet_hpc.plan.options import checked_plan, rank_options, refuse, require_number, training_arguments
from megdet_hpc.plan.risks import warnings_of
from megdet_hpc.plan.run_time import (
    RESTART_MINUTES,
    add_time_options,
    checkpoint_bytes,
    checkpoint_time,
    describe_run_time,
    restart_minutes,
    run_time,
)
from megdet_hpc.plan.speed import images_per_second
from megdet_hpc.programs import require_drawing

DESCRIPTION = """Print what a training run would do and cost on a number of ranks, with warnings of known risks.

It needs no GPU, MPI or data. Warnings go to standard error. Exit status: 0; 2 for a run that would be refused."""


_ESTIMATES = (
    *("--images-per-second", "--measured", "--cores-per-node", "--queue-limit", "--restart-minutes", "--val-images"),
    *("--evaluation-seconds", "--write-speed", "--write-seconds", "--mtbf-hours", "--from", "--probe", "--png"),
)
"""The options of an estimate, which --validate does not make."""


def _parser() -> argparse.ArgumentParser:
    parser = rank_options("megdet_hpc.plan", DESCRIPTION)
    speed = parser.add_mutually_exclusive_group()
    speed.add_argument(
        "--images-per-second", type=float, help="speed of one GPU alone, for the estimate of hours [images/s]"
    )
    speed.add_argument("--measured", metavar="RUN", help="take the speed from metrics.jsonl of this run")
    parser.add_argument(
        "--network", choices=list(NETWORKS), help="preset of assumptions; default: ib-hdr, with --validate one-host-cpu"
    )
    parser.add_argument("--alpha-us", type=float, help="latency of a hop between nodes [microseconds]")
    parser.add_argument("--bandwidth-gbps", type=float, help="bandwidth of a node to the others [Gbit/s]")
    parser.add_argument("--node-alpha-us", type=float, help="latency of a hop inside a node [microseconds]")
    parser.add_argument("--node-bandwidth-gbps", type=float, help="bandwidth of a rank inside its node [Gbit/s]")
    parser.add_argument("--cores-per-node", type=int, help="cores that the ranks of a CPU node share [cores]")
    parser.add_argument("--queue-limit", type=float, metavar="HOURS", help="cut the run into jobs of this length [h]")
    parser.add_argument(
        "--restart-minutes",
        type=float,
        help=f"time that each job loses to its start and end [min]; default: {RESTART_MINUTES:g}, an assumption",
    )
    add_time_options(parser)
    parser.add_argument(
        "--mtbf-hours",
        type=float,
        metavar="HOURS",
        help="suggest a time between checkpoints for nodes that fail this often; the time of one node [h]",
    )
    parser.add_argument(
        "--write-seconds",
        type=float,
        metavar="SECONDS",
        help="time of a checkpoint; default: from --write-speed if given, else the longest one of --measured [s]",
    )
    parser.add_argument(
        "--from",
        dest="noise_run",
        metavar="RUN",
        help="run with solver.noise_every: say beyond which mini-batch more GPUs no longer pay",
    )
    parser.add_argument(
        "--probe",
        type=Path,
        metavar="DIR",
        help="results of megdet variance-probe to put beside the answer of --from; default: those in RUN",
    )
    parser.add_argument("--png", metavar="FILE", help="file for a plot of the learning rate")
    parser.add_argument(
        "--validate",
        type=int,
        nargs="+",
        metavar="RANKS",
        help="measure the error of the estimate: train some steps on these numbers of ranks here, on data.train",
    )
    return parser


def _network(options: argparse.Namespace, default: str = "ib-hdr") -> Network:
    return choose_network(
        options.network or default,
        alpha_us=options.alpha_us,
        bandwidth_gbps=options.bandwidth_gbps,
        node_alpha_us=options.node_alpha_us,
        node_bandwidth_gbps=options.node_bandwidth_gbps,
    )


def _costs(options: argparse.Namespace, plan: JobPlan) -> list[str]:
    """Lines about memory, and about hours if a speed is known."""
    network, speed = _network(options), images_per_second(options, plan)
    require_number("--restart-minutes", restart_minutes(options), least=True)
    if options.queue_limit is not None:
        require_number("--queue-limit", options.queue_limit)
    if options.cores_per_node is not None and options.cores_per_node < 1:
        raise UserError(f"--cores-per-node {options.cores_per_node}; accepted: 1 or more")
    try:
        from megdet_hpc.plan.model_size import measure_model
    except ImportError as error:
        return [f"hours, memory  left out: counting the model's parameters needs torch ({error})"]
    from megdet_hpc.plan.work import work_of

    size = measure_model(plan.config, plan.training_set.num_categories)
    num_bytes, lines = checkpoint_bytes(size.state_bytes, size.trained), describe_memory(plan, size)
    if plan.config.emulate.ranks:
        _saving(options, plan, num_bytes, None)
        return [*lines, "hours          left out: an emulated run sends nothing; its time is that of its passes"]
    if speed is None:
        also = ", and so are the jobs of --queue-limit" if options.queue_limit is not None else ""
        lines += [f"hours          left out{also}: give --images-per-second of one GPU, or --measured RUN"]
        return [*lines, *_saving(options, plan, num_bytes, None)]
    work = work_of(plan, size, speed[0], options.cores_per_node)
    lines += ["", *describe_cost(plan, work, network, speed[1])]
    time = run_time(
        options,
        plan,
        training_hours=hours_of(plan, work, network),
        images_per_second=speed[0] / work.crowding(plan.nodes.num_ranks, plan.nodes.ranks_per_node),
        num_bytes=num_bytes,
    )
    deferred = plan.config.evaluation.mode == "deferred"
    lines += ["", *describe_run_time(time, deferred=deferred, limit=options.queue_limit)]
    return [*lines, *_saving(options, plan, num_bytes, time_of(plan, work, network).total)]


def _saving(options: argparse.Namespace, plan: JobPlan, num_bytes: int, step_seconds: float | None) -> list[str]:
    """Lines about the time between checkpoints, if --mtbf-hours asks for them.

    Raises:
        UserError: the time of a checkpoint is not known, or is given without --mtbf-hours.
    """
    if options.mtbf_hours is None:
        if options.write_seconds is not None and step_seconds is None:
            raise UserError(
                f"--write-seconds {options.write_seconds:g} is used with --mtbf-hours, or beside the hours of "
                "--images-per-second and --measured, which are missing"
            )
        return []
    require_number("--mtbf-hours", options.mtbf_hours)
    time = checkpoint_time(options, num_bytes)
    if not time.known:
        raise UserError(
            "--mtbf-hours needs the time of a checkpoint: --write-seconds SECONDS, --write-speed GB/S, or "
            "--measured RUN of a run that saved one before its last row of metrics"
        )
    nodes = plan.nodes.num_nodes
    return ["", *describe_saving(options.mtbf_hours, nodes, time, restart_minutes(options), step_seconds)]


def _draw(plan: JobPlan, picture: Path) -> None:
    from megdet_hpc.plan.figure import draw_schedule

    rates = [plan.schedule.lr_at(step) for step in range(plan.total_steps)]
    title = f"learning rate, global batch {plan.epoch.global_batch}"
    try:
        draw_schedule(rates, [step for step, _ in marks(plan)[1:-1]], picture, title)
    except OSError as error:
        raise UserError(f"--png {picture}: cannot be written ({error.strerror})") from error


def _validate(options: argparse.Namespace, plan: JobPlan, rest: list[str]) -> None:
    from megdet_hpc.parallel.cores import usable_cores
    from megdet_hpc.plan.model_size import measure_model
    from megdet_hpc.plan.validate import predict_and_measure
    from megdet_hpc.plan.work import work_of

    for option in _ESTIMATES:
        if getattr(options, "noise_run" if option == "--from" else option[2:].replace("-", "_")) is not None:
            raise UserError(f"{option} does not go with --validate, which measures; accepted: one of the two")
    if not Path(plan.config.data.train).is_dir():
        raise UserError(f"--validate trains on data.train, and {plan.config.data.train} does not exist")
    if min(options.validate) < 1:
        raise UserError(f"--validate {min(options.validate)}; accepted: numbers of ranks, 1 or more")
    groups = {
        ranks: plan_job(plan.config, Nodes(ranks, ranks), plan.training_set).ranks_per_statistics if ranks > 1 else 1
        for ranks in options.validate
    }
    size = measure_model(plan.config, plan.training_set.num_categories)
    network = _network(options, "one-host-cpu")
    print(f"{usable_cores()} core(s); network {network}")
    heads = {
        "ranks": 6,
        "compute ms": 11,
        "gradients": 10,
        "CGBN": 8,
        "predicted": 10,
        "measured": 9,
        "error": 7,
        "load": 5,
    }
    print(" ".join(head.rjust(width) for head, width in heads.items()), flush=True)
    for row in predict_and_measure(
        training_arguments(options, rest), groups, work_of(plan, size, 1.0, None, here=True), network
    ):
        parts = row.predicted
        print(
            f"{row.ranks:>6} {parts.compute * 1e3:>11.0f} {parts.gradients * 1e3:>10.1f} {parts.cgbn * 1e3:>8.2f} "
            f"{parts.total * 1e3:>10.0f} {row.measured * 1e3:>9.0f} {row.error:>+7.1%} {row.load:>5.1f}",
            flush=True,
        )


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    parser = _parser()
    options, rest = parser.parse_known_args(sys.argv[1:] if arguments is None else arguments)
    try:
        plan = checked_plan("megdet_hpc.plan", options, rest)
        if options.png:
            if Path(options.png).is_file():
                raise UserError(f"--png {options.png}: exists already; name another file or delete it")
            require_drawing(f"--png {options.png}")
        if options.validate:
            _validate(options, plan, rest)
            return
        # all refusals come before the first printed line
        lines = [*describe_run(plan), "", *_costs(options, plan)]
        if options.probe and not options.noise_run:
            raise UserError(f"--probe {options.probe} stands beside a run's own answer; name the run by --from RUN")
        if options.noise_run:
            run = Path(options.noise_run)
            lines += ["", *describe_noise(run, plan.epoch.global_batch), *describe_probes(run, options.probe)]
        if options.png:
            _draw(plan, Path(options.png))
            lines += ["", f"wrote {options.png}"]
    except UserError as error:
        refuse(parser, error)
    print("\n".join(lines), flush=True)
    for warning in warnings_of(plan):
        print(f"warning: {warning}", file=sys.stderr)


if __name__ == "__main__":
    main()
