"""The computed receptive field is the measured one, on many random networks and on published ones."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.convolution.conv import output_size
from handbook_src.layers.convolution import conv as ours
from handbook_src.layers.convolution.conv_transpose import ConvTranspose1d, ConvTranspose2d
from handbook_src.layers.convolution.deformable_conv import DeformConv2d
from handbook_src.layers.pooling import pooling
from handbook_src.metrics.receptive_field import gradient_support, receptive_field
from handbook_src.testing import oracle, refuses


class Residual(nn.Module):
    """A branch and a way round it."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x):
        return torch.relu(x + self.branch(x))


class Joined(nn.Module):
    """Two branches side by side."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        return torch.cat([b(x) for b in self.branches], 1).add(1.0)


def proved(module: nn.Module, *shape: int):
    """The output's field; its windows and sizes are asserted to be the measured ones."""
    field = receptive_field(module, shape)[-1]
    measured = gradient_support(module, shape)
    assert field.windows == measured
    assert field.size == tuple(module(torch.zeros(1, *shape)).shape[2:])
    return field


# ---------------------------------------------------------------- laws
KINDS = ["conv", "conv", "ours", "max", "average", "up", "nearest", "residual", "joined", "relu"]
MODES = ["zeros", "zeros", "reflect", "replicate", "circular"]
LAYER = st.tuples(
    st.sampled_from(KINDS),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 3),
    st.integers(1, 3),
    st.sampled_from(MODES),
    st.booleans(),
)


def build(kind: str, k: int, s: int, p: int, d: int, mode: str, ceil: bool) -> nn.Module:
    """Built outside the strategy: layers draw their weights."""
    inner = min(p, k // 2)
    makers = {
        "conv": lambda: nn.Conv1d(2, 2, k, s, p, d, padding_mode=mode),
        "ours": lambda: ours.Conv1d(2, 2, k, padding="same", dilation=d, groups=2, padding_mode=mode),
        "max": lambda: nn.MaxPool1d(k, s, inner, d, ceil_mode=ceil),
        "average": lambda: nn.AvgPool1d(k, s, inner, ceil_mode=ceil),
        "up": lambda: ConvTranspose1d(2, 2, k, s, min(p, d * (k - 1)), max(s, d) - 1 if ceil else 0, dilation=d),
        "nearest": lambda: nn.Upsample(scale_factor=s),
        "residual": lambda: Residual(
            nn.Sequential(nn.Conv1d(2, 2, 2 * k - 1, 1, (k - 1) * d, d), nn.BatchNorm1d(2), nn.ReLU6())
        ),
        "joined": lambda: nn.Sequential(Joined(nn.Conv1d(2, 1, 1, s), nn.Conv1d(2, 1, 3, s, 1)), nn.Hardtanh()),
        "relu": nn.ReLU,
    }
    return makers[kind]()


@pytest.mark.law("conv2d", "conv1d", "dilated-conv", "transposed-conv")
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.lists(LAYER, min_size=1, max_size=5), st.integers(1, 24))
def test_computed_is_measured_at_every_position_of_random_networks(parts, n):
    module = nn.Sequential(*[build(*part) for part in parts])
    try:
        out = module.eval()(torch.zeros(1, 2, n))
    except (RuntimeError, ValueError):  # too short for one of its kernels
        return
    if out.shape[-1] < 100:
        proved(module, 2, n)


@pytest.mark.law("conv2d")
def test_each_axis_has_its_own():
    module = nn.Sequential(
        ours.Conv2d(1, 2, (3, 5), (2, 1), (1, 0)),
        nn.MaxPool2d((1, 2), ceil_mode=True),
        ours.DepthwiseSeparableConv2d(2, 3, (2, 3), padding=1),
        ConvTranspose2d(3, 1, 3, (1, 2)),
    )
    field = proved(module, 1, 13, 12)
    assert field.jump == (2, 1)
    wide = proved(nn.Sequential(nn.Conv3d(1, 1, 3), nn.AvgPool3d(2), nn.Conv3d(1, 1, 2, dilation=2)), 1, 9, 11, 10)
    assert wide.field == (8, 8, 8)
    four = receptive_field(nn.Sequential(ours.Conv4d(1, 1, 3, padding=1), ours.Conv4d(1, 1, 3)), (1, 5, 6, 7, 5))[-1]
    assert (four.field, four.size) == ((5,) * 4, (3, 4, 5, 3))


