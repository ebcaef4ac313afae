r"""Deformable convolution: every tap of the kernel is read where its own offset says.

Plain convolution reads a rigid grid. Here each output position brings an offset for each tap,
mostly a fraction of a pixel, and the image is read between its pixels by bilinear weights.
Version 2 also brings a factor for each tap, its ``mask``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from handbook_src.check import as_tuple, check_floating, check_rank
from handbook_src.dispatch import Backend, resolve
from handbook_src.errors import ShapeError
from handbook_src.functional.convolution.conv_input import Geometry, autocasts, check_conv, check_sizes, read_geometry


def deform_conv2d(
    input: Float[Tensor, "b channels height width"],
    offset: Float[Tensor, "b offsets height2 width2"],
    weight: Float[Tensor, "out part kh kw"],
    bias: Float[Tensor, " out"] | None = None,
    stride: int | Sequence[int] = (1, 1),
    padding: int | Sequence[int] = (0, 0),
    dilation: int | Sequence[int] = (1, 1),
    mask: Float[Tensor, "b taps height2 width2"] | None = None,
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "b out height2 width2"]:
    r"""Convolve with a kernel whose taps move, each by its own offset at each position.

    .. math::
        y(p) = b + \sum_{k=1}^{K} w_k \cdot x(s p + p_k + \Delta p_k) \cdot \Delta m_k, \qquad
        x(q) = \sum_{n} \max(0, 1 - |q_y - n_y|) \, \max(0, 1 - |q_x - n_x|) \; x(n)

    with :math:`p_k` the tap's place on the rigid grid (dilation and padding included) and :math:`n` over
    all pixels; :math:`x` is zero outside the image. Without ``mask`` (version 1) :math:`\Delta m_k = 1`.

    Both backends widen halves to float32 and round once; offsets and mask may have another float dtype.
    A NaN offset gives a NaN output there, and never reads outside the image.

    Args:
        input: the image.
        offset: for each offset group and tap two channels, :math:`\Delta y` then :math:`\Delta x`, in pixels:
            ``2 * offset_groups * kh * kw`` in all. Offset groups cut the input's channels into equal parts.
        weight: ``part`` is channels over (weight) groups, whose number follows from it.
        bias: one shift for each output channel.
        stride: input pixels for one output pixel.
        padding: zeros on all sides.
        dilation: input pixels between neighbouring taps of the rigid grid.
        mask: for each offset group and tap one factor, ``offset_groups * kh * kw`` channels.
        backend: ``reference`` gathers four corners for each channel; ``torch`` (``auto``) copies the image to
            channels-last once and reads whole rows of channels.

    Raises:
        ConfigError: a stride, padding or dilation that is no size.
        ShapeError: rank, channels, groups, dtypes or sizes that do not fit.

    Source:
        Dai et al. 2017, eq. 2 to 4, arXiv:1703.06211; the mask: Zhu et al. 2018, eq. 1, arXiv:1811.11168
    """
    op = "deform_conv2d"
    check_rank(op, input, (4,), "(batch, channels, height, width)")
    groups = _weight_groups(input, weight)
    check_conv(op, 2, input, weight, bias, groups)
    padding = as_tuple(op, "padding", padding, 2, least=0)  # numbers only, as in torchvision
    geometry = read_geometry(op, weight.shape[2:], stride, padding, dilation, groups)
    size = check_sizes(op, input.shape[2:], weight.shape[2:], geometry)
    _check_offsets(input, offset, mask, weight.shape[2] * weight.shape[3], size)
    runs = resolve(op, backend, {"torch": None, "reference": None})
    sample = _sample_rows if runs == "torch" else _sample_corners
    if not autocasts(input):
        return _convolve(sample, input, offset, weight, bias, mask, geometry)
    with torch.autocast(input.device.type, enabled=False):  # places in pixels need their digits
        return _convolve(sample, input, offset, weight, bias, mask, geometry)


def _convolve(
    sample: Callable[[Tensor, Places, Tensor | None], Tensor],
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    geometry: Geometry,
) -> Tensor:
    """Sample the image at every place, then one matrix product; at least in float32."""
    wide = torch.promote_types(torch.promote_types(x.dtype, offset.dtype), torch.float32)
    stride, padding, dilation = geometry.stride, [p for p, _ in geometry.padding], geometry.dilation
    places = sampling_places(offset.to(wide), weight.shape[2:], stride, padding, dilation)
    columns = sample(x.to(wide), places, None if mask is None else mask.to(wide).view(places.y.shape))
    y = torch.einsum(
        "bpkgc,gokc->bgop",
        columns.unflatten(-1, (geometry.groups, weight.shape[1])),
        rearrange(weight.to(wide), "(g o) c kh kw -> g o (kh kw) c", g=geometry.groups),
    )
    y = y.reshape(x.shape[0], weight.shape[0], *offset.shape[2:])
    if bias is not None:
        y = y + bias.to(wide)[:, None, None]
    return y.to(x.dtype)


_ROWS = "b g k h w -> (b h w k g)"


class Places(NamedTuple):
    """Where each tap is read, in pixels: both ``b offset_groups taps height2 width2``."""

    y: Tensor
    x: Tensor


def sampling_places(
    offset: Float[Tensor, "b offsets height2 width2"],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> Places:
    r"""Where a deformable convolution reads: the rigid grid plus the offsets.

    .. math:: s p + p_k + \Delta p_k, \qquad p_k = d\,k - \text{padding}

    Args:
        offset: as :func:`deform_conv2d` takes it.
        kernel_size: taps along height and width.
        stride: input pixels for one output pixel.
        padding: zeros on all sides.
        dilation: input pixels between neighbouring taps.

    Raises:
        ConfigError: a size that is none.
        ShapeError: the offset's channels are not two for each tap and group.

    Source:
        Dai et al. 2017, eq. 2, arXiv:1703.06211
    """
    op = "sampling_places"
    kernel = as_tuple(op, "kernel_size", kernel_size, 2)
    geometry = read_geometry(op, kernel, stride, padding, dilation, 1)
    taps, (high, wide) = kernel[0] * kernel[1], offset.shape[-2:]
    grouped = offset.view(offset.shape[0], _offset_groups(op, offset, taps), taps, 2, high, wide)

    y, x = (_grid(kernel[a], n, geometry, a, offset.device) for a, n in enumerate((high, wide)))
    rows = y[:, None, :, None].expand(*kernel, -1, 1).flatten(0, 1)
    columns = x[None, :, None, :].expand(*kernel, 1, -1).flatten(0, 1)
    return Places(grouped[:, :, :, 0] + rows, grouped[:, :, :, 1] + columns)


def _grid(taps: int, size: int, geometry: Geometry, axis: int, device: torch.device) -> Tensor:
    """Where the taps of a rigid kernel stand, along one axis: ``taps size``."""
    tap = torch.arange(taps, device=device) * geometry.dilation[axis] - geometry.padding[axis][0]
    return tap[:, None] + torch.arange(size, device=device) * geometry.stride[axis]


def _sample_corners(x: Tensor, places: Places, mask: Tensor | None) -> Tensor:
    """The readable maths: four corners for each tap and channel, weighted by their nearness; ``b p k c``."""
    groups, taps, *size = places.y.shape[1:]
    (y0, fy), (x0, fx) = _corner(places.y, x.shape[2]), _corner(places.x, x.shape[3])
    padded = F.pad(x, (1, 2, 1, 2))
    wide, pixels = padded.shape[3], rearrange(padded, "b (g c) h w -> b g c (h w)", g=groups)
    corners = []
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
        at = ((y0 + down) * wide + x0 + right).flatten(2).unsqueeze(2).expand(-1, -1, pixels.shape[2], -1)
        corners.append(pixels.gather(3, at).unflatten(3, (taps, *size)))
    fy, fx = fy.unsqueeze(2), fx.unsqueeze(2)
    above = (1 - fx) * corners[0] + fx * corners[1]
    below = (1 - fx) * corners[2] + fx * corners[3]
    value = (1 - fy) * above + fy * below
    if mask is not None:
        value = value * mask.unsqueeze(2)
    return rearrange(value, "b g c k h w -> b (h w) k (g c)")


def _sample_rows(x: Tensor, places: Places, mask: Tensor | None) -> Tensor:
    """The same values, read as whole rows of channels; ``b p k c``.

    One index then fetches ``c`` neighbouring numbers: on one CPU thread, forward and backward of
    64 channels take about a third of the time that single numbers take.
    """
    (b, groups, taps, *size), channels = places.y.shape, x.shape[1]
    (y0, fy), (x0, fx) = _corner(places.y, x.shape[2]), _corner(places.x, x.shape[3])
    high, wide = x.shape[2] + 3, x.shape[3] + 3
    rows = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 2, 1, 2)).reshape(b * high * wide * groups, channels // groups)
    image = torch.arange(b, device=x.device).view(-1, 1, 1, 1, 1) * (high * wide)
    group = torch.arange(groups, device=x.device).view(1, -1, 1, 1, 1)
    first = rearrange((image + y0 * wide + x0) * groups + group, _ROWS)
    corners = [rows.index_select(0, first + groups * step) for step in (0, 1, wide, wide + 1)]
    fy, fx = rearrange(fy, _ROWS)[:, None], rearrange(fx, _ROWS)[:, None]
    value = torch.lerp(torch.lerp(corners[0], corners[1], fx), torch.lerp(corners[2], corners[3], fx), fy)
    if mask is not None:
        value = value * rearrange(mask, _ROWS)[:, None]
    return value.view(b, size[0] * size[1], taps, channels)


def _corner(place: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The pixel before ``place`` in an image with one zero before and two after it, and the way beyond that pixel."""
    place = place.clamp(-1, size)  # further out there are only zeros
    before = place.detach().floor().nan_to_num(0)  # a NaN keeps to the image; the fraction still carries it
    return before.long() + 1, place - before


