"""Each scheme draws torch's numbers, has the closed-form variance, and keeps the signal it promises to keep."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.foundations import init
from handbook_src.testing import refuses, unchecked

SHAPES = [(1, 1), (3, 5), (64, 17), (4, 3, 5), (8, 2, 3, 3), (2, 3, 1, 2, 3)]
NONLINEARITIES = ["linear", "conv2d", "conv_transpose1d", "sigmoid", "tanh", "relu", "leaky_relu", "selu"]


def drawn(fill, shape, *args, dtype=torch.float64, **options):
    return fill(torch.empty(shape, dtype=dtype), *args, generator=torch.Generator().manual_seed(3), **options)


# ---------------------------------------------------------------- parity
@pytest.mark.parity("init-xavier")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gain", [1.0, 5 / 3, 0.1])
@pytest.mark.parametrize("name", ["xavier_uniform_", "xavier_normal_"])
def test_xavier_draws_torchs_numbers(name, gain, shape):
    mine, torchs = (drawn(getattr(where, name), shape, gain) for where in (init, nn.init))
    torch.testing.assert_close(mine, torchs, rtol=1e-14, atol=0)


@pytest.mark.parity("init-he")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", ["fan_in", "fan_out"])
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("name", ["kaiming_uniform_", "kaiming_normal_"])
def test_kaiming_draws_torchs_numbers(name, nonlinearity, mode, shape):
    for a in (0.0, 0.2, math.sqrt(5), -0.5):
        mine, torchs = (drawn(getattr(where, name), shape, a, mode, nonlinearity) for where in (init, nn.init))
        torch.testing.assert_close(mine, torchs, rtol=1e-14, atol=0)


@pytest.mark.parity("init-lecun")
@pytest.mark.parametrize("shape", SHAPES)
def test_lecun_is_he_for_a_linear_layer(shape):
    for kind in ("normal", "uniform"):
        mine = drawn(getattr(init, f"lecun_{kind}_"), shape)
        torchs = drawn(getattr(nn.init, f"kaiming_{kind}_"), shape, nonlinearity="linear")
        torch.testing.assert_close(mine, torchs, rtol=1e-14, atol=0)


@pytest.mark.parity("init-he")
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_gains_are_torchs(nonlinearity):
    params = (None, 0.0, 0.3, -1.0, 2.0) if nonlinearity == "leaky_relu" else (None, 0.3)
    for param in params:
        assert init.gain(nonlinearity, param) == nn.init.calculate_gain(nonlinearity, param)


@pytest.mark.parity("init-xavier", "init-he", "init-lecun")
@pytest.mark.parametrize(
    ("fill", "variance"),
    [
        (init.xavier_uniform_, 2 / (300 + 200)),
        (init.xavier_normal_, 2 / (300 + 200)),
        (init.kaiming_uniform_, 2 / 300),
        (init.kaiming_normal_, 2 / 300),
        (init.lecun_normal_, 1 / 300),
        (init.lecun_uniform_, 1 / 300),
    ],
)
def test_the_drawn_variance_is_the_closed_form(fill, variance):
    w = drawn(fill, (200, 300))
    # the variance of 60,000 draws has a relative deviation of at most sqrt(2 / 60,000) = 0.6 %
    assert w.var().item() == pytest.approx(variance, rel=0.03)
    assert abs(w.mean().item()) < 5 * math.sqrt(variance / w.numel())


# ---------------------------------------------------------------- law


def forward_moments(fill, activation, depth=12, width=512):
    x = torch.randn(64, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for i in range(depth):
        w = fill(torch.empty(width, width, dtype=torch.float64), generator=torch.Generator().manual_seed(100 + i))
        x = activation(x @ w.T)
    return x


@pytest.mark.law("init-he")
def test_he_keeps_the_second_moment_through_relus_and_xavier_halves_it():
    kept = forward_moments(init.kaiming_normal_, torch.relu).square().mean().item()
    halved = forward_moments(init.xavier_normal_, torch.relu).square().mean().item()
    # the last second moment is measured after the ReLU: half of what the next layer's rows sum to
    assert 0.35 < kept < 0.7
    assert halved / kept == pytest.approx(2.0**-12, rel=1e-6)


@pytest.mark.law("init-he")
def test_fan_out_keeps_the_gradient_where_widths_differ():
    wide, narrow = 1024, 256
    for mode, factor in (("fan_out", 1.0), ("fan_in", narrow / wide)):
        w = drawn(init.kaiming_normal_, (narrow, wide), 0.0, mode, "linear")
        gradient = torch.randn(200, narrow, dtype=torch.float64)
        assert (gradient @ w).square().mean().item() == pytest.approx(factor, rel=0.03)


@pytest.mark.law("init-xavier")
def test_xavier_keeps_the_mean_of_both_directions():
    n_in, n_out = 800, 200
    w = drawn(init.xavier_normal_, (n_out, n_in))
    forward = (torch.randn(400, n_in, dtype=torch.float64) @ w.T).square().mean().item()
    backward = (torch.randn(400, n_out, dtype=torch.float64) @ w).square().mean().item()
    assert forward == pytest.approx(2 * n_in / (n_in + n_out), rel=0.05)
    assert backward == pytest.approx(2 * n_out / (n_in + n_out), rel=0.05)
    assert (forward + backward) / 2 == pytest.approx(1, rel=0.05)


@pytest.mark.law("init-lecun")
def test_lecun_keeps_mean_and_variance_through_fifty_selu_layers():
    x = forward_moments(init.lecun_normal_, torch.selu, depth=50)
    assert abs(x.mean().item()) < 0.1
    assert x.var().item() == pytest.approx(1, abs=0.15)
    x = forward_moments(lambda w, generator: init.kaiming_normal_(w, generator=generator), torch.selu, depth=50)
    assert abs(x.var().item() - 1) > 0.5


@pytest.mark.law("init-he")
@pytest.mark.parametrize(("name", "param", "phi"), [
    ("relu", None, torch.relu),
    ("leaky_relu", 0.3, lambda z: torch.nn.functional.leaky_relu(z, 0.3)),
    ("linear", None, lambda z: z),
])  # fmt: skip
def test_the_gain_undoes_the_activation(name, param, phi):
    z = torch.linspace(-12, 12, 400_001, dtype=torch.float64)
    density = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    moment = torch.trapezoid(phi(z) ** 2 * density, z).item()
    assert init.gain(name, param) ** 2 == pytest.approx(1 / moment, rel=1e-6)


@pytest.mark.law("init-xavier")
def test_fans_count_the_terms_of_a_sum():
    for layer in (nn.Linear(7, 3), nn.Conv1d(6, 4, 5), nn.Conv2d(4, 6, (3, 2)), nn.Conv2d(4, 6, 3, groups=2)):
        n_in, _ = init.fans(layer.weight)
        nn.init.ones_(layer.weight)
        nn.init.zeros_(layer.bias)
        shape = (1, 7) if isinstance(layer, nn.Linear) else (1, layer.in_channels, *layer.kernel_size)
        assert (layer(torch.ones(shape)) == n_in).all()


# ---------------------------------------------------------------- registration
FILLS = ["xavier_uniform_", "xavier_normal_", "kaiming_uniform_", "kaiming_normal_", "lecun_uniform_", "lecun_normal_"]


@pytest.mark.registration("init-xavier", "init-he", "init-lecun")
@pytest.mark.parametrize("name", FILLS)
def test_filling_is_in_place_and_outside_autograd(name):
    fill = getattr(init, name)
    parameter = nn.Parameter(torch.zeros(4, 6)[:, ::2])
    assert fill(parameter) is parameter
    assert parameter.grad_fn is None
    assert parameter.requires_grad
    assert parameter.is_leaf
    assert not (parameter == 0).any()
    for empty in ((0, 3), (3, 0), (2, 3, 0)):
        assert fill(torch.empty(empty)).numel() == 0
    assert fill(torch.empty(3, 2, device="meta")).is_meta
    for dtype in (torch.float16, torch.bfloat16):
        assert fill(torch.empty(40, 50, dtype=dtype)).isfinite().all()
    a, b = (drawn(fill, (3, 4)) for _ in range(2))
    assert torch.equal(a, b)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    drawn(fill, (3, 4))
    assert torch.equal(state, torch.get_rng_state()), "a given generator leaves the global one alone"


# ---------------------------------------------------------------- refusal
@pytest.mark.refusal("init-xavier", "init-he", "init-lecun")
@pytest.mark.parametrize("name", FILLS)
def test_what_has_no_fan_is_refused(name):
    fill = getattr(init, name)
    with refuses(ShapeError, "(5,)", "two axes"):
        fill(torch.empty(5))
    with refuses(ShapeError, "()"):
        fill(torch.tensor(1.0))
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with refuses(ShapeError, dtype, name):
            fill(torch.zeros(2, 2, dtype=dtype))


@pytest.mark.refusal("init-xavier")
@pytest.mark.parametrize("gain", [0, -1.0, math.nan, math.inf, True, "relu", None])
def test_a_bad_gain_is_refused(gain):
    for fill in (init.xavier_normal_, init.xavier_uniform_):
        with refuses(ConfigError, "gain", repr(gain)):
            fill(torch.empty(2, 2), gain)


@pytest.mark.refusal("init-he")
@pytest.mark.parametrize("fill", [init.kaiming_normal_, init.kaiming_uniform_])
def test_bad_choices_are_refused(fill):
    with refuses(ConfigError, "mode", "'fan_avg'"):
        fill(torch.empty(2, 2), mode="fan_avg")
    with refuses(ConfigError, "'gelu'", "'relu'"):
        fill(torch.empty(2, 2), nonlinearity="gelu")
    for slope in (math.nan, math.inf, True, "0.1"):
        with refuses(ConfigError, "slope", repr(slope)):
            fill(torch.empty(2, 2), slope)


@pytest.mark.refusal("init-lecun")
def test_a_refused_tensor_keeps_its_values():
    x = torch.arange(4.0)
    with pytest.raises(ShapeError), unchecked():
        init.lecun_normal_(x)
    assert x.tolist() == [0, 1, 2, 3]
