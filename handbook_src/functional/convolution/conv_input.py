"""What a convolution's arguments must satisfy, read once into one :class:`Geometry`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from handbook_src.check import as_tuple, check_floating, check_rank, check_size
from handbook_src.errors import ConfigError, ShapeError

AXES = ("length", "height, width", "depth, height, width", "t, depth, height, width")


class Geometry(NamedTuple):
    """One integer (or pair) for each spatial axis, and the number of groups."""

    stride: tuple[int, ...]
    #: zeros before and after each axis.
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def symmetric(self) -> tuple[int, ...] | None:
        """One padding for both ends of each axis; ``None`` where they differ."""
        before, after = tuple(p[0] for p in self.padding), tuple(p[1] for p in self.padding)
        return before if before == after else None

    @property
    def flat_padding(self) -> list[int]:
        """As ``torch.nn.functional.pad`` reads it: the last axis first."""
        return [end for pair in reversed(self.padding) for end in pair]


def read_geometry(
    op: str,
    kernel: Sequence[int],
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    *,
    words: Sequence[str] = ("same", "valid"),
) -> Geometry:
    """Read stride, padding, dilation and groups as torch does, one value for each axis of ``kernel``.

    Raises:
        ConfigError: one is no size, has another number of axes, or ``"same"`` stands beside a stride.
    """
    axes = len(kernel)
    check_size(op, "groups", groups)
    strides = as_tuple(op, "stride", stride, axes)
    dilations = as_tuple(op, "dilation", dilation, axes)
    if not isinstance(padding, str):
        return Geometry(
            strides, tuple((p, p) for p in as_tuple(op, "padding", padding, axes, least=0)), dilations, groups
        )
    if padding not in words:
        names = " or ".join(map(repr, words))
        raise ConfigError(
            f"{op} padding",
            got=repr(padding),
            want=f"a number of zeros{names and ', '}{names}",
            remedy="Pass padding=0.",
        )
    if padding == "same" and set(strides) != {1}:
        raise ConfigError(
            f"{op} stride with padding='same'",
            got=strides,
            want="stride 1: no padding keeps the size under a stride",
            remedy="Pass the padding as numbers, for instance dilation * (kernel - 1) // 2.",
        )
    totals = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilations, kernel, strict=True)]
    return Geometry(strides, tuple((t // 2, t - t // 2) for t in totals), dilations, groups)  # the odd zero comes last


def check_conv(
    op: str, axes: int, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, *, transposed: bool = False
) -> None:
    """Check that input, weight and bias belong together.

    Args:
        op: the operation's name.
        axes: spatial axes.
        x: with or without a batch axis.
        weight: ``out, channels / groups, *kernel``, or transposed ``channels, out / groups, *kernel``.
        bias: one entry for each output channel.
        groups: how many parts the channels are cut into.
        transposed: which of the two orders ``weight`` has.

    Raises:
        ConfigError: ``groups`` is not a positive integer.
        ShapeError: rank, channels, groups, dtypes or devices do not fit.
    """
    check_floating(op, x, weight, bias)
    check_alike(op, x, weight, bias)
    check_size(op, "groups", groups)
    check_rank(op, x, (axes + 2, axes + 1), f"([batch,] channels, {AXES[axes - 1]})")
    order = "in, out / groups" if transposed else "out, in / groups"
    if weight.ndim != axes + 2 or 0 in weight.shape[2:]:
        raise ShapeError(
            f"{op} weight",
            got=tuple(weight.shape),
            want=f"{axes + 2} axes, ({order}, *kernel), and no empty kernel",
            remedy="Build the layer of the right dimension, or unsqueeze the missing axes.",
        )
    first, second = weight.shape[:2]
    if first % groups or first == 0:
        raise ShapeError(
            f"{op} groups",
            got=f"{first} {'input' if transposed else 'output'} channels in {groups} groups",
            want="groups that divide the channels",
            remedy=f"Take one of {[g for g in range(1, first + 1) if first % g == 0] or 'more channels'}.",
        )
    wanted, out = (first, second * groups) if transposed else (second * groups, first)
    if x.shape[-axes - 1] != wanted or wanted == 0:
        raise ShapeError(
            f"{op} input",
            got=f"{x.shape[-axes - 1]} channels in {tuple(x.shape)}",
            want=f"{wanted or 'at least 1'} channels on axis {-axes - 1}, "
            f"as a weight of {tuple(weight.shape)} has in {groups} groups",
            remedy="Channels come before the spatial axes; move them there, or build the layer with the input's count.",
        )
    if bias is not None and tuple(bias.shape) != (out,):
        raise ShapeError(
            f"{op} bias", got=tuple(bias.shape), want=f"{(out,)}", remedy="One entry for each output channel."
        )


def check_sizes(op: str, sizes: Sequence[int], kernel: Sequence[int], geometry: Geometry) -> tuple[int, ...]:
    """Return the output's spatial sizes.

    Raises:
        ShapeError: the kernel, its holes included, is longer than the padded input.
    """
    out = []
    for n, k, s, (before, after), d in zip(sizes, kernel, *geometry[:3], strict=True):
        span, padded = d * (k - 1) + 1, n + before + after
        if padded < span:
            raise ShapeError(
                f"{op} input",
                got=f"{tuple(sizes)}, {padded} entries of one axis after padding",
                want=f"at least the kernel's span, {span} ({k} taps, dilation {d})",
                remedy="Pad more, or take a smaller kernel or dilation.",
            )
        out.append((padded - span) // s + 1)
    return tuple(out)


def read_transposed_sizes(
    op: str, sizes: Sequence[int], kernel: Sequence[int], geometry: Geometry, output_padding: int | Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the output padding and the output's spatial sizes of a transposed convolution.

    Raises:
        ConfigError: the output padding is no size, or not smaller than stride or dilation.
        ShapeError: an input axis is empty, or nothing of the output is left.
    """
    extra = as_tuple(op, "output_padding", output_padding, len(kernel), least=0)
    out = []
    for n, k, s, (before, after), d, a in zip(sizes, kernel, *geometry[:3], extra, strict=True):
        if a >= max(s, d):
            raise ConfigError(
                f"{op} output_padding",
                got=f"{a} with stride {s} and dilation {d}",
                want="less than stride or dilation",
                remedy="It chooses among the sizes that one stride maps to the same input; F.pad adds more.",
            )
        length = s * (n - 1) + d * (k - 1) + 1 - before - after + a
        if n == 0 or length < 1:
            raise ShapeError(
                f"{op} input",
                got=f"{tuple(sizes)}, which makes {length if n else 'no'} entries of one axis",
                want="at least one",
                remedy="Cut less with padding, or give a longer input.",
            )
        out.append(length)
    return extra, tuple(out)


