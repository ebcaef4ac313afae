"""The proof tools catch what they are for: each is shown one fault that it must not let through."""

from __future__ import annotations

import pytest
import torch

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.testing import (
    assert_batch_independent,
    assert_causal,
    assert_parity,
    assert_permutation_equivariant,
    refuses,
    relative_error,
    unchecked,
)

X = torch.linspace(-2, 2, 24, dtype=torch.float64).view(2, 4, 3)


def test_parity_passes_on_equals():
    assert_parity(torch.tanh, lambda x: 1 - 2 / (torch.exp(2 * x) + 1), [X])


def test_parity_catches_a_wrong_output():
    with pytest.raises(AssertionError, match="output 0"):
        assert_parity(torch.tanh, torch.sin, [X])


def test_parity_catches_a_wrong_gradient():
    def half(x):
        return x.detach() + 0.5 * (x - x.detach())

    with pytest.raises(AssertionError, match="gradient of input 0"):
        assert_parity(half, lambda x: x * 1.0, [X])


def test_parity_catches_a_missing_gradient():
    with pytest.raises(AssertionError, match="ours is not"):
        assert_parity(lambda x: x.detach() * 2, lambda x: x * 2, [X])


def test_parity_catches_a_wrong_parameter_gradient():
    ours, theirs = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    ours, theirs = (w.double().detach().requires_grad_() for w in (ours, theirs))
    with pytest.raises(AssertionError, match="gradient of parameter 0"):
        assert_parity(
            lambda x: x * ours + 0 * ours.sum(), lambda x: x * theirs + (theirs - 1).sum(), [X],
            parameters=[(ours, theirs)],
        )  # fmt: skip


def test_parity_catches_a_nan_gradient_where_the_oracle_has_none():
    with pytest.raises(AssertionError, match="gradient of input 1: the oracle has none"):
        assert_parity(lambda x, y: x * 2 + (y * 0).abs().sqrt(), lambda x, y: x * 2, [X, X])


def test_relative_error_is_nan_for_nan():
    assert relative_error(torch.tensor([1.0]), torch.tensor([2.0])) == 0.5
    assert not relative_error(torch.tensor([float("nan")]), torch.tensor([2.0])) <= 1e9


def test_causal_catches_a_leak():
    assert_causal(lambda x: x.cumsum(1), X)
    with pytest.raises(AssertionError, match="step 0"):
        assert_causal(lambda x: x - x.mean(1, keepdim=True), X)


def test_causal_catches_a_leak_in_the_gradient_alone():
    def sly(x):
        future = x.flip(1).cumsum(1).flip(1)
        return x + future - future.detach()

    with pytest.raises(AssertionError, match=r"gradient|changed"):
        assert_causal(sly, X)


def normed(x):
    return torch.nn.functional.layer_norm(x, x.shape[-1:])


def next_step(x):
    return normed(x).roll(-1, 1)


@pytest.mark.parametrize(
    ("leak", "found"),
    [
        (lambda x: normed(x) + next_step(x), "changed"),
        (lambda x: normed(x) + next_step(x).detach(), "changed"),
        (lambda x: normed(x) + (next_step(x) - next_step(x).detach()), "gradient"),
    ],
)
def test_causal_catches_a_leak_behind_a_norm(leak, found):
    x = torch.randint(-8, 8, (2, 5, 8), generator=torch.Generator().manual_seed(0)).double()
    assert_causal(normed, x)
    with pytest.raises(AssertionError, match=found):
        assert_causal(leak, x)


def test_batch_independence_catches_batch_statistics():
    assert_batch_independent(torch.tanh, X)
    with pytest.raises(AssertionError, match="sample 0"):
        assert_batch_independent(lambda x: x - x.mean(0), X)


def test_equivariance_catches_positions():
    assert_permutation_equivariant(lambda x: x - x.mean(1, keepdim=True), X)
    with pytest.raises(AssertionError):
        assert_permutation_equivariant(lambda x: x * torch.arange(4).view(1, 4, 1), X)


@pytest.mark.parametrize("law", [assert_batch_independent, assert_permutation_equivariant])
def test_a_tolerance_below_rounding_is_refused(law):
    with refuses(ConfigError, "rtol", 1e-9, "1.2e-07 in torch.float32"):
        law(torch.tanh, X.float())
    law(torch.tanh, X.float(), rtol=1e-6)
    with refuses(ConfigError, "rtol", 1e-9, "7.8e-03 in torch.bfloat16"):
        assert_parity(torch.tanh, torch.tanh, [X], dtype=torch.bfloat16)


def bad_eps():
    raise ConfigError("eps", got=-1.0, want="positive", remedy="Use 1e-5.")


def test_refuses_wants_the_value_in_the_message():
    with refuses(ConfigError, "eps", -1.0):
        bad_eps()
    with pytest.raises(AssertionError, match="does not name"), refuses(ConfigError, -2.0):
        bad_eps()
    with pytest.raises(AssertionError, match="nothing was raised"), refuses(ConfigError):
        pass
    with pytest.raises(ConfigError), refuses(ShapeError):
        bad_eps()


def test_the_shape_checker_is_on_and_can_be_switched_off():
    from handbook_src.data.tasks import accuracy

    flat, targets = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
    with pytest.raises(Exception, match="targets"):
        accuracy(flat, targets)
    with unchecked():
        assert accuracy(flat, targets) == 1.0
    with pytest.raises(Exception, match="targets"):
        accuracy(flat, targets)
