"""Every pooling against torch's, in float64, with every option; and what each is blind to."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from handbook_src.errors import ConfigError, KernelUnavailable, ShapeError
from handbook_src.functional.pooling import pooling as fn
from handbook_src.testing import assert_parity, refuses, unchecked

BACKENDS = ["reference", "auto"]
MAX = {1: (fn.max_pool1d, F.max_pool1d), 2: (fn.max_pool2d, F.max_pool2d), 3: (fn.max_pool3d, F.max_pool3d)}
AVG = {1: (fn.avg_pool1d, F.avg_pool1d), 2: (fn.avg_pool2d, F.avg_pool2d), 3: (fn.avg_pool3d, F.avg_pool3d)}
ADAPTIVE_AVG = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
ADAPTIVE_MAX = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}
SPATIAL = {1: [(1,), (7,), (12,)], 2: [(1, 1), (5, 8), (7, 7)], 3: [(1, 1, 1), (4, 5, 6)]}
CASES = [(axes, spatial) for axes, sizes in SPATIAL.items() for spatial in sizes]


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


# ---------------------------------------------------------------- parity
@pytest.mark.parity("max-pool")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("axes", "spatial"), CASES)
@pytest.mark.parametrize("lead", [(2, 3), (3,)])
def test_max_pool_is_torchs(axes, spatial, lead, backend):
    mine, torchs = MAX[axes]
    x = draw(*lead, *spatial)
    kernels = [1, 3, 4] if min(spatial) > 3 else [1]
    for k, stride, pad, dilation, ceil in itertools.product(kernels, (None, 1, 2, 3), (0, 1, 2), (1, 2), (False, True)):
        if 2 * pad > k or dilation * (k - 1) + 1 > min(spatial) + 2 * pad:
            continue
        args = (k, stride, pad, dilation, ceil)
        if k == 4 and stride == 2:
            assert_parity(lambda x, a=args: mine(x, *a, backend=backend), lambda x, a=args: torchs(x, *a), [x])
        for found, want in zip(mine(x, *args, True, backend=backend), torchs(x, *args, True), strict=True):
            assert torch.equal(found, want), args


@pytest.mark.law("max-pool")
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_a_window_of_padding_alone_is_minus_infinity_and_moves_nothing(axes):
    """Taps at -1 and 2 of two positions: torch's operation names place 6 of 4 and writes the gradient there."""
    x = draw(2, 3, *[2] * axes).requires_grad_()
    y, places = MAX[axes][0](x, 2, 1, 1, 3, return_indices=True)
    assert torch.equal(y, torch.full_like(y, -torch.inf))
    assert places.max() < 2**axes
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.zeros_like(x))
    with refuses(KernelUnavailable, "windows that reach the input"):
        MAX[axes][0](x, 2, 1, 1, 3, backend="torch")


@pytest.mark.law("max-pool")
def test_windows_of_padding_alone_are_found():
    for n, k, s, p, d, ceil in itertools.product(range(1, 7), range(1, 5), (1, 2, 3), (0, 1, 2), range(1, 5), (0, 1)):
        if 2 * p <= k and n + 2 * p > d * (k - 1):
            windows = fn.strided(n, k, s, p, d, bool(ceil))
            assert fn.misses(n, k, s, p, d, bool(ceil)) == bool((windows < 0).all(-1).any()), (n, k, s, p, d, ceil)


@pytest.mark.parity("max-pool")
@pytest.mark.parametrize("backend", BACKENDS)
def test_max_pool_takes_a_setting_for_each_axis(backend):
    args = ((2, 3), (3, 1), (1, 0), (1, 2))
    assert_parity(
        lambda x: fn.max_pool2d(x, *args, backend=backend), lambda x: F.max_pool2d(x, *args), [draw(2, 2, 7, 9)]
    )


