r"""Transposed convolution over one to three axes: the adjoint of convolution, with torch's names.

Where a convolution gathers (each output reads a window of the input), its transpose scatters:
each input entry stamps the kernel, scaled by its value, onto the output, and stamps add up.
It is what the gradient of a convolution does; it inverts sizes, not values.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from handbook_src.dispatch import Backend, resolve
from handbook_src.functional.convolution.conv import in_float32
from handbook_src.functional.convolution.conv_input import Geometry, check_conv, read_geometry, read_transposed_sizes


def conv_transpose1d(
    input: Float[Tensor, "*batch channels length"],
    weight: Float[Tensor, "channels part k"],
    bias: Float[Tensor, " out"] | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "*batch out length2"]:
    r"""Stamp the kernel onto the output, once for each input entry, ``stride`` apart.

    .. math:: y_{o,j} = b_o + \sum_{c} \sum_{(i,m):\; s i + d m - p = j} w_{c,o,m}\; x_{c,i}

    The output has :math:`s(n-1) + d(k-1) + 1 - 2p + a` entries, where :math:`a` is the output padding.

    Args:
        input: channels, then positions; with or without a batch axis.
        weight: input channels first; ``part`` is output channels over groups.
        bias: one shift for each output channel.
        stride: output steps for one input step.
        padding: entries cut off at both ends of the output.
        output_padding: entries added at the output's end; less than stride or dilation.
        groups: parts of the channels that do not mix.
        dilation: output steps between neighbouring taps.
        backend: ``auto`` takes torch's operation.

    Raises:
        ConfigError: a setting that is no size, or an output padding that reaches past the stamps.
        ShapeError: rank, channels, groups or dtypes that do not fit; an output without entries.

    Source:
        Zeiler et al. 2010, section 3, doi:10.1109/CVPR.2010.5539957; Dumoulin & Visin 2016,
        relationship 14, arXiv:1603.07285
    """
    return _conv_transpose(1, input, weight, bias, (stride, padding, dilation, groups), output_padding, backend)


def conv_transpose2d(
    input: Float[Tensor, "*batch channels height width"],
    weight: Float[Tensor, "channels part kh kw"],
    bias: Float[Tensor, " out"] | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "*batch out height2 width2"]:
    r"""Stamp the kernel onto the output, once for each input pixel, ``stride`` apart.

    .. math::
        y_{o,\mathbf j} = b_o + \sum_{c} \sum_{(\mathbf i,\mathbf m):\; s \mathbf i + d \mathbf m - p = \mathbf j}
        w_{c,o,\mathbf m}\; x_{c,\mathbf i}

    where :math:`\mathbf i, \mathbf j, \mathbf m` are pairs of row and column. An axis of :math:`n` gives
    :math:`s(n-1) + d(k-1) + 1 - 2p + a`, where :math:`a` is the output padding. Where the stride does
    not divide the kernel, output pixels are reached by unequal numbers of taps: the checkerboard.

    Args:
        input: channels, then height and width; with or without a batch axis.
        weight: input channels first; ``part`` is output channels over groups.
        bias: one shift for each output channel.
        stride: output steps for one input step.
        padding: entries cut off at both ends of the output.
        output_padding: entries added at the output's end; less than stride or dilation.
        groups: parts of the channels that do not mix.
        dilation: output steps between neighbouring taps.
        backend: ``auto`` takes torch's operation.

    Raises:
        ConfigError: a setting that is no size, or an output padding that reaches past the stamps.
        ShapeError: rank, channels, groups or dtypes that do not fit; an output without entries.

    Source:
        Zeiler et al. 2010, section 3, doi:10.1109/CVPR.2010.5539957; Dumoulin & Visin 2016,
        relationship 14, arXiv:1603.07285
    """
    return _conv_transpose(2, input, weight, bias, (stride, padding, dilation, groups), output_padding, backend)


def conv_transpose3d(
    input: Float[Tensor, "*batch channels depth height width"],
    weight: Float[Tensor, "channels part kd kh kw"],
    bias: Float[Tensor, " out"] | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "*batch out depth2 height2 width2"]:
    r"""Stamp the kernel onto the output, once for each input voxel, ``stride`` apart.

    .. math::
        y_{o,\mathbf j} = b_o + \sum_{c} \sum_{(\mathbf i,\mathbf m):\; s \mathbf i + d \mathbf m - p = \mathbf j}
        w_{c,o,\mathbf m}\; x_{c,\mathbf i}

    where :math:`\mathbf i, \mathbf j, \mathbf m` run over depth, height and width.

    Args:
        input: channels, then depth, height and width; with or without a batch axis.
        weight: input channels first; ``part`` is output channels over groups.
        bias: one shift for each output channel.
        stride: output steps for one input step.
        padding: entries cut off at both ends of the output.
        output_padding: entries added at the output's end; less than stride or dilation.
        groups: parts of the channels that do not mix.
        dilation: output steps between neighbouring taps.
        backend: ``auto`` takes torch's operation.

    Raises:
        ConfigError: a setting that is no size, or an output padding that reaches past the stamps.
        ShapeError: rank, channels, groups or dtypes that do not fit; an output without entries.

    Source:
        Zeiler et al. 2010, section 3, doi:10.1109/CVPR.2010.5539957; Dumoulin & Visin 2016,
        relationship 14, arXiv:1603.07285
    """
    return _conv_transpose(3, input, weight, bias, (stride, padding, dilation, groups), output_padding, backend)


def stamp(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, sizes: Sequence[int], extra: Sequence[int]
) -> Tensor:
    """The readable maths: for each tap, every input entry adds its value times the tap's weights to the output.

    Args:
        x: ``b channels *spatial``, any number of spatial axes, in the dtype to add up in.
        weight: ``channels part *kernel``.
        bias: one shift for each output channel.
        geometry: stride, padding (what is cut off), dilation and groups.
        sizes: of the output, ``extra`` included.
        extra: the output padding.
    """
    kernel = weight.shape[2:]
    x = rearrange(x, "b (g c) ... -> b g c ...", g=geometry.groups)
    weight = rearrange(weight, "(g c) o ... -> g c o ...", g=geometry.groups)
    uncut = [n + sum(cut) for n, cut in zip(sizes, geometry.padding, strict=True)]
    y = x.new_zeros(x.shape[0], geometry.groups, weight.shape[2], *uncut)
    for tap, w in zip(itertools.product(*map(range, kernel)), weight.flatten(3).unbind(-1), strict=True):
        reached: list[Any] = [
            slice(d * m, d * m + s * (n - 1) + 1, s)
            for m, d, s, n in zip(tap, geometry.dilation, geometry.stride, x.shape[3:], strict=True)
        ]
        y[:, :, :, *reached] += torch.einsum("bgc...,gco->bgo...", x, w)
    kept: list[Any] = [slice(cut, cut + n) for n, (cut, _) in zip(sizes, geometry.padding, strict=True)]
    y = y[:, :, :, *kept].flatten(1, 2)
    return y if bias is None else y + bias.view(-1, *[1] * len(kernel))


def _conv_transpose(
    axes: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    settings: tuple[Any, ...],
    output_padding: int | Sequence[int],
    backend: Backend,
) -> Tensor:
    """Check, choose who runs, and give an input without batch axis one for the time being."""
    op = f"conv_transpose{axes}d"
    check_conv(op, axes, x, weight, bias, settings[-1], transposed=True)
    geometry = read_geometry(op, weight.shape[2:], *settings, words=())
    extra, sizes = read_transposed_sizes(op, x.shape[-axes:], weight.shape[2:], geometry, output_padding)
    batched = x if x.ndim == axes + 2 else x[None]
    if resolve(op, backend, {"torch": None, "reference": None}) == "torch":
        run = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[axes - 1]
        cut = [before for before, _ in geometry.padding]
        y = run(batched, weight, bias, geometry.stride, cut, extra, geometry.groups, geometry.dilation)
    else:
        y = in_float32(stamp, batched, weight, bias, geometry, sizes, extra)
    return y if x.ndim == axes + 2 else y[0]
