"""Measure what the linear scaling rule assumes: `python -m megdet_hpc.variance_probe --config tiny --data.train DIR`.

The rule assumes that the variance of a mini-batch's gradient falls as 1/N (paper, section 3.1). This program measures
it
for a model and its data: at several N, for several normalizations, at the start and at a checkpoint (docs/recipe.md).
"""

from __future__ import annotations

import functools
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megdet_hpc.command_line import config_parser, parse_config
from megdet_hpc.config import Config, to_dict
from megdet_hpc.engine.arithmetic import set_arithmetic
from megdet_hpc.engine.deterministic import naming_operators
from megdet_hpc.engine.passes import NotFiniteError
from megdet_hpc.errors import UserError
from megdet_hpc.files import atomic_write, csv_text, write_json
from megdet_hpc.parallel.groups import BnGroups
from megdet_hpc.parallel.runtime import Runtime
from megdet_hpc.parallel.start import started
from megdet_hpc.report.drawing import can_draw
from megdet_hpc.solver.run_plan import check_heads
from megdet_hpc.variance_probe.draws import NORMS, GradientDraws, MeasuredNorm, Setting
from megdet_hpc.variance_probe.estimator import Variance, by_part, fit_exponent

DESCRIPTION = """Measure the variance of the mini-batch gradient by size of the mini-batch, per part of the detector.

One process emulates the N / data.images_per_rank ranks of each mini-batch, with their augmentation, box sampling and
BN groups. The weights do not change. The results are variance.csv, variance.json and variance.png in --output. They are
written after each size, so a program that is stopped (Ctrl-C) keeps what it has measured. --max_minutes is divided
among the sizes, which then get fewer draws."""

FILES = ("variance.csv", "variance.json", "variance.png")
# An image that is used twice makes two draws similar. Above this share the summary says so.
_REUSE_WORTH_TELLING = 0.02


def parse_sizes(text: str, images_per_rank: int) -> list[int]:
    """`16,32` as ascending sizes; raises UserError if one is no multiple of a rank's images."""
    try:
        sizes = sorted({int(part) for part in text.split(",")})
    except ValueError:
        sizes = [0]
    if any(size < 1 or size % images_per_rank for size in sizes):
        raise UserError(
            f"--batches {text}: accepted are numbers of images with commas between, each a multiple of "
            f"data.images_per_rank {images_per_rank}"
        )
    return sizes


def parse_norms(text: str) -> list[MeasuredNorm]:
    """`cgbn,cgbn:16,bn` as normalizations; raises UserError for another word or size."""
    norms = []
    for word in text.split(","):
        kind, _, size = word.strip().partition(":")
        if kind not in NORMS or (size and (kind != "cgbn" or not size.isdigit())):
            raise UserError(
                f"--norms {text}: {word!r}; accepted: {', '.join(NORMS)}, or cgbn:IMAGES for groups of that many images"
            )
        norms.append(MeasuredNorm(kind, int(size or 0)))
    return list(dict.fromkeys(norms))