@pytest.mark.law("dilated-conv")
@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("rate", [1, 2, 3, 7])
def test_one_dilated_layer_sees_k_plus_k_minus_1_times_r_minus_1(k, rate):
    field = proved(nn.Sequential(ours.Conv1d(1, 1, k, dilation=rate)), 1, 40)
    assert field.field == (k + (k - 1) * (rate - 1),)
    assert field.size == (output_size(40, k, dilation=rate),)


@pytest.mark.law("dilated-conv")
def test_doubling_rates_see_exponentially_far():
    """Yu & Koltun 2015: rates 1, 2, 4, ... of kernel 3 see 2^(layers + 1) - 1."""
    for depth in range(1, 6):
        stack = nn.Sequential(*[ours.Conv1d(1, 1, 3, padding=2**i, dilation=2**i) for i in range(depth)])
        assert proved(stack, 1, 70).field == (2 ** (depth + 1) - 1,)


@pytest.mark.law("conv2d")
def test_the_field_is_the_width_of_inner_windows_and_the_start_their_middle():
    module = nn.Sequential(nn.Conv1d(1, 1, 5, 2, 1), nn.Conv1d(1, 1, 3, 1, 2, dilation=2), nn.MaxPool1d(2))
    field = proved(module, 1, 80)
    j = field.size[0] // 2
    first, last = field.windows[0][j]
    assert last - first + 1 == field.field[0]
    assert Fraction(first + last, 2) == field.start[0] + j * field.jump[0]


@pytest.mark.outside("conv2d")
def test_resnets_stem_and_blocks():
    """ResNet-18: 7 and 11 after the stem (Araujo et al. 2019 list 435 at the end), proved by gradient."""
    resnet = oracle.load("torchvision").models.resnet18().eval()
    stem = nn.Sequential(resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool)
    rows = receptive_field(stem, (3, 224, 224))
    assert [(r.field[0], r.size[0]) for r in rows] == [(7, 112), (11, 56), (11, 56)]
    proved(nn.Sequential(stem, resnet.layer1, resnet.layer2), 3, 40, 33)
    body = nn.Sequential(stem, resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4, resnet.avgpool)
    *_, last, pooled, _ = receptive_field(body, (3, 224, 224))
    assert (last.field, last.size, last.jump) == ((435, 435), (7, 7), (32, 32))
    assert pooled.windows[0] == ((0, 223),)


class Then(nn.Module):
    """A function behind a layer."""

    def __init__(self, layer: nn.Module, run) -> None:
        super().__init__()
        self.layer, self.run = layer, run
        self.scale = nn.Parameter(-torch.ones(1, 1, 1))

    def forward(self, x):
        return self.run(self, self.layer(x))


def wide(channels: int = 64) -> nn.Module:
    return nn.Sequential(nn.Conv1d(1, channels, 3, padding=1), nn.Conv1d(channels, 1, 3, padding=1))


@pytest.mark.law("conv1d")
@pytest.mark.parametrize(
    "run",
    [
        lambda m, y: torch.tanh(100 * y),
        lambda m, y: torch.sigmoid(y * -1000.0),
        lambda m, y: nn.functional.dropout(y, 0.99),
        lambda m, y: y * m.scale + y,
        lambda m, y: m.layer(y) - m.layer(y),
        lambda m, y: y - y,
        lambda m, y: y * y,
        lambda m, y: torch.cat(tensors=[y, y], dim=-2),
    ],
    ids=["tanh", "sigmoid", "dropout", "scale", "difference", "nothing", "product", "twice"],
)
def test_no_path_is_cut_and_none_cancels_in_the_measured_windows(run):
    torch.manual_seed(0)
    assert proved(Then(wide(), run), 1, 6).field[0] >= 5


