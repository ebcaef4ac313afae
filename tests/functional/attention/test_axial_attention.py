"""Axial attention against dense masks over the flattened grid."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.attention import scaled_dot_product_attention
from handbook_src.functional.attention.axial_attention import axial_attention, shift
from handbook_src.functional.attention.mask import along
from handbook_src.testing import assert_causal, assert_parity, refuses

ID = "axial-attention"
BACKENDS = pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
FORMS = [
    lambda q, k, v, **kw: axial_attention(q, k, v, 1, **kw),
    lambda q, k, v, **kw: axial_attention(q, k, v, -2, causal=True, **kw),
]
DOUBLE = torch.float64


def grid(*shape: int, h: int = 2, g: int = 2, b: int = 2, e: int = 4, c: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (b, *shape, h, e), (b, *shape, g, e), (b, *shape, g, c)
    return torch.randn(q, dtype=DOUBLE), torch.randn(k, dtype=DOUBLE), torch.randn(v, dtype=DOUBLE)


def masked(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None = None) -> Tensor:
    """Torch's unfused attention under a dense mask, which shares no code with ours."""
    with sdpa_kernel(SDPBackend.MATH):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=True).transpose(1, 2)


def lines(shape: tuple[int, ...], axis: int, causal: bool) -> Tensor:
    """Pairs of cells that differ along one axis at most, by a loop over coordinates."""
    cells = list(itertools.product(*map(range, shape)))
    seen = torch.zeros(len(cells), len(cells), dtype=torch.bool)
    for (a, i), (b, j) in itertools.product(enumerate(cells), repeat=2):
        others = all(x == y for n, (x, y) in enumerate(zip(i, j, strict=True)) if n != axis)
        seen[a, b] = others and (j[axis] <= i[axis] or not causal)
    return seen


@pytest.mark.parity(ID)
@BACKENDS
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(1,), (5,), (3, 4), (4, 1), (2, 3, 4), (2, 1, 2, 3)], ids=str)
def test_each_axis_is_a_dense_mask_over_the_grid(backend: str, causal: bool, shape: tuple[int, ...]) -> None:
    for axis in range(len(shape)):
        seen = lines(shape, axis, causal)
        if not causal:
            torch.testing.assert_close(along(axis, *shape).dense(len(seen)), seen)
        for g, a in ((2, axis), (1, axis - len(shape))):
            assert_parity(
                lambda q, k, v, a=a: axial_attention(q, k, v, a, causal=causal, scale=0.4, backend=backend),
                lambda q, k, v, seen=seen: masked(*(x.flatten(1, -3) for x in (q, k, v)), seen, 0.4).unflatten(
                    1, shape
                ),
                grid(*shape, g=g),
            )


@pytest.mark.law(ID)
@BACKENDS
def test_rows_and_columns_one_after_the_other_reach_everything(backend: str) -> None:
    x = torch.randn(1, 3, 4, 1, 2, dtype=DOUBLE, requires_grad=True)
    rows = axial_attention(x, x, x, 1, backend=backend)
    both = axial_attention(rows, rows, rows, 0, backend=backend)
    (once,) = torch.autograd.grad(rows[0, 1, 2].sum(), x, retain_graph=True)
    (twice,) = torch.autograd.grad(both[0, 1, 2].sum(), x)
    seen = once.abs().sum((0, 3, 4)) > 0
    assert seen[1].all()
    assert seen.sum() == 4
    assert (twice.abs().sum((0, 3, 4)) > 0).all()


@pytest.mark.law(ID)
@BACKENDS
def test_the_order_of_lines_is_invisible_and_one_axis_is_attention(backend: str) -> None:
    q, k, v = grid(3, 5)
    out, order = axial_attention(q, k, v, 1, backend=backend), torch.tensor([2, 0, 1])
    torch.testing.assert_close(
        axial_attention(q[:, order], k[:, order], v[:, order], 1, backend=backend), out[:, order]
    )
    turned = axial_attention(*(x.transpose(1, 2) for x in (q, k, v)), 0, backend=backend)
    torch.testing.assert_close(turned.transpose(1, 2), out)
    q, k, v = grid(6)
    torch.testing.assert_close(axial_attention(q, k, v, 0, backend=backend), scaled_dot_product_attention(q, k, v))


@pytest.mark.law(ID)
@BACKENDS
def test_a_causal_line_hides_what_comes_later(backend: str) -> None:
    x = torch.randn(1, 3, 4, 1, 2).double()
    assert_causal(lambda x: axial_attention(x, x, x, 0, causal=True, backend=backend), x, axis=1)
    assert_causal(lambda x: axial_attention(x, x, x, 1, causal=True, backend=backend), x, axis=2)


