"""Stochastic pooling against its closed-form expectation, fractional pooling against torch's with the same samples."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from handbook_src.errors import ConfigError, DataError, ShapeError
from handbook_src.functional.pooling.random_pooling import fractional_max_pool2d, stochastic_pool2d
from handbook_src.testing import assert_parity, refuses, unchecked

BACKENDS = ["reference", "auto"]


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def expectation(x: Tensor, k: int, s: int, p: int) -> Tensor:
    """Weighted mean of each window: sums of squares over sums, by torch's average pooling."""
    total = F.avg_pool2d(x, k, s, p, divisor_override=1)
    return F.avg_pool2d(x * x, k, s, p, divisor_override=1) / total.where(total > 0, 1)


# ---------------------------------------------------------------- parity
@pytest.mark.parity("stochastic-pool")
@pytest.mark.parametrize(("k", "s", "p"), [(1, 1, 0), (2, 2, 0), (3, 2, 1), (3, 1, 0), (2, 3, 1)])
@pytest.mark.parametrize("shape", [(2, 3, 7, 6), (3, 5, 5), (1, 1, 3, 3)])
def test_evaluation_is_the_closed_form(shape, k, s, p):
    x = draw(*shape).abs() + 0.01
    assert_parity(lambda x: stochastic_pool2d(x, k, s, p, False), lambda x: expectation(x, k, s, p), [x])


@pytest.mark.parity("stochastic-pool")
def test_draws_come_in_proportion_to_the_values(generator):
    x = torch.tensor([[[[1.0, 0.0], [3.0, 6.0]]]], dtype=torch.float64)
    many = x.expand(20_000, 1, 2, 2)
    drawn = stochastic_pool2d(many, 2, generator=generator).flatten()
    for value, share in ((1.0, 0.1), (3.0, 0.3), (6.0, 0.6), (0.0, 0.0)):
        assert (drawn == value).double().mean().item() == pytest.approx(share, abs=0.015)  # 4 deviations
    assert drawn.mean().item() == pytest.approx(stochastic_pool2d(x, 2, training=False).item(), rel=0.015)


@pytest.mark.parity("stochastic-pool")
def test_the_drawn_value_gets_the_whole_gradient(generator):
    x = (draw(3, 2, 6, 6).abs() + 0.01).requires_grad_()
    y = stochastic_pool2d(x, 2, generator=generator)
    (g,) = torch.autograd.grad((y * (weight := draw(*y.shape))).sum(), x)
    windows = g.unfold(2, 2, 2).unfold(3, 2, 2).flatten(-2)
    assert ((windows != 0).sum(-1) == 1).all()
    torch.testing.assert_close(windows.sum(-1), weight)
    chosen = (x.unfold(2, 2, 2).unfold(3, 2, 2).flatten(-2) * (windows != 0)).sum(-1)
    torch.testing.assert_close(chosen, y)


@pytest.mark.parity("fractional-max-pool")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lead", [(2, 3), (1, 1)])
@pytest.mark.parametrize(
    ("size", "k", "out"),
    [((7, 9), 2, (3, 5)), ((7, 9), (2, 3), 4), ((8, 8), 1, 8), ((5, 5), 3, 1), ((6, 7), 2, (5, 1)), ((20, 13), 2, 11)],
)
def test_fractional_pooling_is_torchs(size, k, out, lead, backend):
    x, u = draw(*lead, *size), torch.rand(*lead, 2, dtype=torch.float64)
    mine = fractional_max_pool2d(x, k, out, return_indices=True, _random_samples=u, backend=backend)
    torchs = F.fractional_max_pool2d(x, k, out, return_indices=True, _random_samples=u)
    for found, want in zip(mine, torchs, strict=True):
        assert torch.equal(found, want)
    assert_parity(
        lambda x: fractional_max_pool2d(x, k, out, _random_samples=u, backend=backend),
        lambda x: F.fractional_max_pool2d(x, k, out, _random_samples=u),
        [x],
    )


@pytest.mark.parity("fractional-max-pool")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ratio", [0.7, (0.5, 0.9)])
def test_a_ratio_follows_the_input(ratio, backend):
    for size in ((10, 10), (13, 20)):
        x = draw(2, 3, *size)
        want = F.fractional_max_pool2d(x, 2, output_ratio=ratio if isinstance(ratio, tuple) else (ratio, ratio)).shape
        assert fractional_max_pool2d(x, 2, output_ratio=ratio, backend=backend).shape == want


