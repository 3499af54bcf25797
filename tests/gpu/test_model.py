"""Whole detectors on a GPU against the same weights on the CPU, in float64; and half precision beside it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from megdet_hpc.config import NormConfig
from megdet_hpc.data.batch import Batch
from megdet_hpc.engine.passes import RankPasses
from megdet_hpc.layers.frozen import FrozenNorm
from megdet_hpc.models.detector import Detector
from megdet_hpc.parallel.serial import SerialCommunicator
from megdet_hpc.solver.precision import Precision, ready_for_half_precision
from tests.families import FAMILIES, batch, build

# The devices draw other samples, so all anchors and boxes are samples.
_ALL = {"rpn_samples_per_image": 8192, "roi_samples_per_image": 2048}
# Sums of some 1e5 terms in another order, through some twenty layers.
TOLERANCE = 1e-9


def detector(family: str) -> Detector:
    """A family whose losses take every sample there is."""
    keys = {key: value for key, value in _ALL.items() if hasattr(FAMILIES[family], key)}
    return build(family, **keys)


def losses_and_gradient(model: Detector, some: Batch) -> tuple[dict[str, float], Tensor]:
    """Losses of one update, and the gradients of all parameters in a row on the CPU."""
    losses, _ = RankPasses(model, SerialCommunicator()).forward_backward([some], step=3, seed=0)
    return losses, torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_gradients_and_detections_are_those_of_the_cpu(gpu: torch.device, family: str) -> None:
    here, some = detector(family), batch()
    there = copy.deepcopy(here).to(gpu)
    losses, gradient = losses_and_gradient(here, some)
    others, on_gpu = losses_and_gradient(there, some.to(gpu))
    assert losses.keys() == others.keys()
    for name, value in losses.items():
        assert others[name] == pytest.approx(value, rel=TOLERANCE), name
    assert float((gradient - on_gpu).abs().max() / gradient.abs().max()) < TOLERANCE
    here.eval()
    there.eval()
    with torch.inference_mode():
        wanted, found = here.detect(some), there.detect(some.to(gpu))
    for one, other in zip(wanted, found, strict=True):
        assert len(one.boxes) == len(other.boxes)
        torch.testing.assert_close(other.boxes.cpu(), one.boxes, rtol=0, atol=1e-6)
        torch.testing.assert_close(other.scores.cpu(), one.scores, rtol=0, atol=1e-9)


def test_bfloat16_gives_like_losses_and_float32_gradients(gpu: torch.device) -> None:
    model = detector("faster_rcnn").float().to(gpu)
    ready_for_half_precision(model)
    some = batch(dtype=torch.float32).to(gpu)
    plain, gradient = losses_and_gradient(copy.deepcopy(model), some)
    passes = RankPasses(model, SerialCommunicator(), Precision("bfloat16", gpu))
    losses, _ = passes.forward_backward([some], step=3, seed=0)
    for name, value in plain.items():
        assert losses[name] == pytest.approx(value, rel=0.1), name
    found = torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None])
    assert found.dtype == torch.float32 and torch.nn.functional.cosine_similarity(found, gradient, dim=0) > 0.9


@pytest.mark.parametrize("family", ["faster_rcnn", "retinanet"])
def test_features_are_bfloat16_up_to_the_fpn(gpu: torch.device, family: str) -> None:
    model = build(family, norm=NormConfig(where=("fpn", "rpn", "heads"))).float().to(gpu)  # the backbone is frozen
    ready_for_half_precision(model)
    kinds = set()
    for module in model.modules():
        if isinstance(module, FrozenNorm):
            module.register_forward_hook(lambda _module, _inputs, output: kinds.add(output.dtype))
    model.backbone.register_forward_hook(  # type: ignore[union-attr, operator]
        lambda _module, _inputs, output: kinds.update(level.dtype for level in output.values())
    )
    RankPasses(model, SerialCommunicator(), Precision("bfloat16", gpu)).forward_backward(
        [batch(dtype=torch.float32).to(gpu)], step=3, seed=0
    )
    assert kinds == {torch.bfloat16}


def test_frozen_layers_are_one_kernel_with_float32s_result(gpu: torch.device) -> None:
    layer = FrozenNorm(5)
    layer.running_mean.uniform_()
    layer.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 5, 7, 9)
    wanted = layer(x)
    layer.to(gpu)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10)):
        there = layer(x.to(dtype).to(gpu))
        assert there.dtype == dtype
        torch.testing.assert_close(there.cpu().float(), wanted, rtol=tolerance, atol=2 * tolerance)
