"""The report as a PDF: images/s and efficiency, the parts of an update, and the tables."""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # before pyplot: compute nodes have no display
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure

from megdet_hpc.data.page import plain
from megdet_hpc.files import atomic_write
from megdet_hpc.plan.cost import StepTime
from megdet_hpc.scaling_report.runs import PARTS, UNSPLIT, Scaling, SizeRun, efficiency
from megdet_hpc.scaling_report.text import facts, part_names, table_lines, verdict

_A4 = (8.27, 11.69)  # inches
_COLORS = dict(zip((*PARTS, UNSPLIT), ("#4c78a8", "#72b7b2", "#f58518", "#e45756", "#9d9da1", "#4c78a8"), strict=True))


def _places(axes: Axes, runs: list[SizeRun], unit: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks([run.nodes for run in runs], [str(run.nodes) for run in runs])
    axes.minorticks_off()
    axes.set_xlabel(unit)
    axes.margins(x=0.12)
    axes.grid(alpha=0.3)


def _draw_speed(axes: Axes, runs: list[SizeRun], expected: list[StepTime], unit: str) -> None:
    nodes = [run.nodes for run in runs]
    per_node = runs[0].images_per_s / runs[0].nodes
    axes.plot(nodes, [per_node * size for size in nodes], "--", color="gray", label="ideal")
    speeds = [run.global_batch / parts.total for run, parts in zip(runs, expected, strict=True)]
    axes.plot(nodes, speeds, ":", color="#e45756", marker="x", label="expected by plan")
    spread = [[run.images_per_s - run.least for run in runs], [run.most - run.images_per_s for run in runs]]
    axes.errorbar(nodes, [run.images_per_s for run in runs], yerr=spread, marker="o", capsize=3, label="measured")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("images/s")
    axes.legend(fontsize=8)
    _places(axes, runs, unit)


def _draw_efficiency(axes: Axes, runs: list[SizeRun], line: float, unit: str) -> None:
    values = [efficiency(runs, run) for run in runs]
    axes.plot([run.nodes for run in runs], values, marker="o")
    axes.axhline(line, color="#e45756", linestyle="--")
    axes.text(runs[0].nodes, line, f" the site's {line:.0%}", color="#e45756", va="bottom", fontsize=8)
    for run, value in zip(runs, values, strict=True):
        axes.annotate(f"{value:.0%}", (run.nodes, value), textcoords="offset points", xytext=(4, 5), fontsize=8)
    axes.set_ylim(0, max(1.1, *(1.1 * value for value in values)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_ylabel("efficiency")
    _places(axes, runs, unit)


def _draw_parts(axes: Axes, runs: list[SizeRun], unit: str) -> None:
    bottom = [0.0] * len(runs)
    for name in part_names(runs):
        shares = [run.share(name) for run in runs]
        axes.bar(range(len(runs)), shares, bottom=bottom, label=name, color=_COLORS[name], width=0.6)
        for place, (share, below) in enumerate(zip(shares, bottom, strict=True)):
            if share >= 0.04:
                axes.text(place, below + share / 2, f"{share:.0%}", ha="center", va="center", fontsize=8, color="white")
        bottom = [below + share for below, share in zip(bottom, shares, strict=True)]
    axes.set_xticks(range(len(runs)), [str(run.nodes) for run in runs])
    axes.set_xlabel(unit)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_ylabel("share of an update")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8)


def _kinds(scaling: Scaling) -> list[tuple[str, list[SizeRun]]]:
    return [(kind, runs) for kind, runs in (("weak", scaling.weak), ("strong", scaling.strong)) if runs]


def _speed_page(scaling: Scaling, expected: dict[str, list[StepTime]], line: float, title: str, unit: str) -> Figure:
    kinds = _kinds(scaling)
    figure, panels = plt.subplots(len(kinds) + 1, 2, figsize=_A4, height_ratios=[1.1, *[1] * len(kinds)], squeeze=False)
    figure.suptitle(plain(title), fontsize=13)
    words = [*facts(scaling), *(verdict(runs, line, kind) for kind, runs in kinds)]
    for empty in panels[0]:
        empty.axis("off")
    text = "\n\n".join(textwrap.fill(word, 105) for word in words)
    figure.text(0.07, 0.94, plain(text), va="top", fontsize=8.5)
    for row, (kind, runs) in enumerate(kinds, 1):
        _draw_speed(panels[row, 0], runs, expected[kind], unit)
        _draw_efficiency(panels[row, 1], runs, line, unit)
        for axes in panels[row]:
            axes.set_title(f"{kind} scaling", fontsize=10)
    figure.subplots_adjust(left=0.1, right=0.96, bottom=0.06, top=0.93, hspace=0.4, wspace=0.28)
    return figure


def _parts_page(scaling: Scaling, unit: str) -> Figure:
    kinds = _kinds(scaling)
    figure, panels = plt.subplots(len(kinds) + 1, 1, figsize=_A4, squeeze=False)
    for axes, (kind, runs) in zip(panels[:, 0], kinds, strict=False):
        _draw_parts(axes, runs, unit)
        axes.set_title(f"{kind} scaling: what the time of an update goes to", fontsize=10)
    tables = [line for kind, runs in kinds for line in (f"{kind} scaling", *table_lines(runs), "")]
    panels[-1, 0].axis("off")
    panels[-1, 0].text(0, 1, "\n".join(tables), family="monospace", fontsize=9, va="top")
    figure.subplots_adjust(left=0.1, right=0.78, bottom=0.05, top=0.95, hspace=0.35)
    return figure


def draw_report(scaling: Scaling, expected: dict[str, list[StepTime]], line: float, title: str, path: Path) -> None:
    """Write the two pages.

    Args:
        scaling: the measurements.
        expected: what the planner expects of them, by kind.
        line: least efficiency that the site wants [0 to 1].
        title: title of the report.
        path: PDF to write.

    Raises:
        OSError: it cannot be written.
    """
    unit = f"groups of processes on {scaling.one_host}" if scaling.one_host else "nodes"
    with atomic_write(path) as file, PdfPages(file) as pages:
        for figure in (_speed_page(scaling, expected, line, title, unit), _parts_page(scaling, unit)):
            pages.savefig(figure)
            plt.close(figure)
