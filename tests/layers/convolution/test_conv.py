"""The convolution layers drop in for torch's: arguments, initial values, outputs, gradients, state dict."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.convolution.conv import conv4d
from handbook_src.layers.convolution import conv as ours
from handbook_src.layers.convolution.conv import Conv2d, Conv4d, DepthwiseSeparableConv2d
from handbook_src.testing import assert_batch_independent, assert_parity, refuses

TORCHS = ("Conv1d", "Conv2d", "Conv3d")
IDS = ("conv1d", "conv2d", "conv3d", "conv4d")
SHAPES = {"Conv1d": (2, 4, 9), "Conv2d": (2, 4, 7, 6), "Conv3d": (2, 4, 5, 4, 6), "Conv4d": (1, 4, 3, 4, 3, 4)}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(name: str, *args: object, backend: str = "auto", **options: object) -> tuple[nn.Module, nn.Module]:
    """Our layer and torch's, in float64, with the same parameters."""
    mine, theirs = getattr(ours, name)(*args, backend=backend, **options), getattr(nn, name)(*args, **options)
    mine.load_state_dict(theirs.state_dict())
    return mine.double(), theirs.double()


# ---------------------------------------------------------------- parity
OPTIONS = [
    {},
    {"bias": False},
    {"stride": 2, "padding": 1, "dilation": 2},
    {"groups": 2, "padding": "same"},
    {"padding": "valid", "stride": (2,)},
    {"padding": 2, "padding_mode": "reflect"},
    {"padding": 2, "padding_mode": "replicate", "stride": 2},
    {"padding": 1, "padding_mode": "circular", "groups": 4},
    {"padding": "same", "padding_mode": "circular", "dilation": 2},
    {"padding": 0, "padding_mode": "reflect"},
]


@pytest.mark.parity("conv1d", "conv2d", "conv3d", "dilated-conv", "grouped-conv")
@pytest.mark.parametrize("name", TORCHS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_layers_are_torchs(name, options, backend):
    mine, theirs = pair(name, 4, 8, 3, backend=backend, **options)
    parameters = list(zip(mine.parameters(), theirs.parameters(), strict=True))
    x = draw(*SHAPES[name])
    assert_parity(mine, theirs, [x], parameters=parameters)
    assert_parity(mine, theirs, [x[0]], parameters=parameters)


@pytest.mark.parity("conv2d")
def test_a_size_for_each_axis():
    mine, theirs = pair("Conv2d", 3, 5, (1, 4), stride=(2, 1), padding=(0, 3), dilation=(1, 2), padding_mode="reflect")
    assert_parity(mine, theirs, [draw(2, 3, 4, 9)])


@pytest.mark.parity("conv4d")
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [(1, 2, 0, 1), "same"])
def test_conv4d_pads_every_axis_by_its_mode(mode, padding):
    """The oracle pads by an index along each axis; the convolution itself has its own test."""
    layer = Conv4d(4, 2, (3, 2, 1, 3), padding=padding, padding_mode=mode).double()
    ends = [(1, 1), (0, 1), (0, 0), (1, 1)] if padding == "same" else [(p, p) for p in padding]
    index = {
        "reflect": lambda i, n: i.abs() if n == 1 else (n - 1) - ((n - 1) - i.abs()).abs(),
        "replicate": lambda i, n: i.clamp(0, n - 1),
        "circular": lambda i, n: i % n,
    }

    def oracle(x):
        if mode == "zeros":
            return conv4d(F.pad(x, [e for pair in reversed(ends) for e in pair]), layer.weight, layer.bias)
        for axis, (before, after) in enumerate(ends, start=2):
            n = x.shape[axis]
            x = x.index_select(axis, index[mode](torch.arange(-before, n + after), n))
        return conv4d(x, layer.weight, layer.bias)

    x = draw(*SHAPES["Conv4d"])
    assert_parity(layer, oracle, [x])
    torch.testing.assert_close(layer(x[0]), layer(x)[0])


