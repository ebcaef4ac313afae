"""The rotary embedding's kernel, in the interpreter: both pairings, both ways, in three dtypes."""

from __future__ import annotations

import pytest
import torch

from handbook_src.errors import KernelUnavailable, ShapeError
from handbook_src.functional.positions.rope import apply_rope, rope_cos_sin, rope_frequencies
from handbook_src.kernels import rope
from handbook_src.kernels.rope import rope_triton
from handbook_src.testing import refuses, relative_error

# Relative l2 error against float64: half a place of the dtype.
ALLOWED = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}
DTYPES = list(ALLOWED)
PAIRINGS = pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])


def tables(t, rotary, b=None):
    positions = torch.arange(7, 7 + t)
    positions = positions if b is None else positions + 3 * torch.arange(b)[:, None]
    return rope_cos_sin(positions, rope_frequencies(rotary))


def agree(x, cos, sin, interleaved):
    """Compare output and gradient with the readable maths in float64."""
    x = x.detach().requires_grad_()
    wide = x.detach().double().requires_grad_()
    got = rope_triton(x, cos, sin, interleaved)
    want = apply_rope(wide, cos.double(), sin.double(), interleaved=interleaved, backend="reference")
    assert got.dtype == x.dtype
    down = torch.randn(got.shape).to(got.dtype)
    assert relative_error(got, want) <= ALLOWED[x.dtype]
    (g,) = torch.autograd.grad(got, x, down)
    (w,) = torch.autograd.grad(want, wide, down.double())
    assert relative_error(g, w) <= ALLOWED[x.dtype]


@pytest.mark.parity("rope")
@PAIRINGS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_sample", [False, True])
def test_both_pairings_and_every_dtype(per_sample, dtype, interleaved, guards):
    agree(torch.randn(2, 5, 3, 14).to(dtype), *tables(5, 14, 2 if per_sample else None), interleaved)


