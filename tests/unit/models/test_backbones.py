"""Backbones: counts against torchvision's and the papers', levels, frozen stages, kinds of convolution, two ranks."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import DenseNet
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops import FrozenBatchNorm2d, SqueezeExcitation

from megdet_hpc.config import Config, FasterRcnnConfig, ModelConfig, NormConfig, RetinaNetConfig
from megdet_hpc.data.batch import Batch
from megdet_hpc.errors import UserError
from megdet_hpc.export.graph import DetectorGraph, read, write
from megdet_hpc.layers.cgbn import CrossGpuBatchNorm2d
from megdet_hpc.layers.convolution import ConvKind, DeformableConv2d, WeightStandardizedConv2d
from megdet_hpc.layers.frozen import FrozenNorm
from megdet_hpc.layers.norm import NormLayer, norm_layer
from megdet_hpc.models.backbones.base import Backbone
from megdet_hpc.models.backbones.configured import build_backbone
from megdet_hpc.models.backbones.densenet import DenseNetBackbone
from megdet_hpc.models.backbones.detnet import build_detnet
from megdet_hpc.models.backbones.peleenet import build_peleenet
from megdet_hpc.models.backbones.resnet import ResNetBackbone, dilate
from megdet_hpc.models.backbones.root_resnet import Order, PreActivationBlock, Root, build_root_resnet
from megdet_hpc.models.detector import Detector, Draws
from megdet_hpc.models.factory import build_detector
from megdet_hpc.models.necks.fpn import build_fpn, build_retina_fpn
from megdet_hpc.models.weights import PUBLISHED
from megdet_hpc.parallel.communicator import Communicator
from megdet_hpc.parallel.serial import SerialCommunicator
from megdet_hpc.parallel.threads import run_ranks
from megdet_hpc.plan.model_size import macs_of
from megdet_hpc.solver.precision import Precision, ready_for_half_precision
from tests.families import FAMILIES, NUM_CATEGORIES, batch

ALONE = SerialCommunicator()


def on_meta(name: str, norm: NormConfig = NormConfig(kind="bn"), **keys: Any) -> Backbone:  # noqa: B008
    config = FasterRcnnConfig(backbone=name, backbone_weights=None, **keys)  # type: ignore[arg-type]
    with torch.device("meta"):
        return build_backbone(config, norm_layer(norm, "backbone", ALONE))


def size_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_arithmetic_are_torchvisions(name: str) -> None:
    """torchvision's published numbers are the classifier's, of an image of 224 pixels."""
    published = torchvision.models.get_model_weights(name).DEFAULT.meta
    body = on_meta(name)
    classifier = body.stages[-1].channels * 1000
    assert size_of(body) + classifier + 1000 == published["num_params"]
    macs = macs_of(body, torch.empty(1, 3, 224, 224, device="meta")) + classifier
    assert macs / 1e9 == pytest.approx(published["_ops"], abs=0.002)


def test_resnet10_w16_has_a_quarter_of_the_channels() -> None:
    wide, narrow = on_meta("resnet10"), on_meta("resnet10_w16")
    assert [stage.channels for stage in wide.stages] == [64, 128, 256, 512]
    assert [stage.channels for stage in narrow.stages] == [16, 32, 64, 128]
    image = torch.empty(1, 3, 64, 64, device="meta")
    stem = 32 * 32 * 64 * 3 * 7 * 7  # it sees three channels in both, so it shrinks by 4, the others by 16
    assert macs_of(narrow, image) == stem / 4 + (macs_of(wide, image) - stem) / 16
    assert set(wide.state_dict()) == set(narrow.state_dict())


def test_detnet_is_the_papers() -> None:
    """4.8 GMAC is published: with the stride in the first 1 x 1 convolution of a stage."""
    body, image = on_meta("detnet59"), torch.empty(1, 3, 224, 224, device="meta")
    assert size_of(body) + 1024 * 1000 + 1000 == 18_372_648
    assert (macs_of(body, image) + 1024 * 1000) / 1e9 == pytest.approx(5.000, abs=0.001)
    for layer in ("layer2", "layer3"):
        block = body.get_submodule(f"{layer}.0")
        block.conv1.stride, block.conv2.stride = (2, 2), (1, 1)  # type: ignore[assignment]
    assert (macs_of(body, image) + 1024 * 1000) / 1e9 == pytest.approx(4.846, abs=0.001)


def batch_norms(module: nn.Module) -> tuple[int, int]:
    """The batch norms of a module, and their channels together."""
    channels = [layer.num_features for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    return len(channels), sum(channels)


def test_peleenet_is_the_papers() -> None:
    """2.8 million parameters and 508 million multiplications are published. Sides of 304 pixels round up, to 10."""
    body = on_meta("peleenet")
    assert size_of(body) + 704 * 1000 + 1000 == 2_802_248
    assert batch_norms(body) == (113, 4864)
    macs = macs_of(body, torch.empty(1, 3, 224, 224, device="meta")) + 704 * 1000
    assert macs / 1e6 == pytest.approx(508, abs=0.6)
    levels = body(torch.empty(1, 3, 304, 304, device="meta")).values()
    assert [tuple(level.shape[1:]) for level in levels] == [
        (128, 76, 76), (256, 38, 38), (512, 19, 19), (704, 10, 10)
    ]  # fmt: skip


def test_peleenets_rounded_pool_divides_by_the_cells_that_are_there() -> None:
    pool: Any = build_peleenet(nn.BatchNorm2d, (1, 1, 1, 1), 8, 8).pool
    x = torch.arange(9.0).view(1, 1, 3, 3)
    assert pool(x).flatten().tolist() == [2.0, 3.5, 6.5, 8.0]


# Of the authors' two networks, with 3 x 3 heads for 21 labels and 30 default boxes in a column of all maps.
@pytest.mark.parametrize(
    ("name", "order", "norms", "with_heads"),
    [
        ("root_resnet34", "post", (49, 10_048), 24_573_212),
        ("root_resnet34", "pre", (42, 8640), 24_554_012),
        ("root_resnet18", "pre", (26, 4928), 14_445_852),
    ],
)
def test_root_resnets_are_the_authors(name: str, order: Order, norms: tuple[int, int], with_heads: int) -> None:
    with torch.device("meta"):
        body = build_root_resnet(name, None, order=order)
    heads = [9 * s.channels * boxes * 25 for s, boxes in zip(body.stages, (4, 6, 6, 6, 4, 4), strict=True)]
    scales_and_offsets = 2 * 30 * 25
    assert size_of(body) + sum(heads) + scales_and_offsets == with_heads
    assert batch_norms(body) == norms


@pytest.mark.parametrize("order", ["post", "pre"])
@pytest.mark.parametrize("root", ["root", "a", "b", "original"])
@pytest.mark.parametrize("norm", [None, lambda channels: nn.GroupNorm(1, channels)])
def test_roots_end_in_the_same_levels(root: Root, order: Order, norm: NormLayer | None) -> None:
    """A root with twice the stride has one layer fewer behind it, and each level has the channels of the next."""
    with torch.device("meta"):
        body = build_root_resnet("root_resnet18", norm, root, order)
    found = body(torch.empty(1, 3, 300, 300, device="meta"))
    assert list(found) == [stage.name for stage in body.stages]
    assert [level.shape[1] for level in found.values()] == [stage.channels for stage in body.stages]
    assert [level.shape[2] for level in found.values()] == [38, 19, 10, 5, *((3, 3) if order == "post" else (5, 5))]
    assert [stage.channels for stage in body.stages][:3] == ([128, 256, 512] if root == "original" else [256, 512, 128])
    kinds = {type(m) for m in body.modules() if isinstance(m, nn.BatchNorm2d | nn.GroupNorm)}
    assert kinds == {nn.BatchNorm2d if norm is None else nn.GroupNorm}


def test_levels_before_the_sum() -> None:
    """With normalization before the convolutions a level is the last convolution's output; the sum goes on."""
    torch.manual_seed(0)
    body: Any = root_resnet_pre(nn.BatchNorm2d).eval()
    x = torch.randn(1, 3, 64, 64)
    found = body(x)
    x, _ = body.layer1[0](body.root(x))
    assert isinstance(body.layer1[0].before, nn.Identity) and isinstance(body.layer2[0], PreActivationBlock)
    x, _ = body.layer2[0](x)
    active = body.layer3[0].before(x)
    branch = body.layer3[0].conv2(body.layer3[0].between(body.layer3[0].conv1(active)))
    assert torch.equal(found["2"], branch)
    x = branch + body.layer3[0].shortcut(active)
    assert torch.equal(found["3"], body.layer4[0](x)[1])


