"""Mean under a mask, length one: against a loop and sentence-transformers; laws; refusals."""

from __future__ import annotations

import pytest
import torch

from handbook_src.errors import ShapeError
from handbook_src.functional.embeddings.sentence import mean_pool, sentence_embedding
from handbook_src.testing import assert_parity, oracle, refuses

MASKS = [[[1, 1, 1, 1], [1, 0, 0, 0], [0, 1, 0, 1]], [[1, 1, 1, 1]] * 3]


@pytest.mark.parity("sentence-embedding")
@pytest.mark.parametrize("mask", [*MASKS, None])
@pytest.mark.parametrize("dtype", [torch.long, torch.bool])
def test_the_mean_of_the_kept_tokens_at_length_one(mask, dtype) -> None:
    m = None if mask is None else torch.tensor(mask, dtype=dtype)

    def loop(x):
        rows = []
        for i in range(3):
            kept = [x[i, t] for t in range(4) if m is None or m[i, t]]
            u = sum(kept) / len(kept)
            rows.append(u / (u * u).sum().sqrt())
        return torch.stack(rows)

    assert_parity(lambda x: sentence_embedding(x, m), loop, [torch.randn(3, 4, 5)])


@pytest.mark.outside("sentence-embedding")
@pytest.mark.parametrize("mask", MASKS)
def test_it_is_sentence_transformers_pooling(mask) -> None:
    theirs = oracle.load("sentence_transformers.sentence_transformer.modules").Pooling(5, "mean")
    x, m = torch.randn(3, 4, 5), torch.tensor(mask)
    want = theirs({"token_embeddings": x, "attention_mask": m})["sentence_embedding"]
    torch.testing.assert_close(mean_pool(x, m), want)


@pytest.mark.law("sentence-embedding")
def test_what_stands_under_the_mask_does_not_enter() -> None:
    x, m = torch.randn(2, 5, 3, requires_grad=True), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    y = sentence_embedding(x, m)
    with torch.no_grad():
        poisoned = x.masked_fill(m[..., None] == 0, torch.nan)
    assert torch.equal(sentence_embedding(poisoned, m), y)
    torch.testing.assert_close(sentence_embedding(x[:1, :2]), y[:1])
    order = torch.tensor([1, 0, 4, 2, 3])
    torch.testing.assert_close(sentence_embedding(x[:, order], m[:, order]), y)
    (g,) = torch.autograd.grad(y.sum(), x)
    assert (g[m == 0] == 0).all()
    torch.testing.assert_close(y.norm(dim=-1), torch.ones(2))
    torch.testing.assert_close(sentence_embedding(7 * x, m), y)


@pytest.mark.law("sentence-embedding")
def test_nothing_kept_is_zero_and_halves_do_not_overflow() -> None:
    assert (sentence_embedding(torch.ones(1, 3, 2), torch.zeros(1, 3, dtype=torch.long)) == 0).all()
    assert sentence_embedding(torch.ones(0, 3, 2)).shape == (0, 2)
    assert sentence_embedding(torch.ones(2, 0, 4)).shape == (2, 4)
    big = torch.full((1, 100, 4), 6e4, dtype=torch.float16)
    assert (mean_pool(big) == 6e4).all()
    assert (sentence_embedding(big) == 0.5).all()


@pytest.mark.refusal("sentence-embedding")
def test_bad_masks_and_ranks_are_refused() -> None:
    with refuses(ShapeError, (2, 4), (2, 3)):
        mean_pool(torch.ones(2, 3, 5), torch.ones(2, 4, dtype=torch.long))
    with refuses(ShapeError, "torch.float32"):
        mean_pool(torch.ones(2, 3, 5), torch.ones(2, 3))
    with refuses(ShapeError, "2 axes"):
        sentence_embedding(torch.ones(2, 3))
    with refuses(ShapeError, "torch.int64"):
        sentence_embedding(torch.ones(2, 3, 5, dtype=torch.long))


@pytest.mark.law("sentence-embedding")
def test_huge_vectors_have_length_one_too() -> None:
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(sentence_embedding(x * 1e30), sentence_embedding(x))
