r"""Convolution over one to four axes: one sum, :func:`conv_nd`, and torch's operations.

What the field calls convolution is cross-correlation: the kernel is not flipped. Learned
weights do not mind.

==================  =======================================================
:func:`conv1d`      sequences, ``b channels length``
:func:`conv2d`      images, ``b channels height width``
:func:`conv3d`      volumes and videos, ``b channels depth height width``
:func:`conv4d`      volumes in time, ``b channels t depth height width``
==================  =======================================================

All take ``dilation`` (holes in the kernel), ``groups`` (channels cut into parts that do not mix),
and an input without batch axis. :func:`depthwise_separable_conv2d` is two of them in a row.
The reference computes float16 and bfloat16 in float32 and rounds once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from handbook_src.check import as_tuple, check_rank
from handbook_src.dispatch import Backend, resolve
from handbook_src.functional.convolution.conv_input import (
    Geometry,
    autocasts,
    check_border,
    check_conv,
    check_separable,
    check_sizes,
    read_geometry,
)

Padding = int | Sequence[int] | Literal["same", "valid"]


def conv1d(
    input: Float[Tensor, "*batch channels length"],
    weight: Float[Tensor, "out part k"],
    bias: Float[Tensor, " out"] | None = None,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "*batch out length2"]:
    r"""Slide a kernel along a sequence; each output is the kernel's inner product with a window.

    .. math:: y_{o,i} = b_o + \sum_{c} \sum_{m=0}^{k-1} w_{o,c,m}\; x_{c,\, s i + d m - p}

    with stride :math:`s`, dilation :math:`d`, and :math:`p` zeros before the start; :math:`x` is zero
    outside. The output has :math:`\lfloor (n + 2p - d(k-1) - 1)/s \rfloor + 1` entries.

    Args:
        input: channels, then positions; with or without a batch axis.
        weight: ``part`` is channels over groups.
        bias: one shift for each output channel.
        stride: input steps for one output step.
        padding: zeros at both ends; ``"same"`` keeps the length (an odd zero comes last), ``"valid"`` adds none.
        dilation: input steps between neighbouring taps.
        groups: parts of the channels that do not mix.
        backend: ``auto`` takes torch's operation.

    Raises:
        ConfigError: a setting that is no size; ``"same"`` with a stride.
        ShapeError: rank, channels, groups or dtypes that do not fit; a kernel longer than the padded input.

    Source:
        Waibel et al. 1989, section II, doi:10.1109/29.21701; Dumoulin & Visin 2016, relationship 15, arXiv:1603.07285
    """
    return _conv("conv1d", 1, input, weight, bias, (stride, padding, dilation, groups), backend)


def conv2d(
    input: Float[Tensor, "*batch channels height width"],
    weight: Float[Tensor, "out part kh kw"],
    bias: Float[Tensor, " out"] | None = None,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "*batch out height2 width2"]:
    r"""Slide a kernel over an image; each output is the kernel's inner product with a window.

    .. math::
        y_{o,i,j} = b_o + \sum_{c \in G(o)} \sum_{m=0}^{k_h-1} \sum_{n=0}^{k_w-1}
        w_{o,c,m,n}\; x_{c,\, s i + d m - p,\, s j + d n - p}

    with stride :math:`s`, dilation :math:`d`, and :math:`p` zeros around the image, each its own for
    height and width. :math:`G(o)` are the input channels of output channel :math:`o`'s group, all of
    them in a plain convolution. An axis of :math:`n` gives :math:`\lfloor (n + 2p - d(k-1) - 1)/s \rfloor + 1`.

    Args:
        input: channels, then height and width; with or without a batch axis.
        weight: ``part`` is channels over groups.
        bias: one shift for each output channel.
        stride: input steps for one output step.
        padding: zeros at both ends; ``"same"`` keeps the size (an odd zero comes last), ``"valid"`` adds none.
        dilation: input steps between neighbouring taps: a dilated, or atrous, convolution above 1.
        groups: parts of the channels that do not mix; as many as channels is a depthwise convolution.
        backend: ``auto`` takes torch's operation.

    Raises:
        ConfigError: a setting that is no size; ``"same"`` with a stride.
        ShapeError: rank, channels, groups or dtypes that do not fit; a kernel longer than the padded input.

    Source:
        LeCun et al. 1998, section II.A, doi:10.1109/5.726791; sizes: Dumoulin & Visin 2016,
        relationships 6 and 15, arXiv:1603.07285; dilation: Yu & Koltun 2015, eq. 2, arXiv:1511.07122;
        groups: Krizhevsky et al. 2012, figure 2, and Xie et al. 2016, figure 3c, arXiv:1611.05431
    """
    return _conv("conv2d", 2, input, weight, bias, (stride, padding, dilation, groups), backend)


def conv3d(
    input: Float[Tensor, "*batch channels depth height width"],
    weight: Float[Tensor, "out part kd kh kw"],
    bias: Float[Tensor, " out"] | None = None,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "*batch out depth2 height2 width2"]:
    r"""Slide a kernel through a volume, or a video with time as depth.

    .. math::
        y_{o,\mathbf i} = b_o + \sum_{c} \sum_{\mathbf m} w_{o,c,\mathbf m}\;
        x_{c,\, \mathbf s \mathbf i + \mathbf d \mathbf m - \mathbf p}

    where :math:`\mathbf i` and the tap :math:`\mathbf m` run over depth, height and width: a kernel
    of side 3 has 27 taps.

    Args:
        input: channels, then depth, height and width; with or without a batch axis.
        weight: ``part`` is channels over groups.
        bias: one shift for each output channel.
        stride: input steps for one output step.
        padding: zeros at both ends; ``"same"`` keeps the size (an odd zero comes last), ``"valid"`` adds none.
        dilation: input steps between neighbouring taps.
        groups: parts of the channels that do not mix.
        backend: ``auto`` takes torch's operation.

    Raises:
        ConfigError: a setting that is no size; ``"same"`` with a stride.
        ShapeError: rank, channels, groups or dtypes that do not fit; a kernel longer than the padded input.

    Source:
        Ji et al. 2013, eq. 2, doi:10.1109/TPAMI.2012.59; Tran et al. 2014, section 3.1, arXiv:1412.0767
    """
    return _conv("conv3d", 3, input, weight, bias, (stride, padding, dilation, groups), backend)


def conv4d(
    input: Float[Tensor, "*batch channels t depth height width"],
    weight: Float[Tensor, "out part kt kd kh kw"],
    bias: Float[Tensor, " out"] | None = None,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "*batch out t2 depth2 height2 width2"]:
    r"""Slide a kernel through a volume that changes in time: four axes, none of them a batch.

    .. math::
        y_{o,\tau,\mathbf i} = b_o + \sum_{m=0}^{k_t-1}
        \operatorname{conv3d}\bigl(x_{\cdot,\, s_t \tau + d_t m - p_t},\; w_{\cdot,\cdot,m}\bigr)_{o,\mathbf i}

    Torch has no such operation; it is a sum of :math:`k_t` of its 3-d convolutions, each over all time
    steps at once. A kernel of side 3 has 81 taps: a 3-d kernel, with 27, sees a single time step.
    Half-precision slices are added in float32.

    Args:
        input: channels, then time, depth, height and width; with or without a batch axis.
        weight: ``part`` is channels over groups.
        bias: one shift for each output channel.
        stride: input steps for one output step.
        padding: zeros at both ends; ``"same"`` keeps the size (an odd zero comes last), ``"valid"`` adds none.
        dilation: input steps between neighbouring taps.
        groups: parts of the channels that do not mix.
        backend: ``auto`` (``torch``) adds 3-d convolutions, ``reference`` adds taps.

    Raises:
        ConfigError: a setting that is no size; ``"same"`` with a stride.
        ShapeError: rank, channels, groups or dtypes that do not fit; a kernel longer than the padded input.

    Source:
        Choy et al. 2019, eq. 2 with D = 4 on a dense grid, arXiv:1904.08755
    """
    return _conv("conv4d", 4, input, weight, bias, (stride, padding, dilation, groups), backend)


def depthwise_separable_conv2d(
    input: Float[Tensor, "*batch channels height width"],
    depthwise: Float[Tensor, "mid 1 kh kw"],
    pointwise: Float[Tensor, "out mid 1 1"],
    bias: Float[Tensor, " out"] | None = None,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "*batch out height2 width2"]:
    r"""Filter each channel by itself, then mix the channels at each position.

    .. math::
        z_{c,i,j} = \sum_{m,n} v_{c,m,n}\; x_{\lfloor c/\mu \rfloor,\, s i + d m - p,\, s j + d n - p}, \qquad
        y_{o,i,j} = b_o + \sum_{c} u_{o,c}\, z_{c,i,j}

    with :math:`\mu` filters for each channel, the multiplier. It is the convolution whose kernel
    factors, :math:`w_{o,c,m,n} = u_{o,c} v_{c,m,n}`, for :math:`\mu = 1`: :math:`k^2 C + C O` weights in
    place of :math:`k^2 C O`. Nothing stands between the two steps; MobileNets put a norm and a ReLU there.

    Args:
        input: channels, then height and width; with or without a batch axis.
        depthwise: ``mid`` filters, a multiple of the input's channels, each over one channel.
        pointwise: how the filtered channels mix.
        bias: one shift for each output channel; one of the first step would be absorbed in it.
        stride: of the first step.
        padding: of the first step.
        dilation: of the first step.
        backend: ``auto`` takes torch's operations.

    Raises:
        ConfigError: a setting that is no size; ``"same"`` with a stride.
        ShapeError: the two weights do not belong together or to the input.

    Source:
        Howard et al. 2017, eq. 3, arXiv:1704.04861; Chollet 2016, section 1.2 and figure 4, arXiv:1610.02357
    """
    op = "depthwise_separable_conv2d"
    check_rank(op, input, (4, 3), "([batch,] channels, height, width)")
    groups = input.shape[-3]
    check_separable(op, groups, depthwise, pointwise)
    z = conv2d(input, depthwise, None, stride, padding, dilation, groups, backend=backend)
    return conv2d(z, pointwise, bias, backend=backend)


def conv_nd(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The readable maths: for each tap of the kernel, a shifted slice of the input times that tap's weights.

    Args:
        x: ``b channels *spatial``, any number of spatial axes, in the dtype to add up in.
        weight: ``out part *kernel``.
        bias: one shift for each output channel.
        geometry: stride, padding, dilation and groups.
    """
    kernel = weight.shape[2:]
    sizes = check_sizes("conv_nd", x.shape[2:], kernel, geometry)
    x = rearrange(F.pad(x, geometry.flat_padding), "b (g c) ... -> b g c ...", g=geometry.groups)
    weight = rearrange(weight, "(g o) c ... -> g o c ...", g=geometry.groups)
    y = x.new_zeros(x.shape[0], geometry.groups, weight.shape[1], *sizes)
    for tap, w in zip(itertools.product(*map(range, kernel)), weight.flatten(3).unbind(-1), strict=True):
        window: list[Any] = [
            slice(d * m, d * m + s * (n - 1) + 1, s)
            for m, d, s, n in zip(tap, geometry.dilation, geometry.stride, sizes, strict=True)
        ]
        y = y + torch.einsum("bgc...,goc->bgo...", x[:, :, :, *window], w)
    y = y.flatten(1, 2)
    return y if bias is None else y + bias.view(-1, *[1] * len(kernel))