def check_groups(config: Config, norms: Sequence[MeasuredNorm], batches: Sequence[int]) -> None:
    """Raise UserError where a size of cgbn does not divide a mini-batch into whole groups, or the heads' regions."""
    images = config.data.images_per_rank
    for norm in norms:
        for batch in batches:
            try:
                check_heads(config, BnGroups(batch // images, images, norm.size))
            except UserError as error:
                raise UserError(f"--norms {norm.label(images)} with --batches {batch}: {error}") from None


def run_probe(
    probe: GradientDraws,
    settings: list[Setting],
    draws: int,
    minutes: float | None,
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Measure all settings and fit the exponents.

    Args:
        probe: model and data.
        settings: what to measure.
        draws: largest number of draws of each setting.
        minutes: time for all settings; None: no limit.
        keep: function that stores the report. It is called after each setting, so a stopped run keeps its results.

    Returns:
        The report: `rows` of the table, `exponents`, and `failed`, settings whose losses are not finite.
    """
    end = None if minutes is None else time.monotonic() + 60 * minutes
    rows: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    lines: dict[tuple[str, str, str], list[Variance]] = {}
    report: dict[str, Any] = {"rows": rows, "exponents": [], "failed": failed}
    for index, setting in enumerate(settings):
        label = setting.norm.label(probe.config.data.images_per_rank)
        named = {"state": setting.state, "norm": label}
        deadline = None
        if end is not None:  # time is shared in proportion to images, so that all sizes get about equally many draws
            left = max(end - time.monotonic(), 0)
            deadline = time.monotonic() + left * setting.batch / sum(later.batch for later in settings[index:])
        try:
            moments = probe.measure(setting, draws, deadline)
        except NotFiniteError as error:
            failed.append({**named, "batch": setting.batch, "reason": str(error).splitlines()[0]})
            print(f"{setting.state}, {label}, {setting.batch} images: failed, {failed[-1]['reason']}", flush=True)
            keep(report)
            continue
        made = min(own.draws for own in moments.values())
        print(f"{setting.state}, {label}, {setting.batch} images: {made} draws", flush=True)
        if made < 2:
            continue
        bias = probe.reuse_bias(setting.batch, made)
        for part, found in by_part(setting.batch, moments).items():
            values = {f"variance_{key}": getattr(found, key) for key in ("error", "low", "high")}
            rows.append(
                {**named, "part": part, "batch": setting.batch, "draws": made, "variance": found.value, **values}
                | {"batch_times_variance": setting.batch * found.value, "squared_mean": found.squared_mean}
                | {"noise_scale": found.noise_scale, "reuse_bias": bias}
            )
            lines.setdefault((setting.state, label, part), []).append(found)
        report["exponents"] = [
            {"state": state, "norm": label, "part": part, **asdict(fit), "reading": fit.reading()}
            for (state, label, part), variances in lines.items()
            if (fit := fit_exponent(variances))
        ]
        keep(report)
    return report


def print_summary(report: dict[str, Any]) -> None:
    """Print the exponents with their meaning, and what makes them uncertain."""
    print(
        "\nvariance = constant / N ** exponent; 1 is what the linear scaling rule assumes (error: one standard error)"
    )
    for row in report["exponents"]:
        error = "" if row["error"] is None else f" +- {row['error']:.2f}"
        print(f"{row['state']:12s} {row['norm']:10s} {row['part']:9s} {row['value']:.2f}{error:8s}  {row['reading']}")
    reused = max((row["reuse_bias"] for row in report["rows"]), default=0.0)
    if reused > _REUSE_WORTH_TELLING:
        print(f"draws share images: the variance of the largest mini-batches may be up to {100 * reused:.0f} % too low")
    if report["failed"]:
        print(f"{len(report['failed'])} settings failed; see their lines above")


def write_report(report: dict[str, Any], config: Config, output: Path) -> None:
    """Write the report and, once there are rows, table and picture; raises UserError if the folder takes no files."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / FILES[1], {**report, "config": to_dict(config)})
        if not report["rows"]:
            return
        with atomic_write(output / FILES[0]) as file:
            file.write(csv_text(report["rows"]).encode())
        if can_draw():
            from megdet_hpc.variance_probe.figure import draw_variance

            draw_variance(report["rows"], output / FILES[2], f"Gradient variance, {config.model.backbone}")
    except OSError as error:
        raise UserError(f"output {output}: cannot be written ({error.strerror})") from error


def run(config: Config, options: Any, runtime: Runtime) -> None:
    """Check the arguments, measure, write and print, in one process.

    Raises:
        UserError: arguments do not fit, several ranks were started, or results exist.
    """
    if runtime.world.size > 1:
        raise UserError(f"variance_probe emulates the ranks in one process; {runtime.world.size} were started")
    if config.emulate.ranks or config.solver.accumulate > 1:
        raise UserError("emulate.ranks and solver.accumulate have no meaning here; give the mini-batches by --batches")
    if config.solver.precision == "float16":
        raise UserError("solver.precision is float16, whose loss scale drops draws; accepted here: float32, bfloat16")
    if options.draws < 2:
        raise UserError(f"--draws is {options.draws}; accepted: 2 or more")
    if options.skip_start and not options.checkpoint:
        raise UserError("--skip_start leaves nothing to measure without --checkpoint")
    output = Path(config.output)
    if (output / FILES[0]).exists():  # the table exists only if something was measured
        raise UserError(f"output {output} holds {FILES[0]} already; name another --output")
    images = config.data.images_per_rank
    batches = parse_sizes(options.batches, images)
    size = config.norm.images(images)
    norms = parse_norms(options.norms or f"cgbn,cgbn:{min(size, batches[0]) or batches[0]},bn,frozen")
    check_groups(config, norms, batches)
    probe = GradientDraws(
        config,
        Path(options.checkpoint) if options.checkpoint else None,
        start=not options.skip_start,
        device=runtime.device(config.device),
    )
    for batch in batches:
        probe.mini_batches(batch)
    for state in probe.states:
        for norm in norms:  # so a checkpoint that does not fit is refused before the work
            probe.model(Setting(state, norm, batches[0]))
    if not options.skip_start:
        model = probe.config.model
        print(f"start: begins with {model.weights or model.backbone_weights or 'random weights'}", flush=True)
    settings = [Setting(state, norm, batch) for state in probe.states for norm in norms for batch in batches]
    print(
        f"{len(settings)} settings, {options.draws * sum(setting.batch for setting in settings)} images at most",
        flush=True,
    )
    # so a folder that cannot be written is refused before the work
    write_report({"rows": [], "exponents": [], "failed": []}, config, output)
    keep = functools.partial(write_report, config=config, output=output)
    try:
        report = run_probe(probe, settings, options.draws, config.max_minutes, keep)
    except KeyboardInterrupt:
        print(f"stopped; the results so far are in {output}", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    if not report["rows"]:
        raise UserError(
            f"nothing was measured: {len(report['failed'])} of {len(settings)} settings failed, and a size needs two "
            f"draws with finite losses; --max_minutes is {config.max_minutes}"
        )
    print_summary(report)
    written = [str(output / name) for name in FILES if (output / name).exists()]
    print(f"result: {len(report['rows'])} rows in {', '.join(written)}")


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    parser = config_parser("megdet_hpc.variance_probe", DESCRIPTION)
    parser.add_argument("--checkpoint", type=str, default=None, help="Checkpoint at whose weights to measure too.")
    parser.add_argument("--skip_start", type=bool, default=False, help="true: measure only at the checkpoint.")
    parser.add_argument("--batches", type=str, default="16,32,64,128", help="Sizes of the mini-batch [images].")
    parser.add_argument("--draws", type=int, default=32, help="Mini-batches of each size [draws].")
    parser.add_argument(
        "--norms",
        type=str,
        default=None,
        help="Normalizations with commas between: cgbn (over the whole mini-batch), cgbn:IMAGES, bn, frozen, gn "
        "(default: cgbn, cgbn:NORM.SIZE but no more than the smallest size, bn, frozen).",
    )
    parser.set_defaults({"output": "runs/variance_probe"})
    config, options = parse_config(parser, sys.argv[1:] if arguments is None else arguments)
    with started(config.norm.transport, config.device) as runtime, naming_operators(config.deterministic):
        set_arithmetic(config)
        run(config, options, runtime)


if __name__ == "__main__":
    main()
