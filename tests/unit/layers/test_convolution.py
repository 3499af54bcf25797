"""Kinds of convolution against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from megdet_hpc.layers.convolution import DeformableConv2d, WeightStandardizedConv2d, conv_layer
from megdet_hpc.layers.replace import replace_convs

GEOMETRIES = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 5), "stride": (2, 1), "padding": (1, 2), "bias": False},
    {"kernel_size": 3, "dilation": 2, "groups": 2},
    {"kernel_size": 1},
]
geometries = pytest.mark.parametrize("geometry", GEOMETRIES, ids=["3x3", "3x5-strided", "dilated-grouped", "1x1"])


def plain(geometry: dict, dtype: torch.dtype = torch.float64) -> nn.Conv2d:  # type: ignore[type-arg]
    torch.manual_seed(0)
    return nn.Conv2d(4, 6, **geometry).to(dtype)


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def by_hand(weight: Tensor) -> Tensor:
    """Every output channel's weights standardized with Python's own sums."""
    rows = []
    for row in weight.double().flatten(1).tolist():
        mean = math.fsum(row) / len(row)
        deviation = math.sqrt(math.fsum((w - mean) ** 2 for w in row) / len(row) + 1e-5)
        rows.append([(w - mean) / deviation for w in row])
    return torch.tensor(rows, dtype=torch.float64).view_as(weight)


@geometries
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_weight_standardization_is_its_formula(geometry: dict, dtype: torch.dtype, tolerance: float) -> None:  # type: ignore[type-arg]
    conv, x = plain(geometry, dtype), draw(2, 4, 9, 8, dtype=dtype)
    expected = nn.functional.conv2d(
        x.double(),
        by_hand(conv.weight),
        None if conv.bias is None else conv.bias.double(),
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
    )
    layer = conv_layer("weight_standardized")(conv)
    assert layer.weight is conv.weight and layer.bias is conv.bias
    torch.testing.assert_close(layer(x).double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["weight_standardized", "deformable"])
def test_gradcheck(kind: str) -> None:
    layer = conv_layer(kind)(plain({"kernel_size": 3, "padding": 1, "groups": 2}))  # type: ignore[arg-type]
    if isinstance(layer, DeformableConv2d):
        # away from whole pixels, between which bilinear interpolation has a kink
        nn.init.uniform_(layer.offset.weight, -0.01, 0.01)
        nn.init.constant_(layer.offset.bias, 0.4)  # type: ignore[arg-type]
    names, values = zip(*layer.named_parameters(), strict=True)

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))
        return y

    assert torch.autograd.gradcheck(call, (draw(1, 4, 4, 4).requires_grad_(), *values), atol=1e-5)


def test_gradient_of_weights_leaves_mean_and_scale_alone() -> None:
    """The output does not depend on them, so the gradient is orthogonal to both (up to eps)."""
    layer = conv_layer("weight_standardized")(plain({"kernel_size": 3}))
    layer(draw(2, 4, 5, 5)).square().sum().backward()
    gradient, weight = layer.weight.grad.flatten(1), layer.weight.detach().flatten(1)  # type: ignore[union-attr, operator]
    assert gradient.sum(1).abs().max() < 1e-9 * gradient.abs().max()
    along = (gradient * (weight - weight.mean(1, keepdim=True))).sum(1).abs().max()
    assert along < 1e-2 * gradient.abs().max() * weight.norm(dim=1).max()


def test_constant_weights_have_finite_gradients() -> None:
    layer = conv_layer("weight_standardized")(plain({"kernel_size": 3}))
    nn.init.constant_(layer.weight, 0.1)  # type: ignore[arg-type]
    y = layer(draw(1, 4, 5, 5))
    y.sum().backward()
    assert layer.weight.grad.isfinite().all()  # type: ignore[union-attr, operator]


def test_half_precision_standardizes_in_float32() -> None:
    """Weights of mean 10 and deviation 0.01, which bfloat16 would all round to 10."""
    conv = plain({"kernel_size": 3, "bias": False}, torch.float32)
    nn.init.normal_(conv.weight, 10, 0.01)
    x = draw(1, 4, 5, 5, dtype=torch.float32)
    exact = nn.functional.conv2d(x.double(), by_hand(conv.weight))
    layer = conv_layer("weight_standardized")(conv)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact, rtol=2**-6, atol=2**-6 * float(exact.abs().max()))
    assert layer.bfloat16().standardized().dtype == torch.float32  # type: ignore[operator]
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_one_weight_a_channel_cannot_be_standardized() -> None:
    with pytest.raises(ValueError, match="one weight per output channel"):
        conv_layer("weight_standardized")(nn.Conv2d(3, 3, 1, groups=3))


@geometries
@pytest.mark.parametrize("modulated", [False, True])
def test_deformable_begins_as_the_plain_convolution(geometry: dict, modulated: bool) -> None:  # type: ignore[type-arg]
    conv, x = plain(geometry), draw(2, 4, 9, 8)
    layer = DeformableConv2d(conv, modulated).double()
    state = dict(conv.state_dict())
    missing, unexpected = layer.load_state_dict(state, strict=False)
    assert set(missing) == {"offset.weight", "offset.bias"} and unexpected == []
    torch.testing.assert_close(layer(x), conv(x))


def test_deformable_moves_its_taps() -> None:
    """An offset of one pixel down for every tap is the convolution of the image moved up by one."""
    conv, x = plain({"kernel_size": 3}), draw(1, 4, 9, 8)
    layer = conv_layer("deformable")(conv)
    assert isinstance(layer, DeformableConv2d) and layer.weight is conv.weight
    with torch.no_grad():
        layer.offset.bias.copy_(torch.tensor([1.0, 0.0] * 9))  # type: ignore[union-attr]
    torch.testing.assert_close(layer(x)[:, :, :-1], conv(x)[:, :, 1:])
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.float()(x.float()).isfinite().all()


def test_deformable_padding_is_pixels_of_zeros() -> None:
    for options in ({"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}):
        with pytest.raises(ValueError, match="padding of a deformable convolution"):
            conv_layer("deformable")(nn.Conv2d(3, 3, 3, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["weight_standardized", "deformable"])
def test_replacing_draws_no_random_numbers_and_keeps_the_keys(kind: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1)).half().eval()
    keys, state = set(model.state_dict()), torch.random.get_rng_state()
    replace_convs(model, conv_layer(kind), lambda path, _: path == "0")  # type: ignore[arg-type]
    assert torch.equal(torch.random.get_rng_state(), state)
    extra = {"0.offset.weight", "0.offset.bias"} if kind == "deformable" else set()
    assert set(model.state_dict()) == keys | extra
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert type(model[2]) is nn.Conv2d and isinstance(model[0], WeightStandardizedConv2d | DeformableConv2d)
    assert not any(module.training for module in model.modules())
