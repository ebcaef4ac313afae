"""The gates against torch's operations and transformers' activations, and what makes them gates."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from handbook_src.errors import ConfigError, KernelUnavailable, ShapeError
from handbook_src.functional.foundations import glu as maths
from handbook_src.functional.foundations.glu import GATES, gated, gated_hidden_dim, geglu, glu, reglu, swiglu
from handbook_src.testing import assert_parity, refuses, relative_error

ORACLE = {
    "sigmoid": torch.sigmoid,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}
BACKENDS = ["auto", "reference", "torch"]


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64) * 2


# ---------------------------------------------------------------- parity
@pytest.mark.parity("glu")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", GATES)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3, 7), (2, 0, 3), (3, 0)])
def test_gated_is_torchs_activation_times_the_value(activation, shape, backend):
    assert_parity(
        lambda g, v: gated(g, v, activation, backend=backend),
        lambda g, v: ORACLE[activation](g) * v,
        [draw(*shape), draw(*shape)],
    )


@pytest.mark.parity("glu")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("shape", "dim"), [((6,), 0), ((2, 6), -1), ((2, 6, 5), 1), ((4, 3), -2), ((0, 4), 1), ((2, 0), 1)]
)
def test_glu_is_torchs(shape, dim, backend):
    """The value comes first and the gate second: torch's order, and Dauphin's."""
    assert_parity(lambda x: glu(x, dim, backend=backend), lambda x: F.glu(x, dim), [draw(*shape)])
    assert_parity(lambda x: glu(x, dim=dim, backend=backend), lambda x: F.glu(x, dim), [draw(*shape)])


@pytest.mark.parity("glu")
@pytest.mark.parametrize("backend", BACKENDS)
def test_views_with_strides(backend):
    wide = draw(6, 14)
    for gate, value in [(wide[:, ::2], wide[:, 1::2]), (wide.T, wide.T), (wide[:1].expand(6, 14), wide)]:
        assert_parity(lambda g, v: gated(g, v, backend=backend), lambda g, v: F.silu(g) * v, [gate, value])
        torch.testing.assert_close(gated(gate, value, backend=backend), F.silu(gate) * value)


@pytest.mark.outside("glu")
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_activations_of_transformers(backend):
    transformers = pytest.importorskip("transformers.activations")
    g, v = draw(4, 5), draw(4, 5)
    for ours, theirs in [("gelu_tanh", "gelu_new"), ("gelu", "gelu"), ("silu", "silu"), ("relu", "relu")]:
        torch.testing.assert_close(gated(g, v, ours, backend=backend), transformers.ACT2FN[theirs](g) * v)


@pytest.mark.parity("glu")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", GATES)
def test_second_derivatives(activation, backend):
    g, v = draw(3, 2).requires_grad_(), draw(3, 2).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda g, v: gated(g, v, activation, backend=backend), (g, v))


@pytest.mark.parity("glu")
def test_the_named_units():
    g, v = draw(3, 4), draw(3, 4)
    for backend in BACKENDS:
        assert torch.equal(reglu(g, v, backend=backend), gated(g, v, "relu", backend=backend))
        assert torch.equal(geglu(g, v, backend=backend), gated(g, v, "gelu", backend=backend))
        assert torch.equal(geglu(g, v, "tanh", backend=backend), gated(g, v, "gelu_tanh", backend=backend))
        assert torch.equal(swiglu(g, v, backend=backend), gated(g, v, "silu", backend=backend))


# ---------------------------------------------------------------- laws
@pytest.mark.law("glu")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", GATES)
def test_linear_in_the_value(activation, backend):
    g, u, v = draw(3, 5), draw(3, 5), draw(3, 5)
    whole = gated(g, 2 * u - 3 * v, activation, backend=backend)
    parts = 2 * gated(g, u, activation, backend=backend) - 3 * gated(g, v, activation, backend=backend)
    torch.testing.assert_close(whole, parts)


@pytest.mark.law("glu")
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_open_gate_is_the_value_and_a_shut_one_nothing(backend):
    v = draw(8)
    x = torch.cat([v, torch.full_like(v, 40.0)])
    torch.testing.assert_close(glu(x, backend=backend), v)
    shut = torch.cat([v, torch.full_like(v, -800.0)])
    assert torch.equal(glu(shut, backend=backend), torch.zeros(8, dtype=torch.float64))


@pytest.mark.law("glu")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_a_large_gate_makes_a_product(activation, backend):
    """Past the bend the unit is bilinear, g v: it multiplies features, which no pointwise activation does."""
    g, v = draw(8).abs() + 40, draw(8)
    torch.testing.assert_close(gated(g, v, activation, backend=backend), g * v)


@pytest.mark.law("glu")
def test_equal_parameters():
    for dim in (3, 48, 64, 4096):
        plain, gate = 2 * dim * 4 * dim, 3 * dim * gated_hidden_dim(dim)
        assert plain - 3 * dim < gate <= plain
    # the widths of LLaMA 7B, 13B, 33B and 65B
    widths = {4096: 11008, 5120: 13824, 6656: 17920, 8192: 22016}
    assert {d: gated_hidden_dim(d, multiple_of=256) for d in widths} == widths
    assert gated_hidden_dim(1, multiple_of=8) == 8
    assert gated_hidden_dim(6, expansion=1.0) == 4
    assert gated_hidden_dim(5, expansion=1.9) == 6  # floor(2/3 * floor(9.5))
    assert gated_hidden_dim(3, expansion=1.6) == 2  # floor(2/3 * 4.8) would be 3
    assert gated_hidden_dim(1, expansion=0.1) == 1


# ---------------------------------------------------------------- registration
@pytest.mark.registration("glu")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", GATES)
def test_half_precision(activation, backend, dtype):
    g, v = draw(64, 8).to(dtype), draw(64, 8).to(dtype)
    got = gated(g, v, activation, backend=backend)
    error = relative_error(got, ORACLE[activation](g.double()) * v.double())
    assert got.dtype == dtype
    assert error < torch.finfo(dtype).eps * (0.3 if backend == "reference" else 0.6)


@pytest.mark.registration("glu")
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_to_one_graph(backend, unchecked):
    x = torch.randn(3, 8)

    def both(x):
        return glu(x, backend=backend) + swiglu(x, x, backend=backend)[:, :4]

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), F.glu(x) + (F.silu(x) * x)[:, :4])


@pytest.mark.registration("glu")
def test_meta_tensors():
    x = torch.empty(3, 8, device="meta")
    assert glu(x).shape == (3, 4)
    assert geglu(x, x).shape == (3, 8)


# ---------------------------------------------------------------- refusals
@pytest.mark.refusal("glu")
def test_what_is_no_gate_is_refused():
    x = torch.randn(3, 8)
    with refuses(ConfigError, "tanh", "silu"):
        gated(x, x, "tanh")
    with refuses(ConfigError, "erf", "'none' or 'tanh'"):
        geglu(x, x, "erf")
    with refuses(ConfigError, "cuda", "reference"):
        swiglu(x, x, backend="cuda")


@pytest.mark.refusal("glu")
def test_what_does_not_fit_is_refused():
    x = torch.randn(3, 8)
    with refuses(ShapeError, "(3, 8)", "(1, 8)", "lost axis"):
        swiglu(x, x[:1])
    with refuses(ShapeError, "torch.float32", "torch.float16"):
        swiglu(x, x.half())
    with refuses(ShapeError, "cpu", "meta"):
        swiglu(x, x.to("meta"))
    with refuses(ShapeError, "torch.int64"):
        reglu(x.long(), x.long())
    with refuses(ShapeError, "torch.int64"):
        glu(x.long())
    with refuses(ShapeError, "7", "even"):
        glu(x[:, :7])
    with refuses(ConfigError, "dim", 2, "(3, 8)"):
        glu(x, 2)
    with refuses(ConfigError, "dim", 0.5):
        glu(x, 0.5)
    with refuses(ConfigError, "dim", "()"):
        glu(x.sum())


@pytest.mark.refusal("glu")
@pytest.mark.parametrize("wrong", [0, -1, 2.5, True, "8", float("nan")])
def test_wrong_widths_are_refused(wrong):
    with refuses(ConfigError, "dim", wrong):
        gated_hidden_dim(wrong)
    with refuses(ConfigError, "multiple_of", wrong):
        gated_hidden_dim(8, multiple_of=wrong)
    if wrong != 2.5:
        with refuses(ConfigError, "expansion", wrong):
            gated_hidden_dim(8, expansion=wrong)


@pytest.mark.refusal("glu")
def test_the_kernel_is_refused_where_it_cannot_run(monkeypatch):
    x = torch.randn(3, 8)
    with refuses(KernelUnavailable, "float32"):
        swiglu(x.double(), x.double(), backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with refuses(KernelUnavailable, "triton"):
        swiglu(x, x, backend="triton")


@pytest.mark.law("glu")
def test_inputs_are_left_alone():
    g, v = draw(3, 4), draw(3, 4)
    before = g.clone(), v.clone()
    for activation in GATES:
        for backend in BACKENDS:
            gated(g, v, activation, backend=backend)
    assert torch.equal(g, before[0])
    assert torch.equal(v, before[1])


def test_every_gate_has_a_name():
    assert {maths.activation_name(a) for a in GATES} == {"glu", "reglu", "geglu", "swiglu"}
