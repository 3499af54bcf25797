"""`python -m megdet_hpc.study NAME... --scale tiny`: the paper's comparisons at a size that suits this machine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megdet_hpc.data.shard_format import MANIFEST_NAME
from megdet_hpc.errors import UserError, file_error
from megdet_hpc.programs import ProgramParser, as_called_here, called_as, errors_in_one_line
from megdet_hpc.study import data
from megdet_hpc.study.grids import (
    GRIDS,
    PAPER_GRIDS,
    Cell,
    Run,
    begins_from_scratch,
    distinct,
    estimated_seconds,
    expand,
    named_like,
    peak_rate,
    pretraining_run,
    queue,
)
from megdet_hpc.study.outcome import read_outcome
from megdet_hpc.study.readings import MOST_SEEDS
from megdet_hpc.study.report import score_of, sentences_of, tables_of, write_reports
from megdet_hpc.study.runner import EXIT_UNFINISHED, Inputs, Runner, only_one
from megdet_hpc.study.scales import SCALES, Scale, scale_named
from megdet_hpc.study.scratch import (
    LINES,
    NUM_SEEDS,
    SCRATCH_SCALES,
    TEXT,
    StudiedDetector,
    scratch_cells,
    scratch_scale,
    scratch_seconds,
)
from megdet_hpc.study.scratch import (
    NAME as SCRATCH,
)
from megdet_hpc.study.scratch_report import write_scratch_reports

_EPILOG = """The same command continues a study that was stopped (by Ctrl-C, SIGUSR1 or --max-minutes, exit status 75).
A run that diverges is a result and is marked "failed". A run that breaks is marked "error" and tried again."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    grids = "; ".join(f"{name}: {text}" for name, text in {**GRIDS, SCRATCH: TEXT}.items())
    top = ProgramParser(prog=called_as("megdet_hpc.study"), description=as_called_here(__doc__ or ""), epilog=_EPILOG)
    top.add_argument("names", nargs="*", metavar="NAME", help=f"all (the paper's), or some of: {grids}")
    scales = f"{', '.join(SCALES)}; {SCRATCH}: {', '.join(SCRATCH_SCALES)}"
    top.add_argument("--scale", default="tiny", help=f"{scales} (default: tiny)")
    top.add_argument("--output", type=Path, default=Path("runs/study"), metavar="DIR", help="default: runs/study")
    top.add_argument("--jobs", type=int, default=2, metavar="N", help="runs at a time, one core each (default: 2)")
    top.add_argument("--max-minutes", type=float, metavar="M", help="save and stop within this time")
    top.add_argument("--data", type=Path, metavar="DIR", help="bccd, voc, coco: folder with the packs train and val")
    top.add_argument(
        "--backbone-weights", type=Path, metavar="FILE", help="bccd, voc, coco: value of model.backbone_weights"
    )
    top.add_argument(
        "--config",
        default="",
        metavar="NAME",
        help="configuration of all runs in place of the scale's, such as tiny_dsod",
    )
    top.add_argument(
        "--seed",
        type=int,
        default=0,
        help=f"seed of every run; each seed has its own runs; {SCRATCH}: the first one (default: 0)",
    )
    top.add_argument(
        "--seeds",
        type=int,
        metavar="N",
        help="number of seeds, from --seed on; tables show their scatter, the most telling runs come first "
        f"(default: 1; {SCRATCH}: {NUM_SEEDS})",
    )
    top.add_argument("--lines", nargs="+", metavar="LINE", help=f"{SCRATCH}: {', '.join(LINES)} (default: all)")
    top.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="train only runs of these names, such as '*nowarmup*'; tables show all (default: all)",
    )
    top.add_argument("--list", action="store_true", help="list the grids and exit")
    top.add_argument("--dry-run", action="store_true", help="print the runs and an estimate of their time, and exit")
    top.add_argument("--report", action="store_true", help="write the tables and plots of the recorded runs, and exit")
    return top


