"""Convolutions against torch's and against loops, in float64, with every option; shift, adjoint and group laws."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.convolution.conv import conv1d, conv2d, conv3d, conv4d, output_size
from handbook_src.testing import assert_batch_independent, assert_parity, refuses

IDS = ("conv1d", "conv2d", "conv3d", "conv4d")
BACKENDS = ["reference", "torch"]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def brute(x: Tensor, w: Tensor, b: Tensor | None, stride, padding, dilation, groups: int) -> Tensor:
    """The formula, one output entry at a time; ``padding`` zeros at both ends of each axis."""
    axes, kernel = w.ndim - 2, w.shape[2:]
    out = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
    ]
    part, filters = w.shape[1], w.shape[0] // groups
    rows = []
    for at in itertools.product(range(x.shape[0]), range(w.shape[0]), *map(range, out)):
        sample, o, *i = at
        total = x.new_zeros(()) if b is None else b[o]
        for tap in itertools.product(*map(range, kernel)):
            where = [i[a] * stride[a] + tap[a] * dilation[a] - padding[a] for a in range(axes)]
            if all(0 <= j < n for j, n in zip(where, x.shape[2:], strict=True)):
                first = o // filters * part
                total = total + x[(sample, slice(first, first + part), *where)] @ w[(o, slice(None), *tap)]
        rows.append(total)
    return torch.stack(rows).view(x.shape[0], w.shape[0], *out)


# ---------------------------------------------------------------- parity
CASES = [
    # input, weight, options
    ((2, 3, 9), (4, 3, 3), {}),
    ((1, 1, 1), (1, 1, 1), {}),
    ((2, 4, 13), (6, 2, 5), {"stride": 3, "padding": 2, "dilation": 2, "groups": 2}),
    ((4, 13), (6, 4, 4), {"padding": "same", "dilation": 3}),
    ((3, 4, 8), (4, 1, 4), {"padding": "same", "groups": 4}),
    ((2, 4, 8), (3, 4, 3), {"padding": "valid", "stride": (2,)}),
    ((0, 4, 8), (3, 4, 3), {"padding": 1}),
    ((2, 3, 7, 6), (4, 3, 3, 2), {}),
    ((2, 4, 9, 8), (6, 2, 3, 4), {"stride": (2, 3), "padding": (2, 0), "dilation": (1, 2), "groups": 2}),
    ((4, 5, 7), (2, 4, 2, 4), {"padding": "same", "dilation": (3, 1)}),
    ((2, 4, 5, 5), (8, 1, 3, 3), {"groups": 4, "padding": 1}),
    ((2, 3, 4, 4), (5, 3, 1, 1), {}),
    ((2, 3, 4, 5, 6), (4, 3, 2, 3, 1), {}),
    ((2, 4, 5, 6, 7), (6, 2, 3, 2, 3), {"stride": (2, 1, 3), "padding": (1, 2, 0), "dilation": (2, 1, 2), "groups": 2}),
    ((4, 3, 4, 5), (2, 4, 2, 3, 2), {"padding": "same"}),
]
TORCHS = {1: (conv1d, F.conv1d), 2: (conv2d, F.conv2d), 3: (conv3d, F.conv3d)}


def torch_without_warning(theirs, x, w, b, padding=0, **options):
    """Torch's operation; where an odd ``same`` makes it warn of a copy, the copy is made here."""
    dilation = options.get("dilation", 1)
    spans = [
        d * (k - 1)
        for d, k in zip(
            dilation if isinstance(dilation, tuple) else (dilation,) * (w.ndim - 2), w.shape[2:], strict=True
        )
    ]
    if padding != "same" or all(s % 2 == 0 for s in spans):
        return theirs(x, w, b, padding=padding, **options)
    x = F.pad(x, [end for s in reversed(spans) for end in (s // 2, s - s // 2)])
    return theirs(x, w, b, **options)


@pytest.mark.parity("conv1d", "conv2d", "conv3d", "dilated-conv", "grouped-conv")
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "weight", "options"), CASES)
def test_convolutions_are_torchs(shape, weight, options, bias, backend):
    mine, theirs = TORCHS[len(weight) - 2]
    assert_parity(
        lambda x, w, b: mine(x, w, b, **options, backend=backend),
        lambda x, w, b: torch_without_warning(theirs, x, w, b, **options),
        [draw(*shape), draw(*weight, seed=1), draw(weight[0], seed=2) if bias else None],
    )


@pytest.mark.parity("conv1d")
@pytest.mark.parametrize("dilation", [1, 3])
def test_same_with_an_even_kernel_is_torchs_own(dilation):
    x, w = draw(2, 3, 8), draw(4, 3, 4, seed=1)
    with warnings.catch_warnings():  # it warns, once a process, that it may copy
        warnings.simplefilter("ignore")
        want = F.conv1d(x, w, padding="same", dilation=dilation)
    torch.testing.assert_close(conv1d(x, w, padding="same", dilation=dilation), want)


FOUR = [
    ((2, 2, 3, 2, 3, 2), (3, 2, 2, 1, 2, 2), (1, 1, 1, 1), (0, 0, 0, 0), (1, 1, 1, 1), 1),
    ((1, 1, 1, 1, 1, 1), (1, 1, 1, 1, 1, 1), (1, 1, 1, 1), (0, 0, 0, 0), (1, 1, 1, 1), 1),
    ((1, 2, 3, 3, 3, 3), (2, 2, 3, 3, 3, 3), (1, 1, 1, 1), (1, 0, 0, 0), (1, 1, 1, 1), 1),
    ((1, 4, 5, 3, 4, 3), (4, 2, 2, 2, 2, 1), (2, 1, 3, 2), (1, 0, 1, 0), (2, 1, 2, 3), 2),
    ((1, 3, 4, 2, 2, 3), (6, 1, 3, 2, 1, 2), (3, 2, 1, 1), (2, 1, 0, 1), (1, 2, 1, 1), 3),
]


@pytest.mark.parity("conv4d")
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "weight", "stride", "padding", "dilation", "groups"), FOUR)
def test_conv4d_is_the_loop(shape, weight, stride, padding, dilation, groups, bias, backend):
    assert_parity(
        lambda x, w, b: conv4d(x, w, b, stride, padding, dilation, groups, backend=backend),
        lambda x, w, b: brute(x, w, b, stride, padding, dilation, groups),
        [draw(*shape), draw(*weight, seed=1), draw(weight[0], seed=2) if bias else None],
    )


