"""Octave convolution against its composition from torch's operations, and against loops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.convolution.octave_conv import double, halve, octave_conv2d, split_channels
from handbook_src.testing import assert_batch_independent, assert_parity, refuses


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def octaves(high: int, low: int, size=(7, 6), b: int = 2) -> list[Tensor | None]:
    half = [math.ceil(n / 2) for n in size]
    return [draw(b, high, *size) if high else None, draw(b, low, *half, seed=1) if low else None]


def mean_of_those_there(x: Tensor) -> Tensor:
    """Average pooling of 2 x 2, written out."""
    high, wide = (math.ceil(n / 2) for n in x.shape[2:])
    cells = [x[..., 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((-2, -1)) for i in range(high) for j in range(wide)]
    return torch.stack(cells, -1).view(*x.shape[:2], high, wide)


def composed(high, low, weight, bias, high_out, groups, **geometry):
    """The four paths of eq. 3 and 4, each a convolution of torch's with its block of the weight."""
    part_high = 0 if high is None else high.shape[1] // groups

    def path(x, rows, columns):
        return F.conv2d(x, weight[rows][:, columns], groups=groups, **geometry)

    first, last = slice(None, high_out), slice(high_out, None)
    reads_high, reads_low = slice(None, part_high), slice(part_high, None)
    ups, downs = [], []
    if high is not None and high_out:
        ups.append(path(high, first, reads_high))
    if low is not None and high_out:
        part = path(low, first, reads_low)
        size = ups[0].shape[2:] if ups else [2 * n for n in part.shape[2:]]
        index = [torch.arange(n) // 2 for n in size]
        ups.append(part[..., index[0], :][..., index[1]])
    if high is not None and high_out < len(weight):
        downs.append(path(mean_of_those_there(high), last, reads_high))
    if low is not None and high_out < len(weight):
        downs.append(path(low, last, reads_low))
    shift = torch.zeros(len(weight), dtype=weight.dtype) if bias is None else bias
    y_high = sum(ups) + shift[:high_out, None, None] if high_out else None
    y_low = sum(downs) + shift[high_out:, None, None] if high_out < len(weight) else None
    return tuple(y for y in (y_high, y_low) if y is not None)


def ours(high, low, weight, bias, alpha, groups, **geometry):
    pair = octave_conv2d(high, low, weight, bias, alpha, groups=groups, **geometry)
    return tuple(y for y in pair if y is not None)


SETTINGS = [  # high and low inputs, outputs, share, groups, kernel, geometry
    (3, 2, 7, 0.5, 1, (3, 3), {"padding": 1}),
    (3, 2, 7, 0.5, 1, (1, 1), {}),
    (1, 1, 2, 0.5, 1, (5, 3), {"padding": (2, 1)}),
    (4, 2, 8, 0.25, 2, (3, 3), {"padding": 1}),
    (3, 2, 4, 0.25, 1, (3, 3), {"padding": 2, "dilation": 2}),
    (3, 2, 4, 0.75, 1, (3, 3), {"padding": 1, "stride": 2}),
    (3, 2, 4, 0.5, 1, (3, 5), {"padding": (1, 2), "stride": (2, 3)}),
    (5, 0, 4, 0.5, 1, (3, 3), {"padding": 1}),  # a first layer
    (3, 2, 4, 0.0, 1, (3, 3), {"padding": 1}),  # a last one
    (0, 5, 4, 0.5, 1, (3, 3), {"padding": 1}),
    (0, 5, 4, 1.0, 1, (3, 3), {"padding": 1}),
    (5, 0, 4, 1.0, 1, (3, 3), {"padding": 1}),
]


# ---------------------------------------------------------------- parity
@pytest.mark.parity("octave-conv")
@pytest.mark.parametrize("size", [(8, 6), (7, 5), (9, 1)])
@pytest.mark.parametrize("setting", SETTINGS)
def test_it_is_the_composition_of_four_convolutions(setting, size):
    high, low, out, alpha, groups, kernel, geometry = setting
    weight = draw(out, (high + low) // groups, *kernel, seed=2)
    for bias in (draw(out, seed=3), None):
        assert_parity(
            lambda *a: ours(*a, alpha, groups, **geometry),
            lambda *a: composed(*a, out - int(alpha * out), groups, **geometry),
            [*octaves(high, low, size), weight, bias],
        )


@pytest.mark.parity("octave-conv")
def test_an_even_kernel_with_its_stride_keeps_the_octave():
    weight = draw(4, 5, 4, 4, seed=2)
    geometry = {"stride": 2, "padding": 1}
    assert_parity(
        lambda *a: ours(*a, 0.5, 1, **geometry),
        lambda *a: composed(*a, 2, 1, **geometry),
        [*octaves(3, 2, (8, 12)), weight, draw(4, seed=3)],
    )


@pytest.mark.parity("octave-conv")
def test_the_definition_pixel_by_pixel():
    x_high, x_low = octaves(1, 1, (5, 4), b=1)
    weight = draw(2, 2, 3, 3, seed=2)
    y_high, y_low = octave_conv2d(x_high, x_low, weight, padding=1)

    def at(x, i, j):
        return x[0, 0, i, j] if 0 <= i < x.shape[2] and 0 <= j < x.shape[3] else 0.0

    def conv(x, w, i, j):
        return sum(w[m, n] * at(x, i + m - 1, j + n - 1) for m, n in itertools.product(range(3), repeat=2))

    pooled = mean_of_those_there(x_high)
    for i, j in itertools.product(range(5), range(4)):
        want = conv(x_high, weight[0, 0], i, j) + conv(x_low, weight[0, 1], i // 2, j // 2)
        torch.testing.assert_close(y_high[0, 0, i, j], want)
    for i, j in itertools.product(range(3), range(2)):
        want = conv(x_low, weight[1, 1], i, j) + conv(pooled, weight[1, 0], i, j)
        torch.testing.assert_close(y_low[0, 0, i, j], want)


@pytest.mark.parity("octave-conv")
def test_strides_do_not_matter_and_it_is_twice_differentiable():
    high, low = octaves(2, 1, (4, 3), b=1)
    weight = draw(2, 3, 3, 3, seed=2)
    want = octave_conv2d(high, low, weight, padding=1)
    got = octave_conv2d(high.mT.contiguous().mT, low.flip(1).flip(1), weight.mT.contiguous().mT, padding=1)
    torch.testing.assert_close(got, want)
    torch.autograd.gradgradcheck(
        lambda *a: octave_conv2d(*a, padding=1), [t.requires_grad_() for t in (high, low, weight)]
    )


# ---------------------------------------------------------------- laws
@pytest.mark.law("octave-conv")
@pytest.mark.parametrize("groups", [1, 5])
@pytest.mark.parametrize("geometry", [{}, {"stride": 2, "padding": (0, 3), "dilation": (2, 1)}])
def test_without_low_channels_it_is_a_convolution(geometry, groups):
    x, weight, bias = draw(2, 5, 7, 6), draw(10, 5 // groups, 3, 2, seed=2), draw(10, seed=3)
    y, low = octave_conv2d(x, None, weight, bias, 0.0, groups=groups, **geometry)
    assert low is None
    torch.testing.assert_close(y, F.conv2d(x, weight, bias, groups=groups, **geometry), rtol=1e-12, atol=1e-12)


@pytest.mark.law("octave-conv")
def test_with_low_channels_only_it_is_a_convolution_of_them():
    x, weight, bias = draw(2, 5, 7, 6), draw(4, 5, 3, 3, seed=2), draw(4, seed=3)
    high, y = octave_conv2d(None, x, weight, bias, 1.0, padding=1)
    assert high is None
    torch.testing.assert_close(y, F.conv2d(x, weight, bias, padding=1), rtol=1e-12, atol=1e-12)


@pytest.mark.law("octave-conv")
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (5, 8), (7, 3)])
def test_down_and_up_keep_constants_and_down_undoes_up(size):
    flat = torch.full((1, 2, *size), 3.0, dtype=torch.float64)
    assert (halve(flat) == 3).all()  # at odd borders too: what is not there does not count
    x = draw(2, 3, *size)
    torch.testing.assert_close(halve(double(x)), x)
    assert halve(x).shape[2:] == tuple(math.ceil(n / 2) for n in size)


@pytest.mark.law("octave-conv")
def test_the_octaves_stay_aligned():
    """A bright pixel of either octave shows up, in both, where it stands: no drift by half a pixel."""
    weight = torch.ones(2, 2, 1, 1, dtype=torch.float64)
    high, low = torch.zeros(1, 1, 8, 8, dtype=torch.float64), torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    high[..., 4:6, 2:4] = 1
    from_high = octave_conv2d(high, low, weight)
    low[..., 2, 1] = 1
    from_low = octave_conv2d(torch.zeros_like(high), low, weight)
    for a, b in (from_high, from_low):
        assert torch.equal(a, high)
        assert torch.equal(b, low)


@pytest.mark.law("octave-conv")
def test_a_sample_does_not_see_its_batch():
    weight = draw(4, 3, 3, 3, seed=2)
    assert_batch_independent(lambda x: octave_conv2d(x, halve(x[:, :1]), weight, padding=1)[0], draw(3, 2, 5, 4))


@pytest.mark.law("octave-conv")
@pytest.mark.parametrize(
    ("channels", "alpha", "split"),
    [(8, 0.5, (4, 4)), (10, 0.25, (8, 2)), (3, 0.5, (2, 1)), (100, 0.29, (71, 29)), (7, 0.0, (7, 0)), (7, 1.0, (0, 7))],
)
def test_low_channels_are_rounded_down(channels, alpha, split):
    assert split_channels(channels, alpha) == split


@pytest.mark.law("octave-conv")
def test_an_empty_batch_comes_back_empty():
    high, low = (t[:0] for t in octaves(3, 2))
    y_high, y_low = octave_conv2d(high, low, draw(4, 5, 3, 3), padding=1)
    assert y_high.shape == (0, 2, 7, 6)
    assert y_low.shape == (0, 2, 4, 3)


# ---------------------------------------------------------------- registration
@pytest.mark.registration("octave-conv")
def test_compiles_runs_on_meta_and_in_half(unchecked):
    high, low = (t.float() for t in octaves(3, 2))
    weight, bias = draw(4, 5, 3, 3, seed=2).float(), draw(4, seed=3).float()

    def run(*a):
        return octave_conv2d(*a, padding=1)

    want = run(high, low, weight, bias)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(high, low, weight, bias), want)
    ghosts = run(*(t.to("meta") for t in (high, low, weight, bias)))
    assert [g.shape for g in ghosts] == [w.shape for w in want]
    with torch.autocast("cpu", torch.bfloat16):
        assert {y.dtype for y in run(high, low, weight, bias)} == {torch.bfloat16}
    for dtype in (torch.bfloat16, torch.float16):
        for y, w in zip(run(*(t.to(dtype) for t in (high, low, weight, bias))), want, strict=True):
            assert y.dtype == dtype
            torch.testing.assert_close(y.float(), w, rtol=0.05, atol=8 * torch.finfo(dtype).eps * w.abs().max().item())


# ---------------------------------------------------------------- refusals
@pytest.mark.refusal("octave-conv")
@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan, 0.1])
def test_refuses_shares(alpha):
    with refuses(ConfigError, "alpha", alpha):
        split_channels(4, alpha)