@pytest.mark.parity("rope")
@PAIRINGS
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (1, 1, 1, 3), (2, 7, 1, 9), (1, 65, 2, 32), (3, 2, 5, 130)])
def test_ragged_sizes_and_partial_rotation(shape, interleaved, guards):
    e = shape[-1]
    for rotary in {2, e // 4 * 2 or 2, e // 2 * 2}:
        agree(torch.randn(shape), *tables(shape[1], rotary), interleaved)


@pytest.mark.parity("rope")
@PAIRINGS
def test_any_layout(interleaved, guards, monkeypatch):
    """Slices of a packed projection and transposed axes are read in place; tables may be views of any kind."""
    packed = torch.randn(2, 5, 3, 3, 8)
    cos, sin = tables(5, 8)
    agree(packed[:, :, 1], cos, sin, interleaved)
    agree(packed[:, :, 0].transpose(1, 2)[:, :3], *tables(3, 8), interleaved)
    agree(torch.randn(8, 3, 5, 2).permute(3, 2, 1, 0), cos, sin, interleaved)
    agree(packed[:, :, 2], cos[None], sin[None], interleaved)
    agree(packed[:, :, 2], cos.T.contiguous().T, sin.expand(2, 5, 4)[0], interleaved)
    agree(packed[:, :, 2], cos.expand(2, 5, 4), sin.expand(2, 5, 4), interleaved)
    agree(packed[:, :1, 2].expand(2, 5, 3, 8), cos, sin, interleaved)


@pytest.mark.parity("rope")
def test_tables_of_half_precision(guards):
    cos, sin = (t.bfloat16() for t in tables(5, 8))
    agree(torch.randn(2, 5, 3, 8), cos, sin, False)


@pytest.mark.law("rope")
@PAIRINGS
def test_backwards_undoes_it_and_lengths_stay(interleaved):
    x, (cos, sin) = torch.randn(2, 5, 3, 10), tables(5, 6)
    y = rope_triton(x, cos, sin, interleaved)
    torch.testing.assert_close(rope._rope(y, cos, sin, interleaved, True), x)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(y[..., 6:], x[..., 6:])


@pytest.mark.law("rope")
@PAIRINGS
def test_derivatives_of_any_order(interleaved):
    x, (cos, sin) = torch.randn(1, 3, 2, 6, requires_grad=True), tables(3, 4)

    def third(turn):
        (g,) = torch.autograd.grad(turn(x).pow(4).sum(), x, create_graph=True)
        (g,) = torch.autograd.grad(g.square().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x)[0]

    got = third(lambda x: rope_triton(x, cos, sin, interleaved))
    want = third(lambda x: apply_rope(x, cos, sin, interleaved=interleaved, backend="reference"))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


@pytest.mark.law("rope")
def test_it_is_a_backend_of_the_function(guards):
    x, (cos, sin) = torch.randn(2, 5, 3, 8), tables(5, 6)
    for interleaved in (False, True):
        got = apply_rope(x, cos, sin, interleaved=interleaved, backend="triton")
        torch.testing.assert_close(got, apply_rope(x, cos, sin, interleaved=interleaved))


@pytest.mark.law("rope")
def test_nothing_to_turn():
    for shape in [(0, 5, 3, 8), (2, 0, 3, 8), (2, 5, 0, 8)]:
        x = torch.randn(shape, requires_grad=True)
        y = rope_triton(x, *tables(shape[1], 8))
        y.sum().backward()
        assert y.shape == x.grad.shape == shape


@pytest.mark.law("rope")
def test_addresses_past_two_to_the_31():
    """The second sample starts at element 2^31; only two pages are touched."""
    x = torch.empty(2**31 + 16, dtype=torch.float16).as_strided((2, 1, 2, 8), (2**31, 16, 8, 1))
    x.copy_(torch.randn(2, 1, 2, 8))
    cos, sin = tables(1, 8)
    torch.testing.assert_close(rope_triton(x, cos, sin), apply_rope(x, cos, sin), rtol=2e-3, atol=1e-3)


@pytest.mark.law("rope")
def test_inputs_are_left_alone():
    tensors = torch.randn(2, 5, 3, 8), *tables(5, 8)
    before = [t.clone() for t in tensors]
    agree(*tensors, True)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.law("rope")
def test_every_plan_fits_a_gpu():
    for rows in (1, 3, 10**6):
        for width in (1, 20, 32, 64, 128, 1024):
            high, block, warps = rope.plan(rows, width)
            assert block >= width
            assert high * block <= rope.TILE
            assert warps in (1, 2, 4, 8, 16)


# --- registration


@pytest.mark.registration("rope")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    x, (cos, sin) = torch.randn(2, 3, 2, 6).to(dtype), tables(3, 4)
    for interleaved in (False, True):
        torch.library.opcheck(rope._rope, (x.requires_grad_(), cos, sin, interleaved, interleaved))


@pytest.mark.registration("rope")
def test_compile_sees_one_graph(unchecked):
    def step(x, cos, sin):
        return apply_rope(x, cos, sin, backend="triton").pow(3).sum()

    x, (cos, sin) = torch.randn(2, 3, 2, 6, requires_grad=True), tables(3, 4)
    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        total = run(x, cos, sin)
        results.append([total, *torch.autograd.grad(total, x)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.refusal("rope")
def test_what_does_not_fit_is_refused(monkeypatch):
    x, (cos, sin) = torch.randn(2, 5, 3, 8), tables(5, 8)
    for c, s in [(cos[:4], sin[:4]), (cos, sin[:, :3]), (cos.expand(3, 5, 4), sin.expand(3, 5, 4)), (cos[0], sin[0])]:
        with refuses(ShapeError, tuple(c.shape), tuple(s.shape), (2, 5, 3, 8)):
            rope_triton(x, c, s)
    with refuses(ShapeError, "(5, 4)", "(2, 5, 3, 7)"):
        rope_triton(x[..., :7], cos, sin)
    with refuses(ShapeError, "(5, 8)"):
        rope_triton(x[0, :, 0], cos, sin)
    with refuses(ShapeError, "torch.float64", "reference"):
        rope_triton(x.double(), cos, sin)
    with refuses(ShapeError, "sin", "torch.float64"):
        rope_triton(x, cos, sin.double())
    with refuses(KernelUnavailable, "require a gradient", "reference"):
        rope_triton(x, cos.requires_grad_(), sin)
    cos = cos.detach()
    with refuses(KernelUnavailable, "float32"):
        apply_rope(x.double(), cos, sin, backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    with refuses(KernelUnavailable, "cpu", "TRITON_INTERPRET"):
        rope_triton(x, cos, sin)
    with refuses(KernelUnavailable, "triton", "TRITON_INTERPRET"):
        apply_rope(x, cos, sin, backend="triton")