@pytest.mark.parity("depthwise-separable-conv")
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"stride": 2, "padding": 1}, {"padding": "same"}])
@pytest.mark.parametrize("multiplier", [1, 3])
@pytest.mark.parametrize("shape", [(2, 4, 7, 6), (4, 5, 5), (0, 4, 4, 4)])
def test_depthwise_separable_is_two_of_torchs(shape, multiplier, options):
    options = dict(options)
    layer = DepthwiseSeparableConv2d(4, 5, 3, multiplier=multiplier, **options).double()
    bias = options.pop("bias", True)
    first = nn.Conv2d(4, 4 * multiplier, 3, groups=4, bias=False, **options).double()
    second = nn.Conv2d(4 * multiplier, 5, 1, bias=bias).double()
    first.weight.data, second.weight.data = layer.depthwise.data.clone(), layer.pointwise.data.clone()
    if bias:
        second.bias.data = layer.bias.data.clone()
    theirs = nn.Sequential(first, second)
    parameters = list(zip(layer.parameters(), theirs.parameters(), strict=True))
    assert_parity(layer, theirs, [draw(*shape)], parameters=parameters)


@pytest.mark.outside("depthwise-separable-conv")
def test_depthwise_separable_is_timms_without_norm():
    from timm.layers import SeparableConv2d

    theirs = SeparableConv2d(6, 5, 3, bias=True, channel_multiplier=2).double()
    mine = DepthwiseSeparableConv2d(6, 5, 3, padding=1, multiplier=2).double()
    names = {"conv_dw.weight": "depthwise", "conv_pw.weight": "pointwise", "conv_pw.bias": "bias"}
    mine.load_state_dict({names[k]: v for k, v in theirs.state_dict().items()})
    assert_parity(mine, theirs, [draw(2, 6, 5, 5)])


@pytest.mark.outside("conv2d", "grouped-conv", "dilated-conv")
def test_a_torchvision_block_runs_on_our_layers():
    """ResNeXt's bottleneck, dilated: every Conv2d in it replaced, weights copied."""
    from torchvision.models.resnet import Bottleneck

    theirs = Bottleneck(16, 8, groups=4, base_width=32, dilation=2, downsample=nn.Conv2d(16, 32, 1)).double().eval()
    mine = copy.deepcopy(theirs)
    for name, part in list(mine.named_modules()):
        if isinstance(part, nn.Conv2d):
            keys = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
            swap = Conv2d(*(getattr(part, k) for k in keys), bias=part.bias is not None).double()
            mine.set_submodule(name, swap)
    mine.load_state_dict(theirs.state_dict())
    assert_parity(mine, theirs, [draw(2, 16, 7, 7)])


# ---------------------------------------------------------------- laws
@pytest.mark.law(*IDS)
@pytest.mark.parametrize("name", SHAPES)
def test_circular_padding_makes_it_equivariant_to_shifts_and_zeros_do_not(name):
    x = draw(*SHAPES[name])
    for mode, keeps in (("circular", True), ("zeros", False), ("reflect", False)):
        layer = getattr(ours, name)(4, 3, 3, padding=1, padding_mode=mode).double()
        for axis in range(2, x.ndim):
            same = torch.allclose(layer(x.roll(1, axis)), layer(x).roll(1, axis), rtol=1e-9, atol=1e-9)
            assert same == keeps, (mode, axis)


@pytest.mark.law("conv2d")
def test_parameters_do_not_grow_with_the_image():
    layer = Conv2d(3, 8, 3, padding=1)
    assert sum(p.numel() for p in layer.parameters()) == 8 * (3 * 9 + 1)
    for side in (4, 9):
        dense = torch.autograd.functional.jacobian(lambda x: layer(x), torch.zeros(3, side, side))
        assert dense.numel() == 8 * 3 * side**4  # what a linear layer between the same shapes would have to learn


@pytest.mark.law("depthwise-separable-conv")
def test_its_kernel_is_a_product():
    """One dense convolution with the kernel u_oc v_c, and (1/out + 1/k^2) of its weights: Howard et al. 2017."""
    layer = DepthwiseSeparableConv2d(8, 16, 3, padding=1, bias=False).double()
    product = layer.pointwise * layer.depthwise.transpose(0, 1)
    x = draw(2, 8, 5, 6)
    torch.testing.assert_close(layer(x), F.conv2d(x, product, padding=1))
    weights = sum(p.numel() for p in layer.parameters())
    assert weights / product.numel() == pytest.approx(1 / 16 + 1 / 9)


