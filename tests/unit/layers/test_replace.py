"""Layers replaced inside torchvision's closed classes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import densenet121
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.ssd import SSDHead
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.ops import FrozenBatchNorm2d

from megdet_hpc.layers.cgbn import CrossGpuBatchNorm2d, convert_batchnorm
from megdet_hpc.layers.convolution import conv_layer, is_3x3
from megdet_hpc.layers.replace import add_norms, replace_convs, replace_norms
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.serial import SerialCommunicator
from megdet_hpc.parallel.threads import run_ranks

ALONE = SerialCommunicator()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(build: Callable[[], nn.Module]) -> nn.Module:
    """A float64 module with weights and running statistics that differ from layer to layer."""
    torch.manual_seed(0)
    model = build().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)  # type: ignore[arg-type]
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.uniform_(module.bias)
    return model


def rpn_head() -> nn.Module:
    return RPNHead(4, 3, conv_depth=2)


def ssd_head() -> nn.Module:
    return SSDHead([4, 6], [2, 3], num_classes=5)


def fcn_head() -> nn.Module:
    head = FCNHead(8, 3)
    head[3] = nn.Identity()  # its dropout
    return head


def levels(images: int = 2) -> list[Tensor]:
    return [draw(images, 4, 6, 6, seed=1), draw(images, 4, 3, 3, seed=2)]


CLOSED: list[tuple[Callable[[], nn.Module], Any]] = [
    (densenet121, draw(2, 3, 64, 64)),
    (rpn_head, levels()),
    (ssd_head, [draw(2, 4, 6, 6), draw(2, 6, 3, 3)]),
    (fcn_head, draw(2, 8, 6, 6)),
]
closed = pytest.mark.parametrize(("build", "x"), CLOSED, ids=["DenseNet", "RPNHead", "SSDHead", "FCNHead"])


@closed
def test_an_equal_choice_changes_no_bit(build: Callable[[], nn.Module], x: Any) -> None:
    theirs = made(build).eval()
    ours = copy.deepcopy(theirs)
    state = torch.random.get_rng_state()
    replace_convs(ours, lambda conv: conv_layer("standard")(copy.deepcopy(conv)), is_3x3)
    assert torch.equal(torch.random.get_rng_state(), state)
    replace_norms(ours, nn.BatchNorm2d)
    add_norms(ours, lambda _: nn.Identity(), is_3x3)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)


@closed
def test_parameters_stay_the_same_objects_and_get_gradients(build: Callable[[], nn.Module], x: Any) -> None:
    """An optimizer that was made before trains the model after the replacement."""
    model = made(build)
    before = dict(model.named_parameters())
    replace_norms(model, lambda channels: nn.GroupNorm(1, channels))
    replace_convs(model, conv_layer("weight_standardized"), is_3x3)
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    outputs = model(x)
    while not isinstance(outputs, Tensor):
        outputs = torch.cat([y.flatten() for y in _tensors(outputs)])
    outputs.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in after.values())


def _tensors(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    items = outputs.values() if isinstance(outputs, dict) else outputs
    return [tensor for item in items for tensor in _tensors(item)]


@pytest.mark.parametrize("make", [nn.BatchNorm2d, lambda c: CrossGpuBatchNorm2d(c, group=ALONE), FrozenBatchNorm2d])
def test_densenet_evaluates_as_before(make: Callable[[int], nn.Module]) -> None:
    theirs = made(densenet121).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
    ours = replace_norms(copy.deepcopy(theirs), make)
    kinds = {type(m) for m in ours.modules() if isinstance(m, nn.BatchNorm2d | FrozenBatchNorm2d)}
    assert len(kinds) == 1 and (nn.BatchNorm2d in kinds) == (make is nn.BatchNorm2d)
    x = draw(1, 3, 32, 32)
    torch.testing.assert_close(ours(x), theirs(x))


def test_settings_are_the_old_layers_or_the_new_ones() -> None:
    old = nn.BatchNorm2d(4, eps=1e-3, momentum=0.3)
    kept = replace_norms(old, nn.BatchNorm2d)
    configured = replace_norms(old, lambda channels: nn.BatchNorm2d(channels, momentum=0.01), keep_settings=False)
    assert (kept.eps, kept.momentum) == (1e-3, 0.3)
    assert (configured.eps, configured.momentum) == (1e-5, 0.01)
    for layer in (nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4, track_running_stats=False)):
        new = replace_norms(layer, nn.BatchNorm2d)
        assert list(new.state_dict()) == list(layer.state_dict())
        assert (new.affine, new.track_running_stats) == (layer.affine, layer.track_running_stats)


def test_a_shared_layer_stays_shared() -> None:
    layer = nn.BatchNorm2d(3)
    model = nn.ModuleDict({"a": layer, "b": layer, "c": nn.Sequential(layer, nn.BatchNorm2d(3))})
    convert_batchnorm(model, group=ALONE)
    assert model["a"] is model["b"] is model["c"][0] is not model["c"][1]  # type: ignore[index]
    assert isinstance(model["a"], CrossGpuBatchNorm2d) and model["a"].name == "cgbn.a"


def test_a_model_on_the_meta_device_stays_there() -> None:
    """Where the planner counts activations."""
    with torch.device("meta"):
        model = densenet121()
    replace_norms(model, lambda channels: nn.GroupNorm(1, channels))
    replace_convs(model, conv_layer("deformable"), is_3x3)
    assert model(torch.empty(1, 3, 64, 64, device="meta")).shape == (1, 1000)
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_a_layer_with_layers_of_its_own_is_refused() -> None:
    head = add_norms(nn.Sequential(nn.Conv2d(2, 2, 3)), nn.BatchNorm2d, is_3x3)
    with pytest.raises(ValueError, match="Conv2d cannot be replaced: norm inside it would be lost"):
        replace_convs(head, conv_layer("weight_standardized"), is_3x3)
    with pytest.raises(ValueError, match="0 has a normalization layer already"):
        add_norms(head, nn.BatchNorm2d, is_3x3)


def test_rpn_head_becomes_conv_norm_relu() -> None:
    """The layers written out one after the other; the bias becomes the norm's offset, the predictors stay."""
    head = made(rpn_head)
    state = {key: value.clone() for key, value in head.state_dict().items()}
    add_norms(head, lambda channels: nn.GroupNorm(2, channels), is_3x3)
    head = copy.deepcopy(head)  # as emulated ranks are made
    renamed = {key.replace(".bias", ".norm.bias") if key.startswith("conv.") else key for key in state}
    assert set(head.state_dict()) == renamed | {"conv.0.0.norm.weight", "conv.1.0.norm.weight"}
    scores, boxes = head(levels())
    for level, x in enumerate(levels()):
        for i in (0, 1):
            x = nn.functional.conv2d(x, state[f"conv.{i}.0.weight"], padding=1)
            x = nn.functional.group_norm(x, 2, torch.ones(4).double(), state[f"conv.{i}.0.bias"]).relu()
        torch.testing.assert_close(scores[level], head.cls_logits(x))
        torch.testing.assert_close(boxes[level], head.bbox_pred(x))


