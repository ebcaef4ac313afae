"""Recall at k and the reciprocal rank, against scikit-learn and counting."""

from __future__ import annotations

import pytest
import torch

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.metrics.retrieval import mean_reciprocal_rank, recall_at_k, reciprocal_ranks
from handbook_src.testing import refuses

ID = "rag"
RANKED = torch.tensor([[0, 1, 0], [1, 0, 1], [0, 0, 0], [0, 0, 1]], dtype=torch.bool)


@pytest.mark.parity(ID)
def test_small_example_by_counting() -> None:
    assert [recall_at_k(RANKED, k) for k in (1, 2, 3, 9)] == [0.25, 0.5, 0.75, 0.75]
    assert mean_reciprocal_rank(RANKED) == (1 / 2 + 1 + 0 + 1 / 3) / 4
    assert reciprocal_ranks(RANKED).tolist() == [1 / 2, 1, 0, 1 / 3]


@pytest.mark.outside(ID)
def test_equals_scikit_learn() -> None:
    from sklearn.metrics import label_ranking_average_precision_score, top_k_accuracy_score

    scores = torch.randn(50, 9)
    right = torch.randint(9, (50,))
    relevant = scores.argsort(-1, descending=True) == right[:, None]
    for k in (1, 3, 8):
        want = top_k_accuracy_score(right.numpy(), scores.numpy(), k=k, labels=range(9))
        assert recall_at_k(relevant, k) == pytest.approx(want)
    one_hot = torch.nn.functional.one_hot(right, 9)  # with one right answer, average precision is 1 / rank
    want = label_ranking_average_precision_score(one_hot.numpy(), scores.numpy())
    assert mean_reciprocal_rank(relevant) == pytest.approx(want)


@pytest.mark.law(ID)
def test_recall_grows_with_k_and_bounds_the_reciprocal_rank() -> None:
    relevant = torch.rand(30, 12) < 0.2
    found = [recall_at_k(relevant, k) for k in range(1, 13)]
    assert found == sorted(found)
    assert found[0] <= mean_reciprocal_rank(relevant) <= found[-1]
    assert mean_reciprocal_rank(relevant[:, :0]) == 0.0


@pytest.mark.refusal(ID)
def test_refusals() -> None:
    for k in (0, -1, 1.5, True):
        with refuses(ConfigError, "recall_at_k k", k):
            recall_at_k(RANKED, k)
    for wrong in (RANKED[0], RANKED.int()):
        with refuses(ShapeError, tuple(wrong.shape), wrong.dtype):
            mean_reciprocal_rank(wrong)
    with refuses(ConfigError, "no query"):
        recall_at_k(RANKED[:0], 1)