@pytest.mark.law("depthwise-separable-conv")
def test_a_bias_of_the_first_step_would_be_absorbed():
    layer = DepthwiseSeparableConv2d(4, 5, 3).double()
    x, b = draw(2, 4, 5, 5), draw(4, seed=1)
    both = F.conv2d(F.conv2d(x, layer.depthwise, b, groups=4), layer.pointwise, layer.bias)
    absorbed = layer.bias + layer.pointwise[:, :, 0, 0] @ b
    torch.testing.assert_close(both, F.conv2d(F.conv2d(x, layer.depthwise, groups=4), layer.pointwise, absorbed))
    assert_batch_independent(layer, x)


@pytest.mark.law("grouped-conv")
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups_divide_the_weights(groups):
    assert Conv2d(4, 8, 3, groups=groups).weight.numel() == 4 * 8 * 9 // groups


# ---------------------------------------------------------------- registration
@pytest.mark.registration("conv1d", "conv2d", "conv3d")
@pytest.mark.parametrize("name", TORCHS)
def test_signature_initial_values_and_text_are_torchs(name):
    mine, theirs = getattr(ours, name), getattr(nn, name)
    got, want = inspect.signature(mine).parameters, inspect.signature(theirs).parameters
    assert list(got)[:-1] == list(want)
    assert [p.default for p in got.values()][:-1] == [p.default for p in want.values()]
    for options in ({}, {"groups": 2, "dilation": 2, "padding": 1}, {"bias": False, "padding": "same"}):
        torch.manual_seed(3)
        a = mine(4, 6, 3, **options)
        torch.manual_seed(3)
        b = theirs(4, 6, 3, **options)
        torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=0)
        assert repr(a) == repr(b)
        for attribute in ("kernel_size", "stride", "padding", "dilation", "output_padding", "groups", "transposed"):
            assert getattr(a, attribute) == getattr(b, attribute), attribute


MAKERS = {
    "Conv1d": lambda **k: ours.Conv1d(4, 6, 3, padding=1, **k),
    "Conv2d": lambda **k: ours.Conv2d(4, 6, 3, padding=1, **k),
    "Conv3d": lambda **k: ours.Conv3d(4, 6, 3, padding=1, **k),
    "Conv4d": lambda **k: ours.Conv4d(4, 6, 3, padding=1, **k),
    "DepthwiseSeparableConv2d": lambda **k: DepthwiseSeparableConv2d(4, 6, 3, padding=1, **k),
}
SHAPE_OF = {**SHAPES, "DepthwiseSeparableConv2d": (2, 4, 7, 6)}


@pytest.mark.registration(*IDS, "depthwise-separable-conv")
@pytest.mark.parametrize("name", MAKERS)
def test_they_copy_pickle_move_and_compile(name, unchecked):
    layer, x = MAKERS[name](), draw(*SHAPE_OF[name]).float()
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), y)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = MAKERS[name]()
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(x), y)
    for dtype in (torch.bfloat16, torch.float16):
        half = copy.deepcopy(layer).to(dtype)(x.to(dtype))
        assert half.dtype == dtype
        torch.testing.assert_close(half.float(), y, rtol=0.05, atol=0.05)
    assert MAKERS[name](device="meta", dtype=torch.float64)(draw(*SHAPE_OF[name]).to("meta")).shape == y.shape
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), y)
    assert "4, 6, kernel_size=(3" in repr(layer)


@pytest.mark.registration("conv2d")
def test_the_whole_layer_pickles_by_torch_save_and_resets():
    layer = Conv2d(3, 4, 3)
    torch.manual_seed(5)
    layer.reset_parameters()
    torch.manual_seed(5)
    torch.testing.assert_close(layer.weight, nn.Conv2d(3, 4, 3).weight, rtol=0, atol=0)


# ---------------------------------------------------------------- refusals
@pytest.mark.refusal(*IDS, "dilated-conv", "grouped-conv")
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({"in_channels": 0}, "0"),
        ({"out_channels": -3}, "-3"),
        ({"in_channels": 1.5}, "1.5"),
        ({"kernel_size": 0}, "0"),
        ({"kernel_size": True}, "True"),
        ({"kernel_size": (3,) * 5}, "(3, 3, 3, 3, 3)"),
        ({"stride": 0}, "0"),
        ({"dilation": 0}, "0"),
        ({"padding": -1}, "-1"),
        ({"padding": "full"}, "'full'"),
        ({"padding": "same", "stride": 2}, "2"),
        ({"groups": 3}, "in_channels=4"),
        ({"groups": 0}, "0"),
        ({"out_channels": 5, "groups": 2}, "out_channels=5"),
        ({"padding_mode": "mirror"}, "'mirror'"),
    ],
)
def test_settings_that_cannot_work_are_refused(name, options, value):
    with refuses(ConfigError, name, value):
        getattr(ours, name)(**{"in_channels": 4, "out_channels": 6, "kernel_size": 3, **options})