def _print_runs(
    cells: list[Cell], runs: list[Run], scale: Scale, folder: Path, jobs: int, seconds: dict[str, float | None]
) -> None:
    """Print the runs, the grids that show them, and an estimate of the time left.

    Args:
        cells, runs: the study; runs that no cell has train first weights.
        scale: size of the study.
        folder: folder of the runs' folders.
        jobs: runs at a time.
        seconds: time of each run by its digest; None where it was not measured.
    """
    total: float | None = 0.0
    for run in runs:
        names = [cell.columns["line"] if cell.grid == SCRATCH else cell.grid for cell in cells if cell.run == run]
        grids = list(dict.fromkeys(names))
        outcome = read_outcome(folder / run.folder)
        left = seconds[run.digest]
        if outcome is None or outcome.status == "error":
            # a run on real ranks is the only one at its time
            total = None if left is None or total is None else total + left / (1 if run.ranks else jobs)
        ranks = f"{run.ranks} real" if run.ranks else str(run.config.emulate.ranks or 1)
        state = outcome.status if outcome else "to train" + ("" if left is None else f", about {left:.0f} s")
        print(f"{run.folder:46s} {ranks:>6s} rank(s) x {run.config.data.images_per_rank:<3d} "
              f"rate {peak_rate(run):<7.4g} {','.join(grids) or 'first weights':22s} {state}")  # fmt: skip
    print(f"{len(cells)} cells, {len(runs)} runs")
    if total is None:
        which = "some" if scale.speed else "the"
        print(f"no estimate: the speed of {which} runs at --scale {scale.name} was not measured")
    else:
        print(f"estimate: {total / 60:.0f} minutes with {jobs} run(s) at a time on idle cores")


def _check_inputs(scale: Scale, options: argparse.Namespace, from_scratch: bool) -> Inputs:
    """Check the packs of a scale without generated data, and the weights unless every run begins from scratch.

    Raises:
        UserError: one of them is missing.
    """
    folder = options.data or Path("packed") / ("" if scale.name == "coco" else scale.name)
    data.named_packs(scale, folder)
    if from_scratch:
        return Inputs((folder / "train").resolve(), (folder / "val").resolve(), None)
    weights = options.backbone_weights or Path("weights/resnet50.pth")
    if not weights.is_file():
        raise UserError(
            f"--scale {scale.name}: {weights} does not exist; name a file by --backbone-weights, or make it with "
            f"python -m megdet_hpc.fetch_backbone --backbone resnet50 --output {weights}"
        )
    return Inputs((folder / "train").resolve(), (folder / "val").resolve(), weights.resolve())


def _named_inputs(
    scale: Scale, options: argparse.Namespace, from_scratch: bool
) -> tuple[Inputs | None, list[Path], list[Path]]:
    """The packs and weights that the user names, the manifests of the packs, and the files of the weights.

    Nothing is named of a scale that generates its data. A dry run does without what is missing.

    Raises:
        UserError: something is missing, or is named of a scale that generates its data.
    """
    if scale.shapes:
        scales = {name: own.scale for name, own in SCRATCH_SCALES.items()} if SCRATCH in options.names else SCALES
        for word, given in (("--data", options.data), ("--backbone-weights", options.backbone_weights)):
            if given:
                raise UserError(
                    f"{word} {given}: --scale {scale.name} generates its data and trains its first weights; accepted "
                    f"at the scales {', '.join(name for name, own in scales.items() if not own.shapes)}"
                )
        return None, [], []
    try:
        named = _check_inputs(scale, options, from_scratch)
    except UserError:
        if not options.dry_run:
            raise
        return None, [], []
    packs = [named.train / MANIFEST_NAME, named.val / MANIFEST_NAME]
    return named, packs, [named.weights] if named.weights else []


