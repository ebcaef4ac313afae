"""Deformable convolution against torchvision's and against bilinear sampling written as loops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.convolution.conv import output_size
from handbook_src.functional.convolution.deformable_conv import deform_conv2d, sampling_places
from handbook_src.testing import assert_batch_independent, assert_parity, refuses

BACKENDS = ["auto", "reference"]
BOTH = pytest.mark.parametrize("backend", BACKENDS)


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def case(b=2, c=4, out=6, size=(7, 5), kernel=(3, 3), groups=1, offset_groups=1, masked=True, scale=1.5, **geometry):
    """Input, offset, weight, bias, stride, padding, dilation, mask of one setting."""
    stride, padding, dilation = (geometry.get(k, d) for k, d in (("s", (1, 1)), ("p", (1, 1)), ("d", (1, 1))))
    high, wide = (output_size(n, *rest) for n, *rest in zip(size, kernel, stride, padding, dilation, strict=True))
    taps = kernel[0] * kernel[1] * offset_groups
    mask = draw(b, taps, high, wide, seed=4).sigmoid() if masked else None
    offset = draw(b, 2 * taps, high, wide, seed=1, scale=scale)
    weight = draw(out, c // groups, *kernel, seed=2)
    return [draw(b, c, *size), offset, weight, draw(out, seed=3), stride, padding, dilation, mask]


def literal(x, offset, weight, bias, stride, padding, dilation, mask):
    """The definition: every pixel of the image, weighted by its nearness to the place that a tap asks for."""
    (b, c, height, width), (out, part, kh, kw) = x.shape, weight.shape
    offset_groups, groups = offset.shape[1] // (2 * kh * kw), c // part
    y = torch.zeros(b, out, *offset.shape[2:], dtype=x.dtype)
    for n, o, i, j in itertools.product(*map(range, y.shape)):
        total = bias[o] if bias is not None else 0.0
        for p, u, v in itertools.product(range(part), range(kh), range(kw)):
            channel = (o // (out // groups)) * part + p
            tap = (channel // (c // offset_groups)) * kh * kw + u * kw + v
            qy = i * stride[0] - padding[0] + u * dilation[0] + offset[n, 2 * tap, i, j]
            qx = j * stride[1] - padding[1] + v * dilation[1] + offset[n, 2 * tap + 1, i, j]
            near_y = (1 - (qy - torch.arange(height)).abs()).clamp_min(0)
            near_x = (1 - (qx - torch.arange(width)).abs()).clamp_min(0)
            value = near_y @ x[n, channel] @ near_x
            total = total + weight[o, p, u, v] * value * (1 if mask is None else mask[n, tap, i, j])
        y[n, o, i, j] = total
    return y


def torchvisions(x, offset, weight, bias, stride, padding, dilation, mask):
    from torchvision.ops import deform_conv2d as theirs

    return theirs(x, offset, weight, bias, stride, padding, dilation, mask)


def ours(backend):
    return lambda *arguments: deform_conv2d(*arguments, backend=backend)


SETTINGS = {
    "plain": {},
    "version 1": {"masked": False},
    "one pixel": {"size": (1, 1), "kernel": (1, 1), "p": (0, 0)},
    "one image, one channel": {"b": 1, "c": 1, "out": 1},
    "strided": {"s": (2, 3), "p": (0, 2)},
    "dilated": {"d": (2, 1), "p": (2, 0)},
    "even and unequal kernel": {"kernel": (2, 5), "p": (1, 2)},
    "weight groups": {"groups": 2},
    "depthwise": {"groups": 4, "out": 4},
    "offset groups": {"offset_groups": 2},
    "both, unequal": {"c": 8, "out": 6, "groups": 2, "offset_groups": 4},
    "far outside": {"scale": 20.0},
}


# ---------------------------------------------------------------- parity
@pytest.mark.parity("deformable-conv")
@pytest.mark.outside("deformable-conv")
@BOTH
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
def test_it_is_torchvisions(setting, backend):
    arguments = case(**setting)
    assert_parity(ours(backend), torchvisions, arguments)
    arguments[3] = None  # no bias
    assert_parity(ours(backend), torchvisions, arguments)


@pytest.mark.parity("deformable-conv")
@BOTH
@pytest.mark.parametrize(
    "setting", [{}, {"masked": False, "s": (2, 1)}, {"groups": 2, "offset_groups": 2, "d": (1, 2), "scale": 3.0}]
)
def test_it_is_the_definition(setting, backend):
    arguments = case(b=1, out=2, size=(3, 4), kernel=(2, 3), **setting)
    assert_parity(ours(backend), literal, arguments)


@pytest.mark.parity("deformable-conv")
@BOTH
def test_at_whole_pixels_its_gradient_is_torchvisions(backend):
    # Between pixels the surface has kinks; a fresh layer starts on one. Which side the slope is taken from is a choice.
    arguments = case()
    arguments[1] = arguments[1].round()
    assert (arguments[1] == 0).any()
    assert_parity(ours(backend), torchvisions, arguments)


@pytest.mark.parity("deformable-conv")
@BOTH
def test_strides_do_not_matter(backend):
    dense = case()
    views = [t.flip(-1).flip(-1) if isinstance(t, Tensor) else t for t in dense]
    views[0] = dense[0].to(memory_format=torch.channels_last)
    views[1] = dense[1].mT.contiguous().mT
    views[7] = torch.stack([dense[7], dense[7]], -1)[..., 0]
    assert not views[7].is_contiguous()
    torch.testing.assert_close(ours(backend)(*views), ours(backend)(*dense))


@pytest.mark.parity("deformable-conv")
@BOTH
def test_it_is_twice_differentiable(backend):
    x, offset, weight, bias, stride, padding, dilation, mask = case(1, 2, 2, (3, 3), (2, 2), p=(0, 0))
    torch.autograd.gradgradcheck(
        lambda x, o, w, m: deform_conv2d(x, o, w, bias, stride, padding, dilation, m, backend=backend),
        [t.requires_grad_() for t in (x, offset, weight, mask)],
    )


@pytest.mark.parity("deformable-conv")
def test_places_are_the_grid_plus_the_offset():
    offset = draw(1, 2 * 2 * 6, 3, 4)
    places = sampling_places(offset, (2, 3), (2, 1), (1, 0), (1, 3))
    for g, u, v, i, j in itertools.product(range(2), range(2), range(3), range(3), range(4)):
        tap = g * 6 + u * 3 + v
        assert places.y[0, g, u * 3 + v, i, j] == i * 2 - 1 + u + offset[0, 2 * tap, i, j]
        assert places.x[0, g, u * 3 + v, i, j] == j + v * 3 + offset[0, 2 * tap + 1, i, j]


# ---------------------------------------------------------------- laws
@pytest.mark.law("deformable-conv")
@BOTH
@pytest.mark.parametrize("geometry", [{}, {"s": (2, 1), "p": (0, 3), "d": (1, 2)}])
@pytest.mark.parametrize("groups", [1, 2])
def test_without_offsets_it_is_a_convolution(geometry, groups, backend):
    x, offset, weight, bias, *rest, mask = case(groups=groups, **geometry)
    plain = F.conv2d(x, weight, bias, *rest, groups)
    still = torch.zeros_like(offset)
    for m in (None, torch.ones_like(mask)):
        got = deform_conv2d(x, still, weight, bias, *rest, m, backend=backend)
        torch.testing.assert_close(got, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.law("deformable-conv")
@BOTH
@pytest.mark.parametrize("shift", [(0, 0), (1, 0), (0, -2), (3, 4), (-9, 0)])
def test_a_whole_offset_is_a_shifted_image(shift, backend):
    x, offset, weight, bias, *rest, _ = case()
    moved = torch.tensor(shift, dtype=x.dtype).repeat(9)[None, :, None, None].expand_as(offset)
    padded = F.pad(x, (10, 10, 10, 10)).roll((-shift[0], -shift[1]), (2, 3))
    want = F.conv2d(padded, weight, bias)[:, :, 9 : 9 + x.shape[2], 9 : 9 + x.shape[3]]
    torch.testing.assert_close(deform_conv2d(x, moved, weight, bias, *rest, backend=backend), want)


@pytest.mark.law("deformable-conv")
@BOTH
def test_between_pixels_it_is_the_mean_of_four(backend):
    x = draw(1, 1, 4, 4)
    half = torch.full((1, 2, 4, 4), 0.5, dtype=x.dtype)
    got = deform_conv2d(x, half, torch.ones(1, 1, 1, 1, dtype=x.dtype), backend=backend)
    torch.testing.assert_close(got[0, 0, :3, :3], F.avg_pool2d(x, 2, 1)[0, 0])


@pytest.mark.law("deformable-conv")
@BOTH
def test_a_mask_of_zero_leaves_the_bias(backend):
    *arguments, mask = case()
    got = deform_conv2d(*arguments, torch.zeros_like(mask), backend=backend)
    torch.testing.assert_close(got, arguments[3][:, None, None].expand_as(got))


@pytest.mark.law("deformable-conv")
def test_an_image_does_not_see_its_batch():
    x, offset, *rest, mask = case(b=3, offset_groups=2)
    both = torch.cat([x, offset[:, :, :, :5], mask[:, :, :, :5]], 1)
    splits = [x.shape[1], offset.shape[1], mask.shape[1]]

    def run(t):
        x, o, m = t.split(splits, 1)
        return deform_conv2d(x, o, *rest, m)

    assert_batch_independent(run, both)


@pytest.mark.law("deformable-conv")
@BOTH
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_a_wild_offset_reads_nothing_outside(bad, backend):
    arguments = case(b=1)
    clean = deform_conv2d(*arguments, backend=backend)
    arguments[1] = arguments[1].clone()
    arguments[1][0, 4, 2, 3] = bad
    got = deform_conv2d(*arguments, backend=backend)
    hit = torch.zeros_like(got, dtype=torch.bool)
    hit[:, :, 2, 3] = True
    assert got[hit].isnan().all() if math.isnan(bad) else got[hit].isfinite().all()
    torch.testing.assert_close(got[~hit], clean[~hit])


@pytest.mark.law("deformable-conv")
@BOTH
def test_an_empty_batch_comes_back_empty(backend):
    arguments = [t[:0] if i in (0, 1, 7) else t for i, t in enumerate(case(offset_groups=2))]
    arguments[2].requires_grad_()
    y = deform_conv2d(*arguments, backend=backend)
    assert y.shape == (0, 6, 7, 5)
    y.sum().backward()
    assert (arguments[2].grad == 0).all()


@pytest.mark.law("deformable-conv")
@BOTH
def test_inputs_are_left_as_they_were(backend):
    arguments = case()
    before = [t.clone() if isinstance(t, Tensor) else t for t in arguments]
    deform_conv2d(*arguments, backend=backend)
    for a, b in zip(arguments, before, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


# ---------------------------------------------------------------- registration
@pytest.mark.registration("deformable-conv")
@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_float32_answer_rounded_once(dtype, backend):
    arguments = [t.to(dtype) if isinstance(t, Tensor) else t for t in case()]
    y = deform_conv2d(*arguments, backend=backend)
    assert y.dtype == dtype
    exact = deform_conv2d(*[t.float() if isinstance(t, Tensor) else t for t in arguments], backend=backend)
    assert torch.equal(y, exact.to(dtype))
    arguments[1], arguments[7] = arguments[1].float(), arguments[7].float()  # offsets may keep their digits
    assert deform_conv2d(*arguments, backend=backend).dtype == dtype


@pytest.mark.registration("deformable-conv")
@BOTH
def test_compiles_to_one_graph(backend, unchecked):
    arguments = case()
    torch._dynamo.reset()
    run = torch.compile(ours(backend), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(*arguments), deform_conv2d(*arguments))


@pytest.mark.registration("deformable-conv")
@BOTH
def test_runs_on_meta_and_under_autocast(backend):
    arguments = [t.float() if isinstance(t, Tensor) else t for t in case()]
    meta = [t.to("meta") if isinstance(t, Tensor) else t for t in arguments]
    assert deform_conv2d(*meta, backend=backend).shape == (2, 6, 7, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y = deform_conv2d(*arguments, backend=backend)
    assert y.dtype == torch.float32  # as torchvision's: places in pixels need their digits
    torch.testing.assert_close(y, deform_conv2d(*arguments, backend=backend))


# ---------------------------------------------------------------- refusals
@pytest.mark.refusal("deformable-conv")
def test_refuses_shapes_that_do_not_fit():
    x, o, w, b, *rest, m = case()
    for bad, named in (
        ([x[0], o, w], "3 axes"),
        ([x[:, :3], o, w], "3 channels"),
        ([x, o[:, :-1], w], "17 channels"),
        ([x, o[:, :0], w], "0 channels"),
        ([x, o[:1], w], (1, 18, 7, 5)),
        ([x, o[..., :-1], w], (2, 18, 7, 4)),
        ([x, o[0], w], "3 axes"),
        ([x, torch.cat([o, o, o], 1), w], "3 for 4 input channels"),
        ([x, o, w[0]], (4, 3, 3)),
        ([x, o, w[:, :0]], "4 channels"),
        ([x, o, w[:, :, :0]], (6, 4, 0, 3)),
        ([x, o, w[:5, :2]], "5 output channels in 2 groups"),
        ([x, o, w, b[:5]], (5,)),
        ([x[..., :0, :0], o, w], (0, 0)),
    ):
        filled = [*bad, *([b] if len(bad) == 3 else []), (1, 1), (0, 0) if named == (0, 0) else (1, 1), (1, 1), None]
        with refuses(ShapeError, named):
            deform_conv2d(*filled)
    for bad in (m[:, :-1], m[..., :-1], torch.cat([m, m], 1), m[:1]):
        with refuses(ShapeError, "mask", tuple(bad.shape)):
            deform_conv2d(x, o, w, b, *rest, bad)


@pytest.mark.refusal("deformable-conv")
def test_refuses_dtypes_settings_and_backends():
    x, o, w, b, *rest, m = case()
    for i in (0, 1, 2, 3, 7):
        arguments = [x, o, w, b, *rest, m]
        arguments[i] = arguments[i].long()
        with refuses(ShapeError, "torch.int64"):
            deform_conv2d(*arguments)
    with refuses(ShapeError, "torch.float32"):
        deform_conv2d(x, o, w.float(), b, *rest)
    for name, value in (
        ("stride", 0),
        ("stride", (1, 2, 3)),
        ("padding", -1),
        ("padding", "same"),
        ("dilation", 0),
        ("dilation", 1.5),
        ("stride", True),
    ):
        with refuses(ConfigError, name, value if not isinstance(value, tuple) else 3):
            deform_conv2d(x, o, w, b, **{name: value})
    with refuses(ConfigError, "triton"):
        deform_conv2d(x, o, w, b, *rest, backend="triton")
    with refuses(ShapeError, "10 channels"):
        sampling_places(o[:, :10], 3)