@pytest.mark.parity("conv4d")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding", ["same", "valid", 1])
def test_conv4d_names_of_padding_and_no_batch(padding, backend):
    x, w = draw(2, 3, 4, 3, 5), draw(4, 2, 2, 3, 1, 4, seed=1)
    before, after = {"same": ([0, 1, 0, 1], [1, 1, 0, 2]), "valid": ([0] * 4, [0] * 4), 1: ([1] * 4, [1] * 4)}[padding]
    flat = [end for pair in zip(before[::-1], after[::-1], strict=True) for end in pair]
    if padding == "valid":
        w = w[..., :3]
    want = brute(F.pad(x, flat)[None], w, None, (1,) * 4, (0,) * 4, (1,) * 4, 1)[0]
    torch.testing.assert_close(conv4d(x, w, padding=padding, backend=backend), want)


@pytest.mark.parity("conv4d")
def test_one_step_of_time_is_a_3d_convolution():
    x, w = draw(2, 3, 1, 4, 5, 4), draw(4, 3, 1, 3, 2, 3, seed=1)
    torch.testing.assert_close(conv4d(x, w)[:, :, 0], F.conv3d(x[:, :, 0], w[:, :, 0]))


@pytest.mark.parity("conv1d", "conv2d")
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_axis_that_padding_fills_gives_the_bias(backend):
    b = draw(4)
    y = conv1d(draw(2, 3, 0), draw(4, 3, 3, seed=1), b, padding=2, backend=backend)
    assert torch.equal(y, b[:, None].expand(2, 4, 2))
    y = conv2d(draw(2, 3, 0, 5), draw(4, 3, 3, 3, seed=1), b, padding=2, backend=backend)
    assert torch.equal(y, b[:, None, None].expand(2, 4, 2, 7))


CALLS = {
    "conv1d": (conv1d, (2, 4, 9), (6, 2, 3)),
    "conv2d": (conv2d, (2, 4, 6, 5), (6, 2, 3, 2)),
    "conv3d": (conv3d, (2, 4, 4, 3, 4), (6, 2, 2, 3, 2)),
    "conv4d": (conv4d, (2, 4, 3, 2, 4, 3), (6, 2, 2, 2, 2, 2)),
}
ALL = pytest.mark.parametrize(("call", "shape", "weight"), CALLS.values(), ids=CALLS.keys())


@pytest.mark.parity(*IDS)
@ALL
@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter_and_inputs_stay(call, shape, weight, backend):
    x, w = draw(*shape), draw(*weight, seed=1)
    wide = draw(*shape[:-1], 2 * shape[-1])[..., ::2]
    views = [x.transpose(0, 1).contiguous().transpose(0, 1), x.flip(0), wide, x.expand(2, *x.shape)[1]]
    for view in views:
        kept, taps = view.clone(), w.flip(-1)
        y = call(view, taps, groups=2, backend=backend)
        torch.testing.assert_close(y, call(view.contiguous(), taps.contiguous(), groups=2, backend=backend))
        assert torch.equal(view, kept)