@pytest.mark.parity("max-pool", "avg-pool")
@pytest.mark.parametrize("backend", BACKENDS)
def test_ceil_mode_fits_a_window_larger_than_the_input(backend):
    x = draw(1, 2, 2, 2)
    torch.testing.assert_close(fn.max_pool2d(x, 3, ceil_mode=True, backend=backend), F.max_pool2d(x, 3, ceil_mode=True))
    torch.testing.assert_close(fn.avg_pool2d(x, 3, ceil_mode=True, backend=backend), F.avg_pool2d(x, 3, ceil_mode=True))


@pytest.mark.parity("max-pool", "adaptive-pool")
@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_and_nans_go_where_torch_sends_them(backend):
    x = torch.tensor([[[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, float("nan")], [-1.0, -1.0, 2.0, 2.0], [-1, -1, 2, 2]]])
    for mine, torchs in (
        (lambda x: fn.max_pool2d(x, 2, backend=backend), lambda x: F.max_pool2d(x, 2)),
        (lambda x: fn.adaptive_max_pool(x, 2, 2, backend=backend), lambda x: F.adaptive_max_pool2d(x, 2)),
    ):
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [mine(leaves[0]), torchs(leaves[1])]
        assert outputs[0][0, 0, 1].isnan()
        torch.testing.assert_close(*outputs, equal_nan=True)
        grads = [torch.autograd.grad(y.nan_to_num().sum(), leaf)[0] for y, leaf in zip(outputs, leaves, strict=True)]
        torch.testing.assert_close(*grads, equal_nan=True)


@pytest.mark.parity("avg-pool")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("axes", "spatial"), CASES)
@pytest.mark.parametrize("lead", [(2, 3), (3,)])
def test_avg_pool_is_torchs(axes, spatial, lead, backend):
    mine, torchs = AVG[axes]
    x = draw(*lead, *spatial)
    kernels = [1, 2, 3] if min(spatial) > 3 else [1]
    divisors = (None,) if axes == 1 else (None, 1, -5)
    options = itertools.product(kernels, (None, 1, 2, 4), (0, 1), (False, True), (False, True), divisors)
    for k, stride, pad, ceil, include, divisor in options:
        if 2 * pad > k:
            continue
        args = (k, stride, pad, ceil, include) if axes == 1 else (k, stride, pad, ceil, include, divisor)
        if k == 3 and stride == 2:
            assert_parity(lambda x, a=args: mine(x, *a, backend=backend), lambda x, a=args: torchs(x, *a), [x])
        else:
            torch.testing.assert_close(mine(x, *args, backend=backend), torchs(x, *args), rtol=1e-12, atol=1e-14)


@pytest.mark.parity("adaptive-pool")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("axes", "spatial"), CASES)
@pytest.mark.parametrize("lead", [(2, 3), (3,)])
def test_adaptive_pools_are_torchs(axes, spatial, lead, backend):
    x = draw(*lead, *spatial)
    sizes = [1, 2, 3, 5, 13] if axes < 3 else [1, 3, 7]
    for size in sizes:
        assert_parity(
            lambda x, o=size: fn.adaptive_avg_pool(x, o, axes, backend=backend),
            lambda x, o=size: ADAPTIVE_AVG[axes](x, o),
            [x],
        )
        found = fn.adaptive_max_pool(x, size, axes, True, backend=backend)
        for mine, want in zip(found, ADAPTIVE_MAX[axes](x, size, True), strict=True):
            assert torch.equal(mine, want)


@pytest.mark.parity("adaptive-pool")
@pytest.mark.parametrize("backend", BACKENDS)
def test_none_keeps_an_axis(backend):
    x = draw(2, 3, 5, 7)
    for sizes in ((None, 2), (4, None), (None, None)):
        torch.testing.assert_close(
            fn.adaptive_avg_pool(x, sizes, 2, backend=backend), F.adaptive_avg_pool2d(x, sizes), rtol=1e-12, atol=0
        )
    assert torch.equal(fn.adaptive_max_pool(x, None, 2, backend=backend), x)


