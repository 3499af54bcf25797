"""A detector that only its own file knows: it trains alike on any ranks, resumes, evaluates and is planned for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megdet_hpc import evaluate, train
from megdet_hpc.config import DETECTORS, Geometry
from megdet_hpc.models.factory import BUILDERS
from megdet_hpc.plan.__main__ import main as plan
from tests import toy
from tests.conftest import Launch

STEPS = 4
IMAGES = 24  # of the set, so that every update sees all of them, however they are spread

pytestmark = pytest.mark.parallel


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DETECTORS, "toy", toy.ToyConfig)
    monkeypatch.setitem(BUILDERS, "toy", toy.build)


def arguments(shapes: Path, output: Path, images_per_rank: int, *more: str) -> list[str]:
    config = output.parent / "toy.yaml"
    config.write_text("model: {detector: toy, channels: 6}\nsolver: {drop_epochs: [], drop_factors: []}\n")
    data = ["--data.train", str(shapes / "train"), "--data.val", str(shapes / "val"), "--data.num_workers", "0"]
    sizes = ["--data.short_sides", "[64]", "--data.val_short_side", "64", "--data.max_side", "96"]
    fixed = ["--data.padding", "fixed", "--data.group_by_aspect_ratio", "false"]
    fixed += ["--data.images_per_rank", str(images_per_rank), "--device", "cpu"]
    end = ["--solver.epochs", str(STEPS), "--evaluation.every_epochs", "0", "--checkpoints.every_epochs", "0"]
    return ["--config", str(config), *data, *sizes, *fixed, *end, "--output", str(output), *more]


def weights(output: Path, kind: str = "raw") -> dict[str, Tensor]:
    file = output / "checkpoints" / f"step_{STEPS:08d}.pt"
    state = torch.load(file, weights_only=True)
    own: dict[str, Tensor] = (state["ema"] if kind == "ema" else state)["model"]
    return own


@pytest.mark.timeout(600)  # five trainings
def test_a_detector_is_one_file(
    shapes: Path, tmp_path: Path, launch: Launch, capfd: pytest.CaptureFixture[str]
) -> None:
    one, real, cut, emulated = (tmp_path / name for name in ("one", "real", "cut", "emulated"))
    ema = ("--solver.ema_decay", "0.9")
    train.main(arguments(shapes, one, IMAGES, *ema))
    assert re.search(r"result: AP=0\.\d{3} AP50=0\.\d{3}", capfd.readouterr().out)
    train.main(arguments(shapes, emulated, IMAGES // 2, "--emulate.ranks", "2", "--data.val", "null", *ema))
    for output, *limit in ((real,), (cut, "--max_steps", "2"), (cut, "--resume", "auto")):
        done = launch(2, "-m", "tests.toy", *arguments(shapes, output, IMAGES // 2, "--data.val", "null", *limit, *ema))
        assert done.returncode == 0, done.stderr
    first, average = weights(one), weights(one, "ema")
    assert set(first) >= {"backbone.0.weight", "backbone.1.running_mean", "head.bias"}
    # float32 sums over the images in another order; one update alone moves weights by more than 1e-3
    torch.testing.assert_close(weights(real), first, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights(emulated), first, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights(cut), weights(real), rtol=0, atol=0)
    assert any(not torch.equal(value, average[name]) for name, value in first.items())
    torch.testing.assert_close(weights(real, "ema"), average, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights(emulated, "ema"), average, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights(cut, "ema"), weights(real, "ema"), rtol=0, atol=0)

    capfd.readouterr()
    checkpoint = str(real / "checkpoints" / f"step_{STEPS:08d}.pt")
    evaluate.main(["--checkpoint", checkpoint, "--data.val", str(shapes / "val"), "--device", "cpu"])
    scored = capfd.readouterr().out.splitlines()[-1]
    assert scored.startswith("result: AP=0.")
    whole = Path(checkpoint).with_suffix(".detections.json")
    every = whole.read_bytes()
    evaluate.main(["--checkpoint", checkpoint, "--data.val", str(shapes / "val"), "--device", "cpu", "--limit", "2"])
    assert capfd.readouterr().out.splitlines()[-1].endswith("images=2")
    assert whole.read_bytes() == every and whole.with_suffix("").with_suffix(".limit2.detections.json").is_file()
    plan(["--config", str(tmp_path / "toy.yaml"), "--ranks", "8", "--images", "64"])
    trained = sum(p.numel() for p in toy.Toy(6, 81, torch.nn.BatchNorm2d(6)).parameters())
    assert f"parameters     {trained:,}, {trained:,} trained" in capfd.readouterr().out


@pytest.mark.parametrize("padding", ["batch", "fixed"])
def test_a_family_of_squares(
    shapes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, padding: str
) -> None:
    seen = set()

    def dense(self: toy.Toy, images: Tensor) -> list[Tensor]:
        seen.add(tuple(images.shape[2:]))
        return [self.head(self.backbone(images))]

    monkeypatch.setattr(toy.ToyConfig, "geometry", Geometry(divisible=16, square=True))
    monkeypatch.setattr(toy.Toy, "dense", dense)
    more = ["--data.short_sides", "[80]", "--data.val_short_side", "80", "--data.padding", padding]
    train.main(arguments(shapes, tmp_path / "run", 4, "--max_steps", "2", *more))
    assert re.search(r"result: AP=0\.\d{3}", capfd.readouterr().out)
    words = ["--config", str(tmp_path / "toy.yaml"), "--ranks", "8", "--images", "64", "--data.short_sides", "[80]"]
    plan(words)
    assert seen == {(80, 80)}


def test_keys_are_those_of_the_family(tmp_path: Path, shapes: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for key, message in (("channels", "model.channels is 0; accepted: 1 or more"), ("neck_channels", "channels?")):
        with pytest.raises(SystemExit) as ended:
            train.main(arguments(shapes, tmp_path / "run", IMAGES, f"--model.{key}", "0"))
        assert ended.value.code == 2 and message in capfd.readouterr().err
    with pytest.raises(SystemExit):
        train.main(arguments(shapes, tmp_path / "run", IMAGES, "--model.detector", "tyo"))
    assert ", toy; did you mean toy?" in capfd.readouterr().err