@pytest.mark.refusal("octave-conv")
def test_refuses_octaves_that_do_not_fit():
    high, low = octaves(3, 2)
    weight = draw(4, 5, 3, 3)
    for a, b, said in (
        (None, None, "no octave"),
        (high, low[..., :2], (4, 2)),
        (high, high, (7, 6)),
        (high, low[:1], "1 low images"),
        (high, None, "3 high and 0 low"),
        (high[:, :2], low, "2 high and 2 low"),
        (high[0], low, "3 axes"),
        (high.long(), low, "torch.int64"),
        (high.float(), low, "torch.float32"),
    ):
        with refuses(ShapeError, said):
            octave_conv2d(a, b, weight, padding=1)


@pytest.mark.refusal("octave-conv")
def test_refuses_kernels_and_paddings_that_carry_the_grids_apart():
    for kernel, geometry, values in (
        ((3, 3), {}, (3, "padding 0", "Pass padding=1")),
        ((2, 2), {"padding": 1}, (2, "odd kernel", "Take 3 taps")),
        ((4, 4), {"padding": 1}, (4, "odd kernel", "Take 5 taps")),
        ((1, 1), {"padding": 1}, (1, "Pass padding=0")),
        ((3, 3), {"padding": 1, "dilation": 2}, ("dilation 2", "Pass padding=2")),
        ((3, 3), {"stride": 2}, ("(3, 2) high and (1, 1) low",)),
    ):
        with refuses(ShapeError, *values):
            octave_conv2d(*octaves(3, 2), draw(4, 5, *kernel), **geometry)
    assert octave_conv2d(octaves(3, 0)[0], None, draw(4, 3, 2, 2), alpha_out=0.0)[0].shape == (2, 4, 6, 5)


@pytest.mark.refusal("octave-conv")
def test_refuses_weights_groups_and_settings():
    high, low = octaves(3, 2)
    with refuses(ShapeError, "3 axes"):
        octave_conv2d(high, low, draw(4, 5, 3), padding=1)
    with refuses(ShapeError, "bias", (3,), "4 features"):
        octave_conv2d(high, low, draw(4, 5, 3, 3), draw(3), padding=1)
    with refuses(ShapeError, "groups", 5, "depthwise"):
        octave_conv2d(high, low, draw(5, 1, 3, 3), padding=1, groups=5)
    for name, value in (("groups", 0), ("groups", True), ("stride", 0), ("padding", -1), ("dilation", 0.5)):
        with refuses(ConfigError, name, value):
            octave_conv2d(high, low, draw(4, 5, 3, 3), **{"padding": 1, name: value})