@pytest.mark.parity("global-pool")
@pytest.mark.parametrize("spatial", [(1,), (7,), (3, 5), (2, 3, 4), (2, 1, 3, 2)])
@pytest.mark.parametrize("keepdim", [False, True])
def test_global_pools_are_the_plain_reductions(spatial, keepdim):
    axes = tuple(range(2, 2 + len(spatial)))
    x = draw(3, 4, *spatial)
    assert_parity(lambda x: fn.global_pool(x, "mean", keepdim), lambda x: x.mean(axes, keepdim), [x])
    assert_parity(lambda x: fn.global_pool(x, "max", keepdim), lambda x: x.amax(axes, keepdim), [x])
    if len(spatial) < 4:
        ours, torchs = fn.global_pool(x, "max", True), ADAPTIVE_MAX[len(spatial)](x, 1)
        assert torch.equal(ours, torchs)


# ---------------------------------------------------------------- law
@pytest.mark.law("max-pool")
def test_pooling_commutes_with_shifts_by_its_stride_only():
    x = torch.zeros(1, 1, 16, dtype=torch.float64)
    x[..., 4:8] = draw(4).abs()
    y = fn.max_pool1d(x, 2)
    assert torch.equal(fn.max_pool1d(x.roll(2, -1), 2), y.roll(1, -1))
    assert not torch.equal(fn.max_pool1d(x.roll(1, -1), 2), y)


@pytest.mark.law("max-pool")
def test_the_maximum_commutes_with_rising_functions_and_routes_one_gradient():
    x = draw(2, 3, 6, 6).requires_grad_()
    torch.testing.assert_close(fn.max_pool2d(x.exp(), 2), fn.max_pool2d(x, 2).exp())
    (g,) = torch.autograd.grad(fn.max_pool2d(x, 2, backend="reference").sum(), x)
    assert (F.avg_pool2d(g, 2, divisor_override=1) == 1).all()
    assert set(g.unique().tolist()) == {0.0, 1.0}


@pytest.mark.law("avg-pool")
def test_the_mean_is_linear_and_a_convolution():
    x = draw(2, 3, 7, 7)
    weight = torch.full((3, 1, 3, 3), 1 / 9, dtype=torch.float64)
    torch.testing.assert_close(fn.avg_pool2d(x, 3, 2, 1), F.conv2d(x, weight, stride=2, padding=1, groups=3))
    torch.testing.assert_close(fn.avg_pool2d(2 * x, 2), 2 * fn.avg_pool2d(x, 2))


@pytest.mark.law("avg-pool")
def test_a_constant_stays_constant_unless_padding_is_counted():
    x = torch.ones(1, 1, 6, 6)
    assert (fn.avg_pool2d(x, 3, 1, 1, count_include_pad=False) == 1).all()
    assert fn.avg_pool2d(x, 3, 1, 1)[0, 0, 0, 0] == pytest.approx(4 / 9)