@pytest.mark.law("conv2d", "transposed-conv")
@pytest.mark.parametrize(
    ("layer", "field"),
    [
        (nn.Conv2d(2, 2, 3), 3),
        (ours.Conv2d(2, 2, 3), 3),
        (nn.ConvTranspose2d(2, 2, 3), 3),
        (ConvTranspose2d(2, 2, 3), 3),
        (nn.BatchNorm2d(2).eval(), 1),
        (nn.ReLU(), 1),
        (nn.Upsample(scale_factor=2), 1),
        (pooling.MaxPool2d(2), 2),
        (pooling.StochasticPool2d(2), 2),
        (pooling.GlobalPool(keepdim=True), 8),
        (pooling.AdaptiveAvgPool2d(1), 8),
        (nn.AdaptiveMaxPool2d((1, 1)), 8),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_layer_alone_is_a_network_too(layer, field):
    assert proved(layer, 2, 8, 8).field == (field, field)
    assert receptive_field(layer, (2, 8, 8)) == receptive_field(layer, [2, 8, 8])


@pytest.mark.law("conv2d")
def test_a_parametrised_weight_leaves_the_field_alone_and_cannot_be_measured():
    layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 3))
    for module in (layer, nn.Sequential(layer)):
        assert receptive_field(module, (2, 8, 8))[-1].field == (3, 3)
        with refuses(ConfigError, "parametrised", "Conv2d"):
            gradient_support(module, (2, 8, 8))
    assert layer(torch.zeros(1, 2, 8, 8)).shape == (1, 2, 6, 6)


# ---------------------------------------------------------------- refusals
@pytest.mark.refusal("conv2d")
@pytest.mark.parametrize(
    "layer",
    [
        nn.MaxUnpool2d(2),
        nn.Unfold(3),
        nn.Fold((4, 4), 2),
        nn.LPPool2d(2, 3),
        nn.FractionalMaxPool2d(2, 3),
        pooling.FractionalMaxPool2d(2, 3),
        DeformConv2d(1, 1, 3),
        nn.LazyConv2d(1, 3),
        pooling.GlobalPool(),
        nn.MaxPool2d(2, return_indices=True),
        nn.AdaptiveAvgPool2d((None, 1)),
        nn.Softmax2d(),
    ],
    ids=lambda layer: type(layer).__name__,
)
@pytest.mark.parametrize("call", [receptive_field, gradient_support])
def test_a_layer_that_is_not_known_is_refused_by_name(layer, call):
    for module in (layer, nn.Sequential(nn.Identity(), layer)):
        with refuses(ConfigError, type(layer).__name__):
            call(module, (1, 8, 8))


@pytest.mark.refusal("conv2d")
def test_a_class_that_only_has_a_known_name_is_refused():
    class Conv2d(nn.Conv2d):
        def forward(self, x):
            return super().forward(x[:, :, ::2])

    for module in (Conv2d(1, 1, 3), oracle.load("torchvision").ops.DeformConv2d(1, 1, 3)):
        with refuses(ConfigError, type(module).__name__):
            receptive_field(nn.Sequential(module), (1, 8, 8))


class Call(nn.Module):
    """A forward given as a function."""

    def __init__(self, run) -> None:
        super().__init__()
        self.run = run
        self.up = nn.ConvTranspose1d(1, 1, 3, 2)
        self.table, self.scale = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.run(self, x)


def added_in_place(m, x):
    y = m.up(x)
    y.add_(y)
    return y


@pytest.mark.refusal("conv1d")
@pytest.mark.parametrize(
    ("run", "said"),
    [
        (lambda m, x: torch.cat([x, x], 2), "cat along axis 2"),
        (lambda m, x: torch.cat([x, x], dim=-1), "cat along axis -1"),
        (lambda m, x: torch.concat([x, x], axis=0), "concat along axis 0"),
        (lambda m, x: torch.cat([x, x]), "cat along axis 0"),
        (lambda m, x: torch.cat([x, m.scale], 1), "cat of a parameter"),
        (lambda m, x: x + m.table, "add on a parameter"),
        (lambda m, x: x * torch.sigmoid(m.table), "sigmoid on a parameter"),
        (lambda m, x: m.up(x, output_size=[18]), "'up' called with more than one argument"),
        (lambda m, x: m.table, "does not come from the input"),
        (lambda m, x: x if x.sum() > 0 else m.up(x), "tracing"),
        (lambda m, x: x[:, : len(x)], "tracing"),
        (added_in_place, "add_ in place"),
    ],
)
@pytest.mark.parametrize("call", [receptive_field, gradient_support])
def test_a_call_that_is_not_understood_is_refused(run, said, call):
    with refuses(ConfigError, said):
        call(Call(run), (1, 8))


