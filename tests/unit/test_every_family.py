"""Every registered family: a life from its first step to another detector's, every option of training, every command.

The families are those of DETECTORS, so a new one falls under these tests by itself. Real ranks and AGVM are in
tests/parallel/families.py, ONNX in tests/unit/export/test_families.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from megdet_hpc import evaluate, train
from megdet_hpc.analyze.__main__ import main as analyze
from megdet_hpc.config import to_dict
from megdet_hpc.config.models import DETECTORS
from megdet_hpc.engine.checkpoint import load_checkpoint
from megdet_hpc.export.__main__ import main as export
from megdet_hpc.log import read_metrics
from megdet_hpc.parallel.serial import SerialCommunicator
from megdet_hpc.plan.__main__ import main as plan
from megdet_hpc.predict.__main__ import main as predict
from megdet_hpc.predict.detector import Asked, TrainedDetector, predicting
from megdet_hpc.study.grids import expand, with_settings
from megdet_hpc.study.scales import scale_named
from megdet_hpc.variance_probe.__main__ import main as variance_probe
from tests.conftest import ROOT, Here

# Widths and numbers of boxes, of the families that have the key.
NARROW = {
    "neck_channels": "16",
    "box_head_channels": "32",
    "mask_head_channels": "8",
    "rpn_pre_nms_top_n": "60",
    "rpn_post_nms_top_n": "60",
    "roi_samples_per_image": "16",
    "anchor_sizes": "[8,12,16,24,32]",
    "candidates_per_level": "50",
    "candidates_per_class": "50",
    "first_channels": "8",
    "root_channels": "8",
}
# Each optimizer, kind of statistics, precision and way to share an update, combined so that few runs have them all; sgd
# on all images in float32 is in the life. With several BN groups the checkpoint has the groups' mean.
ROWS = {
    "groups": "--norm.size 2 --emulate.ranks 4 --solver.optimizer lars --solver.precision bfloat16",
    "accumulated": "--norm.kind gn --solver.optimizer lamb --solver.accumulate 2 --solver.ema_decay 0.9",
    "each": "--norm.kind bn --emulate.ranks 2 --solver.accumulate 2 --solver.precision bfloat16 --solver.clip_norm 5",
}
CUT = ("groups", "accumulated")


def tiny(family: str) -> str:
    """The shipped configuration of a family at the size of a laptop."""
    for file in sorted((ROOT / "megdet_hpc" / "configs").glob("tiny*.yaml")):
        if yaml.safe_load(file.read_text())["model"].get("detector", "faster_rcnn") == family:
            return file.stem
    raise AssertionError(f"{family} has no configuration tiny*.yaml, which the study and these tests need")


def words(family: str, shapes: Path, output: Path, images: int, *more: str) -> list[str]:
    """Arguments of a training on images of 64 pixels, which nothing ends."""
    found = ["--config", tiny(family), "--device", "cpu", "--output", str(output)]
    found += ["--data.train", str(shapes / "train"), "--data.val", "null", "--data.images_per_rank", str(images)]
    found += ["--data.short_sides", "[64]", "--data.max_side", "96", "--data.val_short_side", "64"]
    found += [word for key in sorted(keys_of(family)) for word in (f"--model.{key}", NARROW[key])]
    found += ["--solver.epochs", "2", "--solver.drop_epochs", "[]", "--solver.drop_factors", "[]"]
    return [*found, "--evaluation.every_epochs", "0", "--checkpoints.every_epochs", "0", *more]


def keys_of(family: str) -> set[str]:
    return NARROW.keys() & DETECTORS[family].__dataclass_fields__.keys()


def state(output: Path, step: int) -> dict[str, Tensor]:
    """Weights, state of the optimizer and averages of a checkpoint, by path."""
    found: dict[str, Tensor] = {}

    def collect(value: Any, path: str) -> None:
        if isinstance(value, Tensor):
            found[path] = value
        elif isinstance(value, dict | list):
            for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                collect(inner, f"{path}/{key}")

    content = load_checkpoint(output / "checkpoints" / f"step_{step:08d}.pt")
    content.pop("rng")  # of the process; no draw of training depends on it
    collect(content, "")
    return found


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("family", DETECTORS)
def test_options(family: str, row: str, shapes: Path, tmp_path: Path) -> None:
    """All is finite after two updates, and a run that was cut after the first has the same."""
    keys = ["--log_every", "1", *ROWS[row].split()]
    images = 2 if "--norm.kind bn" in ROWS[row] else 1
    train.main(words(family, shapes, tmp_path / "whole", images, *keys, "--max_steps", "2"))
    mine = state(tmp_path / "whole", 2)
    assert all(bool(value.isfinite().all()) for value in mine.values())
    assert [entry["step"] for entry in read_metrics(tmp_path / "whole" / "metrics.jsonl")] == [1, 2]
    if row not in CUT:
        return
    for limit in ("1", "2"):
        train.main(words(family, shapes, tmp_path / "cut", images, *keys, "--max_steps", limit, "--resume", "auto"))
    resumed = state(tmp_path / "cut", 2)
    assert mine.keys() == resumed.keys()
    for path, value in mine.items():
        if row == "groups" and "running" in path:  # the mean of the groups was taken once more
            assert torch.allclose(value, resumed[path], rtol=1e-5, atol=1e-6), path
        else:
            assert torch.equal(value, resumed[path]), path


@pytest.mark.timeout(300)
@pytest.mark.parametrize("family", DETECTORS)
def test_a_life(family: str, shapes: Path, tmp_path: Path, here: Here) -> None:
    """Planned for, trained, scored, cut and resumed, analysed, used for a picture, exported, measured, begun with."""
    whole, cut, masks = tmp_path / "whole", tmp_path / "cut", DETECTORS[family].needs_masks
    planned = here(
        plan, [*words(family, shapes, whole, 2), "--ranks", "8", "--images", "64", "--images-per-second", "3"]
    )
    assert planned.returncode == 0, planned.stderr
    assert re.search(r"parameters +[\d,]+, [\d,]+ trained", planned.stdout)
    assert re.search(r"memory .*GiB", planned.stdout) and re.search(r"training .*images/s", planned.stdout)

    val = ["--data.val", str(shapes / "val"), "--evaluation.score_threshold", "0", "--evaluation.max_detections", "20"]
    last = here(train.main, words(family, shapes, whole, 2, *val, "--max_steps", "2")).stdout.splitlines()[-1]
    scores = r"result: AP=0\.\d{3} AP50=0\.\d{3}" + (r" segm_AP=0\.\d{3} segm_AP50=0\.\d{3}" if masks else "")
    assert re.fullmatch(rf"{scores} output={whole}", last)
    for limit in ("1", "2"):
        train.main(words(family, shapes, cut, 2, "--max_steps", limit, "--resume", "auto"))
    mine, resumed = state(whole, 2), state(cut, 2)
    assert all(torch.equal(value, resumed[path]) for path, value in mine.items())

    rows = json.loads((whole / "detections.json").read_text())
    assert rows and all(("segmentation" in row) == masks for row in rows)
    assert (whole / "predictions.png").stat().st_size > 10_000
    checkpoint = whole / "checkpoints" / "step_00000002.pt"
    named = ["--checkpoint", str(checkpoint)]
    again = here(evaluate.main, [*named, "--data.val", str(shapes / "val"), "--device", "cpu"]).stdout.splitlines()[-1]
    assert again.split(" images=")[0] == last.split(" output=")[0]
    analysed = here(analyze, [str(whole), "--data.val", str(shapes / "val")])
    assert analysed.returncode == 0, analysed.stderr

    pictures = [str(file) for file in sorted((shapes / "coco").rglob("*.jpg"))[:2]]
    content = load_checkpoint(checkpoint)
    config = predicting(content, Asked(0.0, 5))
    detector = TrainedDetector(content, "x", config, torch.device("cpu"), SerialCommunicator())
    found = detector(pictures[0])
    assert 1 <= len(found) <= 5 and (found.masks is not None) == masks
    if found.masks is not None:
        assert found.masks.shape == (len(found), *found.pixels.shape[:2])
    found.plot(tmp_path / "found.png")
    few = ["--score", "0", "--max-detections", "5"]
    predicted = here(predict, [*named, *pictures, "--output", str(tmp_path / "found"), *few, "--workers", "0"])
    assert predicted.returncode == 0, predicted.stderr
    assert len(json.loads((tmp_path / "found" / "detections.json").read_text())) == 10
    graph = ["--format", "torchscript", "--output", str(tmp_path / "graph.ts"), "--images", *pictures]
    exported = here(export, [*named, *graph, *few])
    assert exported.returncode == 0, exported.stdout + exported.stderr

    probe = [*named, "--skip_start", "true", "--batches", "2", "--draws", "2", "--norms", "cgbn,frozen"]
    measured = here(variance_probe, [*words(family, shapes, tmp_path / "probe", 1), *probe])
    assert measured.returncode == 0, measured.stderr
    parts = {row["part"] for row in json.loads((tmp_path / "probe" / "variance.json").read_text())["rows"]}
    assert parts >= {"all", "backbone", "heads"}
    begun = here(
        train.main, words(family, shapes, tmp_path / "more", 1, "--model.weights", str(checkpoint), "--max_steps", "1")
    )
    assert "begins with" in begun.stdout and "kept for circle" in begun.stdout and "drawn anew" not in begun.stdout


@pytest.mark.parametrize("family", DETECTORS)
def test_a_run_of_the_study(family: str, shapes: Path, tmp_path: Path) -> None:
    """The grids with a family's configuration; the smallest batch without CGBN, for one update of small images."""
    own = {f"model.{key}": json.loads(NARROW[key]) for key in keys_of(family)}
    small = {
        "data.short_sides": (64,),
        "data.max_side": 96,
        "data.val_short_side": 64,
        "data.val": None,
        "max_steps": 1,
    }
    cells = expand(scale_named("tiny", tiny(family)), ["batch", "bn_size", "epochs", "warmup", "ranks"], own)
    assert all(cell.run.config.model.detector == family for cell in cells)
    run = next(cell.run for cell in cells if cell.grid == "batch" and cell.columns["norm"] != "cgbn")
    kind, scratch = ("bn", True) if run.from_scratch else ("frozen", False)
    assert (run.config.norm.kind, run.from_scratch, run.global_batch) == (kind, scratch, 16)
    places = {"data.train": str(shapes / "train"), "output": str(tmp_path / "run"), "device": "cpu", "max_steps": 1}
    if not scratch:
        places["model.fixed_from_scratch"] = True  # type: ignore[assignment]
    (tmp_path / "study.yaml").write_text(json.dumps(to_dict(with_settings(run.config, {**small, **places}))))
    train.main(["--config", str(tmp_path / "study.yaml")])
    assert len(state(tmp_path / "run", 1)) > 0