@pytest.mark.law("adaptive-pool")
@pytest.mark.parametrize(("size", "out"), [(12, 4), (9, 3), (7, 5), (5, 7), (10, 4), (1, 3)])
def test_windows_cover_everything_evenly(size, out):
    at = fn.adaptive(size, out)
    assert set(range(size)) == set(at[at >= 0].tolist())
    lengths = (at >= 0).sum(1)
    assert lengths.max() - lengths.min() <= (0 if size % out == 0 else 1)
    if size % out == 0:
        x = draw(2, 3, size)
        torch.testing.assert_close(fn.adaptive_avg_pool(x, out, 1), fn.avg_pool1d(x, size // out))


@pytest.mark.law("global-pool")
def test_a_global_pool_forgets_where():
    x = draw(2, 3, 4, 5)
    shuffled = x.flatten(2)[..., torch.randperm(20)].view(2, 3, 4, 5)
    for reduce in ("mean", "max"):
        torch.testing.assert_close(fn.global_pool(shuffled, reduce), fn.global_pool(x, reduce))
    torch.testing.assert_close(fn.global_pool(x, keepdim=True), fn.adaptive_avg_pool(x, 1, 2))


@pytest.mark.law("max-pool", "avg-pool")
def test_the_output_size_is_the_formula():
    for n, k, s, p, d in itertools.product((5, 8, 13), (1, 2, 3), (1, 2, 3), (0, 1), (1, 2)):
        if d * (k - 1) + 1 <= n:
            assert len(fn.strided(n, k, s, p, d)) == (n + 2 * p - d * (k - 1) - 1) // s + 1


# ---------------------------------------------------------------- registration
@pytest.mark.registration("max-pool", "avg-pool", "adaptive-pool", "global-pool")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_strides_and_empty_batches(dtype):
    x = torch.randn(2, 6, 8, 5).to(dtype)[:, ::2].transpose(2, 3)
    for call, want in (
        (lambda x, **b: fn.max_pool2d(x, 2, **b), F.max_pool2d(x.float(), 2)),
        (lambda x, **b: fn.avg_pool2d(x, 3, 2, 1, **b), F.avg_pool2d(x.float(), 3, 2, 1)),
        (lambda x, **b: fn.adaptive_avg_pool(x, (2, 3), 2, **b), F.adaptive_avg_pool2d(x.float(), (2, 3))),
        (lambda x, **b: fn.adaptive_max_pool(x, (2, 3), 2, **b), F.adaptive_max_pool2d(x.float(), (2, 3))),
    ):
        for backend in BACKENDS:
            kept = x.clone()
            y = call(x, backend=backend)
            assert y.dtype == dtype
            assert torch.equal(x, kept)
            assert call(x[:0], backend=backend).shape == (0, *want.shape[1:])
            if backend == "reference" and dtype.itemsize == 2:  # added in float32, rounded once
                assert torch.equal(y, want.to(dtype))
    for reduce in ("mean", "max"):
        assert fn.global_pool(x, reduce).dtype == dtype
        assert fn.global_pool(x[:0], reduce).shape == (0, 3)


@pytest.mark.registration("max-pool", "avg-pool", "adaptive-pool")
@pytest.mark.parametrize("backend", BACKENDS)
def test_they_compile_without_a_graph_break(backend):
    def run(x):
        a = fn.max_pool2d(x, 2, ceil_mode=True, backend=backend)
        b = fn.avg_pool2d(x, 3, 2, 1, backend=backend)
        return a.sum() + b.sum() + fn.adaptive_avg_pool(x, 3, 2, backend=backend).sum() + fn.global_pool(x, "max").sum()

    x = torch.randn(2, 3, 7, 8)
    with unchecked():
        torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="eager")(x), run(x))


@pytest.mark.registration("avg-pool", "max-pool", "adaptive-pool")
def test_second_derivatives_of_the_readable_maths():
    x = draw(1, 2, 5, 5).requires_grad_()
    for call in (
        lambda x: fn.avg_pool2d(x, 3, 2, 1, backend="reference"),
        lambda x: fn.max_pool2d(x, 2, backend="reference") ** 2,
        lambda x: fn.adaptive_avg_pool(x, 3, 2, backend="reference"),
    ):
        assert torch.autograd.gradgradcheck(call, x)