def _generate_inputs(
    scale: Scale, folder: Path, runner: Runner, from_scratch: bool, *, whole_names: bool = False
) -> Inputs | None:
    """Generate the data, and train the first weights unless no run needs them; None if that run is not finished.

    Args:
        scale: size of the study.
        folder: folder of the study.
        runner: trainer of the run.
        from_scratch: whether no run needs the weights.
        whole_names: make a file for model.weights, in place of one for model.backbone_weights.

    Raises:
        UserError: the run failed.
    """
    assert scale.shapes is not None
    packs = folder / "data" / scale.shapes.folder
    data.generated_packs(scale.shapes, packs)
    first = None if from_scratch else pretraining_run(scale)
    weights = None
    if first and scale.pretraining:
        other = folder / "data" / scale.pretraining[0].folder
        data.generated_packs(scale.pretraining[0], other)
        weights = folder / "data" / f"backbone-{first.digest}.pth"
        if not weights.is_file():
            if runner.train([first], Inputs((other / "train").resolve(), (other / "val").resolve(), None)):
                return None
            outcome = read_outcome(runner.folder / first.folder)
            if outcome is None or outcome.status != "done":
                raise UserError(
                    f"{runner.folder / first.folder}: the run that trains the first weights failed: "
                    f"{outcome.reason if outcome else 'no record'}; no other run is started without them"
                )
            data.export_backbone(runner.folder / first.folder, weights, whole_names=whole_names)
        weights = weights.resolve()
    shared, own = (None, weights) if whole_names else (weights, None)
    return Inputs((packs / "train").resolve(), (packs / "val").resolve(), shared, own)


def _train(
    runs: list[Run], folder: Path, options: argparse.Namespace, prepare: Callable[[Runner], Inputs | None]
) -> int:
    """Train the runs, unless only a report is asked for; returns the number of runs that are left.

    Args:
        runs: runs of the study.
        folder: folder of the study.
        options: options of the command line.
        prepare: gives the inputs; None if a run that trains first weights is not finished.
    """
    if options.report:
        return 0
    with only_one(folder) as lock:
        runner = Runner(folder / "runs", options.jobs, options.max_minutes, lock)
        inputs = prepare(runner)
        return runner.train(runs, inputs) if inputs else len(runs)


def _exit_status(left: int) -> int:
    """The exit status with so many runs left, which are said."""
    if left:
        print(f"{left} run(s) are not finished; the same command continues them")
    return EXIT_UNFINISHED if left else 0


def _seeds(options: argparse.Namespace, default: int) -> list[int]:
    """The seeds that the options ask for; raises UserError for a number of them that cannot be."""
    number = default if options.seeds is None else options.seeds
    if not 1 <= number <= MOST_SEEDS:
        raise UserError(f"--seeds {number}: accepted are 1 to {MOST_SEEDS}")
    return list(range(options.seed, options.seed + number))


def _tables_folder(folder: Path, seeds: list[int], default: int) -> Path:
    """The folder of the tables: that of the study for its usual seeds, one below it for others.

    Args:
        folder: folder of the study.
        seeds: seeds of the tables.
        default: number of seeds where none is asked for.
    """
    if seeds == list(range(default)):
        return folder
    return folder / f"seed{'s' * (len(seeds) > 1)}_{'_'.join(map(str, seeds))}"


def run_study(options: argparse.Namespace) -> int:
    """Do what the command line asks; returns the exit status.

    Raises:
        UserError: an unknown name, missing data, or another study in the same folder.
    """
    if options.jobs < 1:
        raise UserError(f"--jobs {options.jobs}: accepted are 1 or more")
    if options.max_minutes is not None and not options.max_minutes > 0:
        raise UserError(f"--max-minutes {options.max_minutes:g}: accepted is more than 0")
    if not options.names:
        raise UserError(f"name a grid: all, {', '.join(GRIDS)}, {SCRATCH}")
    if SCRATCH in options.names:
        if set(options.names) != {SCRATCH} or options.config:
            raise UserError(f"{SCRATCH} has detectors and weights of its own: name it without other grids or --config")
        return _run_scratch(options)
    if options.lines:
        raise UserError(f"--lines belongs to {SCRATCH}")
    scale = scale_named(options.scale, options.config)
    names = [name for given in options.names for name in (PAPER_GRIDS if given == "all" else [given])]
    if unknown := [name for name in names if name not in GRIDS]:
        raise UserError(f"grid {unknown[0]}: accepted are all, {', '.join(GRIDS)}, {SCRATCH}")
    if options.config and "modules" in names:
        raise UserError("--config: modules declares its own detectors; accepted with the other grids")
    from_scratch = set(names) == {"modules"} or begins_from_scratch(scale)
    named, packs, weights = _named_inputs(scale, options, from_scratch)
    seeds = _seeds(options, default=1)
    inputs_text, packs_text = data.fingerprint(packs + weights), data.fingerprint(packs)
    grids = list(dict.fromkeys(names))
    by_seed = [expand(scale, grids, {"seed": seed}, inputs=inputs_text, packs=packs_text) for seed in seeds]
    cells, runs = [cell for own in by_seed for cell in own], named_like(queue(by_seed), options.only)
    folder = options.output / (f"{scale.name}-{Path(options.config).stem}" if options.config else scale.name)
    if options.dry_run:
        first = None if from_scratch else pretraining_run(scale)
        runs = ([first] if first else []) + runs
        seconds = {run.digest: estimated_seconds(run, scale) for run in runs}
        _print_runs(cells, runs, scale, folder / "runs", options.jobs, seconds)
        return 0
    several = ", ".join(map(str, seeds))
    title = f"study {folder.name}" + (f", seed{'s' * (len(seeds) > 1)} {several}" if seeds != [0] else "")
    left = _train(runs, folder, options, lambda runner: named or _generate_inputs(scale, folder, runner, from_scratch))
    place = _tables_folder(folder, seeds, default=1)
    tables = tables_of(cells, folder / "runs", scale.target_ap)
    for file in write_reports(tables, score_of(cells), place, title, scale.target_ap):
        print(f"wrote {file}")
    for line in sentences_of(tables):
        print(line)
    return _exit_status(left)