@pytest.mark.parametrize("norm", ["gn", "frozen", "bn"])
@pytest.mark.parametrize(
    ("name", "keys", "strides"),
    [
        ("resnext50_32x4d", {"conv": "deformable"}, [4, 8, 16, 32]),
        ("resnet18", {"dilated_c5": True}, [4, 8, 16, 16]),
        ("densenet121", {"conv": "deformable", "conv_stages": (2, 5)}, [4, 8, 16, 32]),
        ("detnet59", {}, [4, 8, 16, 16, 16]),
        ("peleenet", {"conv": "deformable"}, [4, 8, 16, 32]),
    ],
)
def test_levels_are_as_they_say(name: str, keys: dict[str, Any], strides: list[int], norm: Any) -> None:
    body = on_meta(name, NormConfig(kind=norm), **keys)
    found = body(torch.empty(1, 3, 64, 96, device="meta"))
    assert [stage.stride for stage in body.stages] == strides and list(found) == [s.name for s in body.stages]
    for stage in body.stages:
        assert found[stage.name].shape == (1, stage.channels, 64 // stage.stride, 96 // stage.stride)
    kinds = {type(m) for m in body.modules() if isinstance(m, nn.BatchNorm2d | FrozenBatchNorm2d | nn.GroupNorm)}
    assert kinds == {{"gn": nn.GroupNorm, "frozen": FrozenNorm, "bn": nn.BatchNorm2d}[norm]}


# Every kind of backbone at a width that costs nothing.
def resnext(norm: NormLayer) -> Backbone:
    return ResNetBackbone(ResNet(Bottleneck, [1, 1, 1, 1], groups=4, width_per_group=2, norm_layer=norm))


def atrous(norm: NormLayer) -> Backbone:
    resnet = ResNet(BasicBlock, [1, 1, 1, 2], norm_layer=norm)
    dilate(resnet.layer4)
    return ResNetBackbone(resnet, (4, 8, 16, 16))


def densenet(norm: NormLayer | None) -> Backbone:
    return DenseNetBackbone(DenseNet(4, (1, 2, 1, 2), num_init_features=8), norm)


def detnet(norm: NormLayer) -> Backbone:
    return build_detnet(norm, (1, 1, 1, 2, 1))


def peleenet(norm: NormLayer) -> Backbone:
    return build_peleenet(norm, (1, 2, 1, 1), growth=8, stem_width=8)


def root_resnet_post(norm: NormLayer) -> Backbone:
    return build_root_resnet("root_resnet10", norm, width=4)


def root_resnet_pre(norm: NormLayer) -> Backbone:
    return build_root_resnet("root_resnet10", norm, order="pre", width=4)


def deformable(norm: NormLayer) -> Backbone:
    body = resnext(norm)
    body.use_convs("deformable", [3, 5])
    for module in body.modules():
        if isinstance(module, DeformableConv2d):
            nn.init.normal_(module.offset.weight, std=0.1)
    return body


def standardized(norm: NormLayer) -> Backbone:
    body = densenet(norm)
    body.use_convs("weight_standardized", range(1, 6))
    return body


@pytest.mark.parametrize(
    "make",
    [resnext, atrous, densenet, detnet, peleenet, root_resnet_post, root_resnet_pre, deformable, standardized],
)
def test_two_ranks_are_one_process(make: Callable[[NormLayer], Backbone]) -> None:
    """Levels, gradients and running statistics of ranks with 3 images and 1 against batch norm over all 4, float64."""
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def built(norm: NormLayer) -> Backbone:
        torch.manual_seed(0)
        return make(norm).double()

    def run(body: Backbone, own: Tensor) -> list[Tensor]:
        levels = list(body(own).values())
        sum((level.square().sum() for level in levels), start=torch.zeros(())).backward()
        return [level.detach() for level in levels]

    def rank(comm: Communicator) -> tuple[list[Tensor], dict[str, Tensor], dict[str, Tensor]]:
        body = bodies[comm.rank]
        for module in body.modules():
            if isinstance(module, CrossGpuBatchNorm2d):
                module.group = comm
        levels = run(body, images.split([3, 1])[comm.rank])
        return levels, {k: p.grad for k, p in body.named_parameters() if p.grad is not None}, dict(body.named_buffers())

    reference = built(nn.BatchNorm2d)
    expected = run(reference, images)
    bodies = [built(lambda channels: CrossGpuBatchNorm2d(channels, group=ALONE)) for _ in range(2)]
    (first, grads, buffers), (second, others, _) = run_ranks(2, rank)
    for one, other, both in zip(first, second, expected, strict=True):
        torch.testing.assert_close(torch.cat([one, other]), both, rtol=1e-9, atol=1e-9)
    own = dict(reference.named_parameters())
    largest = max(float(p.grad.abs().max()) for p in own.values() if p.grad is not None)
    for name, parameter in own.items():
        # what normalization takes out has a gradient of rounding errors
        torch.testing.assert_close(grads[name] + others[name], parameter.grad, rtol=1e-7, atol=1e-11 * largest)
    torch.testing.assert_close(buffers, dict(reference.named_buffers()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_atrous_is_the_strided_stage_at_even_positions(block: Any) -> None:
    torch.manual_seed(0)
    strided = ResNet(block, [1, 1, 1, 3]).layer4.double().eval()
    x = torch.randn(1, 256 * block.expansion, 5, 6, dtype=torch.float64)
    expected = strided(x)
    if block is Bottleneck:
        theirs = ResNet(block, [1, 1, 1, 3], replace_stride_with_dilation=[False, False, True]).layer4.double().eval()
        theirs.load_state_dict(strided.state_dict())
    dilate(strided)
    found = strided(x)
    assert found.shape == (1, 512 * block.expansion, 5, 6)
    torch.testing.assert_close(found[..., ::2, ::2], expected, rtol=1e-12, atol=1e-12)
    if block is Bottleneck:
        assert torch.equal(found, theirs(x))


def test_densenet_levels_are_torchvisions_features() -> None:
    torch.manual_seed(0)
    theirs = DenseNet(4, (1, 2, 1, 2), num_init_features=8).eval()
    ours = densenet(None).eval()
    assert set(ours.state_dict()) == {key for key in theirs.state_dict() if "classifier" not in key}
    ours.load_state_dict(theirs.state_dict(), strict=False)
    x = torch.randn(2, 3, 64, 64)
    found, features = ours(x), theirs.features
    assert torch.equal(found["3"], features(x).relu())
    assert torch.equal(
        found["1"], features.transition2.norm(features[:7](x)).relu()
    )  # the second block, norm and ReLU behind it


@pytest.mark.parametrize("old", [True, False])
def test_densenet_loads_torchvisions_file(tmp_path: Path, old: bool) -> None:
    """torchvision's published file has old names: norm.1 for norm1."""
    torch.manual_seed(1)
    theirs = DenseNet(4, (1, 2, 1, 2), num_init_features=8)
    state = theirs.state_dict()
    if old:
        state = {re.sub(r"(denselayer\d\.\w+?)([12])\.", r"\1.\2.", key): value for key, value in state.items()}
        assert "features.denseblock1.denselayer1.norm.1.weight" in state
    torch.save(state, tmp_path / "dense.pth")
    body = densenet(FrozenBatchNorm2d)
    body.load(str(tmp_path / "dense.pth"))
    assert torch.equal(body.state_dict()["features.denseblock2.denselayer2.conv1.weight"],
                       theirs.state_dict()["features.denseblock2.denselayer2.conv1.weight"])  # fmt: skip
    torch.save(DenseNet(4, (1, 1, 1, 1), num_init_features=8).state_dict(), tmp_path / "other.pth")
    with pytest.raises(
        UserError, match=r"other\.pth: does not fit DenseNetBackbone: features\.denseblock2\.denselayer2"
    ):
        body.load(str(tmp_path / "other.pth"))


def test_another_networks_weights_are_refused(tmp_path: Path) -> None:
    torch.save(ResNet(Bottleneck, [1, 1, 1, 1]).state_dict(), tmp_path / "resnet.pth")
    for body, name in ((resnext(nn.BatchNorm2d), "layer1.0.conv1.weight"), (detnet(nn.BatchNorm2d), "layer4.1.conv1")):
        with pytest.raises(UserError, match=rf"resnet.pth: does not fit ResNetBackbone: .*{name}"):
            body.load(str(tmp_path / "resnet.pth"))


@pytest.mark.parametrize(
    ("make", "stages", "constant"),
    [
        (densenet, 3, {"conv0", "norm0", "denseblock1", "transition1", "denseblock2", "transition2"}),
        (peleenet, 3, {"stem", "stage1", "stage2"}),
        (root_resnet_pre, 2, {"root", "layer1"}),
        (detnet, 5, {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}),
        (detnet, 6, {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "layer5"}),
    ],
)
def test_frozen_stages_are_constant(make: Callable[[NormLayer], Backbone], stages: int, constant: set[str]) -> None:
    body = make(lambda channels: CrossGpuBatchNorm2d(channels, group=ALONE))
    body.freeze(stages)
    names = [(name.removeprefix("features.").split(".")[0], p) for name, p in body.named_parameters()]
    assert {name for name, p in names if not p.requires_grad} | {"norm0", "bn1"} & constant == constant
    assert not constant & {name for name, p in names if p.requires_grad}
    for name, module in body.named_modules():
        if isinstance(module, CrossGpuBatchNorm2d | FrozenBatchNorm2d):
            assert isinstance(module, FrozenBatchNorm2d) == (name.removeprefix("features.").split(".")[0] in constant)


@pytest.mark.parametrize(("kind", "stages", "number"), [("deformable", [3, 5], 2), ("weight_standardized", [1, 4], 5)])
def test_kinds_of_convolution_by_stage(kind: ConvKind, stages: list[int], number: int, tmp_path: Path) -> None:
    """The stem has one convolution; a stage of one bottleneck has four, one of them of 3 x 3."""
    torch.manual_seed(0)
    plain = resnext(nn.BatchNorm2d).eval()
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    body = resnext(nn.BatchNorm2d).eval()
    before = torch.random.get_rng_state()
    body.use_convs(kind, stages)
    assert torch.equal(torch.random.get_rng_state(), before)
    body.freeze(1)
    body.load(str(tmp_path / "plain.pth"))
    changed = [m for m in body.modules() if isinstance(m, DeformableConv2d | WeightStandardizedConv2d)]
    assert len(changed) == number
    x = torch.randn(1, 3, 64, 64)
    same = torch.allclose(body(x)["3"], plain(x)["3"], atol=1e-4)
    assert same == (kind == "deformable")  # whose offsets are zero


def test_detnets_pyramid_sums_levels_of_one_size() -> None:
    torch.manual_seed(0)
    pyramid = build_fpn(detnet(nn.BatchNorm2d), 8, None).eval()
    assert [level.stride for level in pyramid.levels] == [4, 8, 16, 16, 16]
    x = torch.randn(1, 3, 64, 64)
    stages, levels = pyramid.body(x), pyramid(x)
    fpn: Any = pyramid.fpn
    lateral = [fpn.inner_blocks[i](stages[str(i)]) for i in range(5)]
    p4 = lateral[2] + (lateral[3] + lateral[4])
    assert torch.equal(levels["2"], fpn.layer_blocks[2](p4))
    p3 = lateral[1] + nn.functional.interpolate(p4, scale_factor=2)
    assert torch.equal(levels["1"], fpn.layer_blocks[1](p3))
    for p6_from in ("p5", "c5"):
        retina: Any = build_retina_fpn(pyramid.body, 8, None, p6_from)
        found = retina(x)
        assert [level.name for level in retina.levels] == list(found) == ["1", "2", "3", "4", "p7"]
        assert [level.stride for level in retina.levels] == [64 // y.shape[2] for y in found.values()]
        y = found["4"] if p6_from == "p5" else stages["4"]
        assert torch.equal(found["p7"], retina.fpn.extra_blocks.p7(y))


def built(family: str, norm: NormConfig = NormConfig(), **keys: Any) -> Detector:  # noqa: B008
    config = Config(model=dataclasses.replace(FAMILIES[family], **keys), norm=norm)
    return build_detector(config, num_categories=NUM_CATEGORIES, group=ALONE)


def float_batch() -> Batch:
    return batch(dtype=torch.float32)


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("faster_rcnn", {"backbone": "detnet59"}),
        ("retinanet", {"backbone": "detnet59"}),
        ("retinanet", {"backbone": "peleenet"}),
        ("cascade_mask_rcnn", {"backbone": "densenet121", "conv": "weight_standardized"}),
        ("mask_rcnn", {"backbone": "resnext50_32x4d", "conv": "deformable", "dilated_c5": True}),
    ],
)
def test_families_train_with_them(family: str, keys: dict[str, Any]) -> None:
    """Also in bfloat16, which autocast gives convolutions."""
    model = built(family, NormConfig(momentum=1.0), **keys)
    ready_for_half_precision(model)
    with Precision("bfloat16", torch.device("cpu")).autocast():
        losses = model.losses(float_batch(), Draws(0, 0))
    sum((loss.value for loss in losses.values()), start=torch.zeros(())).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without
    assert len(model.eval().detect(float_batch())) == 4


def test_regions_of_detnet_use_its_last_level() -> None:
    """torchvision takes the coarsest level from the strides, and would never use P5."""
    pool = built("faster_rcnn", backbone="detnet59").roi_heads.box_roi_pool  # type: ignore[union-attr]
    boxes = torch.tensor([[0.0, 0.0, side, side] for side in (20, 112, 224, 447, 449, 900)])
    assert pool.map_levels([boxes]).tolist() == [0, 1, 2, 2, 3, 3]  # type: ignore[operator,union-attr]
    assert pool.featmap_names == ["0", "1", "2", "3"]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"frozen_stages": 6}, "model.frozen_stages is 6; accepted: 0 to 5 with resnet50"),
        (
            {"frozen_stages": 7, "backbone": "detnet59"},
            "model.frozen_stages is 7; accepted: 0 to 5, with detnet59 to 6",
        ),
        ({"dilated_c5": True, "backbone": "densenet121"}, "accepted: false with densenet121, which is no ResNet"),
        ({"dilated_c5": True, "backbone": "detnet59"}, "accepted: false with detnet59"),
        (
            {"memory_efficient": True, "backbone": "resnet50"},
            "accepted: false with resnet50, which has no dense layers",
        ),
        ({"squeeze_excitation": True, "backbone": "densenet121"}, "model.squeeze_excitation is True; accepted: false"),
        ({"squeeze_excitation": True, "frozen_stages": 2}, "0 or 1 with model.squeeze_excitation true"),
        ({"conv_stages": (3,)}, r"model.conv_stages is \(3,\); accepted: null with model.conv standard"),
        ({"conv": "deformable", "conv_stages": (1,)}, "from 2 to 5 with resnet50, since the stem has no 3 x 3"),
        ({"conv": "deformable", "conv_stages": ()}, "different stages from 2 to 5"),
        ({"conv": "weight_standardized", "conv_stages": (1, 6)}, "different stages from 1 to 5 with resnet50"),
        ({"conv": "deformable", "frozen_stages": 3}, "stages from 4 on with model.frozen_stages 3"),
        ({"conv": "weight_standardized", "frozen_stages": 1}, "model.frozen_stages 1.*not standardized"),
    ],
)
def test_contradictions_are_refused(keys: dict[str, Any], message: str) -> None:
    for family in (FasterRcnnConfig, RetinaNetConfig):
        with pytest.raises(UserError, match=message):
            Config(model=family(**keys))


