"""Mean-pooled heads, and shared key heads against torch's enable_gqa."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.attention import scaled_dot_product_attention
from handbook_src.functional.attention.grouped_query import mean_pool_heads
from handbook_src.functional.attention.mask import causal, padding, per_head, window
from handbook_src.testing import assert_parity, refuses

BOTH = ("gqa", "mqa")


@pytest.mark.parity(*BOTH)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 1), (6, 3), (3, 3), (1, 1)])
@pytest.mark.parametrize(("t", "s", "e"), [(5, 5, 3), (1, 7, 4), (3, 8, 1)])
@pytest.mark.parametrize("kind", ["plain", "causal", "window", "padding", "heads"])
def test_shared_heads_are_torchs(backend: str, heads: int, kv_heads: int, t: int, s: int, e: int, kind: str) -> None:
    rules = {"causal": causal, "window": causal & window(2), "padding": padding(torch.tensor([s, 1]))}
    rules["heads"] = per_head(*[causal] * (heads - 1), window(2))  # no fold of a group's heads into queries
    rule = rules.get(kind)

    def oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mask = None if rule is None else rule.dense(t, s)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)

    inputs = [torch.randn(2, t, heads, e), torch.randn(2, s, kv_heads, e), torch.randn(2, s, kv_heads, e)]
    assert_parity(lambda q, k, v: scaled_dot_product_attention(q, k, v, rule, backend=backend), oracle, inputs)


@pytest.mark.parity(*BOTH)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (4, 1), (4, 4), (6, 3)])
@pytest.mark.parametrize("tail", [(), (5,), (2, 3)])
def test_mean_pooling_is_the_mean_of_each_group(heads: int, kv_heads: int, tail: tuple[int, ...]) -> None:
    weight, e = torch.randn(heads * 3, *tail), 3

    def by_hand(w: Tensor) -> Tensor:
        of = [w[i * e : (i + 1) * e] for i in range(heads)]
        each = heads // kv_heads
        return torch.cat([sum(of[j * each : (j + 1) * each]) / each for j in range(kv_heads)])  # type: ignore[misc]

    assert_parity(lambda w: mean_pool_heads(w, heads, kv_heads), by_hand, [weight])
    strided = torch.randn(*tail[::-1], heads * 3).movedim(-1, 0) if tail else weight
    torch.testing.assert_close(mean_pool_heads(strided, heads, kv_heads), by_hand(strided))


@pytest.mark.law(*BOTH)
def test_pooling_groups_of_one_changes_nothing_and_equal_heads_pool_to_themselves() -> None:
    weight = torch.randn(12, 5).double()
    torch.testing.assert_close(mean_pool_heads(weight, 4, 4), weight, rtol=0, atol=0)
    twin = torch.randn(3, 5).double()
    torch.testing.assert_close(mean_pool_heads(twin.repeat(4, 1), 4, 1), twin)
    twice = mean_pool_heads(mean_pool_heads(weight, 4, 2), 2, 1)  # means of means of equal groups
    torch.testing.assert_close(twice, mean_pool_heads(weight, 4, 1))
    assert mean_pool_heads(weight.bfloat16(), 4, 2).dtype == torch.bfloat16


@pytest.mark.refusal(*BOTH)
def test_refusals() -> None:
    weight = torch.randn(12, 5)
    with refuses(ConfigError, "3 for 4 heads", "divisor"):
        mean_pool_heads(weight, 4, 3)
    for bad in (0, -1, 1.5, True):
        with refuses(ConfigError, "kv_heads", bad):
            mean_pool_heads(weight, 4, bad)  # type: ignore[arg-type]
    with refuses(ShapeError, (12, 5), 5):
        mean_pool_heads(weight, 5, 1)
    with refuses(ShapeError, "()"):
        mean_pool_heads(torch.tensor(1.0), 1, 1)
    with refuses(ShapeError, "torch.int64"):
        mean_pool_heads(torch.ones(4, 2, dtype=torch.int64), 2, 1)
    with refuses(ShapeError, "4 query, 3 key"):
        scaled_dot_product_attention(torch.randn(1, 2, 4, 3), torch.randn(1, 2, 3, 3), torch.randn(1, 2, 3, 3))
