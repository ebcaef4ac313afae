"""Strided and fixed attention against dense masks written as the paper's sets."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.attention import scaled_dot_product_attention
from handbook_src.functional.attention.mask import causal
from handbook_src.functional.attention.sparse_transformer import (
    fixed_attention,
    fixed_rule,
    strided_attention,
    strided_rule,
)
from handbook_src.testing import assert_causal, assert_parity, refuses

ID = "chunked-attention"
BACKENDS = pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
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


def strided_sets(t: int, s: int, l: int, part: str) -> Tensor:  # noqa: E741
    """Section 4.3 with sets: the queries are the last t of s positions."""
    seen = torch.zeros(t, s, dtype=torch.bool)
    for row in range(t):
        i = row + s - t
        local = set(range(max(0, i - l), i + 1))
        column = {j for j in range(i + 1) if (i - j) % l == 0}
        for j in {"local": local, "column": column, "both": local | column}[part]:
            seen[row, j] = True
    return seen


def fixed_sets(t: int, s: int, l: int, c: int, part: str) -> Tensor:  # noqa: E741
    seen = torch.zeros(t, s, dtype=torch.bool)
    for row in range(t):
        i = row + s - t
        local = {j for j in range(i + 1) if j // l == i // l}
        summary = {j for j in range(i + 1) if j % l in range(l - c, l)}
        for j in {"local": local, "summary": summary, "both": local | summary}[part]:
            seen[row, j] = True
    return seen


SIZES = [(1, 1), (7, 3), (12, 4), (13, 4), (9, 1), (5, 8), (70, 33)]


@pytest.mark.parity(ID)
@BACKENDS
@pytest.mark.parametrize("part", ["both", "local", "column"])
@pytest.mark.parametrize(("t", "stride"), SIZES)
def test_strided_is_the_papers_sets(backend: str, part: str, t: int, stride: int) -> None:
    seen = strided_sets(t, t, stride, part)
    torch.testing.assert_close(strided_rule(stride, part).dense(t), seen)
    for g in (1, 2):
        assert_parity(
            lambda q, k, v: strided_attention(q, k, v, stride, part=part, scale=0.7, backend=backend),
            lambda q, k, v: masked(q, k, v, seen, 0.7),
            qkv(t, g=g),
        )


@pytest.mark.parity(ID)
@BACKENDS
@pytest.mark.parametrize("part", ["both", "local", "summary"])
@pytest.mark.parametrize(("t", "stride"), SIZES)
def test_fixed_is_the_papers_sets(backend: str, part: str, t: int, stride: int) -> None:
    for c in {1, stride // 2 or 1, stride}:
        seen = fixed_sets(t, t, stride, c, part)
        torch.testing.assert_close(fixed_rule(stride, c, part).dense(t), seen)
        assert_parity(
            lambda q, k, v, c=c, seen=seen: fixed_attention(q, k, v, stride, c, part=part, backend=backend),
            lambda q, k, v, seen=seen: masked(q, k, v, seen).nan_to_num(0.0),
            qkv(t, h=4, g=2),
        )


@pytest.mark.parity(ID)
@BACKENDS
@pytest.mark.parametrize(("t", "s"), [(1, 9), (3, 10), (9, 10)])
def test_queries_are_the_last_positions(backend: str, t: int, s: int) -> None:
    for part in ("both", "local", "column"):
        assert_parity(
            lambda q, k, v, part=part: strided_attention(q, k, v, 3, part=part, backend=backend),
            lambda q, k, v, part=part: masked(q, k, v, strided_sets(t, s, 3, part)),
            qkv(t, s),
        )
    for part in ("both", "local", "summary"):
        assert_parity(
            lambda q, k, v, part=part: fixed_attention(q, k, v, 3, 2, part=part, backend=backend),
            lambda q, k, v, part=part: masked(q, k, v, fixed_sets(t, s, 3, 2, part)).nan_to_num(0.0),
            qkv(t, s),
        )


FORMS = {
    "strided": lambda q, k, v, **kw: strided_attention(q, k, v, 3, **kw),
    "strided, local": lambda q, k, v, **kw: strided_attention(q, k, v, 3, part="local", **kw),
    "strided, column": lambda q, k, v, **kw: strided_attention(q, k, v, 3, part="column", **kw),
    "fixed": lambda q, k, v, **kw: fixed_attention(q, k, v, 3, 2, **kw),
    "fixed, local": lambda q, k, v, **kw: fixed_attention(q, k, v, 3, 2, part="local", **kw),
    "fixed, summary": lambda q, k, v, **kw: fixed_attention(q, k, v, 3, 2, part="summary", **kw),
}
EVERY = pytest.mark.parametrize("name", FORMS)


@pytest.mark.law(ID)
@BACKENDS
@EVERY
def test_the_future_does_not_leak(backend: str, name: str) -> None:
    assert_causal(lambda x: FORMS[name](x, x, x, backend=backend), torch.randn(1, 8, 2, 4).double())


@pytest.mark.law(ID)
@pytest.mark.parametrize("rules", [("local", "column"), ("column", "local")])
def test_two_halves_of_strided_reach_everything(rules: tuple[str, str]) -> None:
    for n, stride in ((16, 4), (23, 5), (9, 3)):
        first, second = (strided_rule(stride, r).dense(n).double() for r in rules)
        torch.testing.assert_close(second @ first > 0, causal.dense(n))


@pytest.mark.law(ID)
def test_two_layers_of_fixed_reach_everything_before_the_block() -> None:
    for n, stride, c in ((16, 4, 1), (23, 5, 2)):
        local, summary = (fixed_rule(stride, c, r).dense(n).double() for r in ("local", "summary"))
        reached = summary @ local > 0  # summaries first gather their blocks, then are read
        earlier = torch.arange(n)[:, None] // stride > torch.arange(n) // stride
        assert reached[earlier].all()
        both = fixed_rule(stride, c).dense(n).double()
        torch.testing.assert_close(both @ both > 0, causal.dense(n))


@pytest.mark.law(ID)
@BACKENDS
def test_the_limits_are_full_causal_attention(backend: str) -> None:
    q, k, v = qkv(11)
    want = scaled_dot_product_attention(q, k, v, causal=True, backend="reference")
    for got in (
        strided_attention(q, k, v, 1, backend=backend),
        strided_attention(q, k, v, 10, backend=backend),
        strided_attention(q, k, v, 10, part="local", backend=backend),
        strided_attention(q, k, v, 1, part="column", backend=backend),
        fixed_attention(q, k, v, 11, backend=backend),
        fixed_attention(q, k, v, 4, 4, part="summary", backend=backend),
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.law(ID)
@BACKENDS
@EVERY
def test_a_nan_reaches_only_queries_that_may_see_it(backend: str, name: str) -> None:
    q, k, v = qkv(10)
    want = FORMS[name](q, k, v, backend="reference")
    kernel, _, extra = name.partition(", ")
    rule = strided_rule(3, extra or "both") if kernel == "strided" else fixed_rule(3, 2, extra or "both")
    sees = rule.dense(10)[:, 4]
    k[:, 4], v[:, 4] = math.nan, math.inf
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = FORMS[name](*leaves, backend=backend)
    torch.testing.assert_close(out[:, ~sees], want[:, ~sees])
    assert out[:, sees].isnan().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out[:, ~sees].sum(), leaves))


@pytest.mark.registration(ID)
@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_meta_empty_and_strides(name: str, dtype: torch.dtype) -> None:
    q, k, v = qkv(10)
    want = FORMS[name](q, k, v)
    for backend in ("auto", "reference"):
        got = FORMS[name](*(x.to(dtype) for x in (q, k, v)), backend=backend)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=0.05, atol=0.05)
    assert FORMS[name](*(x.to("meta") for x in (q, k, v))).shape == want.shape
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    torch.testing.assert_close(FORMS[name](*turned), want)
    for b, t in ((0, 5), (2, 0), (0, 0)):
        assert FORMS[name](*qkv(t, b=b)).shape == (b, t, 2, 3)


@pytest.mark.registration(ID)
@EVERY
def test_second_derivatives_and_dropout(name: str) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(5, b=1, h=1, g=1, e=2, c=2))
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(lambda *x: FORMS[name](*x), (q, k, v))
    q, k, _ = (x.float() for x in qkv(10, b=8, h=8, g=8))
    ones = torch.ones(8, 10, 8, 16)
    kept = FORMS[name](q, k, ones, dropout=0.5)
    assert not torch.equal(kept, FORMS[name](q, k, ones))
    assert abs(kept[:, 3:].mean().item() - 1) < 0.15, "what is left is scaled up"


@pytest.mark.registration(ID)
@pytest.mark.usefixtures("unchecked")
@EVERY
def test_compiles_without_a_graph_break(name: str) -> None:
    q, k, v = (x.float() for x in qkv(10))
    compiled = torch.compile(FORMS[name], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), FORMS[name](q, k, v))


@pytest.mark.refusal(ID)
@pytest.mark.parametrize("attend", [strided_attention, fixed_attention])
def test_refusals(attend: object) -> None:
    q, k, v = qkv(6)
    for wrong in (0, -3, True, 2.5, math.nan, None):
        with refuses(ConfigError, "stride", wrong):
            attend(q, k, v, wrong)
    with refuses(ConfigError, "part", "'column '", "both"):
        attend(q, k, v, 3, part="column ")
    with refuses(ConfigError, "backend", "'triton'"):
        attend(q, k, v, 3, backend="triton")
    with refuses(ConfigError, "dropout", 1.0):
        attend(q, k, v, 3, dropout=1.0)
    with refuses(ConfigError, "scale", -1.0):
        attend(q, k, v, 3, scale=-1.0)
    with refuses(ShapeError, "t=6", "s=4"):
        attend(q, k[:, :4], v[:, :4], 3)
    with refuses(ShapeError, "dtype", "torch.int64"):
        attend(q.long(), k.long(), v.long(), 3)
    with refuses(ShapeError, "dtypes", "torch.float32"):
        attend(q, k.float(), v, 3)
    with refuses(ShapeError, "attention heads", "3 query, 2 key"):
        attend(torch.randn(2, 6, 3, 4).double(), k, v, 3)
    with refuses(ShapeError, "four axes", (6, 2, 4)):
        attend(q[0], k[0], v[0], 3)


@pytest.mark.refusal(ID)
def test_refusals_of_a_summary() -> None:
    q, k, v = qkv(6)
    for wrong in (0, -1, True, 1.5, 4):
        with refuses(ConfigError, "fixed attention summary", wrong):
            fixed_attention(q, k, v, 3, wrong)


def test_strides_longer_than_the_sequence_make_no_padding() -> None:
    q, k, v = qkv(9, 9)
    whole = scaled_dot_product_attention(q, k, v, causal)
    torch.testing.assert_close(strided_attention(q, k, v, 10**12), whole)
    torch.testing.assert_close(fixed_attention(q, k, v, 10**12), whole)
    seen = fixed_attention(q, k, v, 10**12, 10**12 - 4, part="summary")  # the summary begins at position 4
    assert not seen[:, :4].any()
    torch.testing.assert_close(seen[:, 4:], scaled_dot_product_attention(q[:, 4:], k[:, 4:], v[:, 4:], causal))