@pytest.mark.parametrize(("name", "conv"), [("resnet18", "weight_standardized"), ("resnet50", "standard")])
def test_squeeze_and_excitation_is_behind_each_block(name: str, conv: ConvKind, tmp_path: Path) -> None:
    """A published file loads, its gates stay random; with open gates the levels are the plain network's."""
    plain = torchvision.models.get_model(name)
    torch.save(plain.state_dict(), file := tmp_path / "plain.pth")
    keys: dict[str, Any] = {"backbone": name, "backbone_weights": str(file), "squeeze_excitation": True}
    config = FasterRcnnConfig(**keys, conv=conv, frozen_stages=1)
    layer = norm_layer(NormConfig(kind="bn"), "backbone", ALONE)
    body, without = (
        build_backbone(config, layer),
        build_backbone(dataclasses.replace(config, squeeze_excitation=False), layer),
    )
    gates = [module for module in body.modules() if isinstance(module, SqueezeExcitation)]
    assert len(gates) == sum(isinstance(module, BasicBlock | Bottleneck) for module in plain.modules())
    assert not any(isinstance(m, WeightStandardizedConv2d) for gate in gates for m in gate.modules())
    image = torch.rand(1, 3, 64, 64)
    body.eval(), without.eval()
    assert not torch.equal(body(image)["3"], without(image)["3"])
    for gate in gates:
        nn.init.zeros_(gate.fc2.weight)
        nn.init.constant_(gate.fc2.bias, 40.0)  # sigmoid(40) is 1 in float32
    assert all(torch.equal(level, without(image)[key]) for key, level in body(image).items())