@pytest.mark.law(ID)
@BACKENDS
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_hidden_may_be_broken(backend: str, bad: float) -> None:
    x = grid(3, 4)
    for causal, clean_part in ((False, (slice(None), [0, 2])), (True, (slice(None), 1, slice(0, 2)))):
        clean = [y.clone().requires_grad_() for y in x]
        dirty = [y.clone() for y in x]
        dirty[1][:, 1, 2], dirty[2][:, 1, 2] = bad, bad
        dirty = [y.requires_grad_() for y in dirty]
        out, want = (axial_attention(*y, 1, causal=causal, backend=backend)[clean_part] for y in (dirty, clean))
        torch.testing.assert_close(out, want)
        for a, b in zip(torch.autograd.grad(out.sum(), dirty), torch.autograd.grad(want.sum(), clean), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.law(ID)
def test_shift_moves_one_step_and_lets_zeros_in() -> None:
    x = torch.randn(2, 3, 4, 5)
    for axis, dim in ((0, 1), (1, 2), (-1, 2), (-2, 1)):
        y = shift(x, axis)
        assert (y.select(dim, 0) == 0).all()
        torch.testing.assert_close(y.narrow(dim, 1, x.shape[dim] - 1), x.narrow(dim, 0, x.shape[dim] - 1))
    x[:, -1] = math.nan
    assert shift(x, 0).isfinite().all(), "the last line leaves, whatever it holds"
    assert shift(torch.randn(2, 0, 5), 0).shape == (2, 0, 5)
    assert (shift(torch.randn(2, 1, 5), 0) == 0).all()


@pytest.mark.registration(ID)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_meta_empty_and_strides(dtype: torch.dtype) -> None:
    for form in FORMS:
        q, k, v = grid(3, 4)
        want = form(q, k, v)
        for backend in ("auto", "reference"):
            got = form(*(x.to(dtype) for x in (q, k, v)), backend=backend)
            assert got.dtype == dtype
            torch.testing.assert_close(got.double(), want, rtol=0.05, atol=0.05)
        assert form(*(x.to("meta") for x in (q, k, v))).shape == want.shape
        turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
        torch.testing.assert_close(form(*turned), want)
        for b, t in ((0, 5), (2, 0), (0, 0)):
            assert form(*grid(t, 4, b=b)).shape == (b, t, 4, 2, 3)
            assert form(*grid(4, t, b=b)).shape == (b, 4, t, 2, 3)


@pytest.mark.registration(ID)
def test_second_derivatives_and_dropout() -> None:
    for form in FORMS:
        q, k, v = (x.requires_grad_() for x in grid(3, 2, b=1, h=1, g=1, e=2, c=2))
        with sdpa_kernel(SDPBackend.MATH):
            assert torch.autograd.gradgradcheck(lambda *x, form=form: form(*x), (q, k, v))
        q, k, _ = (x.float() for x in grid(5, 6, b=8, h=8, g=8))
        ones = torch.ones(8, 5, 6, 8, 16)
        kept = form(q, k, ones, dropout=0.5)
        assert not torch.equal(kept, form(q, k, ones))
        assert abs(kept[kept > 0].mean().item() - 1) < 1.01, "what is left is scaled up"


@pytest.mark.registration(ID)
@pytest.mark.usefixtures("unchecked")
def test_compiles_without_a_graph_break() -> None:
    q, k, v = (x.float() for x in grid(3, 4))
    for form in FORMS:
        compiled = torch.compile(form, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(q, k, v), form(q, k, v))


@pytest.mark.refusal(ID)
def test_refusals() -> None:
    q, k, v = grid(3, 4)
    for wrong in (2, -3, True, 1.0, None):
        with refuses(ConfigError, "grid axis", wrong, "-2 to 1"):
            axial_attention(q, k, v, wrong)
        with refuses(ConfigError, "grid axis", wrong):
            shift(q[..., 0], wrong)
    with refuses(ConfigError, "backend", "'triton'"):
        axial_attention(q, k, v, 0, backend="triton")
    with refuses(ConfigError, "dropout", -0.1):
        axial_attention(q, k, v, 0, dropout=-0.1)
    with refuses(ConfigError, "scale", 0.0):
        axial_attention(q, k, v, 0, scale=0.0)
    with refuses(ShapeError, "grids", (3, 4), (3, 3)):
        axial_attention(q, k[:, :, :3], v, 0)
    with refuses(ShapeError, "grids", "batch 2"):
        axial_attention(q, k[:1], v[:1], 0)
    with refuses(ShapeError, "grid", (3, 2, 4)):
        axial_attention(q[0, 0, :3], k[0, 0, :3], v[0, 0, :3], 0)
    with refuses(ShapeError, "grid", (4, 2)):
        shift(torch.randn(4, 2), 0)
    with refuses(ShapeError, "dtype", "torch.int64"):
        axial_attention(q.long(), k.long(), v.long(), 0)
    with refuses(ShapeError, "dtypes", "torch.float32"):
        axial_attention(q, k.float(), v, 0)
    with refuses(ShapeError, "attention heads", "3 query, 2 key"):
        axial_attention(torch.randn(2, 3, 4, 3, 4).double(), k, v, 0)


@pytest.mark.refusal("axial-attention")
def test_inputs_that_are_no_tensors_of_one_device_are_refused() -> None:
    q, k, v = grid(3, 4)
    with refuses(ConfigError, "NoneType"):
        axial_attention(q, None, v, 0)  # type: ignore[arg-type]
    with refuses(ShapeError, "meta"):
        axial_attention(q, k.to("meta"), v, 0)