def test_ssd_head_gets_a_norm_behind_every_predictor() -> None:
    head, x = made(ssd_head).train(), CLOSED[2][1]
    plain = head(x)
    add_norms(head, nn.BatchNorm2d, is_3x3)
    found = head(x)
    assert found["cls_logits"].shape == plain["cls_logits"].shape
    assert sum(isinstance(module, nn.BatchNorm2d) for module in head.modules()) == 4
    # offset 0.5 to 1.5 and deviation 1 on every channel: the first map's scores over images, cells and anchors
    offsets = head.classification_head.module_list[0].norm.bias.view(2, 5).mean(0)
    first = found["cls_logits"][:, : 36 * 2]
    torch.testing.assert_close(first.mean((0, 1)), offsets)


def _shares_equal_the_whole(build: Callable[[], nn.Module], prepare: Callable[..., Any], whole: list[Tensor]) -> None:
    """Outputs, gradients and running statistics of 2 ranks with 3 images and 1 against BatchNorm on all 4."""
    reference = made(build)
    prepare(reference, nn.BatchNorm2d)
    expected = torch.cat([y.flatten(1) for y in _tensors(reference(whole[0] if len(whole) == 1 else whole))], dim=1)
    expected.square().mean().backward()

    def rank(comm: Communicator) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        model = copy.deepcopy(start)
        prepare(model, lambda channels: CrossGpuBatchNorm2d(channels, group=comm))
        own = [x.split([3, 1])[comm.rank] for x in whole]
        y = torch.cat([y.flatten(1) for y in _tensors(model(own[0] if len(own) == 1 else own))], dim=1)
        (y.square().sum() / expected.numel()).backward()
        return y, {k: p.grad for k, p in model.named_parameters() if p.grad is not None}, dict(model.named_buffers())

    start = made(build)
    (y0, first, buffers), (y1, second, _) = run_ranks(2, rank)
    torch.testing.assert_close(torch.cat([y0, y1]), expected, rtol=1e-8, atol=1e-8)
    assert len(first) == len(dict(reference.named_parameters()))
    for name, parameter in reference.named_parameters():
        assert parameter.grad is not None
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(first[name] + second[name], parameter.grad, rtol=1e-7, atol=1e-9 * max(scale, 1e-3))
    torch.testing.assert_close(buffers, dict(reference.named_buffers()), rtol=1e-9, atol=1e-9)


def test_densenet_on_two_ranks_is_batchnorm_on_the_whole_batch() -> None:
    _shares_equal_the_whole(densenet121, replace_norms, [draw(4, 3, 64, 64)])


def test_rpn_head_on_two_ranks_is_batchnorm_on_the_whole_batch() -> None:
    """One layer for both levels: each level has statistics of its own, in the same order on every rank."""
    _shares_equal_the_whole(rpn_head, lambda head, make: add_norms(head, make, is_3x3), levels(4))
