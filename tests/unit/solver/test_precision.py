from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megdet_hpc.command_line import config_parser, parse_config
from megdet_hpc.config import Config, NormConfig
from megdet_hpc.data.batch import Batch
from megdet_hpc.data.sample import Target
from megdet_hpc.engine.checkpoint import load_checkpoint
from megdet_hpc.engine.passes import NotFiniteError, RankPasses
from megdet_hpc.engine.step import StepResult, train_step
from megdet_hpc.layers.frozen import FrozenNorm
from megdet_hpc.log import read_metrics
from megdet_hpc.models.detector import Draws
from megdet_hpc.models.detectors.faster_rcnn import FasterRcnn
from megdet_hpc.models.factory import build_detector
from megdet_hpc.models.heads.anchors import WideAnchors
from megdet_hpc.parallel.runtime import SynchronizedOptimizer
from megdet_hpc.parallel.serial import SerialCommunicator
from megdet_hpc.solver.optimizer import build_optimizer
from megdet_hpc.solver.precision import Precision, ready_for_half_precision
from megdet_hpc.train import main
from tests.families import FAMILIES, build
from tests.families import batch as family_batch

SMALL = ["--model.neck_channels", "16", "--model.box_head_channels", "32", "--data.val", "null"]
TRAIN = ["--config", "tiny", *SMALL, "--data.images_per_rank", "2", "--data.short_sides", "[64]", "--device", "cpu"]


def config(*arguments: str) -> Config:
    return parse_config(config_parser("tests", ""), ["--config", "tiny", *SMALL, *arguments])[0]


def detector(of: Config) -> FasterRcnn:
    model = build_detector(of, num_categories=2, group=SerialCommunicator())
    assert isinstance(model, FasterRcnn)
    ready_for_half_precision(model)
    return model


def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8, generator=generator)
    target = Target.ordinary(torch.tensor([[8.0, 8.0, 60.0, 50.0]]), torch.tensor([1]))
    return Batch(images, [(96, 96)] * 2, [(1.0, 1.0)] * 2, [1, 2], [target] * 2)


def steps(of: Config, model: FasterRcnn, precision: Precision, number: int) -> list[StepResult]:
    optimizer = SynchronizedOptimizer(build_optimizer(model, of.solver, decay_norm=True))
    world = SerialCommunicator()
    passes = RankPasses(model, world, precision)
    return [
        train_step(model, optimizer, [batch()], step=step, seed=0, lr=0.01, clip_norm=None, world=world, passes=passes)
        for step in range(number)
    ]


def losses(of: Config, precision: str) -> list[float]:
    model = detector(of)
    rows = steps(of, model, Precision(precision), 3)
    assert not any(row.skipped for row in rows)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    return [sum(row.losses.values()) for row in rows]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["cgbn", "bn", "gn"])
def test_three_steps_in_half_precision_stay_near_float32(kind: str, precision: str) -> None:
    of = config("--norm.kind", kind)
    half, full = losses(of, precision), losses(of, "float32")
    assert half[0] != full[0]
    # bfloat16 rounds to 1 / 256; the sampled boxes may differ too
    assert half == pytest.approx(full, rel=0.1)


def test_the_loss_scale_leaves_the_gradient() -> None:
    of = config()
    norms = []
    for scale in (2.0**8, 2.0**14):
        precision = Precision("float16")
        precision.scaler.load_state_dict({**precision.scaler.state_dict(), "scale": scale})
        norms.append(steps(of, detector(of), precision, 1)[0].gradient_norm)
    # float16 has 11 bits; what the smaller scale loses lies far below the largest gradients
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)


def test_an_overflow_skips_the_update_and_halves_the_scale() -> None:
    of = config()
    model, precision = detector(of), Precision("float16")
    precision.scaler.load_state_dict({**precision.scaler.state_dict(), "scale": 2.0**40})
    before = [p.detach().clone() for p in model.parameters()]
    row = steps(of, model, precision, 1)[0]
    assert row.skipped and not math.isfinite(row.gradient_norm)
    assert precision.scaler.get_scale() == 2.0**39
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_gradient_that_no_scale_makes_finite_ends_the_run() -> None:
    of = config()
    model, precision = detector(of), Precision("float16")
    model.rpn.head.cls_logits.weight.register_hook(lambda gradient: gradient * math.inf)  # type: ignore[union-attr, operator]
    precision.scaler.load_state_dict({**precision.scaler.state_dict(), "scale": 4.0})
    with pytest.raises(
        NotFiniteError, match=r"step 2: .*in 1 parameter\(s\), first \['rpn.head.cls_logits.weight'\]; loss scale 1,"
    ):
        steps(of, model, precision, 5)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_boxes_and_losses_are_float32_under_autocast(precision: str) -> None:
    model = detector(config())
    seen: dict[str, torch.dtype] = {}
    linear = model.roi_heads.box_head.fc6
    linear.register_forward_hook(lambda m, i, output: seen.update(inside=output.dtype))
    model.rpn.register_forward_hook(lambda m, i, output: seen.update(proposals=output[0][0].dtype))
    one = batch()
    with Precision(precision).autocast():
        result = model.losses(one, Draws(0, 0))
    assert seen == {"inside": getattr(torch, precision), "proposals": torch.float32}
    assert {loss.value.dtype for loss in result.values()} == {torch.float32}
    with Precision("float32").autocast():
        assert not torch.is_autocast_enabled("cpu")


