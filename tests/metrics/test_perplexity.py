"""Perplexity against torchmetrics, streamed and at once, and its laws."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from handbook_src.errors import ConfigError, DataError, ShapeError
from handbook_src.metrics.perplexity import Perplexity, perplexity
from handbook_src.testing import oracle, refuses, unchecked


def batch(b: int, t: int, v: int = 13) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(b * 10 + t)
    return torch.randn(b, t, v, generator=g, dtype=torch.float64) * 2, torch.randint(v, (b, t), generator=g)


@pytest.mark.outside("perplexity")
@pytest.mark.parity("perplexity")
@pytest.mark.parametrize("ignore", [-100, 3])
def test_equals_torchmetrics_over_batches(ignore: int) -> None:
    theirs = oracle.load("torchmetrics.text").Perplexity(ignore_index=ignore)
    ours = Perplexity(ignore_index=ignore)
    for b, t in ((2, 7), (1, 1), (3, 5)):
        z, w = batch(b, t)
        if b > 1:
            w[0, t // 2 :] = ignore
        ours.update(z, w)
        theirs.update(z, w)
    assert math.isclose(ours.compute(), theirs.compute().item(), rel_tol=1e-6)


@pytest.mark.parity("perplexity")
def test_equals_the_formula() -> None:
    z, w = batch(3, 5)
    logs = [math.log(z[b, t].softmax(-1)[w[b, t]].item()) for b in range(3) for t in range(5)]
    assert math.isclose(perplexity(z, w), math.exp(-sum(logs) / 15), rel_tol=1e-12)


@pytest.mark.law("perplexity")
def test_any_cut_into_batches_gives_the_same() -> None:
    z, w = batch(6, 9)
    w[4:, 2:] = -100
    at_once = perplexity(z, w)
    for size in (1, 2, 5):
        streamed = Perplexity()
        for part in zip(z.split(size), w.split(size), strict=True):
            streamed.update(*part)
        assert math.isclose(streamed.compute(), at_once, rel_tol=1e-12)
    merged = Perplexity().update(z[:4], w[:4]).merge(Perplexity().update(z[4:], w[4:]))
    assert math.isclose(merged.compute(), at_once, rel_tol=1e-12)
    assert math.isclose(perplexity(z.view(54, 13), w.view(54)), at_once, rel_tol=1e-12)


@pytest.mark.law("perplexity")
def test_mean_of_batch_perplexities_is_larger() -> None:
    z, w = batch(8, 9)
    parts = [perplexity(*part) for part in zip(z.split(1), w.split(1), strict=True)]
    assert sum(parts) / len(parts) > perplexity(z, w)


@pytest.mark.law("perplexity")
def test_padding_counts_for_nothing() -> None:
    z, w = batch(2, 6)
    w[0, 3:] = -100
    z_changed = z.clone()
    z_changed[0, 3:] = 99.0
    assert perplexity(z, w) == perplexity(z_changed, w)


@pytest.mark.law("perplexity")
def test_ignorance_costs_the_vocabulary_and_certainty_one() -> None:
    _, w = batch(2, 6)
    assert math.isclose(perplexity(torch.zeros(2, 6, 13), w), 13.0, rel_tol=1e-6)
    assert math.isclose(perplexity(torch.nn.functional.one_hot(w, 13) * 200.0, w), 1.0, rel_tol=1e-9)


@pytest.mark.law("perplexity")
def test_the_base_changes_the_entropy_and_not_the_perplexity() -> None:
    seen = Perplexity().update(*batch(2, 6))
    for base in (2.0, math.e, 10.0):
        assert math.isclose(base ** seen.entropy(base), seen.compute(), rel_tol=1e-12)
    assert math.isclose(seen.bits_per_byte(36), seen.entropy(2.0) * 12 / 36, rel_tol=1e-12)
    seen.reset()
    assert (seen.nats, seen.tokens) == (0.0, 0)


@pytest.mark.registration("perplexity")
def test_half_precision_and_no_graph() -> None:
    z, w = batch(2, 6)
    assert math.isclose(perplexity(z.bfloat16(), w), perplexity(z.bfloat16().float(), w), rel_tol=1e-6)
    seen = Perplexity().update(z.requires_grad_(), w)
    assert isinstance(seen.nats, float)


@pytest.mark.refusal("perplexity")
def test_refuses_what_has_no_perplexity() -> None:
    for dtype in (torch.float32, torch.bool):
        with unchecked(), refuses(ShapeError, "cross_entropy target", str(dtype)):
            perplexity(torch.zeros(2, 5), torch.ones(2, dtype=dtype))
    z, w = batch(2, 6)
    with unchecked(), refuses(ShapeError, "torch.int64"):
        perplexity(z.long(), w)
    with refuses(DataError, "class 13", "0 to 12"):
        perplexity(z, torch.full((2, 6), 13))
    with refuses(ShapeError, "(2, 6, 13)", "(2, 5)", "tokens[:, 1:]"):
        perplexity(z, w[:, 1:])
    with refuses(ConfigError, "0 counted tokens"):
        perplexity(z, torch.full((2, 6), -100))
    for base in (1.0, 0.0, -2.0):
        with refuses(ConfigError, "base", base):
            Perplexity().update(z, w).entropy(base)
    with refuses(ConfigError, "bits_per_byte", 0):
        Perplexity().update(z, w).bits_per_byte(0)


@pytest.mark.law("perplexity")
def test_a_hopeless_model_has_infinite_perplexity_and_int32_targets_count() -> None:
    z = torch.tensor([[0.0, 1000.0]])
    assert Perplexity().update(z, torch.tensor([0], dtype=torch.int32)).compute() == math.inf
