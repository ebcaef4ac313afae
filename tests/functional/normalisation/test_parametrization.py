"""Weight norm and spectral norm as functions: against torch's, and what they promise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrizations as theirs

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.normalisation.parametrization import (
    as_matrix,
    norm_except,
    power_iteration,
    spectral_norm,
    weight_norm,
)
from handbook_src.testing import assert_parity, refuses

SHAPES = [(1, 1), (5, 3), (4, 3, 1, 1), (4, 3, 3, 2), (2, 5, 3)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parity("weight-norm")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dim", [0, 1, -1, -2, None])
def test_weight_norm_is_torchs(shape, dim):
    v = draw(*shape)
    g = draw(*norm_except(v, dim).shape, seed=1)
    kept = -1 if dim is None else dim % len(shape)  # torch's private -1 means None
    assert_parity(
        lambda v, g: weight_norm(v, g, dim),
        lambda v, g: v * (g / torch.norm_except_dim(v, 2, kept)),
        [v, g],
    )


@pytest.mark.parity("weight-norm")
def test_weight_norm_of_a_vector():
    v, g = draw(4), draw(4, seed=1)
    torch.testing.assert_close(weight_norm(v, g), g * v.sign())
    torch.testing.assert_close(weight_norm(v, g[0], None), g[0] * v / v.norm())


@pytest.mark.law("weight-norm")
@pytest.mark.parametrize("dim", [0, 1, -1, None])
def test_the_length_is_g_whatever_v_is(dim):
    v = draw(5, 3, 2)
    g = draw(*norm_except(v, dim).shape, seed=1).abs()
    for scale in (1.0, 1e-6, 1e6):
        torch.testing.assert_close(norm_except(weight_norm(v * scale, g, dim), dim), g)


@pytest.mark.law("weight-norm")
def test_the_gradient_of_v_is_orthogonal_to_v():
    v, g = draw(5, 3).requires_grad_(), draw(5, 1, seed=1)
    (grad,) = torch.autograd.grad((weight_norm(v, g) * draw(5, 3, seed=2)).sum(), v)
    torch.testing.assert_close((grad * v).sum(1), torch.zeros(5, dtype=v.dtype), rtol=0, atol=1e-12)


@pytest.mark.registration("weight-norm")
def test_half_precision_sums_in_float32():
    v = torch.full((1, 4096), 16.0, dtype=torch.float16)  # squares sum to 2^20, past float16's 65504
    w = weight_norm(v, torch.full((1, 1), 64.0, dtype=torch.float16))
    assert w.dtype == torch.float16
    torch.testing.assert_close(w, torch.ones_like(w))


@pytest.mark.refusal("weight-norm")
def test_weight_norm_refuses_by_value():
    with refuses(ShapeError, (5,), (5, 1), "dim=0"):
        weight_norm(draw(5, 3), draw(5))
    for dim in (2, -3):
        with refuses(ConfigError, "dim", dim):
            weight_norm(draw(5, 3), draw(5, 1), dim)


def converged(weight: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    u, _, vt = torch.linalg.svd(as_matrix(weight, dim).detach(), full_matrices=False)
    return u[:, 0], vt[0]


@pytest.mark.parity("spectral-norm")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_spectral_norm_is_division_by_the_svds_largest_value(shape, dim):
    weight = draw(*shape)
    u, v = converged(weight, dim)
    rows = dim % len(shape)
    order = [rows, *(a for a in range(len(shape)) if a != rows)]
    assert_parity(
        lambda w: spectral_norm(w, u, v, dim),
        lambda w: w / torch.linalg.matrix_norm(w.permute(order).flatten(1), 2),
        [weight],
    )


@pytest.mark.parity("spectral-norm")
@pytest.mark.parametrize("steps", [1, 3])
def test_power_iteration_is_torchs_step_for_step(steps):
    weight, u, v = draw(5, 7), draw(5, seed=1), draw(7, seed=2)
    oracle = theirs._SpectralNorm(weight, steps)
    oracle._u, oracle._v = u.clone(), v.clone()
    want = oracle(weight)
    u, v = power_iteration(weight, u, v, steps)
    torch.testing.assert_close((u, v), (oracle._u, oracle._v), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(spectral_norm(weight, u, v), want, rtol=1e-12, atol=1e-12)


@pytest.mark.law("spectral-norm")
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (4, 3, 3, 3)])
def test_the_largest_singular_value_becomes_one(shape):
    weight = draw(*shape)
    matrix = as_matrix(weight)
    u, v = power_iteration(matrix, draw(len(matrix), seed=1), draw(matrix.shape[1], seed=2), 1000)
    top = torch.linalg.matrix_norm(as_matrix(spectral_norm(weight, u, v)), 2)
    torch.testing.assert_close(top, torch.ones_like(top), rtol=1e-9, atol=0)


@pytest.mark.law("spectral-norm")
def test_the_estimate_never_passes_the_truth_and_improves():
    weight = draw(20, 30)
    truth = torch.linalg.matrix_norm(weight, 2)
    u, v = power_iteration(weight, draw(20, seed=1), draw(30, seed=2), 1)
    last = torch.zeros(())
    for _ in range(30):
        u, v = power_iteration(weight, u, v, 1)
        sigma = u @ weight @ v
        assert last - 1e-12 <= sigma <= truth + 1e-12
        last = sigma


@pytest.mark.law("spectral-norm")
def test_no_steps_change_nothing():
    u, v = draw(3), draw(4)
    assert power_iteration(draw(3, 4), u, v, 0) == (u, v)


@pytest.mark.refusal("spectral-norm")
def test_spectral_norm_refuses_an_axis_that_is_not_there():
    for dim in (2, -3):
        with refuses(ConfigError, "dim", dim, 2):
            spectral_norm(draw(5, 3), draw(5), draw(3), dim)