# ---------------------------------------------------------------- refusal
@pytest.mark.refusal("max-pool", "avg-pool")
@pytest.mark.parametrize(("name", "axes"), [(f"{kind}_pool{n}d", n) for kind in ("max", "avg") for n in (1, 2, 3)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_settings_and_inputs_are_refused(name, axes, backend):
    pool = getattr(fn, name)
    x = torch.randn(2, 3, *[6] * axes)
    for value in (0, -1, 1.5, True, "2", (2,) * (axes + 1), None):
        with refuses(ConfigError, f"{name} kernel_size"):
            pool(x, value, backend=backend)
    for value in (0, -2, 0.5, (1,) * (axes + 1)):
        with refuses(ConfigError, f"{name} stride"):
            pool(x, 2, value, backend=backend)
    with refuses(ConfigError, f"{name} padding", "-1"):
        pool(x, 2, 1, -1, backend=backend)
    with refuses(ConfigError, f"{name} padding", "2 with a kernel of 2"):
        pool(x, 2, 1, 2, backend=backend)
    with refuses(ShapeError, "6 positions", "at least 7"):
        pool(x, 7, backend=backend)
    for wrong in (x[0, 0], x[None]):
        with refuses(ShapeError, f"{name} input", tuple(wrong.shape)):
            pool(wrong, 2, backend=backend)
    with refuses(ShapeError, "0 positions"):
        pool(x[..., :0], 1, backend=backend)
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with refuses(ShapeError, dtype):
            pool(x.to(dtype), 2, backend=backend)
    with refuses(ConfigError, "backend", "'triton'"):
        pool(x, 2, backend="triton")


@pytest.mark.refusal("avg-pool")
@pytest.mark.parametrize("divisor", [0, 1.5, True])
def test_a_divisor_of_nothing_is_refused(divisor):
    with refuses(ConfigError, "divisor_override", repr(divisor)):
        fn.avg_pool2d(torch.randn(1, 1, 4, 4), 2, divisor_override=divisor)


@pytest.mark.refusal("adaptive-pool")
@pytest.mark.parametrize("pool", [fn.adaptive_avg_pool, fn.adaptive_max_pool])
@pytest.mark.parametrize("backend", BACKENDS)
def test_adaptive_sizes_that_are_none_are_refused(pool, backend):
    x = torch.randn(2, 3, 5, 5)
    for size in (0, -1, 1.5, True, (2, -1), "2"):
        with refuses(ConfigError, "output_size"):
            pool(x, size, 2, backend=backend)
    with refuses(ConfigError, "output_size", (1, 2, 3)):
        pool(x, (1, 2, 3), 2, backend=backend)
    for axes in (0, 4, True, "2"):
        with refuses(ConfigError, "axes", repr(axes)):
            pool(x, 1, axes, backend=backend)
    with refuses(ShapeError, "(3, 5)"):
        pool(x[0, :, 0], 1, 2, backend=backend)
    with refuses(ShapeError, "(2, 3, 5, 0)"):
        pool(x[..., :0], 1, 2, backend=backend)
    with refuses(ShapeError, torch.int64):
        pool(x.long(), 1, 2, backend=backend)


@pytest.mark.refusal("global-pool")
def test_a_global_pool_of_nothing_is_refused():
    with refuses(ShapeError, "(2, 3)"):
        fn.global_pool(torch.randn(2, 3))
    with refuses(ShapeError, "(2, 3, 0)"):
        fn.global_pool(torch.randn(2, 3, 0))
    with refuses(ConfigError, "'sum'"):
        fn.global_pool(torch.randn(2, 3, 4), "sum")
    with refuses(ShapeError, torch.int64):
        fn.global_pool(torch.ones(2, 3, 4, dtype=torch.int64))


@pytest.mark.refusal("max-pool", "avg-pool", "global-pool")
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_channels_are_refused(backend):
    x = torch.ones(2, 0, 4, 4)
    for call in (fn.max_pool2d, fn.avg_pool2d):
        with refuses(ShapeError, "(2, 0, 4, 4)", "channel"):
            call(x, 2, backend=backend)
    for reduce in ("mean", "max"):
        with refuses(ShapeError, "(2, 0, 4, 4)", "channel"):
            fn.global_pool(x, reduce)


@pytest.mark.registration("avg-pool")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_volumes_of_halves_have_means(backend, dtype):
    x = torch.randn(1, 2, 4, 4, 4).to(dtype)
    assert torch.equal(fn.avg_pool3d(x, 2, backend=backend), F.avg_pool3d(x.float(), 2).to(dtype))
    with torch.autocast("cpu", dtype):
        mine, torchs = fn.avg_pool3d(x, 2), F.avg_pool3d(x, 2)
    assert mine.dtype == torchs.dtype == torch.float32
    assert torch.equal(mine, torchs)