@pytest.mark.refusal("conv2d")
def test_two_inputs_and_no_module_are_refused():
    class Two(nn.Module):
        def forward(self, x, y):
            return x + y

    with refuses(ConfigError, "second input"):
        receptive_field(Two(), (1, 8, 8))
    with refuses(ConfigError, "function"):
        receptive_field(lambda x: x, (1, 8, 8))


@pytest.mark.refusal("conv2d")
@pytest.mark.parametrize("call", [receptive_field, gradient_support])
@pytest.mark.parametrize(
    ("layer", "shape", "error", "said"),
    [
        (nn.MaxPool2d(5, 2, ceil_mode=True), (1, 1, 1), ShapeError, "(1, 1)"),
        (nn.AvgPool2d(3, padding=2), (1, 9, 9), ConfigError, "at most half"),
        (nn.MaxPool2d(2), 32, ConfigError, "input_shape"),
        (nn.MaxPool2d(2), (), ConfigError, "input_shape"),
        (nn.MaxPool2d(2), (3,), ConfigError, "input_shape"),
        (nn.MaxPool2d(2), (1, 0, 8), ConfigError, "0"),
        (nn.MaxPool2d(2), (1, 8.5, 8), ConfigError, "8.5"),
        (nn.MaxPool2d(2), (1, 3, 32, 32), ShapeError, "without the batch"),
        (nn.MaxPool2d(2), (32, 32), ShapeError, "1 spatial axes"),
        (nn.BatchNorm2d(3), (1, 3, 32, 32), ShapeError, "without the batch"),
        (nn.Conv2d(3, 1, 3), (1, 3, 32, 32), ShapeError, "without the batch"),
        (nn.Conv2d(1, 1, 9, padding=4, padding_mode="reflect"), (1, 3, 3), ShapeError, "reflect"),
        (ours.Conv2d(1, 1, 9, padding=4, padding_mode="circular"), (1, 3, 3), ShapeError, "circular"),
    ],
)
def test_shapes_that_cannot_be_are_refused(call, layer, shape, error, said):
    with refuses(error, said):
        call(layer, shape)


@pytest.mark.refusal("conv2d")
def test_the_measurement_wants_the_networks_channels():
    with refuses(ShapeError, "1 channels", 2):
        gradient_support(nn.Conv2d(2, 1, 3), (1, 8, 8))


@pytest.mark.refusal("conv2d")
def test_what_is_not_understood_is_refused_by_name():
    for module, name in (
        (nn.Sequential(nn.Conv2d(1, 1, 3), nn.Flatten()), "Flatten"),
        (nn.Sequential(nn.GroupNorm(1, 1)), "GroupNorm"),
        (nn.Sequential(nn.Upsample(scale_factor=1.5)), "1.5"),
        (nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear")), "bilinear"),
        (nn.Sequential(nn.AdaptiveAvgPool2d(3)), "AdaptiveAvgPool2d"),
        (Joined(nn.Conv2d(1, 1, 1), nn.Sequential(nn.MaxPool2d(2), nn.ConvTranspose2d(1, 1, 3, 1, 0))), "jumps"),
    ):
        side = 4 if name == "jumps" else 8
        with refuses(ConfigError, name):
            receptive_field(module, (1, side, side))


@pytest.mark.refusal("conv2d")
def test_inputs_too_small_and_branches_of_different_size_are_refused():
    with refuses(ShapeError, "(4, 4)", 5):
        receptive_field(nn.Sequential(nn.Conv2d(1, 1, 5)), (1, 4, 4))
    with refuses(ShapeError, "8 and 6"):
        receptive_field(Residual(nn.Conv2d(1, 1, 3)), (1, 8, 8))
    with refuses(ConfigError, "-4"):
        receptive_field(nn.Sequential(nn.Conv2d(1, 1, 5)), (1, -4, 4))


@pytest.mark.refusal("conv2d")
def test_several_outputs_are_refused():
    class Two(nn.Module):
        def forward(self, x):
            return x, x

    with refuses(ConfigError, "tuple"):
        receptive_field(Two(), (1, 4, 4))
