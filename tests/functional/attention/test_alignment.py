"""Bahdanau's and Luong's attention against loops over their papers' equations."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.alignment import additive_attention, multiplicative_attention
from handbook_src.functional.attention.attention import attention_weights, scaled_dot_product_attention
from handbook_src.functional.attention.mask import padding
from handbook_src.testing import assert_parity, refuses

SDPA = "scaled-dot-product-attention"
LENGTHS = torch.tensor([4, 1])


@pytest.mark.parity("bahdanau-attention")
@pytest.mark.parametrize(("t", "s", "d", "f"), [(3, 5, 4, 6), (1, 1, 1, 1), (4, 2, 7, 3)])
@pytest.mark.parametrize("masked", [False, True])
def test_bahdanau_is_his_equations(t: int, s: int, d: int, f: int, masked: bool) -> None:
    lengths = torch.tensor([max(s - 1, 1), s])
    mask = padding(lengths) if masked else None

    def loops(query: Tensor, key: Tensor, value: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        contexts, alphas = [], []
        for b in range(2):
            for i in range(t):
                seen = range(int(lengths[b]) if masked else s)
                e = torch.stack([torch.dot(vector, torch.tanh(query[b, i] + key[b, j])) for j in seen])
                alpha = F.pad(e.exp() / e.exp().sum(), (0, s - len(seen)))
                contexts.append(sum(alpha[j] * value[b, j] for j in seen))
                alphas.append(alpha)
        return torch.stack(contexts).view(2, t, d), torch.stack(alphas).view(2, t, s)

    assert_parity(
        lambda q, k, v, a: additive_attention(q, k, v, a, mask),
        loops,
        [torch.randn(2, t, f), torch.randn(2, s, f), torch.randn(2, s, d), torch.randn(f)],
    )


@pytest.mark.parity("luong-attention")
@pytest.mark.parametrize("score", ["dot", "general", "concat"])
@pytest.mark.parametrize(("t", "s", "d1", "d2"), [(3, 5, 4, 4), (1, 1, 1, 1), (4, 2, 7, 3)])
def test_luong_is_his_equations(score: str, t: int, s: int, d1: int, d2: int) -> None:
    d2 = d1 if score == "dot" else d2
    weight = {"dot": None, "general": torch.randn(d1, d2), "concat": torch.randn(6, d1 + d2)}[score]
    vector = torch.randn(6) if score == "concat" else None

    def loops(h: Tensor, source: Tensor, w: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor]:
        def one(a: Tensor, b: Tensor) -> Tensor:
            if w is None:
                return torch.dot(a, b)
            return torch.dot(a, w @ b) if v is None else torch.dot(v, torch.tanh(w @ torch.cat([a, b])))

        e = torch.stack([torch.stack([torch.stack([one(a, b) for b in source[i]]) for a in h[i]]) for i in range(2)])
        alpha = e.exp() / e.exp().sum(-1, keepdim=True)
        return torch.stack([alpha[i] @ source[i] for i in range(2)]), alpha

    assert_parity(
        lambda h, source, w, v: multiplicative_attention(h, source, source, score, w, v),
        loops,
        [torch.randn(2, t, d1), torch.randn(2, s, d2), weight, vector],
    )


@pytest.mark.law("luong-attention", "bahdanau-attention")
def test_luongs_concat_is_bahdanaus_score() -> None:
    h, source, weight, vector = (torch.randn(*n, dtype=torch.float64) for n in ((2, 3, 4), (2, 5, 6), (8, 10), (8,)))
    luong = multiplicative_attention(h, source, source, "concat", weight, vector)
    bahdanau = additive_attention(h @ weight[:, :4].T, source @ weight[:, 4:].T, source, vector)
    torch.testing.assert_close(luong, bahdanau)


@pytest.mark.law("luong-attention", SDPA)
def test_luongs_dot_is_scaled_dot_product_with_scale_one() -> None:
    h, source = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 5, 4, dtype=torch.float64)
    got, weights = multiplicative_attention(h, source, source)
    want = scaled_dot_product_attention(h[:, :, None], source[:, :, None], source[:, :, None], scale=1.0)
    torch.testing.assert_close(got, want[:, :, 0])
    torch.testing.assert_close(weights, attention_weights(h[:, :, None], source[:, :, None], scale=1.0)[:, 0])


@pytest.mark.law("luong-attention", "bahdanau-attention")
@pytest.mark.parametrize("form", ["rule", "b t s", "t s", "added"])
@pytest.mark.parametrize("kind", ["additive", "dot"])
def test_padding_gets_no_weight_and_its_garbage_goes_nowhere(form: str, kind: str) -> None:
    seen = padding(LENGTHS).dense(3, 5)[:, 0]
    masks = {"rule": padding(LENGTHS), "b t s": seen, "added": torch.zeros(2, 3, 5).masked_fill(~seen, -math.inf)}
    masks["t s"] = seen[0] & (torch.arange(5) < 1)
    query, source = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    source[0, 4:], source[1, 1:] = math.nan, math.nan
    query.requires_grad_(), source.requires_grad_()
    if kind == "additive":
        context, weights = additive_attention(query, source, source, torch.ones(4), masks[form])
    else:
        context, weights = multiplicative_attention(query, source, source, mask=masks[form])
    assert (weights[~seen] == 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3))
    assert context.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(context.square().sum(), (query, source)))


@pytest.mark.law("luong-attention", "bahdanau-attention")
def test_a_memory_that_is_all_padding_gives_zeros() -> None:
    query, source = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    for context, weights in (
        additive_attention(query, source, source, torch.ones(4), padding(torch.tensor([0, 2]))),
        multiplicative_attention(query, source, source, mask=padding(torch.tensor([0, 2]))),
        multiplicative_attention(query, source[:, :0], source[:, :0]),
    ):
        assert (context[0] == 0).all()
        assert weights[0].sum() == 0


@pytest.mark.registration("luong-attention", "bahdanau-attention")
def test_recurrent_attentions_in_low_precision_and_with_dropout() -> None:
    query, source = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    for run in (
        lambda q, s, p: additive_attention(q, s, s, torch.ones(4, dtype=q.dtype), dropout=p),
        lambda q, s, p: multiplicative_attention(q, s, s, dropout=p),
    ):
        exact, _ = run(query, source, 0.0)
        low, weights = run(query.bfloat16(), source.bfloat16(), 0.0)
        assert low.dtype == weights.dtype == torch.bfloat16
        torch.testing.assert_close(low.float(), exact, rtol=0.05, atol=0.05)
        _, dropped = run(query, source, 0.5)
        assert (dropped == 0).any()


@pytest.mark.refusal("bahdanau-attention", "luong-attention")
def test_recurrent_attentions_refuse() -> None:
    q, s = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    with refuses(ShapeError, "4, 4 and 3 features"):
        additive_attention(q, s, s, torch.ones(3))
    with refuses(ShapeError, "attention mask", (5, 3)):
        additive_attention(q, s, s, torch.ones(4), torch.ones(5, 3, dtype=torch.bool))
    with refuses(ConfigError, "dropout", 1.5):
        additive_attention(q, s, s, torch.ones(4), dropout=1.5)
    with refuses(ConfigError, "Luong score", "bilinear"):
        multiplicative_attention(q, s, s, "bilinear")  # type: ignore[arg-type]
    with refuses(ConfigError, "general", "weight alone"):
        multiplicative_attention(q, s, s, "general")
    with refuses(ConfigError, "dot", "neither"):
        multiplicative_attention(q, s, s, "dot", torch.ones(4, 4))
    with refuses(ConfigError, "concat", "weight and vector"):
        multiplicative_attention(q, s, s, "concat", torch.ones(3, 8))
    with refuses(ShapeError, "4 and 5 features", "general"):
        multiplicative_attention(q, torch.randn(2, 5, 5), s)
    with refuses(ShapeError, (4, 3), (4, 4)):
        multiplicative_attention(q, s, s, "general", torch.ones(4, 3))
    with refuses(ShapeError, (3, 9), (3, 8)):
        multiplicative_attention(q, s, s, "concat", torch.ones(3, 9), torch.ones(3))
    with refuses(ShapeError, "attention mask", (3, 1, 3, 5)):
        multiplicative_attention(q, s, s, mask=padding(torch.tensor([1, 2, 3])))


@pytest.mark.law("luong-attention")
def test_luong_scores_of_halves_do_not_overflow() -> None:
    query, source = 90 * torch.randn(1, 3, 128), 90 * torch.randn(1, 5, 128)
    weight, wide = torch.eye(128), torch.cat([torch.eye(128), torch.eye(128)], 1) * 500
    for parts in (("dot",), ("general", weight), ("concat", wide, torch.ones(128) / 64)):
        halves = [x.half() if isinstance(x, Tensor) else x for x in parts]
        context, weights = multiplicative_attention(query.half(), source.half(), source.half(), *halves)
        assert context.dtype == weights.dtype == torch.float16
        want = multiplicative_attention(
            query.half().double(),
            source.half().double(),
            source.half().double(),
            *(x.double() if isinstance(x, Tensor) else x for x in halves),
        )
        torch.testing.assert_close(context.double(), want[0], rtol=0.01, atol=0.2)


@pytest.mark.refusal("bahdanau-attention", "luong-attention")
def test_recurrent_attentions_do_not_broadcast() -> None:
    q, s = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    for query, key, value in ((q[:1], s, s), (q, s[:1], s[:1]), (q, s, s[:1]), (q, s, s[:, :4]), (q[0], s, s)):
        with refuses(ShapeError, "alignment inputs", tuple(query.shape)):
            additive_attention(query, key, value, torch.ones(4))
        with refuses(ShapeError, "alignment inputs", tuple(value.shape)):
            multiplicative_attention(query, key, value)
    with refuses(ShapeError, "alignment inputs", (4, 1)):
        additive_attention(q, s, s, torch.ones(4, 1))
