r"""Octave convolution: part of the channels live on a grid of half the size, and the two parts talk.

The ``high`` octave has the image's size, the ``low`` one half of it, rounded up. An octave without
channels is ``None``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from handbook_src.check import check_features, check_floating, check_probability, check_rank, check_size
from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.convolution.conv import conv2d
from handbook_src.functional.convolution.conv_input import read_geometry

Octaves = tuple[Tensor | None, Tensor | None]


def split_channels(channels: int, alpha: float) -> tuple[int, int]:
    r"""How many channels are high and how many low.

    .. math:: c_L = \lfloor \alpha c \rfloor, \qquad c_H = c - c_L

    Args:
        channels: in all.
        alpha: the share of the low octave.

    Raises:
        ConfigError: ``alpha`` is no share, or asks for less than one channel of an octave.

    Source:
        Chen et al. 2019, section 3.2, arXiv:1904.05049; rounding down is the published code's

    Example:
        >>> split_channels(10, 0.25)
        (8, 2)
    """
    check_size("octave", "channels", channels)
    check_probability("octave", "alpha", alpha, below_one=False)
    low = int(alpha * channels + 1e-9)  # 0.29 * 100 is 28.999999999999996
    if low == 0 and alpha > 0:
        raise ConfigError(
            "octave alpha",
            got=f"{alpha} of {channels} channels, less than one",
            want="0, or at least one channel",
            remedy=f"Pass alpha=0, or at least {1 / channels:.3g}.",
        )
    return channels - low, low


def halve(high: Float[Tensor, "b channels height width"]) -> Float[Tensor, "b channels height2 width2"]:
    r"""Go one octave down: the mean of each 2 x 2 pixels; at an odd border, of those that are there.

    .. math:: y_{ij} = \tfrac14 \sum_{m,n \in \{0, 1\}} x_{2i+m,\, 2j+n}

    Args:
        high: the image, or the high octave.

    Source:
        Chen et al. 2019, eq. 3 and 4, arXiv:1904.05049
    """
    return F.avg_pool2d(high, 2, ceil_mode=True, count_include_pad=False)


def double(low: Float[Tensor, "b channels height width"]) -> Float[Tensor, "b channels height2 width2"]:
    r"""Go one octave up: each pixel becomes 2 x 2 equal ones.

    .. math:: y_{ij} = x_{\lfloor i/2 \rfloor,\, \lfloor j/2 \rfloor}

    Args:
        low: the low octave.

    Source:
        Chen et al. 2019, eq. 3, arXiv:1904.05049
    """
    b, channels, high, wide = low.shape
    return low[..., :, None, :, None].expand(b, channels, high, 2, wide, 2).reshape(b, channels, 2 * high, 2 * wide)


def octave_conv2d(
    high: Float[Tensor, "b high height width"] | None,
    low: Float[Tensor, "b low height2 width2"] | None,
    weight: Float[Tensor, "out part kh kw"],
    bias: Float[Tensor, " out"] | None = None,
    alpha_out: float = 0.5,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Octaves:
    r"""Convolve both octaves, each into both: four convolutions cut from one weight.

    .. math::
        y_H &= f(x_H; W_{H \to H}) + \operatorname{up}\bigl(f(x_L; W_{L \to H})\bigr) + b_H \\
        y_L &= f(x_L; W_{L \to L}) + f\bigl(\operatorname{pool}(x_H); W_{H \to L}\bigr) + b_L

    ``weight`` is that of a plain convolution of all channels; its first rows make the high octave, its first
    columns (of each group) read it. Without low channels on either side this is that convolution.
    Odd sizes: the low octave has half the size rounded up, and what is doubled loses the row too many.
    A strided kernel of odd size moves the octaves apart by half a pixel; the paper pools instead.

    Args:
        high: the channels at full size, or None.
        low: the channels at half size, or None.
        weight: ``part`` is all input channels over groups.
        bias: one shift for each output channel, those of the high octave first.
        alpha_out: the share of output channels in the low octave.
        stride: of each of the four convolutions, on its own grid.
        padding: zeros on all sides of each grid.
        dilation: pixels between neighbouring taps, on each grid.
        groups: parts of the channels that do not mix; they must divide all four counts.

    Returns:
        The high and the low octave, ``None`` where it has no channels.

    Raises:
        ConfigError: a share or a size that is none.
        ShapeError: no input; octaves of different images; channels, groups or dtypes that do not fit; a kernel
            that is not centred, or a stride that carries the two grids apart.

    Source:
        Chen et al. 2019, section 3.2 and eq. 3 and 4, arXiv:1904.05049
    """
    wide = _check(high, low, weight, bias, groups)
    outs = split_channels(weight.shape[0], alpha_out)
    for count in (*wide, *outs):
        if count % groups:
            raise ShapeError(
                "octave_conv2d groups",
                got=f"{groups} for {wide} input and {outs} output channels (high, low)",
                want="groups that divide all four",
                remedy="Change the shares or the channels; for depthwise octaves use two plain depthwise convolutions.",
            )
    if (wide[0] or outs[0]) and (wide[1] or outs[1]):
        _check_alignment(weight.shape[2:], stride, padding, dilation)
    cut = wide[0] // groups
    (rows_high, rows_low), settings = weight.split(outs), (stride, padding, dilation, groups)
    b_high, b_low = (None, None) if bias is None else bias.split(outs)
    y_high = y_low = None
    if high is not None and outs[0]:
        y_high = conv2d(high, rows_high[:, :cut], b_high, *settings)
    if low is not None and outs[1]:
        y_low = conv2d(low, rows_low[:, cut:], b_low, *settings)
    if low is not None and outs[0]:
        part = conv2d(low, rows_high[:, cut:], b_high if y_high is None else None, *settings)
        y_high = double(part) if y_high is None else y_high + _crop(double(part), _octave(y_high, part, "output"))
    if high is not None and outs[1]:
        part = conv2d(halve(high), rows_low[:, :cut], b_low if y_low is None else None, *settings)
        y_low = part if y_low is None else y_low + part
    if y_high is not None and y_low is not None:
        _octave(y_high, y_low, "output")
    return y_high, y_low


def _crop(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x[..., : size[0], : size[1]]


def _check_alignment(
    kernel: Sequence[int], stride: int | Sequence[int], padding: int | Sequence[int], dilation: int | Sequence[int]
) -> None:
    """Refuse a kernel that is not centred: at half the size its shift is twice as far, and the octaves part."""
    geometry = read_geometry("octave_conv2d", kernel, stride, padding, dilation, 1)
    for k, s, p, d in zip(kernel, geometry.stride, geometry.padding, geometry.dilation, strict=True):
        if s == 1 and sum(p) != d * (k - 1):
            raise ShapeError(
                "octave_conv2d kernel",
                got=f"{k} taps, dilation {d}, padding {p[0]}",
                want="an odd kernel with padding = dilation * (kernel_size - 1) // 2, so that both octaves keep place",
                remedy=f"Pass padding={d * (k - 1) // 2}." if k % 2 else f"Take {k + 1} taps.",
            )


def _octave(high: Tensor, low: Tensor, what: str) -> tuple[int, int]:
    """Return the size of ``high``; refuse a ``low`` of another size than half of it, rounded up."""
    size, half = tuple(high.shape[2:]), tuple(-(-n // 2) for n in high.shape[2:])
    if tuple(low.shape[2:]) != half:
        raise ShapeError(
            f"octave_conv2d {what}",
            got=f"{size} high and {tuple(low.shape[2:])} low",
            want=f"{half} low, half of the high octave rounded up",
            remedy="Choose kernel, stride and padding so that they halve alike, for instance 4, 2 and 1."
            if what == "output"
            else "Make the low octave with halve(high).",
        )
    return size[0], size[1]


def _check(
    high: Tensor | None, low: Tensor | None, weight: Tensor, bias: Tensor | None, groups: int
) -> tuple[int, int]:
    """Return the channels of both octaves, once everything fits."""
    given = [x for x in (high, low) if x is not None]
    if not given:
        raise ShapeError(
            "octave_conv2d input", got="no octave", want="a high or a low one", remedy="Pass the image as high."
        )
    for x in given:
        check_rank("octave_conv2d", x, (4,), "(batch, channels, height, width)")
    check_rank("octave_conv2d weight,", weight, (4,), "(out, channels / groups, height, width)")
    check_floating("octave_conv2d", *given, weight)
    check_size("octave_conv2d", "groups", groups)
    if bias is not None:
        check_rank("octave_conv2d bias,", bias, (1,), "(out)")
        check_features("octave_conv2d", bias, len(weight), name="bias")
    if high is not None and low is not None:
        _octave(high, low, "input")
        if len(high) != len(low):
            raise ShapeError(
                "octave_conv2d input",
                got=f"{len(high)} high and {len(low)} low images",
                want="as many of each",
                remedy="Pass both octaves of one batch.",
            )
    counts = [0 if x is None else x.shape[1] for x in (high, low)]
    if sum(counts) != weight.shape[1] * groups:
        raise ShapeError(
            "octave_conv2d input",
            got=f"{counts[0]} high and {counts[1]} low channels",
            want=f"{weight.shape[1] * groups} in all, as a weight of {tuple(weight.shape)} has in {groups} groups",
            remedy="Split the channels by split_channels with the share that the weight was made for.",
        )
    return counts[0], counts[1]