def pad_borders(x: Float[Tensor, "*lead"], geometry: Geometry, mode: str) -> Float[Tensor, "*lead2"]:
    """Continue ``x`` past its borders, by what stands there instead of zeros.

    Torch's padding knows up to three axes; a fourth is padded by itself.

    Args:
        x: its last axes are the spatial ones, with one or two before them.
        geometry: its padding says how far.
        mode: ``reflect`` mirrors without repeating the border, ``replicate`` repeats it, ``circular`` goes round.

    Raises:
        ShapeError: an axis is too short to be continued that far.
    """
    axes = len(geometry.padding)
    check_border(x.shape[-axes:], geometry, mode)
    batched = x if x.ndim == axes + 2 else x[None]
    flat = geometry.flat_padding
    if axes == 4:
        b, c, t, *volume = batched.shape
        batched = F.pad(batched.reshape(b, c * t, *volume), flat[:6], mode=mode).unflatten(1, (c, t))
        volume = list(batched.shape[3:])
        padded = F.pad(batched.flatten(3), [0, 0, *flat[6:]], mode=mode).unflatten(3, volume)
    else:
        padded = F.pad(batched, flat, mode=mode)
    return padded if x.ndim == axes + 2 else padded[0]


def output_size(size: int, kernel_size: int, stride: int = 1, padding: int = 0, dilation: int = 1) -> int:
    r"""How many positions a convolution (or a pooling) makes of ``size``.

    .. math:: \left\lfloor \frac{n + 2p - d(k-1) - 1}{s} \right\rfloor + 1

    Args:
        size: entries of the axis.
        kernel_size: taps.
        stride: input steps for one output step.
        padding: zeros at each end.
        dilation: input steps between taps.

    Raises:
        ConfigError: a setting that is no size.
        ShapeError: the kernel is longer than the padded axis.

    Source:
        Dumoulin & Visin 2016, relationship 15, arXiv:1603.07285

    Example:
        >>> output_size(224, 7, stride=2, padding=3)
        112
    """
    kernel = as_tuple("output_size", "kernel_size", kernel_size, 1)
    size = as_tuple("output_size", "size", size, 1, least=0)[0]
    return check_sizes(
        "output_size", (size,), kernel, read_geometry("output_size", kernel, stride, padding, dilation, 1)
    )[0]