def _run_scratch(options: argparse.Namespace) -> int:
    """Do the same for the grid `scratch`, whose detectors have first weights of their own each."""
    scale = scratch_scale(options.scale)
    lines = options.lines or list(LINES)
    if unknown := [line for line in lines if line not in LINES]:
        raise UserError(f"--lines {unknown[0]}: accepted are {', '.join(LINES)}")
    seeds = _seeds(options, default=NUM_SEEDS)
    two, one = scale.detectors["two"], scale.detectors["one"]
    named, packs, weights = _named_inputs(scale.scale, options, from_scratch=False)
    cells = scratch_cells(scale, seeds, lines, packs=data.fingerprint(packs), weights=data.fingerprint(weights))
    runs = named_like(distinct(cells), options.only)
    folder = options.output / scale.scale.name
    if options.dry_run:
        seconds = {cell.run.digest: scratch_seconds(scale, cell) for cell in cells}
        first = {run.digest: (run, estimated_seconds(run, own.scale)) for own in (two, one) for run in _first(own)}
        seconds.update({digest: estimate for digest, (_, estimate) in first.items()})
        every = [run for run, _ in first.values()] + runs
        _print_runs(cells, every, scale.scale, folder / "runs", options.jobs, seconds)
        return 0
    left = _train(runs, folder, options, lambda runner: named or _scratch_inputs(two, one, folder, runner))
    tables = _tables_folder(folder, seeds, default=NUM_SEEDS)
    title = f"study {SCRATCH} {scale.scale.name}, seeds {', '.join(map(str, seeds))}"
    name = "-".join([SCRATCH, *options.lines]) if options.lines else SCRATCH
    for file in write_scratch_reports(cells, folder / "runs", tables / name, title):
        print(f"wrote {file}")
    return _exit_status(left)


def _first(studied: StudiedDetector) -> list[Run]:
    first = pretraining_run(studied.scale)
    return [first] if first else []


def _scratch_inputs(two: StudiedDetector, one: StudiedDetector, folder: Path, runner: Runner) -> Inputs | None:
    """Generate the data and train the first weights of both detectors; None if one of these runs is not finished."""
    shared = _generate_inputs(two.scale, folder, runner, from_scratch=False)
    own = shared and _generate_inputs(one.scale, folder, runner, from_scratch=False, whole_names=True)
    return own and replace(own, weights=shared.weights) if shared else None


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    options = parser().parse_args(sys.argv[1:] if arguments is None else arguments)
    if options.list:
        for name, text in {**GRIDS, SCRATCH: TEXT}.items():
            print(f"{name:8s} {text}")
        return
    with errors_in_one_line("megdet_hpc.study"):
        try:
            status = run_study(options)
        except BrokenPipeError:  # a reader that went away, of which the command line takes care
            raise
        except OSError as error:
            text = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            raise file_error(error, text) from error
    raise SystemExit(status)


if __name__ == "__main__":
    main()
