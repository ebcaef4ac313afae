"""Chunked attention against dense block-diagonal masks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.attention import scaled_dot_product_attention
from handbook_src.functional.attention.chunked_attention import chunk_rule, chunked_attention
from handbook_src.testing import assert_causal, assert_parity, assert_permutation_equivariant, refuses

ID = "chunked-attention"
BACKENDS = pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
FORMS = [
    lambda q, k, v, **kw: chunked_attention(q, k, v, 4, **kw),
    lambda q, k, v, **kw: chunked_attention(q, k, v, 3, causal=True, **kw),
]
DOUBLE = torch.float64


def qkv(
    t: int, s: int | None = None, h: int = 2, g: int = 2, b: int = 2, e: int = 4, c: int = 3
) -> tuple[Tensor, Tensor, Tensor]:
    s = t if s is None else s
    q, k, v = (b, t, h, e), (b, s, g, e), (b, s, g, c)
    return torch.randn(q, dtype=DOUBLE), torch.randn(k, dtype=DOUBLE), torch.randn(v, dtype=DOUBLE)


def masked(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None = None) -> Tensor:
    """Torch's unfused attention under a dense mask, which shares no code with ours."""
    with sdpa_kernel(SDPBackend.MATH):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=True).transpose(1, 2)


def with_lengths(seen: Tensor, lengths: Tensor | None) -> Tensor:
    """The mask, joined with padding on the right."""
    return seen if lengths is None else seen & (torch.arange(seen.shape[1]) < lengths[:, None])[:, None, None]


def block_diagonal(t: int, s: int, chunk: int, causal: bool) -> Tensor:
    seen = torch.zeros(t, s, dtype=torch.bool)
    for row in range(t):
        i = row + s - t
        for j in range(s):
            seen[row, j] = i // chunk == j // chunk and (j <= i or not causal)
    return seen


@pytest.mark.parity(ID)
@BACKENDS
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [None, torch.tensor([5, 0]), torch.tensor([9, 3])], ids=str)
@pytest.mark.parametrize(
    ("t", "s", "chunk"), [(1, 1, 1), (9, 9, 1), (8, 8, 4), (9, 9, 4), (7, 7, 10), (1, 8, 4), (3, 11, 4), (10, 11, 3)]
)
def test_it_is_the_dense_block_diagonal(
    backend: str, causal: bool, lengths: Tensor | None, t: int, s: int, chunk: int
) -> None:
    seen = block_diagonal(t, s, chunk, causal)
    torch.testing.assert_close(chunk_rule(chunk, causal).dense(t, s), seen)
    seen = with_lengths(seen, lengths)
    for g, scale in ((2, None), (1, 0.3)):
        assert_parity(
            lambda q, k, v, scale=scale: chunked_attention(
                q, k, v, chunk, causal=causal, lengths=lengths, scale=scale, backend=backend
            ),
            lambda q, k, v, scale=scale: masked(q, k, v, seen, scale).nan_to_num(0.0),
            qkv(t, s, g=g),
        )


@pytest.mark.law(ID)
@BACKENDS
def test_chunks_are_sequences_of_their_own(backend: str) -> None:
    q, k, v = qkv(10)
    out = chunked_attention(q, k, v, 4, backend=backend)
    for cut in (slice(0, 4), slice(4, 8), slice(8, 10)):
        alone = scaled_dot_product_attention(q[:, cut], k[:, cut], v[:, cut], backend="reference")
        torch.testing.assert_close(out[:, cut], alone)
    assert_permutation_equivariant(
        lambda x: chunked_attention(x, x, x, 4, backend=backend)[:, :4], torch.randn(1, 4, 2, 3).double()
    )


@pytest.mark.law(ID)
@BACKENDS
def test_no_gradient_crosses_a_border_and_none_comes_from_the_future(backend: str) -> None:
    x = torch.randn(1, 10, 1, 4, dtype=DOUBLE, requires_grad=True)
    y = x
    for _ in range(5):
        y = y + chunked_attention(y, y, y, 4, backend=backend)  # depth does not help
    (grad,) = torch.autograd.grad(y[0, :4].square().sum(), x)
    assert (grad[0, 4:] == 0).all()
    assert (grad[0, :4] != 0).all()
    assert_causal(lambda x: chunked_attention(x, x, x, 4, causal=True, backend=backend), x)


@pytest.mark.law(ID)
@BACKENDS
def test_the_limits_are_full_attention_and_the_value_itself(backend: str) -> None:
    q, k, v = qkv(6)
    for causal in (False, True):
        want = scaled_dot_product_attention(q, k, v, causal=causal, backend="reference")
        torch.testing.assert_close(chunked_attention(q, k, v, 6, causal=causal, backend=backend), want)
        torch.testing.assert_close(chunked_attention(q, k, v, 1, causal=causal, backend=backend), v)


