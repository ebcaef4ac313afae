"""What a convolution's arguments must satisfy, read once into one :class:`Geometry`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.check import as_tuple, check_floating, check_rank, check_size

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
    if padding not in ("same", "valid"):
        raise ConfigError(
            f"{op} padding", got=repr(padding), want="'same', 'valid', or a number of zeros", remedy="Pass padding=0."
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
    _check_alike(op, x, weight, bias)
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
    if x.shape[-axes - 1] != wanted:
        raise ShapeError(
            f"{op} input",
            got=f"{x.shape[-axes - 1]} channels in {tuple(x.shape)}",
            want=f"{wanted} channels on axis {-axes - 1}, as a weight of {tuple(weight.shape)} has in {groups} groups",
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


def _check_alike(op: str, x: Tensor, *parameters: Tensor | None) -> None:
    """Refuse mixed devices, and mixed dtypes outside autocast, which unites them."""
    for p in parameters:
        if p is None:
            continue
        if p.device != x.device:
            raise ShapeError(f"{op} device", got=f"{p.device} and {x.device}", want="one device", remedy="Use .to().")
        if p.dtype != x.dtype and not autocasts(x):
            raise ShapeError(
                f"{op} dtype",
                got=f"{x.dtype} input, {p.dtype} parameters",
                want="one dtype",
                remedy="Convert one of them with .to(), or run under torch.autocast.",
            )


def autocasts(x: Tensor) -> bool:
    """Whether autocast is at work on the device of ``x``; the meta device knows none."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)