@pytest.mark.parity(*IDS)
@ALL
@pytest.mark.parametrize("backend", BACKENDS)
def test_twice_differentiable(call, shape, weight, backend):
    x = draw(1, 2, *[min(n, 3) for n in shape[2:]]).requires_grad_()
    w, b = draw(2, 1, *[2] * len(shape[2:]), seed=1).requires_grad_(), draw(2, seed=2).requires_grad_()
    x = x[..., :2].detach().requires_grad_() if len(shape) == 6 else x
    torch.autograd.gradgradcheck(
        lambda x, w, b: call(x, w, b, groups=2, padding=1, stride=2, backend=backend), (x, w, b)
    )


# ---------------------------------------------------------------- registration
@pytest.mark.registration(*IDS)
@ALL
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_float32_answer_rounded_once(call, shape, weight, backend, dtype):
    x, w, b = draw(*shape).to(dtype), draw(*weight, seed=1).to(dtype), draw(6, seed=2).to(dtype)
    y = call(x, w, b, groups=2, backend=backend)
    assert y.dtype == dtype
    exact = call(x.double(), w.double(), b.double(), groups=2)
    ulp = torch.finfo(dtype).eps
    atol = 1e-6 if backend == "reference" else 4 * ulp  # torch's own may round part sums
    torch.testing.assert_close(y.double(), exact, rtol=0.51 * ulp if backend == "reference" else ulp, atol=atol)


@pytest.mark.registration(*IDS)
@ALL
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_gives_what_torchs_operation_gives(call, shape, weight, backend):
    x, w, b = draw(*shape).float(), draw(*weight, seed=1).float(), draw(6, seed=2).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = call(x, w, b, groups=2, backend=backend)
        mixed = call(x.bfloat16(), w, b, groups=2, backend=backend)
    assert y.dtype == mixed.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), call(x, w, b, groups=2), rtol=0.02, atol=0.05)
    assert torch.equal(y, mixed)


@pytest.mark.registration(*IDS)
@ALL
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_compiles_to_one_graph(call, shape, weight, backend, unchecked):
    x, w = draw(*shape), draw(*weight, seed=1)
    torch._dynamo.reset()
    run = lambda x, w: call(x, w, padding="same", groups=2, backend=backend)  # noqa: E731
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(x, w), run(x, w))


@pytest.mark.registration(*IDS)
@ALL
@pytest.mark.parametrize("backend", BACKENDS)
def test_meta_tensors_have_shapes(call, shape, weight, backend):
    y = call(draw(*shape).to("meta"), draw(*weight).to("meta"), groups=2, padding=1, backend=backend)
    assert y.shape == call(draw(*shape), draw(*weight), groups=2, padding=1).shape
    assert y.is_meta


# ---------------------------------------------------------------- laws
@pytest.mark.law(*IDS)
@ALL
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_shifted_input_gives_a_shifted_output(call, shape, weight, backend):
    """On the circle, for every axis and shift; zero padding breaks it at the border."""
    x, w = draw(*shape), draw(*weight, seed=1)

    def circular(x):
        for axis, k in zip(range(2, x.ndim), weight[2:], strict=True):
            x = torch.cat([x, x.narrow(axis, 0, k - 1)], axis)
        return call(x, w, groups=2, backend=backend)

    for axis, shift in itertools.product(range(2, x.ndim), (1, -1)):
        torch.testing.assert_close(circular(x.roll(shift, axis)), circular(x).roll(shift, axis))
        zeros = call(x.roll(shift, axis), w, groups=2, padding="same", backend=backend)
        assert not torch.allclose(zeros, call(x, w, groups=2, padding="same").roll(shift, axis), atol=1e-3)


@pytest.mark.law("conv2d")
def test_a_stride_keeps_only_its_own_multiples():
    x, w = draw(1, 1, 8, 8), draw(1, 1, 1, 1, seed=1)
    y = conv2d(x, w, stride=2)
    torch.testing.assert_close(conv2d(x.roll(2, -1), w, stride=2), y.roll(1, -1))
    assert not torch.allclose(conv2d(x.roll(1, -1), w, stride=2), y, atol=0.1)


