"""The two marginals over documents, summed out by hand, and as transformers computes them."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from handbook_src.errors import ShapeError
from handbook_src.functional.attention.rag import rag_marginal, rag_sequence, rag_token
from handbook_src.testing import assert_parity, oracle, refuses

ID = "rag"
SIZES = [(1, 1, 1), (2, 3, 5), (4, 2, 1), (3, 7, 2)]


def draw(b: int, z: int, t: int) -> tuple[Tensor, Tensor]:
    return torch.randn(b, z, dtype=torch.float64), torch.randn(b, z, t, 6, dtype=torch.float64).log_softmax(-1)[..., 0]


def sequence_by_hand(scores: Tensor, log_p: Tensor) -> Tensor:
    p_z, p = scores.exp() / scores.exp().sum(1, keepdim=True), log_p.exp()
    return torch.stack([
        sum(p_z[b, z] * p[b, z].prod() for z in range(p.shape[1])).log() for b in range(len(p))
    ])  # fmt: skip


def token_by_hand(scores: Tensor, log_p: Tensor) -> Tensor:
    p_z, p = scores.exp() / scores.exp().sum(1, keepdim=True), log_p.exp()
    rows = []
    for b in range(len(p)):
        each = [sum(p_z[b, z] * p[b, z, i] for z in range(p.shape[1])) for i in range(p.shape[2])]
        rows.append(torch.stack(each).prod().log())
    return torch.stack(rows)


@pytest.mark.parity(ID)
@pytest.mark.parametrize("size", SIZES)
def test_both_are_the_papers_sums(size: tuple[int, int, int]) -> None:
    assert_parity(rag_sequence, sequence_by_hand, draw(*size))
    assert_parity(rag_token, token_by_hand, draw(*size))


@pytest.mark.parity(ID)
def test_padding_does_not_count() -> None:
    scores, log_p = draw(3, 4, 5)
    mask = torch.arange(5) < torch.tensor([[5], [2], [0]])
    log_p = log_p.masked_fill(~mask[:, None], math.nan)
    for ours, by_hand in ((rag_sequence, sequence_by_hand), (rag_token, token_by_hand)):
        out = ours(scores, log_p, mask)
        for i, n in enumerate((5, 2)):
            torch.testing.assert_close(out[i], by_hand(scores[i : i + 1], log_p[i : i + 1, :, :n])[0])
        torch.testing.assert_close(out[2], torch.zeros((), dtype=torch.float64))


@pytest.mark.outside(ID)
def test_transformers_rag_computes_the_same() -> None:
    theirs: Any = oracle.load("transformers.models.rag.modeling_rag")
    b, z, t, v = 2, 3, 4, 7
    logits, scores = torch.randn(b * z, t, v, dtype=torch.float64), torch.randn(b, z, dtype=torch.float64)
    log_p = logits.log_softmax(-1).view(b, z, t, v)
    token = theirs.RagTokenForGeneration.marginalize(SimpleNamespace(), logits, scores, z)
    torch.testing.assert_close(rag_marginal(scores, log_p), token)
    target = torch.randint(1, v, (b, t + 1))
    chosen = log_p.gather(-1, target[:, None, 1:, None].expand(-1, z, -1, -1))[..., 0]
    ids = SimpleNamespace(bos_token_id=None, pad_token_id=0)
    whole = SimpleNamespace(config=SimpleNamespace(bos_token_id=None, generator=ids))
    padded = torch.cat([logits, logits[:, :1]], 1)  # theirs shifts left, and pads at the end
    nll = theirs.RagSequenceForGeneration.get_nll(whole, padded, scores, target, n_docs=z)
    torch.testing.assert_close(-rag_sequence(scores, chosen), nll)


@pytest.mark.law(ID)
def test_one_document_or_one_token_makes_them_equal() -> None:
    for size in ((3, 1, 5), (3, 4, 1)):
        scores, log_p = draw(*size)
        torch.testing.assert_close(rag_sequence(scores, log_p), rag_token(scores, log_p))


@pytest.mark.law(ID)
def test_both_sum_to_one_over_all_answers() -> None:
    """Two tokens of a vocabulary of three: nine answers, the second token depends on the first."""
    scores, first = torch.randn(1, 4).double(), torch.randn(1, 4, 3).double().log_softmax(-1)
    second = torch.randn(1, 4, 3, 3).double().log_softmax(-1)
    answers = [torch.stack([first[:, :, i], second[:, :, i, j]], -1) for i in range(3) for j in range(3)]
    for marginal in (rag_sequence, rag_token):
        total = sum(marginal(scores, log_p).exp() for log_p in answers)
        torch.testing.assert_close(total, torch.ones(1).double())
    torch.testing.assert_close(rag_marginal(scores, second).exp().sum(-1), torch.ones(1, 3).double())


@pytest.mark.law(ID)
def test_an_answer_from_two_documents_needs_the_token_form() -> None:
    scores = torch.zeros(1, 2)
    log_p = torch.tensor([[[0.9, 0.01], [0.01, 0.9]]]).log()  # each document knows one half
    assert rag_token(scores, log_p).exp() > 10 * rag_sequence(scores, log_p).exp()


@pytest.mark.law(ID)
def test_the_retriever_learns_from_the_answer_alone() -> None:
    scores, log_p = torch.zeros(1, 3, requires_grad=True), torch.tensor([[[0.1], [0.7], [0.2]]]).log()
    for marginal in (rag_sequence, rag_token):
        (grad,) = torch.autograd.grad(marginal(scores, log_p).sum(), scores)
        posterior = torch.tensor([[0.1, 0.7, 0.2]])
        torch.testing.assert_close(grad, posterior - 1 / 3)


@pytest.mark.law(ID)
def test_long_answers_do_not_underflow_and_impossible_ones_are_impossible() -> None:
    scores = torch.tensor([[0.0, -math.inf]])
    log_p = torch.full((1, 2, 500), -5.0)
    for marginal in (rag_sequence, rag_token):
        torch.testing.assert_close(marginal(scores, log_p), torch.tensor([-2500.0]))
        assert marginal(torch.zeros(1, 2), torch.full((1, 2, 3), -math.inf)).item() == -math.inf


@pytest.mark.registration(ID)
def test_low_precision_and_double_backward() -> None:
    scores, log_p = draw(2, 3, 4)
    for marginal in (rag_sequence, rag_token):
        low = marginal(scores.bfloat16(), log_p.bfloat16())
        assert low.dtype == torch.bfloat16
        want = marginal(scores.bfloat16().float(), log_p.bfloat16().float())
        torch.testing.assert_close(low.float(), want, rtol=0.02, atol=0.02)
        assert torch.autograd.gradgradcheck(marginal, [scores.requires_grad_(), log_p.requires_grad_()])
        assert marginal(scores[:0], log_p[:0]).shape == (0,)
        assert marginal(scores.to("meta"), log_p.to("meta")).shape == (2,)
        torch.testing.assert_close(marginal(scores, log_p[:, :, :0]), torch.zeros(2).double())


@pytest.mark.refusal(ID)
def test_refusals() -> None:
    scores, log_p = draw(2, 3, 4)
    for marginal in (rag_sequence, rag_token, rag_marginal):
        name = marginal.__name__
        for s, p in ((scores[:, :2], log_p), (scores[0], log_p), (scores[:, :0], log_p[:, :0])):
            with refuses(ShapeError, name, tuple(s.shape), tuple(p.shape)):
                marginal(s, p)
        with refuses(ShapeError, "int64"):
            marginal(scores.long(), log_p)
    for mask in (torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 4)):
        with refuses(ShapeError, "rag mask", tuple(mask.shape)):
            rag_sequence(scores, log_p, mask)
    with refuses(ShapeError, "(2, 3, 4, 1)"):
        rag_sequence(scores, log_p[..., None])


@pytest.mark.law(ID)
def test_a_nan_in_the_padding_does_not_come_back_through_the_gradient() -> None:
    scores, log_p = draw(2, 3, 4)
    mask = torch.arange(4) < torch.tensor([[4], [2]])
    log_p = log_p.masked_fill(~mask[:, None], math.nan).requires_grad_()
    for marginal in (rag_sequence, rag_token):
        (grad,) = torch.autograd.grad(marginal(scores, log_p, mask).sum(), log_p)
        assert grad.isfinite().all()
        assert (grad.masked_select(~mask[:, None].expand_as(grad)) == 0).all()


@pytest.mark.law(ID)
def test_no_document_found_means_no_probability() -> None:
    scores = torch.tensor([[-math.inf] * 3, [0.0, -math.inf, 1.0]], dtype=torch.float64, requires_grad=True)
    _, log_p = draw(2, 3, 4)
    for marginal in (rag_sequence, rag_token):
        out = marginal(scores, log_p)
        assert out[0] == -math.inf
        assert out[1].isfinite()
        (grad,) = torch.autograd.grad(out[1], scores)
        assert grad.isfinite().all()


@pytest.mark.law(ID)
def test_halves_are_summed_in_float32_and_rounded_once() -> None:
    scores, log_p = (x.bfloat16() for x in draw(3, 4, 200))
    exact = rag_token(scores.double(), log_p.double())
    assert torch.equal(rag_token(scores, log_p), exact.bfloat16())


@pytest.mark.refusal(ID)
def test_two_devices_are_refused() -> None:
    scores, log_p = draw(2, 3, 4)
    for marginal in (rag_sequence, rag_token, rag_marginal):
        with refuses(ShapeError, "meta", "cpu"):
            marginal(scores, log_p.to("meta"))
