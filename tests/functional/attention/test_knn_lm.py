"""The nearest-neighbour language model's two equations, written out one neighbour at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.knn_lm import knn_lm_log_probs, knn_probabilities
from handbook_src.testing import assert_parity, refuses

ID = "knn-lm"


def draw(*lead: int, k: int, v: int) -> tuple[Tensor, Tensor, Tensor]:
    logits = torch.randn(*lead, v, dtype=torch.float64)
    distances = torch.rand(*lead, k, dtype=torch.float64) * 5
    return logits, distances, torch.randint(v, (*lead, k))


def literally(distances: Tensor, tokens: Tensor, v: int, temperature: float = 1.0) -> Tensor:
    rows = []
    for d, near in zip(distances.flatten(0, -2), tokens.flatten(0, -2), strict=True):
        pairs = [(torch.exp(-a / temperature), int(w)) for a, w in zip(d, near, strict=True) if w >= 0]
        votes = [sum((p for p, w in pairs if w == y), torch.zeros(()).double()) for y in range(v)]
        rows.append(torch.stack(votes) / sum(p for p, _ in pairs) if pairs else torch.zeros(v).double())
    return torch.stack(rows).view(*distances.shape[:-1], v)


@pytest.mark.parity(ID)
@pytest.mark.parametrize("lead", [(1,), (3,), (2, 5)])
@pytest.mark.parametrize(("k", "v"), [(1, 1), (4, 3), (7, 50)])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 10.0])
def test_votes_are_equation_2(lead: tuple[int, ...], k: int, v: int, temperature: float) -> None:
    _, distances, tokens = draw(*lead, k=k, v=v)
    tokens.view(-1)[0] = -1  # one neighbour is missing; alone, it leaves its row empty
    if k == 1:
        tokens.view(-1)[0] = 0
    assert_parity(
        lambda d, w: knn_probabilities(d, w, v, temperature=temperature),
        lambda d, w: literally(d, w, v, temperature),
        [distances, tokens],
    )


@pytest.mark.parity(ID)
@pytest.mark.parametrize("lam", [0.0, 0.25, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_mixture_is_equation_3(lam: float, temperature: float) -> None:
    logits, distances, tokens = draw(2, 5, k=6, v=4)
    distances[..., :4], tokens[..., :4] = 1.0, torch.arange(4)  # every token has a vote, so that lam = 1 is finite

    def by_hand(z: Tensor, d: Tensor, w: Tensor) -> Tensor:
        p_lm = z.exp() / z.exp().sum(-1, keepdim=True)
        return (lam * literally(d, w, 4, temperature) + (1 - lam) * p_lm).log()

    assert_parity(
        lambda z, d, w: knn_lm_log_probs(z, d, w, lam, temperature=temperature), by_hand, [logits, distances, tokens]
    )


@pytest.mark.law(ID)
def test_both_are_distributions() -> None:
    logits, distances, tokens = draw(3, 4, k=5, v=7)
    one = torch.ones(3, 4, dtype=torch.float64)
    torch.testing.assert_close(knn_probabilities(distances, tokens, 7).sum(-1), one)
    for lam in (0.0, 0.3, 1.0):
        torch.testing.assert_close(knn_lm_log_probs(logits, distances, tokens, lam).exp().sum(-1), one)


@pytest.mark.law(ID)
def test_the_ends_of_lambda() -> None:
    logits, distances, tokens = draw(6, k=3, v=5)
    torch.testing.assert_close(knn_lm_log_probs(logits, distances, tokens, 0.0), logits.log_softmax(-1))
    only = knn_lm_log_probs(logits, distances, tokens, 1.0).exp()
    torch.testing.assert_close(only, knn_probabilities(distances, tokens, 5))


@pytest.mark.law(ID)
def test_temperature_goes_from_the_nearest_to_a_count() -> None:
    distances, tokens = torch.tensor([[0.0, 1.0, 1.5, 2.0]]), torch.tensor([[3, 1, 1, 0]])
    cold = knn_probabilities(distances, tokens, 4, temperature=1e-3)
    hot = knn_probabilities(distances, tokens, 4, temperature=1e6)
    torch.testing.assert_close(cold, torch.tensor([[0.0, 0.0, 0.0, 1.0]]))
    torch.testing.assert_close(hot, torch.tensor([[0.25, 0.5, 0.0, 0.25]]))


@pytest.mark.law(ID)
def test_only_differences_of_distances_matter() -> None:
    _, distances, tokens = draw(4, k=5, v=6)
    torch.testing.assert_close(
        knn_probabilities(distances + 1e4, tokens, 6), knn_probabilities(distances, tokens, 6), rtol=1e-9, atol=1e-9
    )


@pytest.mark.law(ID)
def test_without_neighbours_the_model_is_left_alone() -> None:
    logits, distances, tokens = draw(2, k=3, v=4)
    distances[0], tokens[0] = math.inf, -1
    assert not knn_probabilities(distances, tokens, 4)[0].any()
    for lam in (0.3, 1.0):
        out = knn_lm_log_probs(logits.requires_grad_(), distances, tokens, lam)
        torch.testing.assert_close(out[0], logits[0].log_softmax(-1))
        (grad,) = torch.autograd.grad(out[0].sum(), logits, retain_graph=True)
        assert grad.isfinite().all()
    empty = knn_lm_log_probs(logits, distances[:, :0], tokens[:, :0], 0.5)
    torch.testing.assert_close(empty, logits.log_softmax(-1))


@pytest.mark.law(ID)
def test_an_improbable_token_stays_finite() -> None:
    logits = torch.tensor([[0.0, -300.0]], requires_grad=True)  # exp(-300) is zero in float32
    out = knn_lm_log_probs(logits, torch.tensor([[1.0]]), torch.tensor([[0]]), 0.5)
    torch.testing.assert_close(out[0, 1], torch.tensor(-300.0 + math.log(0.5)))
    out.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.registration(ID)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_int32_and_strides(dtype: torch.dtype) -> None:
    logits, distances, tokens = draw(5, k=3, v=8)
    low = knn_lm_log_probs(logits.to(dtype), distances.to(dtype), tokens.int(), 0.25)
    assert low.dtype == dtype
    want = knn_lm_log_probs(logits.to(dtype).float(), distances.to(dtype).float(), tokens, 0.25)
    torch.testing.assert_close(low, want.to(dtype))
    turned = knn_lm_log_probs(logits.T.contiguous().T, distances.T.contiguous().T, tokens.T.contiguous().T, 0.25)
    torch.testing.assert_close(turned, knn_lm_log_probs(logits, distances, tokens, 0.25))
    assert knn_probabilities(distances.to("meta"), tokens.to("meta"), 8).shape == (5, 8)
    assert knn_lm_log_probs(logits[:0], distances[:0], tokens[:0]).shape == (0, 8)


@pytest.mark.registration(ID)
def test_double_backward() -> None:
    logits, distances, tokens = draw(2, k=3, v=4)
    inputs = [logits.requires_grad_(), distances.requires_grad_()]
    assert torch.autograd.gradgradcheck(lambda z, d: knn_lm_log_probs(z, d, tokens, 0.25), inputs)


@pytest.mark.refusal(ID)
def test_refusals() -> None:
    logits, distances, tokens = draw(2, 3, k=4, v=5)
    for lam in (-0.1, 1.1, math.nan, True, None):
        with refuses(ConfigError, "knn_lm lam", lam):
            knn_lm_log_probs(logits, distances, tokens, lam)
    for temperature in (0.0, -1.0, math.nan, True):
        with refuses(ConfigError, "temperature", temperature):
            knn_lm_log_probs(logits, distances, tokens, temperature=temperature)
    for size in (0, 2.5, True):
        with refuses(ConfigError, "vocab_size", size):
            knn_probabilities(distances, tokens, size)
    with refuses(ShapeError, "tokens", "got 5", "vocab_size=5"):
        knn_probabilities(distances, tokens.fill_(5), 5)
    tokens.fill_(1)
    with refuses(ShapeError, "(2, 3, 4)", "(2, 3, 3)"):
        knn_probabilities(distances, tokens[..., :3], 5)
    with refuses(ShapeError, "float32"):
        knn_probabilities(distances, tokens.float(), 5)
    with refuses(ShapeError, "int64"):
        knn_probabilities(distances.long(), tokens, 5)
    with refuses(ShapeError, "(2, 3, 5)", "(3, 4)"):
        knn_lm_log_probs(logits, distances[0], tokens[0])
    with refuses(ShapeError, "int64"):
        knn_lm_log_probs(logits.long(), distances, tokens)


@pytest.mark.law(ID)
def test_neighbours_at_infinity_have_no_vote() -> None:
    distances = torch.tensor([[math.inf, math.inf], [1.0, math.inf]])
    tokens, logits = torch.tensor([[0, 1], [2, 1]]), torch.randn(2, 4)
    torch.testing.assert_close(knn_probabilities(distances, tokens, 4), torch.tensor([[0.0] * 4, [0.0, 0.0, 1.0, 0.0]]))
    mixed = knn_lm_log_probs(logits, distances, tokens)
    torch.testing.assert_close(mixed[0], logits[0].log_softmax(-1))
    torch.testing.assert_close(mixed.exp().sum(-1), torch.ones(2))


@pytest.mark.refusal(ID)
def test_two_devices_are_refused() -> None:
    distances, tokens = torch.rand(2, 3), torch.zeros(2, 3, dtype=torch.int64)
    with refuses(ShapeError, "meta", "cpu"):
        knn_probabilities(distances, tokens.to("meta"), 4)
    with refuses(ShapeError, "meta", "cpu"):
        knn_lm_log_probs(torch.randn(2, 4, device="meta"), distances, tokens)
