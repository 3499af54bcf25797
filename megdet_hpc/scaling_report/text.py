"""The report in Markdown, and the table that the job prints."""

from __future__ import annotations

from collections.abc import Sequence

from megdet_hpc.plan.cost import StepTime
from megdet_hpc.plan.network import Network
from megdet_hpc.scaling_report.runs import PARTS, UNSPLIT, Scaling, SizeRun, efficiency

_KEYS = (
    "model.detector",
    "model.backbone",
    "data.images_per_rank",
    "data.short_sides",
    "data.train",
    "norm.kind",
    "norm.size",
    "norm.transport",
    "solver.gradients",
    "solver.precision",
)


def table_lines(runs: list[SizeRun]) -> list[str]:
    """Images/s and efficiency by number of nodes, as plain text."""
    lines = [f"{'nodes':>5} {'ranks':>5} {'images/s':>10} {'per node':>10} {'efficiency':>10}"]
    for run in runs:
        lines.append(
            f"{run.nodes:5d} {run.ranks:5d} {run.images_per_s:10.1f} {run.images_per_s / run.nodes:10.1f} "
            f"{efficiency(runs, run):10.1%}"
        )
    return lines


def verdict(runs: list[SizeRun], line: float, kind: str) -> str:
    """A sentence on the largest number of nodes at the site's line.

    Args:
        runs: one kind of scaling.
        line: least efficiency that the site wants [0 to 1].
        kind: weak or strong.
    """
    size = 0
    for run in runs:
        if efficiency(runs, run) < line:
            break
        size = run.nodes
    beyond = next((run for run in runs if run.nodes > size), None)
    text = f"{kind.capitalize()} scaling stays at {100 * line:g}% or above up to {size} node(s)"
    return (
        f"{text}; {beyond.nodes} reach {_apart(efficiency(runs, beyond), line)}."
        if beyond
        else f"{text}, the largest size."
    )


def _apart(value: float, line: float) -> str:
    """A share in percent with one decimal, or as many as tell it from the line."""
    digits = next((n for n in range(1, 9) if round(100 * value, n) != round(100 * line, n)), 1)
    return f"{value:.{digits}%}"


def part_names(runs: Sequence[SizeRun]) -> list[str]:
    """The parts of an update that these runs tell apart."""
    found = {name for run in runs for name in run.parts}
    return [name for name in (*PARTS[:1], UNSPLIT, *PARTS[1:]) if name in found]


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table of Markdown."""
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]


def facts(scaling: Scaling) -> list[str]:
    """What was run, where, and how it was measured."""
    largest, smallest = scaling.weak[-1], scaling.weak[0]
    config = largest.config
    rows = sorted({run.rows for run in (*scaling.weak, *scaling.strong)})
    number = f"{rows[0]} to {rows[-1]}" if len(rows) > 1 else f"{rows[0]}"
    settings = ", ".join(f"{key} {config[key]}" for key in _KEYS if config.get(key) is not None)
    lines = [
        f"{largest.ranks // largest.nodes} rank(s) a node, {len(scaling.weak)} sizes of {smallest.nodes} to "
        f"{largest.nodes} nodes; device: {largest.device or 'not recorded'}.",
        f"Configuration: {settings}.",
        f"Each run is a short training. images/s is the median of {number} row(s) of the log after the warm-up, "
        "by the time of the slowest rank. Efficiency is images/s of a node relative to the smallest run of the table.",
    ]
    if scaling.one_host:
        lines.insert(
            0,
            f"All ranks ran on one host, {scaling.one_host}: a node stands for a group of processes there. The runs "
            "share its cores, and say nothing of a network.",
        )
    return lines


def _speeds(runs: list[SizeRun], expected: list[StepTime]) -> list[str]:
    head = [
        "nodes",
        "ranks",
        "mini-batch",
        "images/s (least, most)",
        "update, s",
        "efficiency",
        "`plan` expects, images/s",
    ]
    rows = []
    for run, parts in zip(runs, expected, strict=True):
        rows.append(
            [
                str(run.nodes),
                str(run.ranks),
                str(run.global_batch),
                f"{run.images_per_s:.1f} ({run.least:.1f}, {run.most:.1f})",
                f"{run.step_s:.3f}",
                f"{efficiency(runs, run):.1%}",
                f"{run.global_batch / parts.total:.1f}",
            ]
        )
    return markdown_table(head, rows)


def _shares(runs: list[SizeRun], expected: list[StepTime]) -> list[str]:
    names = part_names(runs)
    rows = []
    for run, parts in zip(runs, expected, strict=True):
        estimate = [parts.compute, parts.cgbn, parts.gradients]
        rows.append(
            [
                str(run.nodes),
                *(f"{run.share(name):.1%}" if name in run.parts else "-" for name in names),
                ", ".join(f"{seconds / parts.total:.1%}" for seconds in estimate),
            ]
        )
    return markdown_table(["nodes", *names, "`plan`: compute, layers' messages, gradients"], rows)


def report_text(
    scaling: Scaling, expected: dict[str, list[StepTime]], network: Network, line: float, title: str, command: str
) -> str:
    """The whole report.

    Args:
        scaling: the measurements.
        expected: what the planner expects of them, by kind.
        network: its assumptions.
        line: least efficiency that the site wants [0 to 1].
        title: title of the report.
        command: command that repeats it.
    """
    lines = [f"# {title}", ""]
    for fact in facts(scaling):
        lines += [fact, ""]
    for kind, runs in (("weak", scaling.weak), ("strong", scaling.strong)):
        what = "the images of a rank stay" if kind == "weak" else "the mini-batch stays"
        lines += [f"## {kind.capitalize()} scaling: {what}", ""]
        if not runs:
            lines += ["Not measured.", ""]
            continue
        lines += [*_speeds(runs, expected[kind]), "", verdict(runs, line, kind), ""]
        lines += ["Shares of an update:", "", *_shares(runs, expected[kind]), ""]
    lines += [
        "## How to read it",
        "",
        "- compute: passes, update and all else that a rank does by itself, mean over ranks. data: waiting for "
        "the loader.",
        "- layers' messages: cross-GPU batch normalization and the sums of the losses. gradients: waiting for their "
        "sum after the backward pass; what travels during it costs nothing here.",
        "- stragglers: waiting for the rank with most work of its own, beyond the mean; taken out of both "
        "kinds of messages.",
        "- On GPUs messages are only queued, so that compute and messages are one part.",
        f"- `plan` is a model: the compute of the smallest run, and messages over this network, assumed: {network}. "
        "It knows no waiting for data and no stragglers.",
        "",
        f"Made by `{command}`.",
    ]
    return "\n".join(lines) + "\n"
