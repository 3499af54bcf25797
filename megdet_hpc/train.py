"""Train a detector: `horovodrun -np 128 python -m megdet_hpc.train --config megdet_r50_fpn_256`."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from megdet_hpc.command_line import config_parser, named_configs, parse_config
from megdet_hpc.config import Config
from megdet_hpc.engine.stop import EXIT_UNFINISHED, StopRequests
from megdet_hpc.parallel.launch import is_first_process, note_status
from megdet_hpc.programs import as_called_here

if TYPE_CHECKING:
    from megdet_hpc.data.dataset import DetectionDataset
    from megdet_hpc.engine.loop import Evaluate
    from megdet_hpc.engine.training import Training
    from megdet_hpc.engine.watchdog import Watchdog
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
    """A collective that scores the model on the validation set. Rank 0 writes the files."""
    from megdet_hpc.data.categories import match_labels
    from megdet_hpc.evaluation.coco import score, what_is_missing, what_is_scored
    from megdet_hpc.evaluation.inference import detect_all
    from megdet_hpc.evaluation.results import write_results
    from megdet_hpc.report.pictures import draw_predictions

    config, world = run.config, run.world
    labels = match_labels(run.dataset.categories, dataset.categories, "data.train", "data.val")
    limit, pack = config.evaluation.max_detections, dataset.pack
    if world.rank == 0:
        for line in filter(None, [labels.note, *what_is_scored(pack, len(pack), limit)]):
            print(line, flush=True)

    def on_rank_0(detections: DetectionTable | None) -> dict[str, float]:
        assert detections is not None, "rank 0 has those of all"
        scores = score(pack, detections, max_detections=limit)
        run.check()
        write_results(run.output / "detections.json", detections)
        if run.step == run.last_step:
            draw_predictions(dataset, detections, run.output / "predictions.png")
            for line in what_is_missing(scores, pack, len(pack)):
                print(line, flush=True)
        return scores.logged()

    def evaluate() -> dict[str, float]:
        watchdog.tick()  # the evaluation is no step
        detections = detect_all(
            run.model, dataset, run.device, labels, world, num_workers=config.data.num_workers, moved=watchdog.tick
        )
        metrics: dict[str, float] = watchdog.alone(lambda: on_rank_0(detections), name="metrics")
        return metrics

    return evaluate


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

    world = started(config.norm.transport, config.device, deterministic=config.deterministic)
    with world as runtime, owned(Path(config.output), runtime.world) as folder:
        from megdet_hpc.engine.build import build_training
        from megdet_hpc.engine.checkpoint import read_best
        from megdet_hpc.engine.deterministic import make_deterministic, naming_operators
        from megdet_hpc.engine.loop import train
        from megdet_hpc.engine.watchdog import Watchdog
        from megdet_hpc.evaluation.coco import result_line
        from megdet_hpc.report.curves import draw_curves

        if runtime.world.rank == 0:
            stop.remove_old_file()
        reports = folder.path / "watchdog"
        watchdog = Watchdog(config.watchdog_minutes, reports, runtime.world, runtime.abort, folder.check)
        if config.deterministic:
            make_deterministic()
        run, validation = build_training(config, runtime, folder.check)
        evaluate = _evaluation(run, validation, watchdog) if validation else None
        with naming_operators(config.deterministic):
            stopped = train(run, evaluate, stop, watchdog)
        watchdog.close()
        if runtime.world.rank == 0:
            folder.check()
            draw_curves(run.output / "metrics.jsonl", run.output / "curves.png", str(run.output))
        if runtime.world.rank == 0 and stopped:
            stop.tell(
                f"stopped after step {run.step} of {run.last_step}: {stopped}; the state is saved",
                f"--resume auto with the same output {run.output} goes on; exit status {EXIT_UNFINISHED}",
            )
        elif runtime.world.rank == 0:
            print(f"trained {run.step} steps; checkpoints, metrics and pictures are in {run.output}")
            if best := read_best(run.output).file:
                print(f"highest AP so far: {run.best_ap:.3f}, checkpoint {run.output / best}")
            if evaluate and run.metrics:
                print(result_line(run.metrics, output=run.output))
    if stopped:
        note_status(EXIT_UNFINISHED)
        raise SystemExit(EXIT_UNFINISHED)


if __name__ == "__main__":
    main()
