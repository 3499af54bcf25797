"""Train a detector: `horovodrun -np 128 python -m megdet_hpc.train --config megdet_r50_fpn_256`."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from megdet_hpc.command_line import config_parser, named_configs, parse_config
from megdet_hpc.config import Config
from megdet_hpc.engine.stop import EXIT_UNFINISHED, StopRequests
from megdet_hpc.parallel.launch import is_first_process, note_finished, note_status
from megdet_hpc.programs import as_called_here

if TYPE_CHECKING:
    from megdet_hpc.data.dataset import DetectionDataset
    from megdet_hpc.engine.loop import Evaluate
    from megdet_hpc.engine.training import Training
    from megdet_hpc.engine.watchdog import Watchdog
    from megdet_hpc.evaluation.coco import Scores
    from megdet_hpc.evaluation.detections import DetectionTable

DESCRIPTION = """Train a Faster R-CNN with cross-GPU batch normalization on packed COCO data.

Start one process per GPU with horovodrun, mpirun or srun; plain python trains on one process. Data comes from
data_prep/pack_coco.py. Every key below can stand in a YAML file (--config) or on the command line (--norm.size 32)."""

NEEDS = """python -m megdet_hpc.train did not find its data: {missing} does not exist.

What it needs:
  1. COCO packed once:   python data_prep/pack_coco.py            (coco/{{train,val}}2017 to packed/{{train,val}})
                         or any set: --annotations FILE.json --images DIR --output DIR
  2. a configuration:    --config NAME_OR_PATH, one of: {names}
                         (files in {folder}; without --config: {default})
  3. for example:        horovodrun -np 128 python -m megdet_hpc.train --config {default} \\
                             --data.train packed/train --data.val packed/val --output runs/first

No data at hand? `make demo` in a checkout trains on images that it draws; alone they are drawn by
python data_prep/make_shapes.py. All keys: python -m megdet_hpc.train --help"""

Check = Callable[[], None]
DEFAULT_CONFIG = "megdet_r50_fpn_256"


def _evaluation(run: Training, dataset: DetectionDataset, watchdog: Watchdog) -> Evaluate:
    """A collective that scores the model on the validation set, and its averaged weights if there are any.

    Rank 0 writes the files. detections.json and the pictures are those of the averaged weights then, and
    detections_raw.json has those of the raw ones.
    """
    from megdet_hpc.config.outcome import EMA_PREFIX
    from megdet_hpc.validation.scores import Validation

    validation = Validation(run.config, run.dataset.categories, dataset, run.device, run.world, run.precision)
    if run.world.rank == 0:
        for line in validation.said:
            print(line, flush=True)

    def of_model(main: bool) -> dict[str, float]:
        def finish(detections: DetectionTable, scores: Scores) -> None:
            run.check()
            if run.step == run.last_step:
                validation.write_last(run.output, detections, scores, main=main)

        return validation(run.model, finish, watchdog, watchdog.tick)

    def evaluate() -> dict[str, float]:
        metrics = of_model(main=run.average is None)
        if run.average:
            with run.average.in_model():
                metrics |= {EMA_PREFIX + key: value for key, value in of_model(main=True).items()}
        return metrics

    return evaluate


def _last_words(run: Training) -> None:
    """Print what the run has come to. Rank 0 only."""
    from megdet_hpc.engine.checkpoint import read_best
    from megdet_hpc.evaluation.coco import result_line
    from megdet_hpc.log.deferred import waiting

    print(f"trained {run.step} steps; checkpoints, metrics and pictures are in {run.output}")
    if (best := read_best(run.output)).file:
        print(f"highest {best.metric} so far: {best.highest:.3f}, checkpoint {run.output / best.file}")
    if run.deferred and (left := len(waiting(run.output))):
        print(f"{left} checkpoint(s) wait for their scores: megdet evaluate --follow {run.output}")
    if run.metrics:
        print(result_line(run.metrics, output=run.output))


def _explain_missing_data(config: Config) -> None:
    if not Path(config.data.train).exists():
        missing, advice = f"data.train {config.data.train}", ""
    elif config.data.val and not Path(config.data.val).exists():
        missing, advice = f"data.val {config.data.val}", " (--data.val null trains without validation)"
    else:
        return
    if not is_first_process():
        # if only this host lacks the folder, rank 0 does not say so
        time.sleep(1)
        print(f"megdet_hpc: error: {missing} does not exist on {socket.gethostname()}", file=sys.stderr)
    else:
        names = named_configs()
        folder = next(iter(names.values())).parent
        text = as_called_here(NEEDS).format(
            missing=missing + advice, names=", ".join(names), folder=folder, default=DEFAULT_CONFIG
        )
        print(text, file=sys.stderr)
    note_status(2)
    raise SystemExit(2)


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not any(argument.split("=")[0] in ("--config", "-h", "--help") for argument in arguments):
        arguments = ["--config", DEFAULT_CONFIG, *arguments]
    config, _ = parse_config(config_parser("megdet_hpc.train", DESCRIPTION), arguments)
    _explain_missing_data(config)
    stop, stopped = StopRequests(config.max_minutes, Path(config.output)), ""
    # imported late: torch takes long to load where many ranks read it from one file system
    from megdet_hpc.engine.ownership import owned
    from megdet_hpc.parallel.start import started

    world = started(
        config.norm.transport,
        config.device,
        deterministic=config.deterministic,
        gradients=config.solver.gradients,
    )
    with world as runtime, owned(Path(config.output), runtime.world) as folder:
        from megdet_hpc.engine.arithmetic import set_arithmetic
        from megdet_hpc.engine.build import build_training
        from megdet_hpc.engine.deterministic import naming_operators
        from megdet_hpc.engine.energy import energy_line
        from megdet_hpc.engine.loop import train
        from megdet_hpc.engine.watchdog import Watchdog
        from megdet_hpc.log import read_metrics
        from megdet_hpc.report.drawing import draw_run

        if runtime.world.rank == 0:
            stop.remove_old_file()
        reports = folder.path / "watchdog"
        held = runtime.holds_interpreter
        watchdog = Watchdog(config.watchdog_minutes, reports, runtime.world, runtime.abort, folder.check, held=held)
        # a process on its own may live on after an error; a failing one of several needs it until the job has ended
        with closing(watchdog) if runtime.world.size == 1 else nullcontext():
            set_arithmetic(config)
            run, validation = build_training(config, runtime, folder.check)
            evaluate = _evaluation(run, validation, watchdog) if validation and not run.deferred else None
            with naming_operators(config.deterministic):
                stopped = train(run, evaluate, stop, watchdog)
        watchdog.close()
        if runtime.world.rank == 0:
            folder.check()
            draw_run(run.output)
        if runtime.world.rank == 0 and stopped:
            stop.tell(
                f"stopped after step {run.step} of {run.last_step}: {stopped}; the state is saved",
                f"--resume auto with the same output {run.output} goes on; exit status {EXIT_UNFINISHED}",
            )
        elif runtime.world.rank == 0:
            if energy := energy_line(read_metrics(run.output / "metrics.jsonl")):
                print(energy)
            _last_words(run)
    if stopped:
        note_status(EXIT_UNFINISHED)
        raise SystemExit(EXIT_UNFINISHED)
    note_finished()


if __name__ == "__main__":
    main()
