"""Detection in batches of one padded size: the same at any number of ranks, and as one image at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megdet_hpc.config import Config, DataConfig, EvaluationConfig, FasterRcnnConfig
from megdet_hpc.data.categories import match_labels
from megdet_hpc.data.dataset import DetectionDataset
from megdet_hpc.evaluation.detections import DetectionTable
from megdet_hpc.evaluation.inference import SetDetection, equal_sizes
from megdet_hpc.models.detector import Detector
from megdet_hpc.models.factory import build_detector
from megdet_hpc.parallel.serial import SerialCommunicator
from megdet_hpc.solver.precision import Precision, keep_coordinates_float32

CPU = torch.device("cpu")
DATA = DataConfig(val_short_side=64, max_side=96, num_workers=0)


@pytest.fixture(scope="module")
def dataset(shapes: Path) -> DetectionDataset:
    return DetectionDataset.open(shapes / "train", DATA, training=False, seed=0)


@pytest.fixture(scope="module")
def model(dataset: DetectionDataset) -> Detector:
    parts = FasterRcnnConfig(backbone="resnet10", neck_channels=8, box_head_channels=16)
    config = Config(model=parts, evaluation=EvaluationConfig(score_threshold=0.0, max_detections=5))
    built = build_detector(config, num_categories=len(dataset.categories), group=SerialCommunicator())
    keep_coordinates_float32(built)
    return built


def found(
    model: Detector,
    dataset: DetectionDataset,
    evaluation: EvaluationConfig,
    ranks: int = 1,
    precision: str = "float32",
) -> DetectionTable:
    """The detections of all ranks, ordered by image."""
    labels = match_labels(dataset.categories, dataset.categories, "a", "b")
    parts = []
    for rank in range(ranks):
        world = SerialCommunicator()
        world.rank, world.size = rank, ranks
        detection = SetDetection(
            dataset, CPU, labels, world, num_workers=0, evaluation=evaluation, autocast=Precision(precision).autocast
        )
        parts.append(detection.of_rank(model))
    table = DetectionTable.joined(parts)
    return table.rows(np.argsort(table.image_ids, kind="stable"))


def test_batches_have_one_padded_size_and_every_image_once(dataset: DetectionDataset) -> None:
    batches = equal_sizes(dataset, len(dataset), 4)
    assert sorted(index for batch in batches for index in batch) == list(range(len(dataset)))
    assert max(map(len, batches)) == 4
    for batch in batches:
        assert len({dataset.padded_sizes(index) for index in batch}) == 1
    sizes = [dataset[(0, index)].image.shape[1:] for index in range(6)]
    assert [dataset.padded_sizes(index)[0] for index in range(6)] == [
        (-(-h // 32) * 32, -(-w // 32) * 32) for h, w in sizes
    ]
    assert equal_sizes(dataset, 3, 1) == [[0], [1], [2]]


@pytest.mark.parametrize("views", [{}, {"scales": (64, 48), "flip": True}])
def test_batches_find_what_single_images_do_at_any_number_of_ranks(
    model: Detector, dataset: DetectionDataset, views: dict[str, object]
) -> None:
    single, batched = (
        EvaluationConfig(score_threshold=0.0, max_detections=5, images_per_batch=number, **views)  # type: ignore[arg-type]
        for number in (1, 4)
    )
    alone, one, three = (
        found(model, dataset, evaluation, ranks) for evaluation, ranks in ((single, 1), (batched, 1), (batched, 3))
    )
    assert len(alone) == 5 * len(dataset)
    for column in ("image_ids", "boxes_xywh", "scores", "category_ids"):
        assert np.array_equal(getattr(one, column), getattr(three, column)), column
    # a processor may add up in another order where a batch has more images
    assert np.allclose(one.scores, alone.scores, atol=1e-5)


def test_the_type_of_the_run_is_that_of_its_evaluation(model: Detector, dataset: DetectionDataset) -> None:
    evaluation = EvaluationConfig(score_threshold=0.0, max_detections=5)
    plain, half = (found(model, dataset, evaluation, precision=name) for name in ("float32", "bfloat16"))
    difference = np.abs(plain.scores - half.scores).max()
    assert 0 < difference < 0.05
    assert half.boxes_xywh.dtype == np.float64 and np.isfinite(half.boxes_xywh).all()


def test_workers_live_on_between_evaluations(model: Detector, dataset: DetectionDataset) -> None:
    labels = match_labels(dataset.categories, dataset.categories, "a", "b")
    detection = SetDetection(dataset, CPU, labels, SerialCommunicator(), num_workers=1, limit=3)
    first = detection.of_rank(model)
    (worker,) = detection._loader._iterator._workers  # type: ignore[attr-defined]
    second = detection.of_rank(model)
    assert detection._loader._iterator._workers == [worker] and worker.is_alive()  # type: ignore[attr-defined]
    assert np.array_equal(first.scores, second.scores) and len(first) == len(second) > 0
