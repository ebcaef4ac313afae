"""Back-propagation through time against torch.nn.RNN, truncation against detach, Jacobians against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.foundations.bptt import Recurrence, jacobian_norms, rnn_backward, rnn_forward
from handbook_src.testing import assert_causal, refuses, unchecked

SHAPES = [(1, 1, 1, 1), (2, 5, 3, 4), (3, 1, 2, 5), (2, 12, 1, 3), (0, 4, 2, 3)]  # b t d n


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def cell(d: int, n: int) -> Recurrence:
    return Recurrence(draw(n, d), draw(n, n), draw(n), draw(n))


def torchs(parameters: Recurrence, nonlinearity: str) -> nn.RNN:
    n, d = parameters.weight_ih.shape
    rnn = nn.RNN(d, n, nonlinearity=nonlinearity, batch_first=True).double()
    rnn.load_state_dict({f"{name}_l0": value for name, value in parameters._asdict().items()})
    return rnn


# ---------------------------------------------------------------- parity
@pytest.mark.parity("bptt")
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize(("b", "t", "d", "n"), SHAPES)
def test_states_and_gradients_are_torchs(b, t, d, n, nonlinearity):
    parameters, x, h0, g = cell(d, n), draw(b, t, d), draw(b, n), draw(b, t, n)
    rnn = torchs(parameters, nonlinearity)
    leaves = (x.clone().requires_grad_(), h0[None].clone().requires_grad_())
    want, _ = rnn(*leaves) if b else (leaves[0].new_zeros(0, t, n), None)
    states = rnn_forward(x, h0, parameters, nonlinearity)
    torch.testing.assert_close(states, want.detach(), rtol=1e-11, atol=1e-12)
    found = rnn_backward(g, x, h0, states, parameters, nonlinearity)
    if not b:
        assert all((p == 0).all() for p in found.parameters)
        return
    wants = torch.autograd.grad(want, [*leaves, *rnn.parameters()], g)
    order = [getattr(found.parameters, name.removesuffix("_l0")) for name, _ in rnn.named_parameters()]
    for mine, theirs in zip((found.x, found.h0[None], *order), wants, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parity("bptt")
@pytest.mark.parametrize("truncate", [1, 2, 3, 5, 6, 7, 100])
def test_truncation_is_a_detached_state(truncate):
    parameters, x, h0, g = cell(2, 4), draw(3, 6, 2), draw(3, 4), draw(3, 6, 4)
    rnn = torchs(parameters, "tanh")
    leaf, first = x.clone().requires_grad_(), h0[None].clone().requires_grad_()
    h, pieces = first, []
    for start in range(0, 6, truncate):
        y, h = rnn(leaf[:, start : start + truncate], h)
        pieces.append(y)
        h = h.detach()
    wants = torch.autograd.grad(torch.cat(pieces, 1), [leaf, first, *rnn.parameters()], g)
    states = rnn_forward(x, h0, parameters)
    found = rnn_backward(g, x, h0, states, parameters, truncate=truncate)
    order = [getattr(found.parameters, name.removesuffix("_l0")) for name, _ in rnn.named_parameters()]
    for mine, theirs in zip((found.x, found.h0[None], *order), wants, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parity("bptt")
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_jacobians_are_autograds(nonlinearity):
    parameters, x = cell(2, 3), draw(2, 6, 2)
    states = rnn_forward(x, draw(2, 3), parameters, nonlinearity)
    found = jacobian_norms(states, parameters.weight_hh, nonlinearity)
    assert found.shape == (2, 6)
    for sample in range(2):
        for k in range(6):

            def last(h, rest=x[sample : sample + 1, k + 1 :]):
                return rnn_forward(rest, h[None], parameters, nonlinearity)[0, -1] if rest.shape[1] else h

            jacobian = torch.autograd.functional.jacobian(last, states[sample, k])
            want = torch.linalg.matrix_norm(jacobian, 2)
            torch.testing.assert_close(found[sample, 5 - k], want, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- law
@pytest.mark.law("bptt")
@pytest.mark.parametrize("radius", [0.5, 0.9, 1.0, 1.3])
def test_the_product_stays_below_its_bound_and_a_scaled_rotation_without_activation_meets_it(radius):
    q, _ = torch.linalg.qr(draw(6, 6))
    w = radius * q
    lags = torch.arange(20, dtype=torch.float64)
    active = jacobian_norms(torch.tanh(draw(2, 20, 6)), w)
    assert (active <= radius**lags * (1 + 1e-12)).all()
    passive = jacobian_norms(torch.ones(2, 20, 6, dtype=torch.float64), w, "relu")
    torch.testing.assert_close(passive, (radius**lags).expand(2, 20))


@pytest.mark.law("bptt")
def test_states_never_see_the_future():
    parameters, h0 = cell(3, 4), draw(2, 4)
    assert_causal(lambda x: rnn_forward(x, h0, parameters), draw(2, 7, 3))


@pytest.mark.law("bptt")
def test_a_sequence_in_two_halves_has_the_gradient_of_the_whole():
    parameters, x, h0, g = cell(2, 4), draw(3, 6, 2), draw(3, 4), draw(3, 6, 4)
    states = rnn_forward(x, h0, parameters)
    whole = rnn_backward(g, x, h0, states, parameters)
    late = rnn_backward(g[:, 3:], x[:, 3:], states[:, 2], states[:, 3:], parameters)
    g_early = g[:, :3].clone()
    g_early[:, -1] += late.h0
    early = rnn_backward(g_early, x[:, :3], h0, states[:, :3], parameters)
    torch.testing.assert_close(whole.h0, early.h0)
    for mine, a, b in zip(whole.parameters, early.parameters, late.parameters, strict=True):
        torch.testing.assert_close(mine, a + b)


# ---------------------------------------------------------------- registration
@pytest.mark.registration("bptt")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_are_kept(dtype):
    parameters = Recurrence(*(p.to(dtype) for p in cell(2, 3)))
    x, h0 = draw(2, 4, 2).to(dtype), draw(2, 3).to(dtype)
    states = rnn_forward(x.transpose(0, 1).contiguous().transpose(0, 1), h0, parameters)
    found = rnn_backward(torch.ones_like(states), x, h0, states, parameters)
    assert {t.dtype for t in (states, found.x, found.h0, *found.parameters)} == {dtype}


@pytest.mark.registration("bptt")
def test_no_steps_give_no_states_and_no_gradient():
    parameters, x, h0 = cell(2, 3), draw(2, 0, 2), draw(2, 3)
    states = rnn_forward(x, h0, parameters)
    assert states.shape == (2, 0, 3)
    found = rnn_backward(states, x, h0, states, parameters)
    assert found.x.shape == x.shape
    assert all((p == 0).all() for p in (found.h0, *found.parameters))
    assert jacobian_norms(states, parameters.weight_hh).shape == (2, 0)


@pytest.mark.registration("bptt")
def test_it_compiles_without_a_graph_break():
    parameters, x, h0 = cell(2, 3), draw(2, 4, 2), draw(2, 3)

    def step(x, h0):
        states = rnn_forward(x, h0, parameters)
        return rnn_backward(states, x, h0, states, parameters).parameters.weight_hh

    with unchecked():
        torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="eager")(x, h0), step(x, h0))


# ---------------------------------------------------------------- refusal
@pytest.mark.refusal("bptt")
def test_shapes_that_do_not_fit_are_named():
    parameters, x, h0 = cell(2, 3), draw(2, 4, 2), draw(2, 3)
    with refuses(ShapeError, "weight_ih", "(3, 2)", "(3, 5)"):
        rnn_forward(draw(2, 4, 5), h0, parameters)
    with refuses(ShapeError, "weight_hh", "(3, 4)"):
        rnn_forward(x, h0, parameters._replace(weight_hh=draw(3, 4)))
    with refuses(ShapeError, "bias_hh", "(4,)"):
        rnn_forward(x, h0, parameters._replace(bias_hh=draw(4)))
    with refuses(ShapeError, "batch 3", "batch 2"):
        rnn_forward(x, draw(3, 3), parameters)
    with refuses(ShapeError, "2 axes", "(4, 2)"):
        rnn_forward(x[0], h0, parameters)
    with refuses(ShapeError, torch.int64):
        rnn_forward(torch.ones(2, 4, 2, dtype=torch.int64), h0, parameters)
    with refuses(ShapeError, "(2, 3, 3)", "(2, 4, 3)"):
        rnn_backward(draw(2, 4, 3), x, h0, draw(2, 3, 3), parameters)
    with refuses(ShapeError, "(3, 4)"):
        jacobian_norms(draw(2, 4, 3), draw(3, 4))
    with refuses(ShapeError, "2 axes"):
        jacobian_norms(draw(4, 3), draw(3, 3))


@pytest.mark.refusal("bptt")
def test_mixed_dtypes_are_refused():
    parameters, x, h0 = cell(2, 3), draw(2, 4, 2), draw(2, 3)
    states = rnn_forward(x, h0, parameters)
    for call in (
        lambda: rnn_forward(x, h0.float(), parameters),
        lambda: rnn_forward(x, h0, parameters._replace(bias_hh=parameters.bias_hh.float())),
        lambda: rnn_backward(states.float(), x, h0, states, parameters),
        lambda: jacobian_norms(states, parameters.weight_hh.float()),
    ):
        with refuses(ShapeError, "torch.float32", "torch.float64"):
            call()
    with refuses(ShapeError, "torch.int64"):
        rnn_backward(states.long(), x, h0, states, parameters)


@pytest.mark.registration("bptt")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_jacobians_of_halves_are_computed_in_float32(dtype):
    states, w = torch.tanh(draw(2, 3, 4)).to(dtype), draw(4, 4).to(dtype)
    found = jacobian_norms(states, w)
    assert found.dtype == dtype
    assert torch.equal(found, jacobian_norms(states.float(), w.float()).to(dtype))


@pytest.mark.refusal("bptt")
def test_bad_choices_are_refused():
    parameters, x, h0 = cell(2, 3), draw(2, 4, 2), draw(2, 3)
    for call in (
        lambda: rnn_forward(x, h0, parameters, "gelu"),
        lambda: rnn_backward(draw(2, 4, 3), x, h0, draw(2, 4, 3), parameters, "gelu"),
        lambda: jacobian_norms(draw(2, 4, 3), parameters.weight_hh, "gelu"),
    ):
        with refuses(ConfigError, "'gelu'"):
            call()
    states = rnn_forward(x, h0, parameters)
    for truncate in (0, -1, 1.5, True):
        with refuses(ConfigError, "truncate", repr(truncate)):
            rnn_backward(states, x, h0, states, parameters, truncate=truncate)
