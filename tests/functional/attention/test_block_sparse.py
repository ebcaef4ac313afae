"""Block-sparse attention and its plans against the dense masked formula, for every rule of the vocabulary."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention import block_sparse
from handbook_src.functional.attention.attention import scaled_dot_product_attention
from handbook_src.functional.attention.block_plan import _Sheet
from handbook_src.functional.attention.block_sparse import block_sparse_attention, plan_blocks, rows_first
from handbook_src.functional.attention.mask import (
    Mask,
    anticausal,
    block,
    causal,
    dilated,
    documents,
    full,
    global_tokens,
    left_padding,
    marked,
    padding,
    per_head,
    prefix_lm,
    random,
    sinks,
    window,
)
from handbook_src.testing import assert_parity, refuses

BIGBIRD = "random-attention"
LAYOUT = torch.rand(9, 9, generator=torch.Generator().manual_seed(1)) < 0.4
LAYOUT[3] = False
MARKS = torch.zeros(2, 33, dtype=torch.bool)
MARKS[0, [3, 31]], MARKS[1, 12] = True, True

RULES = {
    "full": full,
    "causal": causal,
    "anticausal": anticausal,
    "window": window(5),
    "causal window with sinks": causal & (window(6) | sinks(2)),
    "global": window(3) | global_tokens(0, 11),
    "not": ~window(9),
    "marked": window(2) | marked(MARKS),
    "marked keys": window(2) | marked(MARKS, rows=False),
    "dilated": window(12) & dilated(3),
    "random": random(0.1),
    "blocks": block(4),
    "layout": block(4, LAYOUT),
    "layout of other blocks": block(5, LAYOUT),
    "padding": padding(torch.tensor([20, 3])),
    "causal, rows empty": causal & left_padding(torch.tensor([0, 9])),
    "prefix": prefix_lm(torch.tensor([3, 8])),
    "documents": causal & documents((torch.arange(66) // 7).view(2, 33)),
    "per head": per_head(causal, window(3), causal, causal & window(7)),
    "strided": Mask("strided", lambda b, h, t, s: (t // 6 == s // 6) | (s % 6 >= 5)),
    "arithmetic": Mask("arithmetic", lambda b, h, t, s: (2 * s - t + 1 > 0) & (3 - s != t) & (s + 1 >= 2)),
    "not for spans": Mask("xor", lambda b, h, t, s: ((t ^ s) & 5) == 0),
    "nothing": Mask("nothing", lambda b, h, t, s: (t < 0) & (s < 0)),
}


def qkv(t: int, s: int, g: int = 2, c: int = 3, b: int = 2) -> list[Tensor]:
    return [torch.randn(b, t, 4, 3), torch.randn(b, s, g, 3), torch.randn(b, s, g, c)]


def dense(q: Tensor, k: Tensor, v: Tensor, rule: Mask, scale: float | None = None) -> Tensor:
    return scaled_dot_product_attention(q, k, v, rule.dense(q.shape[1], k.shape[1]), scale=scale, backend="reference")


@pytest.mark.parity(BIGBIRD, "sliding-window-attention", "global-local-attention")
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(("t", "s", "g"), [(33, 33, 4), (5, 33, 2), (1, 7, 1), (32, 32, 2)])
def test_every_rule_equals_the_dense_mask(name: str, t: int, s: int, g: int) -> None:
    rule = RULES[name]
    for size in (4, 7, 64):
        assert_parity(
            lambda q, k, v, size=size: block_sparse_attention(q, k, v, rule, block_size=size),
            lambda q, k, v: dense(q, k, v, rule),
            qkv(t, s, g),
        )


@pytest.mark.parity(BIGBIRD)
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("c", [1, 8])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_backends_scales_and_widths(backend: str, c: int, scale: float | None) -> None:
    rule = causal & window(6)
    plan = plan_blocks(rule, 10, 13, 4)
    for given in (rule, plan):
        assert_parity(
            lambda q, k, v, given=given: block_sparse_attention(
                q, k, v, given, block_size=4, scale=scale, backend=backend
            ),
            lambda q, k, v: dense(q, k, v, rule, scale),
            qkv(10, 13, c=c),
        )


@pytest.mark.law(BIGBIRD)
@pytest.mark.parametrize("name", RULES)
def test_a_block_is_live_exactly_where_the_rule_lets_something_through(name: str) -> None:
    rule = RULES[name]
    for t, s in ((33, 33), (9, 33)):
        seen = rule.dense(t, s)
        seen = (seen if seen.ndim == 4 else seen[None, None]).any(0)
        for size in (4, 7):
            live = plan_blocks(rule, t, s, size).live
            for i in range(live.shape[1]):
                for j in range(live.shape[2]):
                    part = seen[:, i * size : i * size + size, j * size : j * size + size]
                    torch.testing.assert_close(live[:, i, j], part.flatten(1).any(1))


#: rules whose conditions are exact over blocks, so that no block that is all visible needs a mask
EXACT = ("full", "causal", "anticausal", "window", "blocks", "padding", "documents", "nothing")


@pytest.mark.law(BIGBIRD)
@pytest.mark.parametrize("name", EXACT)
def test_a_block_that_is_all_visible_is_known_as_such(name: str) -> None:
    rule = RULES[name]
    for t, s in ((33, 33), (9, 33)):
        seen = rule.dense(t, s)
        seen = (seen if seen.ndim == 4 else seen[None, None]).all(0)
        for size in (4, 7):
            whole = _Sheet(rule, t, s, size, torch.device("cpu")).whole
            for i in range(whole.shape[1]):
                for j in range(s // size):  # a last block that is not full is masked
                    part = seen[:, i * size : i * size + size, j * size : j * size + size]
                    torch.testing.assert_close(whole[:, i, j], part.flatten(1).all(1))


@pytest.mark.law(BIGBIRD)
@pytest.mark.parametrize(("t", "s"), [(32, 32), (33, 36), (1, 5)])
def test_inputs_are_filled_up_to_whole_blocks_and_no_further(t: int, s: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    monkeypatch.setattr(block_sparse, "rows_first", lambda x, n: rows.append(n) or rows_first(x, n))
    block_sparse_attention(*qkv(t, s), causal, block_size=4)
    assert rows == [math.ceil(n / 4) * 4 for n in (t, s, s)]


@pytest.mark.law("sliding-window-attention")
def test_the_work_grows_with_the_length_and_not_with_its_square() -> None:
    def held(plan: object) -> tuple[int, int]:
        groups = [g for _, part in plan.parts for g in part]  # type: ignore[attr-defined]
        return sum(g.columns.numel() for g in groups), sum(0 if g.mask is None else g.mask.numel() for g in groups)

    rule = window(65) | global_tokens(0)
    small, large = (held(plan_blocks(rule, n, n, 32)) for n in (1024, 4096))
    assert large[0] < 4.5 * small[0]
    assert large[1] < 4.5 * small[1]
    assert plan_blocks(rule, 4096, 4096, 32).density < 0.06
    assert plan_blocks(rule, 4096, 4096, 32) is plan_blocks(rule, 4096, 4096, 32)
    assert len(plan_blocks(per_head(causal, window(3), causal), 33, 33, 4).parts) == 2, "heads alike run together"


@pytest.mark.law(BIGBIRD, "global-local-attention")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_broken_reaches_only_who_may_see_it(bad: float) -> None:
    rule = causal & (window(3) | sinks(1))
    clean = [x.double() for x in qkv(20, 24)]
    q, k, v = (x.clone() for x in clean)
    k[0, 9], v[1, 15, 1], q[1, 2, 3] = bad, bad, bad
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out, want = block_sparse_attention(q, k, v, rule, block_size=8), dense(q, k, v, rule)
    torch.testing.assert_close(out, want, equal_nan=True)
    good = ~out.isnan()
    assert good.any(-1).sum() == 2 * 20 * 4 - (3 * 4 + 3 * 2 + 1)
    torch.testing.assert_close(out[good], dense(*clean, rule)[good])
    grads = torch.autograd.grad(out[good].sum(), (q, k, v))
    wants = torch.autograd.grad(want[good].sum(), (q, k, v))
    for mine, theirs in zip(grads, wants, strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, theirs)


@pytest.mark.law(BIGBIRD)
def test_rows_that_see_nothing_and_empty_inputs_are_zero() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(9, 9))
    out = block_sparse_attention(q, k, v, RULES["nothing"], block_size=4)
    assert (out == 0).all()
    assert all((x == 0).all() for x in torch.autograd.grad(out.sum(), (q, k, v)))
    for b, t, s in ((0, 5, 5), (2, 0, 5), (2, 0, 0)):
        assert block_sparse_attention(*qkv(t, s, b=b), window(2)).shape == (b, t, 4, 3)
    assert (block_sparse_attention(*qkv(5, 0), padding(torch.tensor([0, 0]))) == 0).all()


@pytest.mark.registration(BIGBIRD)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_layout_and_untouched_inputs(dtype: torch.dtype) -> None:
    rule = window(5) | global_tokens(2)
    q, k, v = qkv(21, 21)
    want = dense(q.double(), k.double(), v.double(), rule)
    low = block_sparse_attention(q.to(dtype), k.to(dtype), v.to(dtype), rule, block_size=8)
    assert low.dtype == dtype
    torch.testing.assert_close(low.double(), want, rtol=0.05, atol=0.05)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    copies = [x.clone() for x in turned]
    torch.testing.assert_close(block_sparse_attention(*turned, rule, block_size=8).double(), want, rtol=1e-4, atol=1e-5)
    for x, y in zip(turned, copies, strict=True):
        assert torch.equal(x, y)
    on_meta = block_sparse_attention(*(x.to("meta") for x in (q, k, v)), rule)
    assert on_meta.shape == q.shape
    assert on_meta.is_meta


@pytest.mark.registration(BIGBIRD)
def test_dropout_keeps_the_mean_and_the_reference_has_second_derivatives() -> None:
    rule = window(40)
    q, k, v = qkv(200, 200)
    out = block_sparse_attention(q, k, torch.ones_like(v), rule, dropout=0.3)
    assert out.std() > 0.01
    assert abs(out.mean().item() - 1) < 0.02
    small = [x.double().requires_grad_() for x in qkv(4, 4, b=1)]
    assert torch.autograd.gradgradcheck(lambda *x: block_sparse_attention(*x, window(2), backend="reference"), small)


@pytest.mark.registration(BIGBIRD)
@pytest.mark.usefixtures("unchecked")
def test_compiles_without_a_graph_break_from_a_plan() -> None:
    q, k, v = qkv(21, 21)
    plan = plan_blocks(window(5) | global_tokens(2), 21, 21, 8)
    compiled = torch.compile(lambda q, k, v: block_sparse_attention(q, k, v, plan), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), block_sparse_attention(q, k, v, plan))


@pytest.mark.refusal(BIGBIRD)
def test_refusals() -> None:
    q, k, v = qkv(6, 6)
    for size in (0, -4, True, 2.5, math.nan):
        with refuses(ConfigError, "block_size", size):
            block_sparse_attention(q, k, v, causal, block_size=size)  # type: ignore[arg-type]
    for rule in (None, causal.dense(6), "causal"):
        with refuses(ConfigError, "block rule", "a Mask"):
            block_sparse_attention(q, k, v, rule)  # type: ignore[arg-type]
    with refuses(ConfigError, "plan_blocks t", -1):
        plan_blocks(causal, -1)
    with refuses(ShapeError, "t=6", "s=5"):
        block_sparse_attention(q, k[:, :5], v[:, :5], window(2))
    with refuses(ShapeError, "block plan", "t=6, s=6", "t=5, s=6"):
        block_sparse_attention(q, k, v, plan_blocks(causal, 5, 6))
    with refuses(ShapeError, "(3, 1, 6, 6)"):
        block_sparse_attention(q, k, v, padding(torch.tensor([1, 2, 3])))
    with refuses(ShapeError, "(1, 2, 6, 6)"):
        block_sparse_attention(q, k, v, per_head(full, causal))
    with refuses(ShapeError, "4 query, 3 key"):
        block_sparse_attention(q, *qkv(6, 6, g=3)[1:], causal)
    with refuses(ShapeError, "torch.int64"):
        block_sparse_attention(q.long(), k.long(), v.long(), causal)
    with refuses(ShapeError, "torch.float64"):
        block_sparse_attention(q, k.double(), v, causal)
    with refuses(ConfigError, "scale", -1.0):
        block_sparse_attention(q, k, v, causal, scale=-1.0)
    with refuses(ConfigError, "dropout", 1.0):
        block_sparse_attention(q, k, v, causal, dropout=1.0)
    with refuses(ConfigError, "backend", "flash"):
        block_sparse_attention(q, k, v, causal, backend="flash")  # type: ignore[arg-type]


@pytest.mark.law("global-local-attention")
@pytest.mark.parametrize("size", [4, 64])
def test_rules_that_compare_conditions_equal_the_dense_mask(size: int) -> None:
    same = Mask("same side", lambda b, h, t, s: (t < 5) == (s < 5))
    other = Mask("other side", lambda b, h, t, s: (t < 5) != (s < 5))
    odd = Mask("odd", lambda b, h, t, s: (t < 5) ^ (s < 5))
    q, k, v = qkv(13, 13)
    for rule in (causal & same, same | window(2), causal & ~other, causal & ~odd, same & ~(causal & other)):
        found = block_sparse_attention(q, k, v, rule, block_size=size)
        torch.testing.assert_close(found, scaled_dot_product_attention(q, k, v, rule, backend="reference"))


@pytest.mark.registration("sliding-window-attention")
def test_a_plan_that_was_made_elsewhere_serves_training() -> None:
    rule, (q, k, v) = causal & window(3), qkv(13, 13)
    with torch.inference_mode():
        block_sparse_attention(q, k, v, rule, block_size=4)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    block_sparse_attention(*inputs, rule, block_size=4).sum().backward()
    assert all(x.grad is not None for x in inputs)
    with torch.device("meta"):  # another default device
        found = block_sparse_attention(q, k, v, causal & window(4), block_size=4)
    assert found.device.type == "cpu"
    torch.testing.assert_close(found, scaled_dot_product_attention(q, k, v, causal & window(4)))


def test_a_batch_of_none_and_blocks_longer_than_the_sequence() -> None:
    q, k, v = qkv(5, 5)
    rule = causal & padding(torch.zeros(0, dtype=torch.int64))
    assert block_sparse_attention(q[:0], k[:0], v[:0], rule).shape[0] == 0
    assert rule.dense(5).shape == (0, 1, 5, 5)
    for n in (0, 1, 5):
        assert plan_blocks(causal, n, block_size=10**9).block_size == max(n, 1)
    found = block_sparse_attention(q, k, v, causal, block_size=10**9)  # of which five exist
    torch.testing.assert_close(found, scaled_dot_product_attention(q, k, v, causal))