@pytest.mark.law(*IDS)
@ALL
def test_linear_in_input_and_weight_and_independent_in_the_batch(call, shape, weight):
    x, z, w, v = draw(*shape), draw(*shape, seed=3), draw(*weight, seed=1), draw(*weight, seed=4)
    run = lambda x, w: call(x, w, groups=2)  # noqa: E731
    torch.testing.assert_close(run(2 * x + z, w), 2 * run(x, w) + run(z, w))
    torch.testing.assert_close(run(x, 2 * w + v), 2 * run(x, w) + run(x, v))
    assert_batch_independent(lambda x: run(x, w), x)


@pytest.mark.law("conv4d", "conv3d")
def test_a_4d_kernel_of_side_3_has_81_taps():
    """A 3-d kernel has 27: one output of each depends on that many inputs."""
    for call, axes, taps in ((conv3d, 3, 27), (conv4d, 4, 81)):
        x = draw(1, 1, *[5] * axes).requires_grad_()
        w = torch.ones(1, 1, *[3] * axes, dtype=torch.float64)
        assert w.numel() == taps
        y = call(x, w)
        (g,) = torch.autograd.grad(y[(0, 0, *[1] * axes)], x)
        assert int((g != 0).sum()) == taps


@pytest.mark.law("dilated-conv")
@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("rate", [1, 2, 3, 7])
def test_dilation_spreads_the_same_taps(k, rate):
    """k + (k - 1)(r - 1) wide, k nonzero, and equal to a dense kernel with zeros in its holes."""
    span = k + (k - 1) * (rate - 1)
    x, w = draw(1, 1, 2 * span + 4).requires_grad_(), draw(1, 1, k, seed=1).abs() + 1
    y = conv1d(x, w, dilation=rate)
    (g,) = torch.autograd.grad(y[0, 0, 2], x)
    seen = g[0, 0].nonzero().flatten()
    assert seen.numel() == k
    assert int(seen[-1] - seen[0]) + 1 == span
    dense = w.new_zeros(1, 1, span)
    dense[..., ::rate] = w
    torch.testing.assert_close(conv1d(x, dense), y)


@pytest.mark.law("dilated-conv")
def test_dilation_is_a_plain_convolution_of_every_rth_entry():
    x, w = draw(1, 2, 13), draw(3, 2, 3, seed=1)
    y = conv1d(x, w, dilation=2)
    for phase in range(2):
        torch.testing.assert_close(y[..., phase::2], conv1d(x[..., phase::2], w))


@pytest.mark.law("grouped-conv")
@pytest.mark.parametrize("backend", BACKENDS)
@ALL
def test_groups_are_independent_convolutions_side_by_side(call, shape, weight, backend):
    x, w = draw(*shape), draw(*weight, seed=1)
    y = call(x, w, groups=2, backend=backend)
    halves = [call(x[:, 2 * g : 2 * g + 2], w[3 * g : 3 * g + 3]) for g in range(2)]
    torch.testing.assert_close(y, torch.cat(halves, 1))
    block = w.new_zeros(6, 4, *weight[2:])  # the same as one dense kernel, zero off its diagonal blocks
    block[:3, :2], block[3:, 2:] = w[:3], w[3:]
    torch.testing.assert_close(y, call(x, block))


@pytest.mark.law("grouped-conv", "depthwise-separable-conv")
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_channels_of_different_groups_do_not_mix(groups):
    w = draw(6, 6 // groups, 3, 3, seed=1)
    jacobian = torch.autograd.functional.jacobian(
        lambda x: conv2d(x, w, groups=groups).sum((0, 2, 3)), draw(1, 6, 3, 3)
    )
    mixes = jacobian.abs().sum((1, 3, 4)) > 0
    group = torch.arange(6) * groups // 6
    assert torch.equal(mixes, group[:, None] == group[None])


@pytest.mark.law("conv2d")
@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2, 4])
def test_output_size_is_the_length_of_the_output(k, stride, dilation):
    for n, padding in itertools.product((1, 2, 5, 8, 13), (0, 1, 3)):
        if n + 2 * padding >= dilation * (k - 1) + 1:
            y = F.conv1d(draw(1, 1, n), draw(1, 1, k), stride=stride, padding=padding, dilation=dilation)
            assert output_size(n, k, stride, padding, dilation) == y.shape[-1]
        else:
            with refuses(ShapeError, n, n + 2 * padding):
                output_size(n, k, stride, padding, dilation)


# ---------------------------------------------------------------- refusals
@pytest.mark.refusal(*IDS, "dilated-conv", "grouped-conv")
@pytest.mark.parametrize("value", [0, -1, True, 1.5, float("nan"), "2", (1,) * 5, (1, 0, 1, 1), None])
@pytest.mark.parametrize("option", ["stride", "dilation", "groups"])
@ALL
def test_sizes_that_are_none_are_refused(call, shape, weight, option, value):
    with refuses(ConfigError, option, repr(value) if not isinstance(value, tuple) else ""):
        call(draw(*shape), draw(*weight), groups=value) if option == "groups" else call(
            draw(*shape), draw(*weight), groups=2, **{option: value}
        )


