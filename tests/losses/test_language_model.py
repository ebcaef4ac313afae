"""The causal loss against transformers', in every reduction, and its law."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from handbook_src.errors import ConfigError, DataError, ShapeError
from handbook_src.losses.language_model import causal_lm_loss
from handbook_src.testing import assert_parity, oracle, refuses, unchecked


def tokens(b: int = 3, t: int = 7, v: int = 11) -> Tensor:
    return torch.randint(v, (b, t), generator=torch.Generator().manual_seed(0))


def scores(b: int = 3, t: int = 7, v: int = 11) -> Tensor:
    return torch.randn(b, t, v, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def by_hand(z: Tensor, w: Tensor, *, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
    """The formula, one token at a time."""
    losses = [
        [
            -(z[b, t, w[b, t + 1]] - z[b, t].exp().sum().log()) if w[b, t + 1] != ignore_index else z[b, t, 0] * 0
            for t in range(z.shape[1] - 1)
        ]
        for b in range(z.shape[0])
    ]
    each = torch.stack([torch.stack(row) for row in losses])
    if reduction == "none":
        return each
    return each.sum() if reduction == "sum" else each.sum() / max(int((w[:, 1:] != ignore_index).sum()), 1)


@pytest.mark.parity("clm-loss")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignored", [-100, 4])
@pytest.mark.parametrize(("b", "t", "v"), [(3, 7, 11), (1, 2, 1), (2, 3, 5)])
def test_equals_the_formula(reduction: Any, ignored: int, b: int, t: int, v: int) -> None:
    w = tokens(b, t, v)
    w[0, 1] = ignored
    assert_parity(
        lambda z: causal_lm_loss(z, w, ignore_index=ignored, reduction=reduction),
        lambda z: by_hand(z, w, ignore_index=ignored, reduction=reduction),
        [scores(b, t, v)],
    )


@pytest.mark.outside("clm-loss")
@pytest.mark.parametrize("items", [None, 5])
def test_equals_transformers(items: int | None) -> None:
    theirs = oracle.load("transformers.loss.loss_utils").ForCausalLMLoss
    w = tokens()
    w[1, 3:] = -100
    z = scores().float()

    def ours(z: Tensor) -> Tensor:
        if items is None:
            return causal_lm_loss(z, w)
        return causal_lm_loss(z, w, reduction="sum") / items

    # theirs is computed in float32 whatever comes in
    assert_parity(
        ours,
        lambda z: theirs(z, w, vocab_size=11, num_items_in_batch=items),
        [z],
        dtype=torch.float32,
        rtol=1e-5,
        atol=1e-7,
    )


@pytest.mark.law("clm-loss")
def test_the_last_logits_and_the_first_token_don_t_count() -> None:
    z, w = scores().requires_grad_(), tokens()
    loss = causal_lm_loss(z, w)
    loss.backward()
    assert z.grad is not None
    assert not z.grad[:, -1].any()
    assert z.grad[:, :-1].any(-1).all()
    other = w.clone()
    other[:, 0] = (w[:, 0] + 1) % 11
    assert torch.equal(loss, causal_lm_loss(z, other))


@pytest.mark.law("clm-loss")
def test_even_scores_cost_log_v_and_certainty_nothing() -> None:
    w = tokens()
    even = causal_lm_loss(torch.zeros(3, 7, 11, dtype=torch.float64), w)
    torch.testing.assert_close(even, torch.tensor(11.0, dtype=torch.float64).log())
    sure = F.one_hot(w.roll(-1, 1), 11).double() * 100
    assert causal_lm_loss(sure, w) < 1e-12


@pytest.mark.law("clm-loss")
def test_the_mean_weighs_tokens_not_rows() -> None:
    z, w = scores(), tokens()
    w[0, 2:] = -100
    each = causal_lm_loss(z, w, reduction="none")
    torch.testing.assert_close(causal_lm_loss(z, w), each.sum() / (w[:, 1:] != -100).sum())


@pytest.mark.law("clm-loss")
def test_nothing_to_count_is_zero_with_zero_gradient() -> None:
    z, w = scores().requires_grad_(), torch.full((3, 7), -100)
    loss = causal_lm_loss(z, w)
    loss.backward()
    assert loss == 0
    assert z.grad is not None
    assert not z.grad.any()


@pytest.mark.registration("clm-loss")
def test_half_precision_logits_are_scored_in_float32() -> None:
    z, w = (scores() * 20).bfloat16(), tokens()
    loss = causal_lm_loss(z, w)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, causal_lm_loss(z.float(), w))


@pytest.mark.refusal("clm-loss")
def test_refuses_what_does_not_fit() -> None:
    with refuses(ConfigError, "'max'", "mean"):
        causal_lm_loss(scores(), tokens(), reduction="max")  # type: ignore[arg-type]
    with refuses(ShapeError, "(3, 7, 11)", "(3, 6)", "unshifted"):
        causal_lm_loss(scores(), tokens()[:, 1:])
    with refuses(ShapeError, "(3, 1, 11)"):
        causal_lm_loss(scores(3, 1), tokens(3, 1))
    for dtype in (torch.float32, torch.bool):
        with unchecked(), refuses(ShapeError, "cross_entropy target", str(dtype)):
            causal_lm_loss(scores(), tokens().to(dtype))
    with unchecked(), refuses(ShapeError, "torch.int64"):
        causal_lm_loss(scores().long(), tokens())
    with refuses(DataError, "class 11", "0 to 10"):
        causal_lm_loss(scores(), torch.full((3, 7), 11))


@pytest.mark.law("clm-loss")
def test_padding_may_hold_nan() -> None:
    z, w = scores().detach(), tokens()
    z[1, 3:], w[1, 3:] = torch.nan, -100
    z.requires_grad_()
    causal_lm_loss(z, w).backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()


@pytest.mark.parity("clm-loss")
def test_int32_tokens_give_the_same_loss() -> None:
    torch.testing.assert_close(causal_lm_loss(scores(), tokens().int()), causal_lm_loss(scores(), tokens()))
