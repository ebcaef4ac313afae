"""The fused gate, in the interpreter: every activation, forward and backward, in three dtypes."""

from __future__ import annotations

import pytest
import torch

from handbook_src.errors import ConfigError, KernelUnavailable, ShapeError
from handbook_src.functional.foundations.glu import gated
from handbook_src.functional.foundations.glu import glu as halved
from handbook_src.kernels import glu
from handbook_src.testing import refuses, relative_error

# Relative l2 error against float64: half a place of the dtype.  Measured 1.0e-7, 1.9e-3 and 2.4e-4.
ALLOWED = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
DTYPES = list(ALLOWED)


def agree(gate, value, activation, allowed=None):
    """Compare output and both gradients with the definition in float64."""
    leaves = [t.detach().requires_grad_() for t in (gate, value)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    out = glu.glu_triton(*leaves, activation)
    want = gated(*wide, activation, backend="torch")
    assert out.dtype == gate.dtype
    cotangent = torch.randn(out.shape).to(out.dtype)
    got = (out, *torch.autograd.grad(out, leaves, cotangent))
    wants = (want, *torch.autograd.grad(want, wide, cotangent.double()))
    for name, a, b in zip(("product", "dgate", "dvalue"), got, wants, strict=True):
        error = relative_error(a, b)
        assert error <= (allowed or ALLOWED[gate.dtype]), f"{name}: relative error {error:.1e}"


def drawn(*shape, dtype=torch.float32):
    return [(2 * torch.randn(shape)).to(dtype) for _ in range(2)]


@pytest.mark.parity("glu")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", glu.ACTIVATIONS)
def test_every_activation(activation, dtype, guards):
    agree(*drawn(3, 77, dtype=dtype), activation)


@pytest.mark.parity("glu")
@pytest.mark.parametrize("shape", [(1,), (1, 1), (2047,), (2048,), (2049,), (2, 3, 5), (3, 1), (5, 1025)])
def test_ragged_sizes(shape, guards):
    agree(*drawn(*shape), "silu")


@pytest.mark.parity("glu")
@pytest.mark.parametrize("width", [1, 3, 16, 33, 2049])
def test_halves_of_one_projection_are_read_in_place(width, guards, monkeypatch):
    """The rows have a stride; nothing is copied."""
    packed = torch.randn(5, 2 * width)
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda t: pytest.fail("was copied"))
    agree(packed[:, width:], packed[:, :width], "gelu")


@pytest.mark.parity("glu")
def test_any_layout(guards):
    wide = torch.randn(6, 14)
    for gate, value in [
        (wide.T, wide.T.contiguous()),
        (wide[:, ::2], wide[:, 1::2]),
        (wide[:1].expand(6, 14), wide),
        (wide[:, :1].expand(6, 14), wide),
    ]:
        agree(gate, value, "silu")


@pytest.mark.law("glu")
def test_a_gradient_that_is_expanded(guards):
    gate, value = (t.requires_grad_() for t in drawn(3, 9))
    glu.glu_triton(gate, value).sum().backward()
    want = torch.autograd.grad(gated(gate, value).sum(), (gate, value))
    torch.testing.assert_close((gate.grad, value.grad), want)


@pytest.mark.law("glu")
def test_along_another_axis(guards):
    x = torch.randn(2, 6, 5)
    torch.testing.assert_close(halved(x, 1, backend="triton"), torch.nn.functional.glu(x, 1))


@pytest.mark.law("glu")
@pytest.mark.parametrize("activation", glu.ACTIVATIONS)
def test_large_inputs_neither_overflow_nor_lose_the_small(activation):
    gate = torch.tensor([-1e4, -90.0, -30.0, -0.0, 0.0, 1e-20, 30.0, 90.0, 1e4], requires_grad=True)
    value = torch.full_like(gate, 3.0, requires_grad=True)
    got = glu.glu_triton(gate, value, activation)
    want = gated(gate, value, activation, backend="torch")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-30)
    got, want = (torch.autograd.grad(y.sum(), (gate, value)) for y in (got, want))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-10)


@pytest.mark.law("glu")
@pytest.mark.parametrize("activation", glu.ACTIVATIONS)
def test_nan_comes_through(activation):
    gate, value = torch.tensor([torch.nan, 1.0]), torch.tensor([1.0, torch.nan])
    assert glu.glu_triton(gate, value, activation).isnan().all()


@pytest.mark.law("glu")
def test_no_rows():
    gate, value = (torch.randn(2, 0, 5, requires_grad=True) for _ in range(2))
    y = glu.glu_triton(gate, value)
    y.sum().backward()
    assert y.shape == gate.grad.shape == value.grad.shape == (2, 0, 5)


@pytest.mark.law("glu")
def test_addresses_past_two_to_the_31():
    """Row 1 starts at element 2^31; only two pages are touched."""
    gate = torch.empty(2**31 + 8, dtype=torch.float16).as_strided((2, 8), (2**31, 1))
    gate.copy_(torch.randn(2, 8))
    torch.testing.assert_close(glu.glu_triton(gate, gate), gated(gate, gate), rtol=2e-3, atol=1e-3)


@pytest.mark.law("glu")
def test_inputs_are_left_alone():
    tensors = drawn(4, 17)
    before = [t.clone() for t in tensors]
    agree(*tensors, "relu")
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.law("glu")
def test_tiles_are_never_larger_than_one_program_holds():
    for rows, cols in [(1, 1), (1, 2048), (1, 10**12), (7, 3), (10**6, 1), (5, 2049), (100, 64)]:
        high, block, tiles = glu.plan(rows, cols)
        assert high * block <= glu.TILE
        assert tiles == -(-rows // high) * -(-cols // block)


# --- registration


@pytest.mark.registration("glu")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    gate, value = (t.requires_grad_() for t in drawn(3, 9, dtype=dtype))
    torch.library.opcheck(glu._glu, (gate, value, "silu"))
    torch.library.opcheck(glu._glu_backward, (gate.detach(), value.detach(), value.detach(), "gelu_tanh"))


@pytest.mark.registration("glu")
def test_compile_sees_one_graph(unchecked):
    def step(gate, value):
        return gated(gate, value, "silu", backend="triton").square().sum()

    leaves = [t.requires_grad_() for t in drawn(3, 9)]
    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        total = run(*leaves)
        results.append([total, *torch.autograd.grad(total, leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.refusal("glu")
def test_a_second_derivative_is_refused():
    gate, value = (t.requires_grad_() for t in drawn(3, 9))
    (g,) = torch.autograd.grad(glu.glu_triton(gate, value).square().sum(), gate, create_graph=True)
    with refuses(KernelUnavailable, "second derivative", "backend='reference'"):
        g.sum().backward()


@pytest.mark.refusal("glu")
def test_what_does_not_fit_is_refused(monkeypatch):
    x = torch.randn(3, 9)
    with refuses(ConfigError, "tanh", "silu"):
        glu.glu_triton(x, x, "tanh")
    with refuses(ShapeError, "value", "(3, 8)", "(3, 9)"):
        glu.glu_triton(x, x[:, :8])
    with refuses(ShapeError, "torch.float64", "reference"):
        glu.glu_triton(x.double(), x.double())
    with refuses(ShapeError, "torch.float16", "torch.float32"):
        glu.glu_triton(x, x.half())
    monkeypatch.delenv("TRITON_INTERPRET")
    with refuses(KernelUnavailable, "cpu", "TRITON_INTERPRET"):
        glu.glu_triton(x, x)