@pytest.mark.parity("fractional-max-pool")
def test_one_image_without_a_batch():
    x, u = draw(3, 9, 9), torch.rand(1, 3, 2, dtype=torch.float64)
    both = [fractional_max_pool2d(x, 2, 5, _random_samples=u, backend=b) for b in BACKENDS]
    assert both[0].shape == (3, 5, 5)
    assert torch.equal(*both)


@pytest.mark.parity("fractional-max-pool")
@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_of_another_dtype_are_converted(backend):
    x, u = draw(2, 3, 9, 9), torch.rand(2, 3, 2)
    want = F.fractional_max_pool2d(x, 2, 5, _random_samples=u.double())
    assert torch.equal(fractional_max_pool2d(x, 2, 5, _random_samples=u, backend=backend), want)
    half = torch.rand(2, 3, 2).bfloat16()
    wide = F.fractional_max_pool2d(x.bfloat16().float(), 2, 5, _random_samples=half.float())
    found = fractional_max_pool2d(x.bfloat16(), 2, 5, _random_samples=half, backend="reference")
    assert torch.equal(found.float(), wide)
    for bad in (torch.ones(2, 3, 2, dtype=torch.int64), torch.rand(2, 3, 2, device="meta")):
        with refuses(ShapeError, "_random_samples", bad.dtype, bad.device):
            fractional_max_pool2d(x, 2, 5, _random_samples=bad, backend=backend)


# ---------------------------------------------------------------- law
@pytest.mark.law("stochastic-pool")
@pytest.mark.parametrize("scale", [1e-25, 1e-38, 1e25, 3e38])
def test_the_scale_of_a_window_does_not_matter(scale, generator):
    x = torch.full((1, 1, 2, 2), scale)
    for training in (True, False):
        y = stochastic_pool2d(x, 2, training=training, generator=generator)
        if scale < 1e38 or training:
            torch.testing.assert_close(y, x[..., :1, :1], rtol=1e-6, atol=0)


@pytest.mark.law("stochastic-pool")
@pytest.mark.parametrize("training", [True, False])
def test_nan_is_never_swallowed_and_infinity_outweighs_the_rest(training, generator):
    nan, inf = float("nan"), float("inf")
    for window in ([1.0, 2.0, nan, 3.0], [nan, 1.0, 1.0, 1.0], [1.0, 1.0, inf, nan]):
        x = torch.tensor(window).view(1, 1, 2, 2)
        assert all(stochastic_pool2d(x, 2, training=training, generator=generator).isnan() for _ in range(5))
    x = torch.tensor([1.0, inf, 2.0, 0.0]).view(1, 1, 2, 2)
    assert all(stochastic_pool2d(x, 2, training=training, generator=generator) == inf for _ in range(5))


@pytest.mark.law("stochastic-pool")
def test_it_stays_between_mean_and_maximum_and_keeps_zero_windows(generator):
    x = draw(2, 3, 8, 8).relu()
    x[0, 0] = 0
    y = stochastic_pool2d(x, 2, training=False)
    assert (y <= F.max_pool2d(x, 2) + 1e-12).all()
    assert (y >= F.avg_pool2d(x, 2) - 1e-12).all()
    for training in (True, False):
        leaf = x.clone().requires_grad_()
        out = stochastic_pool2d(leaf, 2, training=training, generator=generator)
        assert (out[0, 0] == 0).all()
        (g,) = torch.autograd.grad(out.sum(), leaf)
        assert g.isfinite().all()


@pytest.mark.law("stochastic-pool")
def test_one_positive_value_is_always_drawn(generator):
    x = torch.zeros(500, 1, 3, 3)
    place = torch.randint(9, (500,), generator=generator)
    x.flatten(1)[torch.arange(500), place] = 2.5
    for training in (True, False):
        assert (stochastic_pool2d(x, 3, training=training, generator=generator) == 2.5).all()
    assert (stochastic_pool2d(x + 0, 3, 1, 1, generator=generator)[..., 1, 1] == 2.5).all()


@pytest.mark.law("fractional-max-pool")
@pytest.mark.parametrize("backend", BACKENDS)
def test_windows_rise_and_reach_both_ends(backend):
    ramp = torch.arange(30.0).expand(30, 30).contiguous()
    for _ in range(20):
        y = fractional_max_pool2d(ramp[None, None], 2, 21, backend=backend)[0, 0]
        steps = y[0].diff()
        assert set(steps.tolist()) <= {1.0, 2.0}  # the ratio 28/20 lies between
        assert y[0, 0] == 1
        assert y[0, -1] == 29