@pytest.mark.refusal(*IDS)
@pytest.mark.parametrize("padding", [-1, True, 0.5, "full", (1,) * 5, math.inf, None])
@ALL
def test_paddings_that_are_none_are_refused(call, shape, weight, padding):
    with refuses(ConfigError, "padding"):
        call(draw(*shape), draw(*weight), groups=2, padding=padding)


@pytest.mark.refusal(*IDS)
@ALL
def test_same_padding_under_a_stride_is_refused(call, shape, weight):
    with refuses(ConfigError, "same", 2):
        call(draw(*shape), draw(*weight), groups=2, padding="same", stride=2)


@pytest.mark.refusal(*IDS, "grouped-conv")
@ALL
def test_tensors_that_do_not_fit_are_refused(call, shape, weight):
    x, w = draw(*shape), draw(*weight)
    with refuses(ShapeError, "3 channels", "4 channels"):
        call(x[:, :3], w, groups=2)
    with refuses(ShapeError, "4 channels", "2 channels"):
        call(x, w)  # forgot the groups
    with refuses(ShapeError, "5 output channels in 2 groups", "[1, 5]"):
        call(x, w[:5], groups=2)
    with refuses(ShapeError, tuple(x[0, 0].shape), "axes"):
        call(x[0, 0], w, groups=2)
    with refuses(ShapeError, (1, *x.shape)):
        call(x[None], w, groups=2)
    with refuses(ShapeError, tuple(w[0].shape)):
        call(x, w[0], groups=2)
    with refuses(ShapeError, tuple(w[..., :0].shape)):
        call(x, w[..., :0], groups=2)
    with refuses(ShapeError, "0 output channels"):
        call(x, w[:0], groups=2)
    with refuses(ShapeError, (5,), (6,)):
        call(x, w, draw(5), groups=2)
    with refuses(ShapeError, (6, 1)):
        call(x, w, draw(6, 1), groups=2)


@pytest.mark.refusal(*IDS)
@ALL
def test_dtypes_that_do_not_fit_are_refused(call, shape, weight):
    x, w = draw(*shape), draw(*weight)
    for bad in (x.long(), x > 0, x.to(torch.complex64)):
        with refuses(ShapeError, bad.dtype):
            call(bad, w, groups=2)
    with refuses(ShapeError, torch.int64):
        call(x, w.long(), groups=2)
    with refuses(ShapeError, torch.float32, torch.float64):
        call(x.float(), w, groups=2)
    with refuses(ShapeError, "meta"):
        call(x.to("meta"), w, groups=2)


@pytest.mark.refusal(*IDS, "dilated-conv")
@ALL
def test_a_kernel_longer_than_the_padded_input_is_refused(call, shape, weight):
    with refuses(ShapeError, "span", 50 * (weight[2] - 1) + 1):
        call(draw(*shape), draw(*weight), groups=2, dilation=50, padding=1)
    with refuses(ShapeError, 0):
        call(draw(*shape)[..., :0], draw(*weight), groups=2)


@pytest.mark.refusal("conv2d")
def test_an_unknown_backend_is_refused():
    with refuses(ConfigError, "triton"):
        conv2d(draw(1, 1, 3, 3), draw(1, 1, 3, 3), backend="triton")


@pytest.mark.refusal("conv2d")
@pytest.mark.parametrize("name", ["size", "kernel_size", "stride", "padding", "dilation"])
@pytest.mark.parametrize("value", [-1, 0.5, True, "3"])
def test_output_size_refuses_what_is_no_size(name, value):
    arguments = {"size": 8, "kernel_size": 3, "stride": 1, "padding": 1, "dilation": 1, name: value}
    with refuses(ConfigError, repr(value)):
        output_size(**arguments)


@pytest.mark.refusal(*IDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_one_backend_could_not_answer_both_refuse(backend):
    x, w = draw(1, 2, 5), draw(4, 2, 3)
    for given in ((x, w.float(), None), (x.float(), w.float(), draw(4)), (x.float(), w, None)):
        with torch.autocast("cpu", dtype=torch.bfloat16), refuses(ShapeError, torch.float64, torch.float32):
            conv1d(*given, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert conv1d(x, w, backend=backend).dtype == torch.float64
    with refuses(ShapeError, (1, 0, 5), "at least 1"):
        conv1d(x[:, :0], w[:, :0], backend=backend)