def test_standardized_weights_do_not_fit_published_statistics() -> None:
    model: ModelConfig = FasterRcnnConfig(conv="weight_standardized")
    for norm in (NormConfig(kind="frozen"), NormConfig(where=("fpn",))):
        with pytest.raises(UserError, match="belong to weights that are not standardized"):
            Config(model=model, norm=norm)
    Config(model=dataclasses.replace(model, weights="mine.pt"), norm=NormConfig(kind="frozen"))
    Config(model=dataclasses.replace(model, frozen_stages=2), norm=NormConfig(kind="gn"))


def test_deformable_convolutions_are_exported_as_torchscript_alone(tmp_path: Path) -> None:
    model = built("retinanet", conv="deformable").eval()
    for module in model.modules():
        if isinstance(module, DeformableConv2d):
            nn.init.normal_(module.offset.weight, std=0.1)
    image = torch.randint(0, 256, (3, 64, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    graph = DetectorGraph(model, Config().model.geometry).eval()
    with pytest.raises(UserError, match=r"--format onnx: backbone\.body\.layer2\.0\.conv1 is a deformable convolution"):
        write(graph, "onnx", tmp_path / "graph.onnx", image, {})
    write(graph, "torchscript", tmp_path / "graph.ts", image, {})
    with torch.no_grad():
        for found, expected in zip(read(tmp_path / "graph.ts", "torchscript")(image), graph(image), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