def _conv(
    op: str, axes: int, x: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple[Any, ...], backend: Backend
) -> Tensor:
    """Check, choose who runs, and give an input without batch axis one for the time being."""
    check_conv(op, axes, x, weight, bias, settings[-1])
    geometry = read_geometry(op, weight.shape[2:], *settings)
    check_sizes(op, x.shape[-axes:], weight.shape[2:], geometry)
    batched = x if x.ndim == axes + 2 else x[None]
    if resolve(op, backend, {"torch": None, "reference": None}) == "torch":
        y = _torchs(axes, batched, weight, bias, geometry)
    else:
        y = in_float32(conv_nd, batched, weight, bias, geometry)
    return y if x.ndim == axes + 2 else y[0]


def _torchs(axes: int, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    padding = geometry.symmetric
    if padding is None or 0 in x.shape[2:]:  # torch warns about the one and refuses the other
        x, padding = F.pad(x, geometry.flat_padding), (0,) * axes
    if axes == 4:
        return _sum_of_conv3d(x, weight, bias, padding, geometry)
    run = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
    return run(x, weight, bias, geometry.stride, padding, geometry.dilation, geometry.groups)


def _sum_of_conv3d(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...], geometry: Geometry
) -> Tensor:
    """The 4-d convolution: for each step of the kernel in time, a 3-d convolution of all time steps at once."""
    (stride, *strides), (step, *steps) = geometry.stride, geometry.dilation
    x = rearrange(F.pad(x, [0] * 6 + [padding[0]] * 2), "b c t ... -> b t c ...")
    times = (x.shape[1] - step * (weight.shape[2] - 1) - 1) // stride + 1
    y: Tensor | None = None
    for m in range(weight.shape[2]):
        slices = x[:, m * step : m * step + stride * (times - 1) + 1 : stride].flatten(0, 1)
        part = F.conv3d(
            slices,
            weight[:, :, m],
            bias if m == 0 else None,
            tuple(strides),
            padding[1:],
            tuple(steps),
            geometry.groups,
        )
        dtype = part.dtype
        part = part.to(torch.promote_types(dtype, torch.float32))
        y = part if y is None else y + part
    assert y is not None  # check_conv has refused a kernel without taps
    return rearrange(y.to(dtype), "(b t) o ... -> b o t ...", t=times)


def in_float32(run: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    """Call ``run`` with halves widened to float32, and round its answer once.

    Under autocast the answer has autocast's dtype, as that of torch's operation has.
    """
    if not autocasts(x):
        return _widened(run, x.dtype, x, weight, bias, *rest)
    lower = torch.get_autocast_dtype(x.device.type)
    tensors: list[Any] = [t if t is None or t.dtype == torch.float64 else t.to(lower) for t in (x, weight, bias)]
    with torch.autocast(x.device.type, enabled=False):
        return _widened(run, tensors[0].dtype, *tensors, *rest)


def _widened(run: Any, dtype: torch.dtype, *arguments: Any) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    return run(*(a.to(wide) if isinstance(a, Tensor) else a for a in arguments)).to(dtype)
