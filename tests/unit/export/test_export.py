"""An exported detector finds what the detector finds, at sizes that its example had not."""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor

from megdet_hpc.export.__main__ import main
from megdet_hpc.export.check import compare
from tests.unit.predict.conftest import trained

__all__ = ["trained"]


def export(run: Path, *words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["--checkpoint", str(run), *words])
    return int(ended.value.code or 0)


def pictures(shapes: Path, count: int) -> list[str]:
    return [str(file) for file in sorted((shapes / "coco").rglob("*.jpg"))[:count]]


@pytest.mark.parametrize("kind", ["onnx", "torchscript"])
def test_a_graph_finds_what_the_detector_finds(
    trained: Path, shapes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    output, files = tmp_path / "detector", pictures(shapes, 2)
    words = ["--format", kind, "--output", str(output), "--images", *files, "--score", "0.02"]
    assert export(trained, *words) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[-1] == f"result: check passed images=3 output={output}"
    assert len(lines) == 4 and int(lines[0].split(": ")[1].split()[0]) > 0
    assert export(trained, *words) == 2 and "exists already" in capfd.readouterr().err
    if kind == "onnx":
        session = onnxruntime.InferenceSession(str(output))
        about = json.loads(session.get_modelmeta().custom_metadata_map["megdet_hpc.json"])
    else:
        extra = {"megdet_hpc.json": ""}
        torch.jit.load(str(output), _extra_files=extra)
        about = json.loads(extra["megdet_hpc.json"])
    assert about["categories"]["1"]["name"] == "circle" and about["resize"]["short_side"] == 112


def test_bad_input_is_named(trained: Path, shapes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = ["--output", str(tmp_path / "detector.ts"), "--format", "torchscript"]
    for words, message in (
        ([*output], "the check needs 2 images, and there are 0"),
        ([*output, "--images", "absent.jpg", "b.jpg"], "--images absent.jpg: no such file"),
        ([*output, "--score", "2"], "score"),
        ([*output, "--box-tolerance", "-1"], "--box-tolerance is -1.0; accepted: 0 or more"),
    ):
        assert export(trained, *words) == 2
        assert message in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def found(*objects: tuple[list[float], float, int]) -> tuple[Tensor, Tensor, Tensor]:
    boxes, scores, labels = zip(*objects, strict=True) if objects else ((), (), ())
    return torch.tensor(boxes).view(-1, 4), torch.tensor(scores), torch.tensor(labels, dtype=torch.int64)


A, B = [0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 40.0, 40.0]


@pytest.mark.parametrize(
    ("graph", "passes"),
    [
        ([(A, 0.9, 1), (B, 0.5, 2)], True),
        ([(B, 0.5, 2), (A, 0.9, 1)], True),  # ties may come in another order
        ([(A, 0.9, 1), (B, 0.5, 2), (B, 0.1000001, 3)], True),  # at the edge of the threshold
        ([(A, 0.9, 1)], False),
        ([(A, 0.9, 1), (B, 0.5, 3)], False),
        ([(A, 0.9, 1), (B, 0.6, 2)], False),
        ([(A, 0.9, 1), ([20.0, 20.0, 40.0, 40.5], 0.5, 2)], False),
        ([], False),
    ],
)
def test_what_differs_fails_the_check(graph: list[tuple[list[float], float, int]], passes: bool) -> None:
    image = torch.zeros((3, 64, 64), dtype=torch.uint8)
    detector = found((A, 0.9, 1), (B, 0.5, 2))
    (difference,) = compare(lambda _: detector, lambda _: found(*graph), [image], threshold=0.1, limit=100, edge=1e-4)
    assert difference.within(0.01, 1e-4) == passes


def test_boxes_without_area_are_paired_too() -> None:
    image, detector = torch.zeros((3, 64, 64), dtype=torch.uint8), found(([64.0, 3.0, 64.0, 9.0], 0.9, 1), (A, 0.5, 1))
    (difference,) = compare(lambda _: detector, lambda _: detector, [image], threshold=0.1, limit=100, edge=1e-4)
    assert difference.unpaired == [] and difference.counts == (2, 2)
