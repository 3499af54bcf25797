"""One plot per grid: AP over the mini-batch, the BN size, the epoch, the time of an image; time over ranks."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: compute nodes have no display
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from megdet_hpc.evaluation.coco import metric_text
from megdet_hpc.files import atomic_write
from megdet_hpc.study.outcome import FINISHED
from megdet_hpc.study.scatter import scores_of

Row = dict[str, Any]
_CLOSE = 0.6  # least over most AP from which a plot shows the APs alone, without the room down to 0
_NORMS = {
    "cgbn": "with CGBN",
    "frozen": "without (fixed statistics)",
    "one rank": "without (statistics of one rank)",
    "bn": "without (statistics of each rank)",
}


def draw(grid: str, rows: list[Row], title: str, picture: Path, score: str = "AP") -> None:
    """Draw a grid's rows.

    Args:
        grid: key of GRIDS.
        rows: rows that report.rows_of gives.
        title: above the plot.
        picture: PNG to write.
        score: name of what the column AP holds.
    """
    figure, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    figure.suptitle("\n".join(textwrap.wrap(title, 90)), fontsize=10)
    finished = [row for row in rows if row["status"] in FINISHED]
    how = {"batch": _batch, "bn_size": _bn_size, "epochs": _epochs, "warmup": _warmup, "ranks": _ranks}
    how |= {
        "modules": _modules,
        "claim": _claim,
        "warmups": _warmups,
        "rates": _rates,
        "solvers": _solvers,
        "causes": _causes,
    }
    how[grid](axes, finished)
    axes.set_ylabel(axes.get_ylabel().replace("box AP", f"box {score}"))
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    with atomic_write(picture) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)


def _line(axes: Axes, rows: list[Row], key: str, label: str, color: str, style: str = "-") -> None:
    """Draw AP over a column; a missing AP is a gap. A failed run is a cross at its AP, or at 0 if it has none.

    Of several seeds the line joins the means, and each run is a dot.
    """
    score = [math.nan if row["AP"] is None else row["AP"] for row in rows]
    if any("seed" in row for row in rows):
        axes.plot([row[key] for row in rows], score, "o", color=color, markersize=4, alpha=0.6)
        places = list(dict.fromkeys(row[key] for row in rows))
        scored = [scores_of([row for row in rows if row[key] == place]) for place in places]
        means = [fmean(own) if own else math.nan for own in scored]
        axes.plot(places, means, style, marker="_", markersize=14, color=color, label=label)
    else:
        axes.plot([row[key] for row in rows], score, style, marker="o", color=color, label=label)
    failed = [row for row in rows if row["status"] == "failed"]
    axes.plot([r[key] for r in failed], [r["AP"] or 0.0 for r in failed], "x", color="black", markersize=11, zorder=3)


def _scale(axes: Axes, values: list[int], label: str) -> None:
    """Make the axis logarithmic to base 2, and label each value."""
    ticks = sorted(set(values))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label)
    _heights(axes)


def _heights(axes: Axes) -> None:
    """Label the axis of AP, which begins at 0 unless runs that all did well could not be told apart so."""
    axes.set_ylabel("box AP at the end")
    least, most = axes.dataLim.ymin, axes.dataLim.ymax
    if not math.isfinite(most):  # no run has an AP
        return
    if least > _CLOSE * most:
        room = max(0.5 * (most - least), 0.01)
        axes.set_ylim(least - room, most + room)
        axes.set_ylabel("box AP at the end; the axis does not begin at 0")
    else:
        axes.set_ylim(-0.02, 1.06 * most)


def _batch(axes: Axes, rows: list[Row]) -> None:
    for norm, color in zip(dict.fromkeys(row["norm"] for row in rows), ("tab:blue", "tab:red"), strict=False):
        for rate, style in ((1.0, "-"), (0.5, "--")):
            own = [row for row in rows if (row["norm"], row["rate"]) == (norm, rate)]
            label = f"{_NORMS[norm]}, {'full' if rate == 1 else 'half'} rate"
            _line(axes, own, "batch", label, color, style)
    _scale(axes, [row["batch"] for row in rows], "mini-batch [images]; crosses: failed")


def _bn_size(axes: Axes, rows: list[Row]) -> None:
    _line(axes, rows, "bn_size", f"mini-batch {rows[0]['batch']}", "tab:blue")
    _scale(axes, [row["bn_size"] for row in rows], "images that share batch statistics; crosses: failed")


def _epochs(axes: Axes, rows: list[Row]) -> None:
    colors = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    seeds = {row.get("seed") for row in rows}
    for batch, color in zip(dict.fromkeys(row["batch"] for row in rows), colors, strict=False):
        of_batch = [row for row in rows if row["batch"] == batch and row["epoch"] is not None]
        runs = [[row for row in of_batch if row.get("seed") == seed] for seed in seeds]
        label = f"mini-batch {batch}"
        for own in filter(None, runs):
            axes.plot([row["epoch"] for row in own], [row["AP"] for row in own], marker="o", color=color, label=label,
                      markersize=4 if len(seeds) > 1 else 6, alpha=0.7 if len(seeds) > 1 else 1.0)  # fmt: skip
            label = "_"
    axes.set_xlabel("epoch")
    axes.set_ylabel("box AP")


def _warmup(axes: Axes, rows: list[Row]) -> None:
    """A bar for the mean of each setting, and its seeds as dots if there are several."""
    several = any("seed" in row for row in rows)
    names: list[str] = []
    heights, labels, colors = [], [], []
    for norm, warm in dict.fromkeys((row["norm"], row["warmup"]) for row in rows):
        own = [row for row in rows if (row["norm"], row["warmup"]) == (norm, warm)]
        scores, failed = scores_of(own), sum(row["status"] == "failed" for row in own)
        if several:
            axes.plot([len(names)] * len(scores), scores, "o", color="black", markersize=4, zorder=3)
        mean = fmean(scores) if scores else None
        lost = [f"{failed} of {len(own)} failed" if several else "failed"] if failed else []
        names.append(f"{_NORMS[norm]}\n{'warmup' if warm else 'no warmup'}")
        heights.append(mean or 0.0)
        labels.append(", ".join(([] if failed and mean is None else [metric_text(mean)]) + lost))
        colors.append("tab:blue" if norm == "cgbn" else "tab:red")
    axes.bar_label(axes.bar(names, heights, color=colors), labels)
    axes.set_ylabel(f"box AP at the end, mini-batch {rows[0]['batch']}")
    axes.tick_params(axis="x", labelsize=8)


def _claim(axes: Axes, rows: list[Row]) -> None:
    for norm, color in (("cgbn", "tab:blue"), ("frozen", "tab:red"), ("one rank", "tab:orange")):
        if own := [row for row in rows if row["norm"] == norm]:
            _line(axes, own, "batch", _NORMS[norm], color)
    _scale(axes, [row["batch"] for row in rows], "mini-batch [images]; crosses: failed")


def _warmups(axes: Axes, rows: list[Row]) -> None:
    forms = [(form, [row for row in rows if row["form"] == form]) for form in ("linear", "exp")]
    without = [row for row in rows if row["form"] == "none"]
    for (form, own), color in zip(forms, ("tab:blue", "tab:orange"), strict=True):
        _line(axes, [*without, *own], "epochs", form, color)
    axes.set_xlabel(f"length of the warmup [epochs]; mini-batch {rows[0]['batch']}; crosses: failed")
    _heights(axes)


def _rates(axes: Axes, rows: list[Row]) -> None:
    for batch, color in zip(dict.fromkeys(row["batch"] for row in rows), ("tab:green", "tab:blue"), strict=False):
        _line(axes, [row for row in rows if row["batch"] == batch], "rate", f"mini-batch {batch}", color)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("rate after the warmup [per update]; crosses: failed")
    _heights(axes)


def _solvers(axes: Axes, rows: list[Row]) -> None:
    colors = {"sgd": "tab:blue", "agvm": "tab:red", "lars": "tab:orange", "lamb": "tab:green"}
    styles = dict(zip(dict.fromkeys(row["batch"] for row in rows), ("-.", "-", "--"), strict=False))
    for batch, style in styles.items():
        for solver, color in colors.items():
            own = [row for row in rows if (row["batch"], row["solver"]) == (batch, solver)]
            _line(axes, sorted(own, key=lambda row: row["rate"]), "rate", "_", color, style)
    for solver in dict.fromkeys(row["solver"] for row in rows):
        axes.plot([], [], color=colors[solver], label=solver)
    for batch, style in styles.items():
        axes.plot([], [], style, color="black", label=f"mini-batch {batch}")
    axes.set_xscale("log")
    axes.set_xlabel("rate after the warmup [per update], which differs in kind between solvers; crosses: failed")
    _heights(axes)


def _causes(axes: Axes, rows: list[Row]) -> None:
    named = [{**row, "place": f"{row['batch']}\n{row['case'].replace(', ', ',' + chr(10))}"} for row in rows]
    _line(axes, named, "place", "_", "tab:blue", " ")
    axes.tick_params(axis="x", labelsize=7)
    axes.set_xlabel("mini-batch and what differs; crosses: failed")
    _heights(axes)


def _ranks(axes: Axes, rows: list[Row]) -> None:
    """Time over ranks. Of several seeds the line joins the means, and each run is a dot."""
    ranks = sorted({row["ranks"] for row in rows})
    times = {number: [row["train_s"] for row in rows if row["ranks"] == number] for number in ranks}
    means = [fmean(times[number]) for number in ranks]
    several = any("seed" in row for row in rows)
    if several:
        axes.plot([row["ranks"] for row in rows], [row["train_s"] for row in rows], "o", color="tab:blue", alpha=0.6)
    axes.plot(ranks, means, marker="_" if several else "o", color="tab:blue", label="seconds of one epoch")
    _scale(axes, ranks, "real ranks")
    axes.set_ylabel("training time of one epoch [s]")
    axes.set_ylim(0, 1.15 * max(row["train_s"] for row in rows))
    axes.margins(x=0.15)
    for number, mean in zip(ranks, means, strict=True):
        steps = max(row["steps"] for row in rows if row["ranks"] == number)
        axes.annotate(f"{steps} steps", (number, mean), (0, 8), textcoords="offset points")


def _modules(axes: Axes, rows: list[Row]) -> None:
    """Draw AP over the time of an image; the front is a staircase, its detectors named."""
    scored = [row for row in rows if row["pareto"] is not None]
    heads, backbones = (sorted({row[key] for row in scored}) for key in ("head", "backbone"))
    cycle = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    colors = {head: cycle[number % len(cycle)] for number, head in enumerate(heads)}
    markers = {backbone: "osD^vP*"[number % 7] for number, backbone in enumerate(backbones)}
    for row in scored:
        axes.plot(row["ms_per_image"], row["AP"], markers[row["backbone"]], color=colors[row["head"]], alpha=0.8)
    for head, color in colors.items():
        axes.plot([], [], "-", linewidth=5, color=color, label=head)
    for backbone, marker in markers.items():
        axes.plot([], [], marker, color="gray", label=backbone)
    front = sorted((row for row in scored if row["pareto"]), key=lambda row: row["ms_per_image"])
    times, scores = [row["ms_per_image"] for row in front], [row["AP"] for row in front]
    axes.step(times, scores, "k--", where="post", linewidth=1, label="Pareto front", zorder=0)
    for row in front:
        text = f"{row['backbone']} {row['head']} {row['levels']} {row['input']}"
        axes.annotate(text, (row["ms_per_image"], row["AP"]), (4, 4), textcoords="offset points", fontsize=6)
    failed = sum(row["status"] == "failed" for row in rows)
    axes.set_xlabel(f"training time of an image [ms]; {failed} failed runs are not drawn")
    axes.set_ylabel("box AP at the end")
    axes.margins(x=0.2, y=0.1)