@pytest.mark.law(ID)
@BACKENDS
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_hidden_may_be_broken(backend: str, bad: float) -> None:
    lengths, x = torch.tensor([6, 2]), qkv(10)
    run = [
        (lambda q, k, v: chunked_attention(q, k, v, 4, causal=True, backend=backend)[:, :6], 6),
        (lambda q, k, v: chunked_attention(q, k, v, 4, backend=backend)[:, :4], 5),
        (lambda q, k, v: chunked_attention(q, k, v, 4, lengths=lengths, backend=backend), 6),
    ]
    for form, at in run:
        clean = [y.clone().requires_grad_() for y in x]
        dirty = [y.clone() for y in x]
        dirty[1][:, at], dirty[2][:, at] = bad, bad
        dirty = [y.requires_grad_() for y in dirty]
        out = form(*dirty)
        torch.testing.assert_close(out, form(*clean))
        for a, b in zip(
            torch.autograd.grad(out.sum(), dirty), torch.autograd.grad(form(*clean).sum(), clean), strict=True
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.registration(ID)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_meta_empty_and_strides(dtype: torch.dtype) -> None:
    for form in FORMS:
        q, k, v = qkv(10)
        want = form(q, k, v)
        for backend in ("auto", "reference"):
            got = form(*(x.to(dtype) for x in (q, k, v)), backend=backend)
            assert got.dtype == dtype
            torch.testing.assert_close(got.double(), want, rtol=0.05, atol=0.05)
        assert form(*(x.to("meta") for x in (q, k, v))).shape == want.shape
        turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
        torch.testing.assert_close(form(*turned), want)
        for b, t in ((0, 5), (2, 0), (0, 0)):
            assert form(*qkv(t, b=b)).shape == (b, t, 2, 3)


@pytest.mark.registration(ID)
def test_second_derivatives_and_dropout() -> None:
    for form in FORMS:
        q, k, v = (x.requires_grad_() for x in qkv(5, b=1, h=1, g=1, e=2, c=2))
        with sdpa_kernel(SDPBackend.MATH):
            assert torch.autograd.gradgradcheck(lambda *x, form=form: form(*x), (q, k, v))
        q, k, _ = (x.float() for x in qkv(10, b=8, h=8, g=8))
        ones = torch.ones(8, 10, 8, 16)
        kept = form(q, k, ones, dropout=0.5)
        assert not torch.equal(kept, form(q, k, ones))
        assert abs(kept[kept > 0].mean().item() - 1) < 1.01, "what is left is scaled up"


@pytest.mark.registration(ID)
@pytest.mark.usefixtures("unchecked")
def test_compiles_without_a_graph_break() -> None:
    q, k, v = (x.float() for x in qkv(10))
    for form in FORMS:
        compiled = torch.compile(form, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(q, k, v), form(q, k, v))


@pytest.mark.refusal(ID)
def test_refusals() -> None:
    q, k, v = qkv(6)
    for wrong in (0, -3, True, 2.5, math.nan, None):
        with refuses(ConfigError, "chunk", wrong, "at least 1"):
            chunked_attention(q, k, v, wrong)
        with refuses(ConfigError, "chunk", wrong):
            chunk_rule(wrong)
    for lengths in (torch.tensor([1, 2, 3]), torch.tensor([1.0, 2.0]), [1, 2]):
        with refuses(ShapeError, "lengths"):
            chunked_attention(q, k, v, 3, lengths=lengths)
    for attend in FORMS:
        with refuses(ConfigError, "backend", "'triton'"):
            attend(q, k, v, backend="triton")
        with refuses(ConfigError, "dropout", 1.0):
            attend(q, k, v, dropout=1.0)
        with refuses(ConfigError, "scale", -1.0):
            attend(q, k, v, scale=-1.0)
        with refuses(ShapeError, "dtype", "torch.int64"):
            attend(q.long(), k.long(), v.long())
        with refuses(ShapeError, "dtypes", "torch.float32"):
            attend(q, k.float(), v)
        with refuses(ShapeError, "attention heads", "3 query, 2 key"):
            attend(torch.randn(2, 6, 3, 4).double(), k, v)
        with refuses(ShapeError, "four axes", (6, 2, 4)):
            attend(q[0], k[0], v[0])
        with refuses(ShapeError, "t=6", "s=4"):
            attend(q, k[:, :4], v[:, :4])
        with refuses(ShapeError, "attention inputs", (1, 6, 2, 4)):
            attend(q, k[:1], v[:1])


@pytest.mark.law(ID)
@pytest.mark.usefixtures("unchecked")
def test_compiled_a_nan_stays_with_those_who_see_it_too() -> None:
    q, k, v = (x.float() for x in qkv(10))
    k[:, 6] = math.nan
    for form in FORMS:
        compiled, want = torch.compile(form, fullgraph=True, backend="aot_eager")(q, k, v), form(q, k, v)
        assert want.isfinite().any()
        assert want.isnan().any()
        torch.testing.assert_close(compiled, want, equal_nan=True)
