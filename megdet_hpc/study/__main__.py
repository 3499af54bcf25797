"""`python -m megdet_hpc.study NAME... --scale tiny`: the paper's comparisons at the size of the machine at hand."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megdet_hpc.data.shard_format import MANIFEST_NAME
from megdet_hpc.errors import UserError
from megdet_hpc.programs import as_called_here, called_as
from megdet_hpc.study import data
from megdet_hpc.study.grids import GRIDS, Cell, Run, distinct, estimated_seconds, expand, pretraining_run
from megdet_hpc.study.outcome import read_outcome
from megdet_hpc.study.report import write_reports
from megdet_hpc.study.runner import EXIT_UNFINISHED, Inputs, Runner, only_one
from megdet_hpc.study.scales import SCALES, Scale, scale_named

_EPILOG = """The same command goes on where it was ended (Ctrl-C, SIGUSR1, --max-minutes: exit status 75). A run that
diverges is a result, "failed"; one that breaks is an "error" and tried again."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    grids = "; ".join(f"{name}: {text}" for name, text in GRIDS.items())
    top = argparse.ArgumentParser(
        prog=called_as("megdet_hpc.study"), description=as_called_here(__doc__ or ""), epilog=_EPILOG
    )
    top.add_argument("names", nargs="*", metavar="NAME", help=f"all, or some of: {grids}")
    top.add_argument("--scale", default="tiny", help=f"{', '.join(SCALES)} (default: tiny)")
    top.add_argument("--output", type=Path, default=Path("runs/study"), metavar="DIR", help="default: runs/study")
    top.add_argument("--jobs", type=int, default=2, metavar="N", help="runs at a time, one core each (default: 2)")
    top.add_argument("--max-minutes", type=float, metavar="M", help="save and end before this time is over")
    top.add_argument("--data", type=Path, metavar="DIR", help="bccd, coco: folder with the packs train and val")
    top.add_argument("--backbone-weights", type=Path, metavar="FILE", help="bccd, coco: as model.backbone_weights")
    top.add_argument("--seed", type=int, default=0, help="seed of every run; another seed, another run (default: 0)")
    top.add_argument("--list", action="store_true", help="name the grids and end")
    top.add_argument("--dry-run", action="store_true", help="print the runs and an estimate of their time and end")
    top.add_argument("--report", action="store_true", help="write the tables and plots from what was recorded and end")
    return top


def _print_runs(cells: list[Cell], runs: list[Run], scale: Scale, folder: Path, jobs: int) -> None:
    """The runs, the grids that show them, and how long the unfinished ones take."""
    total: float | None = 0.0
    for run in runs:
        grids = list(dict.fromkeys(cell.grid for cell in cells if cell.run.digest == run.digest))
        outcome = read_outcome(folder / run.folder)
        left = estimated_seconds(run, scale)
        if outcome is None or outcome.status == "error":
            # real ranks run alone
            total = None if left is None or total is None else total + left / (1 if run.ranks else jobs)
        ranks = f"{run.ranks} real" if run.ranks else str(run.config.emulate.ranks or 1)
        state = outcome.status if outcome else "to train" + ("" if left is None else f", about {left:.0f} s")
        print(f"{run.folder:36s} {ranks:>6s} rank(s) x {run.config.data.images_per_rank:<3d} "
              f"rate {_peak(run):<7.4g} {','.join(grids) or 'first weights':22s} {state}")  # fmt: skip
    print(f"{len(cells)} cells, {len(runs)} runs")
    if total is None:
        print(f"no estimate: the speed of --scale {scale.name} was not measured")
    else:
        print(f"estimate: {total / 60:.0f} minutes with {jobs} run(s) at a time on idle cores")


def _peak(run: Run) -> float:
    solver = run.config.solver
    return float(solver.base_lr * (run.global_batch / solver.reference_batch) ** solver.scaling_exponent)