# ---------------------------------------------------------------- registration
@pytest.mark.registration("stochastic-pool", "fractional-max-pool")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_strides_and_empty_batches(dtype, generator):
    x = torch.randn(2, 6, 8, 5).abs().to(dtype)[:, ::2].transpose(2, 3)
    for training in (True, False):
        y = stochastic_pool2d(x, 2, training=training, generator=generator)
        assert y.dtype == dtype
        assert y.isfinite().all()
        assert stochastic_pool2d(x[:0], 2, training=training).shape == (0, 3, 2, 4)
    for backend in BACKENDS:
        assert fractional_max_pool2d(x, 2, 3, backend=backend).dtype == dtype
        assert fractional_max_pool2d(x[:0], 2, 3, backend=backend).shape == (0, 3, 3, 3)


@pytest.mark.registration("stochastic-pool")
def test_a_generator_makes_the_draws_repeat_and_large_halves_do_not_overflow():
    x = torch.rand(4, 3, 8, 8)
    a, b = (stochastic_pool2d(x, 2, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a, b)
    big = torch.full((1, 1, 4, 4), 6e4, dtype=torch.float16)
    assert (stochastic_pool2d(big, 2, training=False) == big[..., :2, :2]).all()


@pytest.mark.registration("stochastic-pool")
def test_it_compiles_without_a_graph_break():
    x = torch.rand(2, 3, 6, 6)
    with unchecked():
        run = torch.compile(lambda x: stochastic_pool2d(x, 2, training=False), fullgraph=True, backend="eager")
        torch.testing.assert_close(run(x), stochastic_pool2d(x, 2, training=False))


# ---------------------------------------------------------------- refusal
@pytest.mark.refusal("stochastic-pool")
def test_what_is_no_probability_is_refused():
    x = torch.rand(1, 1, 4, 4)
    x[..., 2, 2] = -0.25
    with refuses(DataError, "-0.25", "ReLU"):
        stochastic_pool2d(x, 2)
    with refuses(ShapeError, "(4, 4)"):
        stochastic_pool2d(x[0, 0], 2)
    with refuses(ShapeError, torch.int64):
        stochastic_pool2d(torch.ones(1, 1, 4, 4, dtype=torch.int64), 2)
    with refuses(ShapeError, "4 positions"):
        stochastic_pool2d(x.abs(), 5)
    for stride in (0, -1, 1.5):
        with refuses(ConfigError, "stride", repr(stride)):
            stochastic_pool2d(x.abs(), 2, stride)
    with refuses(ConfigError, "padding", "(2, 2)"):
        stochastic_pool2d(x.abs(), 2, 1, 2)
    with refuses(ConfigError, "kernel_size", "0"):
        stochastic_pool2d(x.abs(), 0)


@pytest.mark.refusal("fractional-max-pool")
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_does_not_fit_is_refused(backend):
    x = torch.rand(2, 3, 8, 8)
    for size, ratio in ((None, None), (4, 0.5)):
        with refuses(ConfigError, "exactly one"):
            fractional_max_pool2d(x, 2, size, ratio, backend=backend)
    for ratio in (0.0, 1.0, -0.5, float("nan"), 2, (0.5, 0.5, 0.5), (0.5, 1.5), (0.5, None, 0.7)):
        with refuses(ConfigError, "output_ratio", repr(ratio)):
            fractional_max_pool2d(x, 2, output_ratio=ratio, backend=backend)
    for size in (0, -1, 1.5, (1, 2, 3)):
        with refuses(ConfigError, "output_size", repr(size) if not isinstance(size, tuple) else size):
            fractional_max_pool2d(x, 2, size, backend=backend)
    with refuses(ConfigError, "from output_ratio"):
        fractional_max_pool2d(x, 1, output_ratio=0.1, backend=backend)
    with refuses(ShapeError, "8 positions", "at least 9"):
        fractional_max_pool2d(x, 2, 8, backend=backend)
    with refuses(ShapeError, "(2, 3, 1)", "(2, 3, 2)"):
        fractional_max_pool2d(x, 2, 4, _random_samples=torch.rand(2, 3, 1), backend=backend)
    with refuses(ShapeError, "(8, 8)"):
        fractional_max_pool2d(x[0, 0], 2, 4, backend=backend)
    with refuses(ShapeError, torch.int64):
        fractional_max_pool2d(x.long(), 2, 4, backend=backend)
