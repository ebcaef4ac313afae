"""Transposed convolutions against torch's in float64, with every option; adjoint and scatter laws."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.convolution.conv import conv1d, conv2d, conv3d
from handbook_src.functional.convolution.conv_transpose import conv_transpose1d, conv_transpose2d, conv_transpose3d
from handbook_src.testing import assert_batch_independent, assert_parity, refuses

ID = "transposed-conv"
BACKENDS = ["reference", "torch"]
PAIRS = {
    1: (conv_transpose1d, F.conv_transpose1d, conv1d),
    2: (conv_transpose2d, F.conv_transpose2d, conv2d),
    3: (conv_transpose3d, F.conv_transpose3d, conv3d),
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- parity
CASES = [
    # input, weight, options
    ((2, 3, 5), (3, 4, 3), {}),
    ((1, 1, 1), (1, 1, 1), {}),
    ((2, 4, 5), (4, 3, 5), {"stride": 3, "padding": 2, "output_padding": 1, "groups": 2, "dilation": 2}),
    ((4, 6), (4, 1, 4), {"stride": (2,), "groups": 4, "padding": 1}),
    ((2, 3, 1), (3, 2, 3), {"stride": 2, "padding": 1}),
    ((2, 3, 4), (3, 2, 2), {"dilation": 5, "output_padding": 4}),
    ((0, 3, 4), (3, 2, 2), {}),
    ((2, 3, 4, 5), (3, 4, 3, 2), {}),
    ((2, 4, 4, 3), (4, 3, 3, 4), {"stride": (2, 3), "padding": (2, 0), "output_padding": (0, 2), "dilation": (1, 2)}),
    ((4, 3, 4), (4, 1, 2, 2), {"stride": 2, "groups": 2}),
    ((2, 4, 3, 3), (4, 1, 3, 3), {"stride": 4, "groups": 4, "output_padding": 3}),
    ((2, 3, 2, 3, 4), (3, 2, 2, 3, 1), {"stride": (1, 2, 3)}),
    ((2, 4, 3, 2, 3), (4, 3, 2, 3, 2), {"stride": 2, "padding": 1, "output_padding": 1, "dilation": 2, "groups": 2}),
    ((4, 2, 3, 2), (4, 2, 2, 1, 3), {"padding": (0, 0, 1)}),
]


@pytest.mark.parity(ID)
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "weight", "options"), CASES)
def test_transposed_convolutions_are_torchs(shape, weight, options, bias, backend):
    mine, theirs, _ = PAIRS[len(weight) - 2]
    out = weight[1] * options.get("groups", 1)
    assert_parity(
        lambda x, w, b: mine(x, w, b, **options, backend=backend),
        lambda x, w, b: theirs(x, w, b, **options),
        [draw(*shape), draw(*weight, seed=1), draw(out, seed=2) if bias else None],
    )


CALLS = {
    "1d": (conv_transpose1d, (2, 4, 5), (4, 3, 3)),
    "2d": (conv_transpose2d, (2, 4, 3, 4), (4, 3, 3, 2)),
    "3d": (conv_transpose3d, (2, 4, 2, 3, 2), (4, 3, 2, 3, 2)),
}
ALL = pytest.mark.parametrize(("call", "shape", "weight"), CALLS.values(), ids=CALLS.keys())


@pytest.mark.parity(ID)
@ALL
@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter_and_inputs_stay(call, shape, weight, backend):
    x, w = draw(*shape), draw(*weight, seed=1)
    for view in (x.transpose(0, 1).contiguous().transpose(0, 1), x.flip(0), draw(*shape[:-1], 9)[..., ::2]):
        kept, taps = view.clone(), w.flip(-1)
        y = call(view, taps, groups=2, stride=2, backend=backend)
        dense = call(view.contiguous(), taps.contiguous(), groups=2, stride=2, backend=backend)
        torch.testing.assert_close(y, dense)
        assert torch.equal(view, kept)


@pytest.mark.parity(ID)
@ALL
@pytest.mark.parametrize("backend", BACKENDS)
def test_twice_differentiable(call, shape, weight, backend):
    x, w = draw(1, 2, *[2] * len(shape[2:])).requires_grad_(), draw(2, 1, *[2] * len(shape[2:])).requires_grad_()
    b = draw(2, seed=2).requires_grad_()
    run = lambda x, w, b: call(x, w, b, groups=2, padding=1, stride=2, output_padding=1, backend=backend)  # noqa: E731
    torch.autograd.gradgradcheck(run, (x, w, b))


# ---------------------------------------------------------------- registration
@pytest.mark.registration(ID)
@ALL
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_float32_answer_rounded_once(call, shape, weight, backend, dtype):
    x, w, b = draw(*shape).to(dtype), draw(*weight, seed=1).to(dtype), draw(6, seed=2).to(dtype)
    y = call(x, w, b, stride=2, groups=2, backend=backend)
    assert y.dtype == dtype
    exact = call(x.double(), w.double(), b.double(), stride=2, groups=2)
    ulp = torch.finfo(dtype).eps
    if backend == "reference":
        torch.testing.assert_close(y.double(), exact, rtol=0.51 * ulp, atol=1e-6)
    else:
        torch.testing.assert_close(y.double(), exact, rtol=ulp, atol=8 * ulp)


@pytest.mark.registration(ID)
@ALL
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_compile_and_meta(call, shape, weight, backend, unchecked):
    x, w = draw(*shape).float(), draw(*weight, seed=1).float()
    run = lambda x, w: call(x, w, stride=2, padding=1, groups=2, backend=backend)  # noqa: E731
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = run(x, w)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), run(x, w), rtol=0.02, atol=0.05)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(x, w), run(x, w))
    assert run(x.to("meta"), w.to("meta")).shape == run(x, w).shape


# ---------------------------------------------------------------- laws
@pytest.mark.law(ID)
@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2}, {"stride": 3, "padding": 1}, {"dilation": 2, "padding": 2}, {"stride": 2, "groups": 2}],
)
def test_it_is_the_adjoint_of_the_convolution(axes, options, backend):
    """<conv(x), y> = <x, conv_transpose(y)> with one weight for both, for every size that a stride makes alike."""
    transposed, _, conv = PAIRS[axes]
    stride = options.get("stride", 1)
    for n in range(5, 5 + stride):
        x = draw(2, 4, *[n] * axes)
        w = draw(6, 4 // options.get("groups", 1), *[3] * axes, seed=1)
        y = conv(x, w, **options)
        z = draw(*y.shape, seed=2)
        smallest = transposed(z, w, **options, backend=backend)
        back = transposed(z, w, **options, output_padding=n - smallest.shape[-1], backend=backend)
        assert back.shape == x.shape
        torch.testing.assert_close((y * z).sum(), (x * back).sum())


@pytest.mark.law(ID)
def test_it_is_the_gradient_of_the_convolution_and_the_other_way_round():
    x, w = draw(2, 4, 7, 6).requires_grad_(), draw(3, 4, 3, 2, seed=1)
    y = conv2d(x, w)
    z = draw(*y.shape, seed=2).requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(y, x, z)[0], conv_transpose2d(z, w))
    torch.testing.assert_close(torch.autograd.grad(conv_transpose2d(z, w), z, x)[0], y)


@pytest.mark.law(ID)
def test_it_is_a_convolution_of_the_spread_input_with_the_flipped_kernel():
    """The reading of the name: zeros between the pixels, kernel turned round, axes of the weight swapped."""
    x, w = draw(2, 3, 4, 5), draw(3, 2, 3, 4, seed=1)
    spread = x.new_zeros(2, 3, 2 * 3 + 1, 2 * 4 + 1)
    spread[..., ::2, ::2] = x
    want = conv2d(F.pad(spread, (3, 3, 2, 2)), w.flip(-1, -2).transpose(0, 1))
    torch.testing.assert_close(conv_transpose2d(x, w, stride=2), want)


@pytest.mark.law(ID)
def test_one_pixel_stamps_the_kernel():
    x, w = torch.zeros(1, 1, 4, 4, dtype=torch.float64), draw(1, 1, 3, 3)
    x[0, 0, 1, 2] = 2.0
    y = conv_transpose2d(x, w, stride=2)
    torch.testing.assert_close(y[0, 0, 2:5, 4:7], 2 * w[0, 0])
    assert (y != 0).sum() == 9


@pytest.mark.law(ID)
@pytest.mark.parametrize("k", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("stride", [2, 3])
def test_stamps_overlap_evenly_where_the_stride_divides_the_kernel(k, stride):
    """How many taps reach each output entry, away from the border: the source of the checkerboard."""
    ones = torch.ones(1, 1, k, dtype=torch.float64)
    reached = conv_transpose1d(ones.new_ones(1, 1, 12), ones, stride=stride)[0, 0, k:-k]
    assert (reached.max() == reached.min()).item() == (k % stride == 0)


@pytest.mark.law(ID)
@ALL
def test_linear_and_independent_in_the_batch(call, shape, weight):
    x, z, w = draw(*shape), draw(*shape, seed=3), draw(*weight, seed=1)
    run = lambda x: call(x, w, stride=2, groups=2)  # noqa: E731
    torch.testing.assert_close(run(2 * x + z), 2 * run(x) + run(z))
    assert_batch_independent(run, x)


@pytest.mark.law(ID)
def test_output_sizes_follow_the_formula():
    for n, k, s, p, d in itertools.product((1, 4), (1, 3, 4), (1, 2, 3), (0, 1, 2), (1, 2)):
        for a in range(max(s, d)):
            length = s * (n - 1) + d * (k - 1) + 1 - 2 * p + a
            x, w = draw(1, 1, n), draw(1, 1, k)
            call = lambda: conv_transpose1d(x, w, None, s, p, a, 1, d)  # noqa: E731, B023
            if length < 1:
                with refuses(ShapeError, n, length):
                    call()
            else:
                assert call().shape[-1] == length


# ---------------------------------------------------------------- refusals
@pytest.mark.refusal(ID)
@pytest.mark.parametrize("value", [-1, True, 1.5, float("nan"), "same", (1,) * 4, None])
@pytest.mark.parametrize("option", ["stride", "padding", "output_padding", "dilation", "groups"])
@ALL
def test_sizes_that_are_none_are_refused(call, shape, weight, option, value):
    with refuses(ConfigError, option):
        call(draw(*shape), draw(*weight), **{"groups": 2, option: value})


@pytest.mark.refusal(ID)
@ALL
def test_tensors_that_do_not_fit_are_refused(call, shape, weight):
    x, w = draw(*shape), draw(*weight)
    with refuses(ShapeError, "3 channels", "4 channels"):
        call(x[:, :3], w, groups=2)
    with refuses(ShapeError, "4 input channels in 3 groups", "[1, 2, 4]"):
        call(x, w, groups=3)
    with refuses(ShapeError, tuple(x[0, 0].shape)):
        call(x[0, 0], w)
    with refuses(ShapeError, tuple(w[0].shape)):
        call(x, w[0])
    with refuses(ShapeError, (3,), (6,)):
        call(x, w, draw(3), groups=2)
    with refuses(ShapeError, 0):
        call(x[..., :0], w)
    with refuses(ShapeError, torch.int64):
        call(x.long(), w)
    with refuses(ShapeError, torch.float32, torch.float64):
        call(x.float(), w)


@pytest.mark.refusal(ID)
@ALL
def test_output_padding_past_the_stamps_is_refused(call, shape, weight):
    with refuses(ConfigError, "2 with stride 2 and dilation 1"):
        call(draw(*shape), draw(*weight), stride=2, output_padding=2)
    call(draw(*shape), draw(*weight), stride=2, dilation=3, output_padding=2)


@pytest.mark.refusal(ID)
def test_an_unknown_backend_is_refused():
    with refuses(ConfigError, "triton"):
        conv_transpose1d(draw(1, 1, 3), draw(1, 1, 3), backend="triton")
