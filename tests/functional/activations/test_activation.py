"""Every activation against torch's, in float64, corners and tails included; and what each one promises."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from handbook_src.errors import ConfigError, KernelUnavailable, ShapeError
from handbook_src.functional.activations import activation as ours
from handbook_src.testing import assert_parity, refuses

BACKENDS = ["reference", "torch", "auto"]
BOTH = pytest.mark.parametrize("backend", BACKENDS)
SHAPES = [(), (7,), (3, 1, 5), (0, 3)]


def draw(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


#: id, ours, torch's, by every option; the ids are the components that the pair proves
PAIRS = {
    "relu": ("relu", ours.relu, F.relu),
    "leaky 0.01": ("leaky-relu", ours.leaky_relu, F.leaky_relu),
    "leaky 0.3": ("leaky-relu", lambda x, **k: ours.leaky_relu(x, 0.3, **k), lambda x: F.leaky_relu(x, 0.3)),
    "leaky -1": ("leaky-relu", lambda x, **k: ours.leaky_relu(x, -1.0, **k), lambda x: F.leaky_relu(x, -1.0)),
    "leaky 0": ("leaky-relu", lambda x, **k: ours.leaky_relu(x, 0.0, **k), lambda x: F.leaky_relu(x, 0.0)),
    "elu 1": ("elu", ours.elu, F.elu),
    "elu 0.3": ("elu", lambda x, **k: ours.elu(x, 0.3, **k), lambda x: F.elu(x, 0.3)),
    "elu 2": ("elu", lambda x, **k: ours.elu(x, 2.0, **k), lambda x: F.elu(x, 2.0)),
    "selu": ("selu", ours.selu, F.selu),
    "gelu": ("gelu", ours.gelu, F.gelu),
    "gelu tanh": (
        "gelu",
        lambda x, **k: ours.gelu(x, approximate="tanh", **k),
        lambda x: F.gelu(x, approximate="tanh"),
    ),
    "silu": ("silu", ours.silu, F.silu),
    "swish 1": ("silu", ours.swish, F.silu),
    "swish 0.5": ("silu", lambda x, **k: ours.swish(x, 0.5, **k), lambda x: F.silu(0.5 * x) / 0.5),
    "swish -2": ("silu", lambda x, **k: ours.swish(x, -2.0, **k), lambda x: F.silu(-2 * x) / -2),
    "swish 0": ("silu", lambda x, **k: ours.swish(x, 0.0, **k), lambda x: x / 2),
    "mish": ("mish", ours.mish, F.mish),
    "sigmoid": ("sigmoid", ours.sigmoid, torch.sigmoid),
    "tanh": ("tanh", ours.tanh, torch.tanh),
    "hardsigmoid": ("hardswish", ours.hardsigmoid, F.hardsigmoid),
    "hardswish": ("hardswish", ours.hardswish, F.hardswish),
}
PRELU = {
    "prelu": ("prelu", lambda x, **k: ours.prelu(x, torch.tensor([0.25], dtype=x.dtype), **k), None),
}
IDS = ("relu", "leaky-relu", "elu", "selu", "gelu", "silu", "mish", "sigmoid", "tanh", "hardswish")
EVERY = pytest.mark.parametrize("name", PAIRS)
ALL_CALLS = {name: pair[1] for name, pair in {**PAIRS, **PRELU}.items()}
ALL = pytest.mark.parametrize("call", ALL_CALLS.values(), ids=ALL_CALLS.keys())
#: torch's hardsigmoid multiplies gradients by a sixth that was rounded to float32, in float64 too
ROUGH = {"hardsigmoid": {"rtol": 1e-7, "atol": 1e-9}}
# where the graphs have corners, on both sides of them, and far out
CORNERS = [0.0, -0.0, 3.0, -3.0, 1e-9, -1e-9, 3 + 1e-9, -3 - 1e-9, 3 - 1e-9, -3 + 1e-9]
FAR = [30.0, -30.0, 800.0, -800.0, 1e4, -1e4, 1e-300, -1e-300]


# ---------------------------------------------------------------- parity
@pytest.mark.parity(*IDS)
@EVERY
@BOTH
@pytest.mark.parametrize("shape", SHAPES)
def test_is_torchs(name, shape, backend):
    _, mine, theirs = PAIRS[name]
    assert_parity(lambda x: mine(x, backend=backend), theirs, [draw(*shape)], **ROUGH.get(name, {}))


@pytest.mark.parity(*IDS)
@EVERY
@BOTH
def test_corners_and_tails_are_torchs(name, backend):
    _, mine, theirs = PAIRS[name]
    x = torch.tensor(CORNERS + FAR, dtype=torch.float64)
    assert_parity(lambda x: mine(x, backend=backend), theirs, [x], **ROUGH.get(name, {}))


@pytest.mark.parity("prelu")
@BOTH
@pytest.mark.parametrize(
    ("shape", "slopes"),
    [((), 1), ((3,), 1), ((2, 3), 1), ((2, 3), 3), ((1, 1), 1), ((2, 3, 5), 3), ((2, 3, 2, 1, 4), 3), ((0, 3), 3)],
)
def test_prelu_is_torchs(shape, slopes, backend):
    assert_parity(lambda x, w: ours.prelu(x, w, backend=backend), F.prelu, [draw(*shape), draw(slopes, seed=1)])


@pytest.mark.parity("prelu")
@BOTH
def test_prelu_at_its_corner_is_torchs(backend):
    x = torch.tensor([[0.0, -0.0, 1e4, -1e4, 1e-300]], dtype=torch.float64).T
    for slopes in ([0.25], [0.0], [-1.0]):
        w = torch.tensor(slopes, dtype=torch.float64)
        assert_parity(lambda x, w: ours.prelu(x, w, backend=backend), F.prelu, [x, w])
    scalar = torch.tensor(0.3, dtype=torch.float64)
    assert_parity(lambda x, w: ours.prelu(x, w, backend=backend), F.prelu, [x, scalar])


@pytest.mark.parity("silu")
@BOTH
@pytest.mark.parametrize("beta", [1.0, 0.3, -2.0, 1.702])
def test_swish_learns_beta(beta, backend):
    assert_parity(
        lambda x, b: ours.swish(x, b, backend=backend),
        lambda x, b: F.silu(b * x) / b,
        [torch.cat([draw(9), torch.tensor([0.0, 1e4, -1e4])]), torch.tensor(beta)],
    )


@pytest.mark.parity("selu")
@BOTH
@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("training", [True, False])
def test_alpha_dropout_is_torchs_from_the_same_generator_state(p, training, backend):
    def mine(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return ours.alpha_dropout(x, p, training, backend=backend)

    def theirs(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return F.alpha_dropout(x, p, training)

    assert_parity(mine, theirs, [draw(5, 7)])


@pytest.mark.parity(*IDS, "prelu")
@ALL
@BOTH
def test_strides_do_not_matter_and_the_input_is_left_alone(call, backend):
    dense = draw(3, 4, 5, 6)
    for view in (dense.permute(0, 1, 3, 2), dense[:, :, ::2, 1::3], dense.flip(0), dense[:1].expand(3, -1, -1, -1)):
        before = view.clone()
        torch.testing.assert_close(call(view, backend=backend), call(view.contiguous(), backend=backend))
        assert torch.equal(view, before)


@pytest.mark.parity(*IDS, "prelu")
@ALL
def test_reference_is_twice_differentiable(call):
    x = draw(2, 5).requires_grad_()  # random, so not on a corner
    torch.autograd.gradgradcheck(lambda x: call(x, backend="reference"), x)


@pytest.mark.parity(*IDS, "prelu")
@ALL
@BOTH
def test_nan_passes_through(call, backend):
    y = call(torch.tensor([math.nan, 1.0, math.nan]), backend=backend)
    assert y.isnan().tolist() == [True, False, True]


@pytest.mark.parity(*IDS)
@EVERY
@BOTH
def test_infinities_are_torchs(name, backend):
    if name == "swish 0":
        pytest.skip("infinity times the slope 0 is NaN")
    _, mine, theirs = PAIRS[name]
    x = torch.tensor([math.inf, -math.inf], dtype=torch.float64)
    torch.testing.assert_close(mine(x, backend=backend), theirs(x), equal_nan=True)


# ---------------------------------------------------------------- half precision, compile
@pytest.mark.registration(*IDS, "prelu")
@ALL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_float32_answer_rounded_once(call, dtype):
    x = torch.cat([draw(500), torch.linspace(-12, 12, 200)]).to(dtype)
    y = call(x, backend="reference")
    assert y.dtype == dtype
    exact = call(x.float(), backend="reference")
    torch.testing.assert_close(y.float(), exact, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-7)
    near = call(x, backend="auto")
    assert near.dtype == dtype
    torch.testing.assert_close(near.float(), exact, rtol=2.1 * torch.finfo(dtype).eps, atol=1e-3)


@pytest.mark.registration(*IDS, "prelu")
@ALL
@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_arguments_stay_finite_with_their_gradients(call, backend, dtype):
    # 6e4 is near float16's last number; its exponential, its cube and its square are not numbers there
    x = torch.tensor([1e4, -1e4, 6e4, -6e4, 0.0], dtype=dtype, requires_grad=True)
    y = call(x, backend=backend)
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert torch.isfinite(x.grad).all()


@pytest.mark.registration(*IDS, "prelu")
@pytest.mark.parametrize(
    "name", [n for n in ALL_CALLS if n not in ("leaky 0.3", "leaky -1", "leaky 0", "elu 2", "swish 1")]
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_compiles_to_one_graph(name, backend, unchecked):
    x, call = draw(2, 4), ALL_CALLS[name]
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: call(x, backend=backend), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), call(x))


@pytest.mark.registration("prelu")
def test_prelu_takes_float32_slopes_on_bfloat16_activations():
    x, w = draw(3, 4).bfloat16(), draw(4, seed=1).float()
    y = ours.prelu(x, w)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), F.prelu(x.double(), w.double()), rtol=2**-8, atol=0)


INPLACE = {
    "relu": (ours.relu, F.relu),
    "leaky-relu": (ours.leaky_relu, F.leaky_relu),
    "elu": (ours.elu, F.elu),
    "selu": (ours.selu, F.selu),
    "silu": (ours.silu, F.silu),
    "mish": (ours.mish, F.mish),
    "hardsigmoid": (ours.hardsigmoid, F.hardsigmoid),
    "hardswish": (ours.hardswish, F.hardswish),
}


@pytest.mark.parity("relu", "leaky-relu", "elu", "selu", "silu", "mish", "hardswish")
@pytest.mark.parametrize("name", INPLACE)
def test_inplace_writes_the_result_over_the_input(name):
    mine, theirs = INPLACE[name]
    x = draw(3, 4)
    want = theirs(x)
    y = mine(x, inplace=True)
    assert y is x
    torch.testing.assert_close(x, want)
    assert_parity(lambda x: mine(x * 1, inplace=True), theirs, [draw(3, 4)])


# ---------------------------------------------------------------- laws
GRID = torch.linspace(-8, 8, 1601, dtype=torch.float64)  # with 0 and both 3s on it


@pytest.mark.law("relu")
def test_relu_is_idempotent_and_homogeneous_of_degree_one():
    x = draw(100)
    assert torch.equal(ours.relu(ours.relu(x)), ours.relu(x))
    torch.testing.assert_close(ours.relu(4.0 * x), 4.0 * ours.relu(x))
    assert torch.equal(ours.relu(x) - ours.relu(-x), x)


@pytest.mark.law("leaky-relu")
def test_leaky_relu_lets_gradient_through_everywhere_and_is_inverted_by_the_inverse_slope():
    x = GRID.clone().requires_grad_()
    ours.leaky_relu(x, 0.2).sum().backward()
    assert x.grad.min() == pytest.approx(0.2)
    torch.testing.assert_close(ours.leaky_relu(ours.leaky_relu(GRID, 0.2), 5.0), GRID)


@pytest.mark.law("prelu", "leaky-relu", "relu")
def test_prelu_spans_relu_leaky_relu_and_the_identity():
    x = draw(5, 3)
    for slope, want in ((0.0, ours.relu(x)), (0.01, ours.leaky_relu(x)), (1.0, x)):
        torch.testing.assert_close(ours.prelu(x, torch.full((3,), slope, dtype=x.dtype)), want)


@pytest.mark.law("prelu")
def test_each_channels_slope_sees_its_channel_only():
    x, w = draw(4, 3, 2), torch.full((3,), 0.25, dtype=torch.float64, requires_grad=True)
    for c in range(3):
        (g,) = torch.autograd.grad(ours.prelu(x, w)[:, c].sum(), w)
        assert g[c] == pytest.approx(x[:, c].clamp(max=0).sum().item())
        assert (g[torch.arange(3) != c] == 0).all()


@pytest.mark.law("elu")
@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0])
def test_elu_is_bounded_below_and_its_slope_below_zero_is_its_height_above_the_floor(alpha):
    x = GRID.clone().requires_grad_()
    y = ours.elu(x, alpha)
    y.sum().backward()
    assert y.min() > -alpha
    below = GRID <= 0
    torch.testing.assert_close(x.grad[below], (y.detach() + alpha)[below])


def moments(f, weight=None) -> tuple[float, float]:
    """Mean and second moment of f(z) for a standard normal z, by quadrature."""
    z = torch.linspace(-14, 14, 560_001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    y = f(z)
    return torch.trapezoid(y * density, z).item(), torch.trapezoid(y.square() * density, z).item()


@pytest.mark.law("selu")
@BOTH
def test_selu_maps_a_standard_normal_to_mean_0_and_variance_1(backend):
    mean, second = moments(lambda z: ours.selu(z, backend=backend))
    assert abs(mean) < 1e-9
    assert abs(second - 1) < 1e-9
    mean, _ = moments(lambda z: ours.elu(z, backend=backend))
    assert mean > 0.1  # ELU does not


@pytest.mark.law("selu")
def test_selus_constants_solve_its_two_equations():
    def tail(x: float) -> float:  # P(z < -x)
        return 0.5 * math.erfc(x / math.sqrt(2))

    e = math.e
    alpha = (1 / math.sqrt(2 * math.pi)) / (0.5 - math.sqrt(e) * tail(1))
    scale = (0.5 + alpha**2 * (e**2 * tail(2) - 2 * math.sqrt(e) * tail(1) + 0.5)) ** -0.5
    assert abs(ours.SELU_ALPHA - alpha) < 1e-12
    assert abs(ours.SELU_LAMBDA - scale) < 1e-12


@pytest.mark.law("selu")
@BOTH
@pytest.mark.parametrize("p", [0.05, 0.3, 0.8])
def test_alpha_dropout_keeps_mean_and_variance_where_dropout_does_not(p, backend):
    x = ours.selu(draw(200_000, scale=1.0, seed=5))  # a seed that the mask below does not have
    y = ours.alpha_dropout(x, p, True, backend=backend)
    assert abs(y.mean()) < 0.02
    assert abs(y.var() - 1) < 0.02
    assert abs(F.dropout(x, p, True).var() - 1) > 0.04  # 1 / (1 - p)
    assert ours.alpha_dropout(x, p, False, backend=backend) is x


@pytest.mark.law("gelu")
@BOTH
def test_gelu_is_the_mean_of_the_input_under_a_random_gate(backend):
    # the input is kept with probability Phi(x): the definition in section 2 of the paper
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    torch.testing.assert_close(ours.gelu(GRID, backend=backend), GRID * normal.cdf(GRID))
    torch.testing.assert_close(ours.gelu(GRID) - ours.gelu(-GRID), GRID)


@pytest.mark.law("gelu")
def test_gelus_tanh_form_is_near_but_not_equal():
    error = (ours.gelu(GRID) - ours.gelu(GRID, approximate="tanh")).abs().max()
    assert 4e-4 < error < 5e-4


@pytest.mark.law("gelu")
def test_gelus_reference_keeps_its_digits_in_the_left_tail():
    x = torch.tensor(-12.0, dtype=torch.float64)
    want = -12 * 1.7764821120776767e-33  # -12 P(z < -12)
    assert ours.gelu(x, backend="reference").item() == pytest.approx(want, rel=1e-10, abs=0)
    assert 0.5 * -12 * (1 + math.erf(-12 / math.sqrt(2))) == 0  # the usual form has none left


@pytest.mark.law("silu", "gelu", "mish", "hardswish")
@pytest.mark.parametrize(
    ("f", "lowest", "at"),
    [
        (ours.silu, -0.278465, -1.278465),
        (ours.gelu, -0.169971, -0.751792),
        (ours.mish, -0.308843, -1.192448),
        (ours.hardswish, -0.375, -1.5),
    ],
    ids=["silu", "gelu", "mish", "hardswish"],
)
def test_one_dip_below_zero_of_known_depth(f, lowest, at):
    x = torch.linspace(-6, 6, 120_001, dtype=torch.float64)
    y = f(x)
    assert y.min().item() == pytest.approx(lowest, abs=1e-6)
    assert x[y.argmin()].item() == pytest.approx(at, abs=1e-3)
    turns = (y.diff().sign().diff() != 0) & (y[1:-1] != 0)
    assert turns.sum() <= 2


@pytest.mark.law("silu")
@BOTH
def test_swish_goes_from_half_the_identity_to_relu(backend):
    torch.testing.assert_close(ours.swish(GRID, 0.0, backend=backend), GRID / 2)
    torch.testing.assert_close(ours.swish(GRID, 1e6, backend=backend), ours.relu(GRID))
    quick = (ours.swish(GRID, 1.702, backend=backend) - ours.gelu(GRID)).abs().max()
    assert quick < 0.021


@pytest.mark.law("mish")
@BOTH
def test_mish_in_rational_form(backend):
    # tanh(ln(1 + e^x)) = ((1 + e^x)^2 - 1) / ((1 + e^x)^2 + 1): no tanh, no logarithm
    square = (1 + GRID.exp()).square()
    torch.testing.assert_close(ours.mish(GRID, backend=backend), GRID * (square - 1) / (square + 1))


@pytest.mark.law("sigmoid")
@BOTH
def test_sigmoid_and_its_mirror_sum_to_one_and_its_slope_is_at_most_a_quarter(backend):
    torch.testing.assert_close(
        ours.sigmoid(GRID, backend=backend) + ours.sigmoid(-GRID, backend=backend), torch.ones_like(GRID)
    )
    x = GRID.clone().requires_grad_()
    ours.sigmoid(x, backend=backend).sum().backward()
    assert x.grad.max().item() == pytest.approx(0.25, rel=1e-12)
    tail = ours.sigmoid(torch.tensor(-700.0, dtype=torch.float64), backend=backend).item()
    assert tail == pytest.approx(math.exp(-700), rel=1e-12, abs=0)


@pytest.mark.law("tanh", "sigmoid")
@BOTH
def test_tanh_is_odd_and_a_stretched_sigmoid(backend):
    y = ours.tanh(GRID, backend=backend)
    torch.testing.assert_close(y, -ours.tanh(-GRID, backend=backend))
    torch.testing.assert_close(y, 2 * ours.sigmoid(2 * GRID, backend=backend) - 1)
    small = torch.tensor(1e-12, dtype=torch.float64)
    assert ours.tanh(small, backend=backend).item() == pytest.approx(1e-12, rel=1e-12, abs=0)


@pytest.mark.law("hardswish")
@BOTH
def test_hardswish_is_zero_then_parabola_then_identity(backend):
    y = ours.hardswish(GRID, backend=backend)
    assert (y[GRID <= -3] == 0).all()
    torch.testing.assert_close(y[GRID >= 3], GRID[GRID >= 3], rtol=1e-15, atol=0)
    middle = GRID.abs() < 3
    torch.testing.assert_close(y[middle], (GRID * (GRID + 3) / 6)[middle])
    torch.testing.assert_close(y, GRID * ours.hardsigmoid(GRID, backend=backend))
    assert (y - ours.silu(GRID)).abs().max() < 0.15


# ---------------------------------------------------------------- refusals
@pytest.mark.refusal(*IDS, "prelu")
@ALL
def test_refuses_dtypes_and_backends(call):
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with refuses(ShapeError, dtype):
            call(torch.ones(3, dtype=dtype))
    for backend in ("cudnn", "triton"):
        with refuses(ConfigError, backend):
            call(draw(3), backend=backend)


@pytest.mark.refusal("relu", "leaky-relu", "elu", "selu", "silu", "mish", "hardswish")
@pytest.mark.parametrize("name", INPLACE)
def test_the_reference_does_not_write_in_place(name):
    with refuses(KernelUnavailable, "reference", "inplace"):
        INPLACE[name][0](draw(3), inplace=True, backend="reference")


@pytest.mark.refusal("leaky-relu", "silu", "elu", "gelu")
def test_refuses_settings_that_are_no_numbers():
    for value in (math.nan, math.inf, True, "0.1", None):
        with refuses(ConfigError, "leaky_relu negative_slope", value):
            ours.leaky_relu(draw(3), value)
        with refuses(ConfigError, "swish beta", value):
            ours.swish(draw(3), value)
    for value in (0.0, -1.0, math.nan, math.inf, True, "1"):
        with refuses(ConfigError, "elu alpha", value):
            ours.elu(draw(3), value)
    for value in ("erf", None, True):
        with refuses(ConfigError, "gelu approximate", value):
            ours.gelu(draw(3), approximate=value)
    with refuses(ConfigError, -0.5, "inplace"):
        ours.leaky_relu(draw(3), -0.5, inplace=True)


@pytest.mark.refusal("prelu", "silu")
def test_refuses_slopes_of_another_shape():
    for shape, slopes in (((2, 3), (2,)), ((3,), (3,)), ((2, 3), (3, 1)), ((2, 3), (1, 1)), ((2, 3), (0,))):
        with refuses(ShapeError, "prelu weight", slopes, shape):
            ours.prelu(draw(*shape), draw(*slopes))
    with refuses(ShapeError, "torch.int64"):
        ours.prelu(draw(2, 3), torch.ones(3, dtype=torch.int64))
    with refuses(KernelUnavailable, "float64"):
        ours.prelu(draw(2, 3), draw(3).float(), backend="torch")
    with refuses(ShapeError, "swish beta", (2,)):
        ours.swish(draw(3), draw(2))


@pytest.mark.refusal("selu")
def test_alpha_dropout_refuses_what_is_no_probability():
    for p in (-0.1, 1.5, math.nan):
        with refuses(ConfigError, "alpha_dropout p", p):
            ours.alpha_dropout(draw(3), p, True)
    with refuses(KernelUnavailable, "inplace"):
        ours.alpha_dropout(draw(3), 0.5, True, True, backend="reference")
    with refuses(ShapeError, "torch.int64"):
        ours.alpha_dropout(torch.ones(3, dtype=torch.int64))


@pytest.mark.law("prelu")
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_an_infinite_input_leaves_the_slopes_gradient_alone(backend):
    slope = torch.tensor([0.25], requires_grad=True)
    ours.prelu(torch.tensor([float("inf"), -2.0]), slope, backend=backend)[1:].sum().backward()
    assert slope.grad == -2.0
