"""Spans of indices: what a rule says of a block must bound what it says of the block's pairs."""

from __future__ import annotations

import pytest
import torch

from handbook_src.functional.attention.block_plan import _Fact, _Span

QUERIES, KEYS = torch.tensor([[0, 3], [5, 6], [9, 9]]), torch.tensor([[0, 0], [2, 6], [7, 12]])

CONDITIONS = {
    "difference": lambda t, s: t - s < 3,
    "distance": lambda t, s: (t - s).abs() <= 2,
    "negative distance": lambda t, s: -(s - t).abs() >= -4,
    "from the right": lambda t, s: 7 - s > t + 1,
    "added": lambda t, s: 2 + t == 1 + s,
    "scaled": lambda t, s: 2 * t != s * -3 + 20,
    "divided": lambda t, s: t // 4 == s // 4,
    "remainder": lambda t, s: (t - s) % 3 == 0,
    "not": lambda t, s: ~(s < t) | (s == 2),
    "joined with a tensor": lambda t, s: torch.tensor(True) & (s < torch.tensor(5)),
    "true or": lambda t, s: (t < 0) | torch.tensor(False) | (torch.tensor(6) <= s),
}


@pytest.mark.law("random-attention")
@pytest.mark.parametrize("name", CONDITIONS)
def test_spans_bound_their_pairs(name: str) -> None:
    condition = CONDITIONS[name]
    queries, keys = QUERIES.T[:, :, None], KEYS.T[:, None]
    fact = condition(_Span(*queries), _Span(*keys))
    some, every = fact.some.expand(3, 3), fact.every.expand(3, 3)
    for i, (a, b) in enumerate(QUERIES.tolist()):
        for j, (c, d) in enumerate(KEYS.tolist()):
            pairs = condition(torch.arange(a, b + 1)[:, None], torch.arange(c, d + 1))
            assert some[i, j] or not pairs.any()
            assert not every[i, j] or pairs.all()


@pytest.mark.law("random-attention")
def test_tables_are_looked_up_by_blocks() -> None:
    table = torch.tensor([[True, False], [True, True]])
    rows, columns = torch.tensor([[0, 1], [1, 1]]).T[:, :, None], torch.tensor([[0, 0], [0, 1]]).T[:, None]
    fact = _Span(*columns).lookup(table, _Span(*rows))
    assert fact.some.tolist() == [[True, True], [True, True]]
    assert fact.every.tolist() == [[True, False], [True, True]]
    fact = _Span(*columns).lookup(table, torch.arange(2)[:, None])
    assert fact.every.tolist() == [[True, False], [True, True]]


@pytest.mark.refusal("random-attention")
def test_what_spans_cannot_answer_raises_and_is_not_guessed() -> None:
    span, fact = _Span(torch.tensor(0), torch.tensor(3)), _Fact(torch.tensor(True), torch.tensor(False))
    for ask in (
        lambda: bool(fact),
        lambda: fact & torch.tensor(3),
        lambda: span // 0,
        lambda: span % -2,
        lambda: span // 1.5,
        lambda: span ^ 1,
        lambda: torch.sin(span),
    ):
        with pytest.raises(TypeError):
            ask()