def _check_inputs(scale: Scale, options: argparse.Namespace) -> Inputs:
    """The packs and weights of a scale without generated data.

    Raises:
        UserError: one of them is missing.
    """
    folder = options.data or Path("packed") / ("" if scale.name == "coco" else scale.name)
    data.named_packs(scale, folder)
    weights = options.backbone_weights or Path("weights/resnet50.pth")
    if not weights.is_file():
        raise UserError(
            f"--scale {scale.name}: {weights} does not exist; --backbone-weights FILE names one, which "
            f"python -m megdet_hpc.fetch_backbone --backbone resnet50 --output {weights} writes"
        )
    return Inputs((folder / "train").resolve(), (folder / "val").resolve(), weights.resolve())


def _generate_inputs(scale: Scale, folder: Path, runner: Runner) -> Inputs | None:
    """Data, and first weights by a run of their own; None where that run is not finished.

    Raises:
        UserError: the run failed.
    """
    assert scale.shapes is not None
    packs = folder / "data" / scale.shapes.folder
    data.generated_packs(scale.shapes, packs)
    first = pretraining_run(scale)
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
                    f"{runner.folder / first.folder}: the run that the others' backbone comes from failed: "
                    f"{outcome.reason if outcome else 'no record'}; all would begin with it, so none is started"
                )
            data.export_backbone(runner.folder / first.folder, weights)
        weights = weights.resolve()
    return Inputs((packs / "train").resolve(), (packs / "val").resolve(), weights)


def run_study(options: argparse.Namespace) -> int:
    """Do what the command line asks; returns the exit status.

    Raises:
        UserError: an unknown name, missing data, another study in the same folder.
    """
    scale = scale_named(options.scale)
    if options.jobs < 1:
        raise UserError(f"--jobs {options.jobs}: accepted are 1 or more")
    if options.max_minutes is not None and not options.max_minutes > 0:
        raise UserError(f"--max-minutes {options.max_minutes:g}: accepted is more than 0")
    if not options.names:
        raise UserError(f"name a grid: all, {', '.join(GRIDS)}")
    names = [name for given in options.names for name in (GRIDS if given == "all" else [given])]
    named: Inputs | None = None
    try:
        named = None if scale.shapes else _check_inputs(scale, options)
    except UserError:
        if not options.dry_run:
            raise
    files = [] if named is None else [named.train / MANIFEST_NAME, named.val / MANIFEST_NAME, named.weights]
    cells = expand(
        scale,
        list(dict.fromkeys(names)),
        {"seed": options.seed},
        inputs=data.fingerprint([file for file in files if file]),
    )
    runs = distinct(cells)
    folder = options.output / scale.name
    if options.dry_run:
        first = pretraining_run(scale)
        _print_runs(cells, ([first] if first else []) + runs, scale, folder / "runs", options.jobs)
        return 0
    title = f"study {scale.name}" + (f", seed {options.seed}" if options.seed else "")
    left = 0
    if not options.report:
        with only_one(folder) as lock:
            runner = Runner(folder / "runs", options.jobs, options.max_minutes, lock)
            inputs = named or _generate_inputs(scale, folder, runner)
            left = runner.train(runs, inputs) if inputs else len(runs)
    tables = folder / f"seed_{options.seed}" if options.seed else folder
    for file in write_reports(cells, folder / "runs", tables, title):
        print(f"wrote {file}")
    if left:
        print(f"{left} run(s) are not finished; the same command goes on")
    return EXIT_UNFINISHED if left else 0


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    options = parser().parse_args(sys.argv[1:] if arguments is None else arguments)
    if options.list:
        for name, text in GRIDS.items():
            print(f"{name:8s} {text}")
        return
    try:
        status = run_study(options)
    except UserError as error:
        print(f"{called_as('megdet_hpc.study')}: error: {as_called_here(str(error))}", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(status)


if __name__ == "__main__":
    main()