@pytest.mark.refusal(*IDS)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_inputs_that_do_not_fit_are_refused(name, mode):
    layer, x = MAKERS[name](padding_mode=mode), draw(*SHAPES[name]).float()
    with refuses(ShapeError, "3 channels", "4 channels"):
        layer(x[:, :3])
    with refuses(ShapeError, "axes"):
        layer(x[0, 0])
    with refuses(ShapeError, "axes"):
        layer(x[None])
    with refuses(ShapeError, torch.int64):
        layer(x.long())
    with refuses(ShapeError, torch.float64, torch.float32):
        layer(x.double())
    assert layer(x[:0]).shape[0] == 0


@pytest.mark.refusal(*IDS)
@pytest.mark.parametrize("name", SHAPES)
def test_borders_that_cannot_be_continued_are_refused(name):
    x = draw(*SHAPES[name]).float()[..., :2]
    for mode, padding in (("reflect", 2), ("circular", 3)):
        with refuses(ShapeError, mode, padding):
            getattr(ours, name)(4, 2, 1, padding=padding, padding_mode=mode)(x)
    with refuses(ShapeError, "replicate", 0):
        getattr(ours, name)(4, 2, 1, padding=1, padding_mode="replicate")(x[..., :0])


@pytest.mark.refusal("depthwise-separable-conv")
@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({"in_channels": 0}, "0"),
        ({"out_channels": 1.5}, "1.5"),
        ({"multiplier": 0}, "0"),
        ({"multiplier": True}, "True"),
        ({"kernel_size": (3, 3, 3)}, "(3, 3, 3)"),
        ({"stride": 2, "padding": "same"}, "2"),
        ({"padding": -2}, "-2"),
    ],
)
def test_separable_settings_that_cannot_work_are_refused(options, value):
    with refuses(ConfigError, value):
        DepthwiseSeparableConv2d(**{"in_channels": 4, "out_channels": 6, "kernel_size": 3, **options})


@pytest.mark.refusal("depthwise-separable-conv")
def test_separable_inputs_that_do_not_fit_are_refused():
    layer = DepthwiseSeparableConv2d(4, 6, 3).double()
    for bad in (draw(2, 2, 5, 5), draw(2, 8, 5, 5), draw(5, 5), draw(1, 2, 4, 5, 5)):
        with refuses(ShapeError, tuple(bad.shape)):
            layer(bad)
    with refuses(ShapeError, torch.int64):
        layer(draw(2, 4, 5, 5).long())
    with refuses(ShapeError, "span"):
        layer(draw(2, 4, 2, 5))


@pytest.mark.refusal("depthwise-separable-conv")
def test_separable_weights_that_do_not_belong_together_are_refused():
    x, v, u = draw(2, 4, 5, 5), draw(8, 1, 3, 3), draw(6, 8, 1, 1)
    call = ours.maths.depthwise_separable_conv2d
    for depthwise, pointwise in ((v[:6], u), (v.expand(8, 4, 3, 3), u), (v[0], u), (v, u[:, :4]), (v, u[..., 0])):
        with refuses(ShapeError, "weight"):
            call(x, depthwise, pointwise)
    with refuses(ShapeError, (5,), (6,)):
        call(x, v, u, draw(5))
    with refuses(ShapeError, "axes"):
        call(x[0, 0], v, u)


@pytest.mark.refusal("conv1d", "conv2d", "conv3d", "conv4d")
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_borders_are_continued_after_the_input_was_checked(mode):
    layer = Conv2d(3, 4, 3, padding=1, padding_mode=mode)
    with refuses(ShapeError, "torch.bool"):
        layer(torch.ones(1, 3, 5, 5, dtype=torch.bool))
    with refuses(ShapeError, "0 channels"):
        layer(torch.ones(1, 0, 5, 5))