def check_border(sizes: Sequence[int], geometry: Geometry, mode: str) -> None:
    """Check that every axis is long enough to be continued by its own entries.

    Raises:
        ShapeError: one is not.
    """
    for n, (before, after) in zip(sizes, geometry.padding, strict=True):
        pad = max(before, after)
        least = {"reflect": pad + 1, "circular": pad}.get(mode, 1) if pad else 0
        if n < least:
            raise ShapeError(
                f"{mode} padding",
                got=f"{tuple(sizes)} with {pad} to add at one end",
                want=f"at least {least} entries on that axis",
                remedy="Pad less, or with padding_mode='zeros'.",
            )


def check_separable(op: str, channels: int, depthwise: Tensor, pointwise: Tensor) -> None:
    """Check that the depthwise filters fit the channels, and the pointwise weight fits the filters.

    Raises:
        ShapeError: they do not.
    """
    mid = depthwise.shape[0] if depthwise.ndim else 0
    if channels < 1 or depthwise.ndim != 4 or depthwise.shape[1] != 1 or mid % channels:
        raise ShapeError(
            f"{op} depthwise weight",
            got=f"{tuple(depthwise.shape)} for {channels} channels",
            want="(channels * multiplier, 1, height, width) and at least one channel",
            remedy="One filter, or a whole number of filters, for each input channel.",
        )
    if pointwise.ndim != 4 or tuple(pointwise.shape[1:]) != (mid, 1, 1):
        raise ShapeError(
            f"{op} pointwise weight",
            got=tuple(pointwise.shape),
            want=f"(out, {mid}, 1, 1)",
            remedy="It mixes what the depthwise step gives, one position at a time.",
        )


def check_alike(op: str, x: Tensor, *parameters: Tensor | None) -> None:
    """Refuse mixed devices, and mixed dtypes outside autocast, which unites all but float64.

    Raises:
        ShapeError: they are mixed.
    """
    for p in parameters:
        if p is None:
            continue
        if p.device != x.device:
            raise ShapeError(f"{op} device", got=f"{p.device} and {x.device}", want="one device", remedy="Use .to().")
        if p.dtype != x.dtype and (not autocasts(x) or torch.float64 in (p.dtype, x.dtype)):
            raise ShapeError(
                f"{op} dtype",
                got=f"{x.dtype} input, {p.dtype} parameters",
                want="one dtype",
                remedy="Convert one of them with .to(); torch.autocast unites all dtypes but float64.",
            )


def autocasts(x: Tensor) -> bool:
    """Whether autocast is at work on the device of ``x``; the meta device knows none."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)
