"""The scores of a detector on the validation set, as the training and the follower of a run take them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from megdet_hpc.config import Config
from megdet_hpc.data.categories import Categories, match_labels
from megdet_hpc.data.dataset import DetectionDataset
from megdet_hpc.evaluation.coco import Scores, measure_together, score, what_is_missing, what_is_scored
from megdet_hpc.evaluation.columns import Truth
from megdet_hpc.evaluation.detections import DetectionTable
from megdet_hpc.evaluation.inference import SetDetection
from megdet_hpc.evaluation.results import RAW_RESULTS, RESULTS, write_results
from megdet_hpc.evaluation.scorer import Measured
from megdet_hpc.evaluation.views import what_is_merged
from megdet_hpc.models.detector import Detector
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.report.drawing import can_draw
from megdet_hpc.solver.precision import Precision


class Waits(Protocol):
    """Lets rank 0 work while the others wait, as a `Watchdog` does."""

    def alone(self, work: Callable[[], Any], *, name: str) -> Any:
        """The result of rank 0's work, on every rank. Collective of the world; blocks."""


class Validation:
    """The evaluation of one detector after another on the validation set. Truth and loader are kept between them.

    Args:
        config: configuration of the run.
        trained: categories of the detector.
        dataset: validation set.
        device: device of the detector.
        world: all ranks.
        precision: type of the passes.

    Raises:
        UserError: the categories do not fit.
    """

    def __init__(
        self,
        config: Config,
        trained: Categories,
        dataset: DetectionDataset,
        device: torch.device,
        world: Communicator,
        precision: Precision,
    ) -> None:
        self.dataset, self._world = dataset, world
        self._limit, self._metric = config.evaluation.max_detections, config.evaluation.metric
        self._truth = Truth(dataset.pack)
        labels = match_labels(trained, dataset.categories, "data.train", "data.val")
        self._detection = SetDetection(
            dataset,
            device,
            labels,
            world,
            num_workers=config.data.num_workers,
            evaluation=config.evaluation,
            autocast=precision.autocast,
        )
        merged = what_is_merged(config.data, config.evaluation)
        scored = what_is_scored(dataset.pack, len(dataset.pack), self._limit)
        self.said = list(filter(None, [labels.note, *scored, *merged]))
        """What a reader of the numbers should know, a sentence each."""

    def __call__(
        self,
        model: Detector,
        finish: Callable[[DetectionTable, Scores], None],
        waits: Waits,
        moved: Callable[[], None] = lambda: None,
    ) -> dict[str, float]:
        """The scores of a detector, on every rank. Collective of the world; blocks.

        Args:
            model: detector with the same weights on all ranks.
            finish: called on rank 0 with the detections and their scores.
            waits: lets rank 0 work while the others wait; the message is `metrics`.
            moved: called as detection goes on.
        """
        moved()  # the evaluation is no step
        detections = self._detection.of_all(model, moved)
        moved()
        measured = measure_together(self._truth, detections, self._limit, self._world)
        metrics: dict[str, float] = waits.alone(lambda: self._scored(detections, measured, finish), name="metrics")
        return metrics

    def _scored(
        self,
        detections: DetectionTable | None,
        measured: dict[str, Measured] | None,
        finish: Callable[[DetectionTable, Scores], None],
    ) -> dict[str, float]:
        assert detections is not None, "rank 0 has those of all"
        scores = score(self._truth, detections, max_detections=self._limit, measured=measured, metric=self._metric)
        finish(detections, scores)
        return scores.logged()

    def write_last(self, output: Path, detections: DetectionTable, scores: Scores, *, main: bool) -> None:
        """Write the files of a run's last evaluation, and print what its scores lack. Rank 0 only.

        Args:
            output: folder of the run.
            detections, scores: what was found, and its scores.
            main: whether they are those by which the run is judged; others are of raw weights beside averaged ones.
        """
        write_results(output / (RESULTS if main else RAW_RESULTS), detections)
        if main:
            if can_draw():
                from megdet_hpc.report.pictures import draw_predictions

                draw_predictions(self.dataset, detections, output / "predictions.png")
            for line in what_is_missing(scores, self.dataset.pack, len(self.dataset.pack)):
                print(line, flush=True)