def test_a_map_one_cell_wide_gives_the_whole_gradient_in_bfloat16() -> None:
    """PyTorch 2.14.1 leaves parts of the weight's gradient as they were in memory, here full of NaN."""

    class Narrow(nn.Sequential):
        def coordinate_modules(self) -> list[nn.Module]:
            return []

    torch.manual_seed(0)
    model = Narrow(nn.Conv2d(64, 64, 3, 2, 1))
    ready_for_half_precision(model)  # type: ignore[arg-type]
    images = torch.randn(4, 64, 2, 1)
    gradients = []
    for precision in ["float32"] + 20 * ["bfloat16"]:
        spoilt = [torch.full((64 * 64 * 9,), math.nan, dtype=torch.bfloat16) for _ in range(3)]
        del spoilt
        model.zero_grad()
        with Precision(precision).autocast():
            found = model(images)
        assert found.shape == (4, 64, 1, 1)
        found.float().square().sum().backward()
        gradients.append(model[0].weight.grad.clone())  # type: ignore[union-attr, operator]
    largest = float(gradients[0].abs().max())
    assert max(float((own - gradients[0]).abs().max()) for own in gradients) < 0.02 * largest


def test_training_takes_the_precision_of_its_configuration(shapes: Path, tmp_path: Path) -> None:
    first = []
    for precision in ("float32", "bfloat16", "float16"):
        output = tmp_path / precision
        keys = ["--max_steps", "1", "--log_every", "1", "--solver.precision", precision]
        main([*TRAIN, *keys, "--data.train", str(shapes / "train"), "--output", str(output)])
        first.append(read_metrics(output / "metrics.jsonl")[0]["loss"])
    assert len(set(first)) == 3
    assert first == pytest.approx([first[0]] * 3, rel=0.1)


def test_a_resumed_run_goes_on_with_its_loss_scale(shapes: Path, tmp_path: Path) -> None:
    keys = [*TRAIN, "--data.train", str(shapes / "train"), "--output", str(tmp_path / "run")]
    keys += ["--log_every", "1", "--solver.precision", "float16"]
    main([*keys, "--max_steps", "1"])
    file = tmp_path / "run" / "checkpoints" / "step_00000001.pt"
    state = load_checkpoint(file)
    assert state["loss_scale"]["scale"] == 2.0**16
    # so high that the next gradient overflows
    state["loss_scale"]["scale"] = 2.0**40
    torch.save(state, file)
    main([*keys, "--max_steps", "2", "--resume", "auto"])
    row = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert row["step"] == 2 and row["grad_scale"] == 2.0**39 and row["skipped_steps"] == 1
    assert "gradient_norm" not in row
    kept = load_checkpoint(tmp_path / "run" / "checkpoints" / "step_00000002.pt")
    assert all(
        torch.equal(kept["model"][name], state["model"][name]) for name, _ in detector(config()).named_parameters()
    )


def test_another_type_is_refused_with_what_is_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        config("--solver.precision", "float8")
    assert "solver.precision is 'float8'; accepted: float32, bfloat16, float16" in capsys.readouterr().err


@pytest.mark.parametrize("family", [key for key, value in FAMILIES.items() if hasattr(value, "fpn_levels")])
def test_features_stay_in_half_precision_and_anchors_do_not(family: str) -> None:
    """Frozen layers, other layers and the FPN give bfloat16; anchors have the coordinates of float32."""
    model = build(family, norm=NormConfig(where=("fpn", "rpn", "heads"))).float()  # the backbone is frozen
    ready_for_half_precision(model)
    wide = copy.deepcopy(model)
    kinds: dict[str, set[torch.dtype]] = {}

    def note(where: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            for one in output.values() if isinstance(output, dict) else [output]:
                kinds.setdefault(where, set()).add(one.dtype)

        return hook

    def made(of: nn.Module) -> list[Tensor]:
        found: list[Tensor] = []
        for module in of.modules():
            if isinstance(module, WideAnchors):
                module.register_forward_hook(lambda _module, _inputs, output: found.extend(output))
        return found

    model.backbone.register_forward_hook(note("backbone"))  # type: ignore[union-attr, operator]
    for module in model.modules():
        if isinstance(module, FrozenNorm):
            module.register_forward_hook(note("frozen"))
    narrow_anchors, wide_anchors = made(model), made(wide)
    some = family_batch(dtype=torch.float32)
    with Precision("bfloat16").autocast():
        model.losses(some, Draws(0, 0))
    wide.losses(some, Draws(0, 0))
    assert kinds["backbone"] == {torch.bfloat16}
    assert kinds["frozen"] == {torch.bfloat16}
    assert narrow_anchors and all(map(torch.equal, narrow_anchors, wide_anchors))
