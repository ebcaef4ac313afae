"""Dilated attention and LongNet against dense masks written as loops."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.attention import scaled_dot_product_attention
from handbook_src.functional.attention.dilated_attention import (
    dilated_attention,
    dilated_rule,
    longnet_attention,
    longnet_counts,
)
from handbook_src.testing import assert_causal, assert_parity, refuses

ID = "dilated-attention"
BACKENDS = pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
SEGMENTS, DILATIONS = (2, 4, 8), (1, 2, 4)
FORMS = [
    lambda q, k, v, **kw: dilated_attention(q, k, v, 2, 3, **kw),
    lambda q, k, v, **kw: dilated_attention(q, k, v, 2, 1, causal=True, **kw),
    lambda q, k, v, **kw: longnet_attention(q, k, v, SEGMENTS, DILATIONS, **kw),
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


def gaps(t: int, s: int, reach: int, dilation: int, causal: bool) -> Tensor:
    seen = torch.zeros(t, s, dtype=torch.bool)
    for row in range(t):
        for step in range(1 - reach, 1 if causal else reach):
            j = row + s - t + step * dilation
            if 0 <= j < s:
                seen[row, j] = True
    return seen


@pytest.mark.parity(ID)
@BACKENDS
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [None, torch.tensor([9, 0]), torch.tensor([40, 7])], ids=str)
@pytest.mark.parametrize(
    ("t", "s", "reach", "dilation"),
    [(1, 1, 1, 1), (9, 9, 1, 4), (9, 9, 2, 3), (10, 10, 30, 3), (75, 75, 3, 2), (41, 41, 35, 1), (70, 70, 2, 1),
     (1, 20, 3, 4), (5, 20, 3, 2), (11, 20, 3, 2), (39, 41, 2, 1)],
)  # fmt: skip
def test_it_is_the_dense_window_with_gaps(
    backend: str, causal: bool, lengths: Tensor | None, t: int, s: int, reach: int, dilation: int
) -> None:
    seen = gaps(t, s, reach, dilation, causal)
    torch.testing.assert_close(dilated_rule(reach, dilation, causal).dense(t, s), seen)
    seen = with_lengths(seen, lengths)
    assert_parity(
        lambda q, k, v: dilated_attention(
            q, k, v, reach, dilation, causal=causal, lengths=lengths, scale=0.6, backend=backend
        ),
        lambda q, k, v: masked(q, k, v, seen, 0.6).nan_to_num(0.0),
        qkv(t, s, h=4, g=2, e=2, c=2) if t < 60 else qkv(t, s, h=1, g=1, e=2, c=2),
    )


@pytest.mark.parity(ID)
@pytest.mark.outside(ID)
@pytest.mark.parametrize("causal", [True, False])
def test_without_gaps_it_is_the_window_of_local_attention(causal: bool) -> None:
    from local_attention import LocalAttention

    oracle = LocalAttention(
        window_size=8, causal=causal, exact_windowsize=True, autopad=True, look_backward=1, use_rotary_pos_emb=False
    )
    q, k, v = (x.float() for x in qkv(24, h=2, e=4, c=4))
    theirs = oracle(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    seen = gaps(24, 24, 9, 1, causal)
    torch.testing.assert_close(masked(q, k, v, seen), theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dilated_attention(q, k, v, 9, 1, causal=causal), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.law(ID)
@BACKENDS
def test_streams_are_sequences_of_their_own(backend: str) -> None:
    q, k, v = qkv(80)
    out = dilated_attention(q, k, v, 2, 3, backend=backend)
    for r in range(3):
        alone = dilated_attention(q[:, r::3], k[:, r::3], v[:, r::3], 2, 1, backend="reference")
        torch.testing.assert_close(out[:, r::3], alone)


@pytest.mark.law(ID)
@BACKENDS
@pytest.mark.parametrize("form", FORMS[1:])
def test_the_future_does_not_leak(backend: str, form: object) -> None:
    more = {} if form is not FORMS[2] else {"causal": True}
    assert_causal(lambda x: form(x, x, x, backend=backend, **more), torch.randn(1, 40, 1, 2).double())


@pytest.mark.law(ID)
@BACKENDS
def test_the_limits_are_full_attention_and_the_value_itself(backend: str) -> None:
    q, k, v = qkv(7)
    for causal in (False, True):
        want = scaled_dot_product_attention(q, k, v, causal=causal, backend="reference")
        torch.testing.assert_close(dilated_attention(q, k, v, 7, 1, causal=causal, backend=backend), want)
        torch.testing.assert_close(dilated_attention(q, k, v, 1, 2, causal=causal, backend=backend), v)
        torch.testing.assert_close(dilated_attention(q, k, v, 5, 9, causal=causal, backend=backend), v)
        torch.testing.assert_close(longnet_attention(q, k, v, [7], [1], causal=causal, backend=backend), want)
        twice = longnet_attention(q, k, v, [8, 16], [1, 1], causal=causal, backend=backend)
        torch.testing.assert_close(twice, want)


@pytest.mark.law(ID)
@BACKENDS
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_hidden_may_be_broken(backend: str, bad: float) -> None:
    lengths, x = torch.tensor([50, 30]), qkv(70, h=4, g=4)
    run = [
        (lambda q, k, v: dilated_attention(q, k, v, 3, 2, causal=True, backend=backend)[:, :60], 60),
        (lambda q, k, v: dilated_attention(q, k, v, 3, 2, backend=backend)[:, 1::2], 30),
        (lambda q, k, v: dilated_attention(q, k, v, 3, 2, lengths=lengths, backend=backend), 50),
        (lambda q, k, v: longnet_attention(q, k, v, [8, 16], [1, 4], causal=True, backend=backend)[:, :33], 33),
    ]
    for form, at in run:
        clean = [y.clone().requires_grad_() for y in x]
        dirty = [y.clone() for y in x]
        dirty[1][:, at], dirty[2][:, at] = bad, bad
        dirty = [y.requires_grad_() for y in dirty]
        out, want = form(*dirty), form(*clean)
        torch.testing.assert_close(out, want)
        for a, b in zip(torch.autograd.grad(out.sum(), dirty), torch.autograd.grad(want.sum(), clean), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parity(ID)
@BACKENDS
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("t", "segments", "dilations"),
    [(1, [1], [1]), (16, SEGMENTS, DILATIONS), (13, SEGMENTS, DILATIONS), (7, [3, 6], [3, 2]), (5, [16, 32], [4, 2])],
)
def test_longnet_mixes_by_denominators(
    backend: str, causal: bool, t: int, segments: list[int], dilations: list[int]
) -> None:
    """Section 2.2 read aloud: each pattern's output by its own softmax, then the weighted mean."""

    def literally(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups, rows = q.shape[2] // k.shape[2], []
        for h in range(q.shape[2]):
            for i in range(t):
                outs, sums = [], []
                for w, r in zip(segments, dilations, strict=True):
                    if i % w % r != h % r:
                        continue
                    own = [j for j in range(t) if j // w == i // w and j % w % r == h % r and (j <= i or not causal)]
                    weights = (k[:, own, h // groups] @ q[:, i, h, :, None] / q.shape[-1] ** 0.5).exp()
                    sums.append(weights.sum(1))
                    outs.append((weights * v[:, own, h // groups]).sum(1) / sums[-1])
                zero = v[:, 0, 0] * 0
                rows.append(sum((s * o for s, o in zip(sums, outs, strict=True)), zero) / sum(sums) if sums else zero)
        return torch.stack(rows, 1).unflatten(1, (-1, t)).transpose(1, 2)

    assert_parity(
        lambda q, k, v: longnet_attention(q, k, v, segments, dilations, causal=causal, backend=backend),
        literally,
        qkv(t, h=4, g=2),
    )


@pytest.mark.law(ID)
def test_longnet_counts_say_how_often_a_key_counts() -> None:
    counts = longnet_counts(8, 2, [2, 8], [1, 2])
    assert counts[0, 0].tolist() == [2, 1, 1, 0, 1, 0, 1, 0]
    assert counts[1, 0].tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    assert counts[1, 3].tolist() == [0, 1, 1, 2, 0, 1, 0, 1]
    torch.testing.assert_close(longnet_counts(8, 2, [2, 8], [1, 2], causal=True), counts.tril())


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
        with refuses(ConfigError, "reach", wrong, "at least 1"):
            dilated_attention(q, k, v, wrong, 2)
        with refuses(ConfigError, "dilation", wrong, "at least 1"):
            dilated_attention(q, k, v, 2, wrong)
        with refuses(ConfigError, "segment", wrong):
            longnet_attention(q, k, v, [wrong], [1])
        with refuses(ConfigError, "dilation", wrong):
            longnet_attention(q, k, v, [2], [wrong])
    with refuses(ConfigError, "longnet patterns", "2 segments, 1 dilations"):
        longnet_attention(q, k, v, [2, 4], [1])
    with refuses(ConfigError, "longnet patterns", "0 segments"):
        longnet_attention(q, k, v, [], [])
    with refuses(ConfigError, "longnet dilation", "3 in segments of 4"):
        longnet_attention(q, k, v, [4], [3])
    with refuses(ShapeError, "longnet attention lengths", "2 queries, 6 keys"):
        longnet_attention(q[:, :2], k, v, [4], [2])
    for lengths in (torch.tensor([1, 2, 3]), torch.tensor([1.0, 2.0]), [1, 2]):
        with refuses(ShapeError, "lengths"):
            dilated_attention(q, k, v, 3, 2, lengths=lengths)
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


def test_gaps_and_segments_longer_than_the_sequence_make_no_padding() -> None:
    q, k, v = qkv(13, 13)
    torch.testing.assert_close(dilated_attention(q, k, v, 2, 10**12), dilated_attention(q, k, v, 1, 1))
    for r in (1, 5):
        long = longnet_attention(q, k, v, [r * 10**12], [r])
        torch.testing.assert_close(long, longnet_attention(q, k, v, [15], [r]))


@pytest.mark.refusal("dilated-attention")
def test_pairs_that_are_no_lists_and_tables_of_no_size_are_refused() -> None:
    q, k, v = qkv(4, 4)
    for segments, dilations, value in (
        (4, [2], "int"),
        ([4], None, "NoneType"),
        ([4], [3], "3"),
        ([4, 4], [2], "2 seg"),
    ):
        with refuses(ConfigError, value):
            longnet_attention(q, k, v, segments, dilations)  # type: ignore[arg-type]
        with refuses(ConfigError, value):
            longnet_counts(4, 2, segments, dilations)  # type: ignore[arg-type]
    with refuses(ConfigError, "-4"):
        longnet_counts(-4, 2, [4], [2])
    with refuses(ConfigError, "0"):
        longnet_counts(4, 2, [4], [0])