def _weight_groups(x: Tensor, weight: Tensor) -> int:
    """How often the weight's input channels go into the image's; ``check_conv`` judges the answer."""
    part = weight.shape[1] if weight.ndim > 1 else 0
    return max(1, x.shape[1] // part) if part else 1


def _offset_groups(op: str, offset: Tensor, taps: int) -> int:
    check_rank(op, offset, (4,), "(batch, 2 * offset_groups * kh * kw, height, width)")
    if offset.shape[1] % (2 * taps) or offset.shape[1] == 0:
        raise ShapeError(
            f"{op} offset",
            got=f"{offset.shape[1]} channels in {tuple(offset.shape)}",
            want=f"a multiple of {2 * taps}: y and x for each of {taps} taps",
            remedy="Let the layer that predicts the offsets give 2 * offset_groups * kh * kw channels.",
        )
    return offset.shape[1] // (2 * taps)


def _check_offsets(x: Tensor, offset: Tensor, mask: Tensor | None, taps: int, size: tuple[int, ...]) -> None:
    """Check that offsets and mask are there for each image, tap and output position."""
    op = "deform_conv2d"
    check_floating(op, offset, mask)
    groups = _offset_groups(op, offset, taps)
    if x.shape[1] % groups:
        raise ShapeError(
            f"{op} offset groups",
            got=f"{groups} for {x.shape[1]} input channels",
            want="groups that divide the channels",
            remedy="Predict fewer offsets, or change the channels.",
        )
    for name, t, channels in (("offset", offset, 2 * groups * taps), ("mask", mask, groups * taps)):
        if t is not None and tuple(t.shape) != (x.shape[0], channels, *size):
            raise ShapeError(
                f"{op} {name}",
                got=tuple(t.shape),
                want=f"{(x.shape[0], channels, *size)}: one for each image, tap and output position",
                remedy="Predict it by a convolution of the same kernel, stride, padding and dilation.",
            )
