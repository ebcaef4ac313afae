r"""Output size and receptive field of a network: computed from its layers, and measured by gradient.

Output :math:`j` of a layer with kernel :math:`k`, stride :math:`s`, dilation :math:`d` and padding
:math:`p` reads inputs :math:`s j - p` to :math:`s j - p + d(k-1)`.  From layer to layer, with
:math:`J` the jump (input positions between neighbouring outputs) and :math:`R` the field,

.. math:: J_\ell = J_{\ell-1}\, s_\ell, \qquad R_\ell = R_{\ell-1} + d_\ell (k_\ell - 1)\, J_{\ell-1}

A transposed convolution divides the jump by its stride; branches that meet see what either saw.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from handbook_src.check import as_tuple
from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.convolution.conv_input import (
    Geometry,
    check_border,
    check_sizes,
    read_geometry,
    read_transposed_sizes,
)
from handbook_src.metrics.receptive_field_walk import (
    CONVOLUTIONS,
    JOINS,
    POINTWISE,
    POOLS,
    TRANSPOSED,
    WHOLE,
    kind_of,
    known,
    unknown,
    walk,
)

Window = tuple[int, int] | None


@dataclass(frozen=True)
class Field:
    """What one layer's outputs see of the network's input, one entry for each spatial axis."""

    name: str
    #: output positions.
    size: tuple[int, ...]
    #: input positions from the first to the last that an output can see, away from the border; behind a
    #: transposed convolution the largest number, which not every output reaches.
    field: tuple[int, ...]
    #: input positions between neighbouring outputs.
    jump: tuple[Fraction, ...]
    #: where the middle of output 0's field lies; negative inside the padding.
    start: tuple[Fraction, ...]
    #: for each output, the first and last input position it does see: exact, borders included.
    windows: tuple[tuple[Window, ...], ...]


@dataclass(frozen=True)
class _Axis:
    """One axis of one value: output j sees input positions within ``[jump j + low, jump j + high]``."""

    windows: tuple[Window, ...]
    jump: Fraction
    low: Fraction
    high: Fraction


def receptive_field(module: nn.Module, input_shape: Sequence[int]) -> list[Field]:
    """Walk through ``module`` and return what each layer sees of the input; the last entry is the output.

    Convolutions of torch and of this package, their transposes, max, average and stochastic pooling,
    nearest-neighbour upsampling, batch norm (as in evaluation), activations, sums, products and
    concatenations of channels are understood; everything else is refused by name.

    Args:
        module: traced by ``torch.fx``: no branches that depend on values.
        input_shape: ``(channels, *spatial)``, without the batch.

    Raises:
        ConfigError: a layer or call whose reach is not known here, a forward that cannot be traced, or
            branches of different jump that meet.
        ShapeError: another number of spatial axes than a layer has, a kernel longer than its padded
            input, or branches of different size that meet.

    Source:
        Araujo, Norris & Sim 2019, doi:10.23915/distill.00021; Dumoulin & Visin 2016, arXiv:1603.07285

    Example:
        >>> field = receptive_field(nn.Sequential(nn.Conv2d(1, 1, 3, 2), nn.Conv2d(1, 1, 3)), (1, 32, 32))[-1]
        >>> field.size, field.field
        ((13, 13), (7, 7))
    """
    _, *spatial = _shape(input_shape)
    start = [_Axis(tuple((i, i) for i in range(n)), Fraction(1), Fraction(0), Fraction(0)) for n in spatial]
    return [_summary(name, axes) for name, axes in walk(module, start, _through, _met)]


def gradient_support(module: nn.Module, input_shape: Sequence[int]) -> tuple[tuple[Window, ...], ...]:
    """Measure the windows of :class:`Field` of the output by differentiating it.

    What runs is the network's skeleton, in float64: layers with equal positive weights and no biases, sums in
    place of maxima, differences and products, and no activations, norms or dropout, called as layers or as
    functions.  Every term is then positive, so no path is cut and no two cancel: an input is seen where
    its gradient is not zero.  (A path of a few hundred layers can underflow.)

    Args:
        module: as for :func:`receptive_field`.
        input_shape: ``(channels, *spatial)``, without the batch.

    Raises:
        ConfigError: what :func:`receptive_field` refuses is refused here, too; and parametrised weights.
        ShapeError: likewise; and another number of channels than a convolution takes.
    """
    receptive_field(module, input_shape)
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.ones(1, *_shape(input_shape), dtype=torch.float64, requires_grad=True)
        *_, (_, y) = walk(module, x, _positive, _added)
        return tuple(_support(y, x, axis) for axis in range(2, x.ndim))


def _support(y: Tensor, x: Tensor, axis: int) -> tuple[Window, ...]:
    rows: list[Window] = []
    others = [i for i in range(x.ndim) if i != axis]
    for total in y.sum(others):
        (gradient,) = torch.autograd.grad(total, x, retain_graph=True, materialize_grads=True)
        seen = gradient.sum(others).nonzero().flatten().tolist()
        rows.append((seen[0], seen[-1]) if seen else None)
    return tuple(rows)


def _shape(input_shape: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(input_shape, Sequence) or len(input_shape) < 2:
        raise ConfigError(
            "receptive_field input_shape",
            got=repr(input_shape),
            want="(channels, *spatial), at least two integers",
            remedy="Leave out the batch: (3, 32, 32) for a colour picture.",
        )
    return as_tuple("receptive_field", "input_shape", input_shape, len(input_shape))


# ---------------------------------------------------------------- computing
def _summary(name: str, axes: list[_Axis]) -> Field:
    return Field(
        name=name,
        size=tuple(len(a.windows) for a in axes),
        field=tuple(math.floor(a.high - a.low) + 1 for a in axes),
        jump=tuple(a.jump for a in axes),
        start=tuple((a.low + a.high) / 2 for a in axes),
        windows=tuple(a.windows for a in axes),
    )


def _met(name: str, before: list[list[_Axis]]) -> list[_Axis]:
    merged = before[0]
    for other in before[1:]:
        merged = [_meet(name, a, b) for a, b in zip(merged, other, strict=True)]
    return merged


def _through(name: str, layer: nn.Module, axes: list[_Axis]) -> list[_Axis]:
    kind = known(name, layer, len(axes))
    if kind in POINTWISE:
        return axes
    if kind == "Upsample":
        return _upsampled(layer, axes)
    if kind in WHOLE:
        return [_whole(a) for a in axes]
    geometry, kernel = _geometry(name, layer, len(axes))
    sizes = [len(a.windows) for a in axes]
    if kind in TRANSPOSED:
        extra = _tuple(layer.output_padding, len(axes))
        _, out = read_transposed_sizes(name, sizes, kernel, geometry, extra)
        return [
            _scattered(a, n, k, s, p[0], d) for a, n, k, s, p, d in zip(axes, out, kernel, *geometry[:3], strict=True)
        ]
    out = _sizes(name, sizes, kernel, geometry, bool(getattr(layer, "ceil_mode", False)))
    mode = str(getattr(layer, "padding_mode", "zeros"))
    check_border(sizes, geometry, mode)
    rows = zip(axes, out, kernel, *geometry[:3], strict=True)
    return [_gathered(a, n, k, s, p[0], d, mode) for a, n, k, s, p, d in rows]


def _geometry(name: str, layer: Any, axes: int) -> tuple[Geometry, tuple[int, ...]]:
    kernel = _tuple(layer.kernel_size, axes)
    padding = layer.padding if isinstance(layer.padding, str) else _tuple(layer.padding, axes)
    dilation = _tuple(getattr(layer, "dilation", 1), axes)
    geometry = read_geometry(name, kernel, _tuple(layer.stride, axes), padding, dilation, 1)
    if kind_of(layer) in POOLS:
        for k, (before, _), d in zip(kernel, geometry.padding, geometry.dilation, strict=True):
            if 2 * before > d * (k - 1) + 1:
                raise ConfigError(
                    f"{name} padding",
                    got=before,
                    want=f"at most half the window's span, {d * (k - 1) + 1}",
                    remedy="Pad less: a window of a pool must hold an entry.",
                )
    return geometry, kernel


def _tuple(value: Any, axes: int) -> tuple[int, ...]:
    return as_tuple("receptive_field", "setting", value, axes, least=0)


def _sizes(name: str, sizes: Sequence[int], kernel: Sequence[int], geometry: Geometry, ceil: bool) -> tuple[int, ...]:
    """Output sizes; with ``ceil`` a last window may hang over the end, but must start before it."""
    if not ceil:
        return check_sizes(name, sizes, kernel, geometry)
    out = []
    for n, k, s, (before, after), d in zip(sizes, kernel, *geometry[:3], strict=True):
        count = -(-(n + before + after - d * (k - 1) - 1) // s) + 1
        count -= (count - 1) * s >= n + before
        if count < 1:
            raise ShapeError(
                f"{name} input", got=tuple(sizes), want="at least one window", remedy="Pad more, or pool less."
            )
        out.append(count)
    return tuple(out)


def _gathered(axis: _Axis, out: int, k: int, s: int, before: int, d: int, mode: str) -> _Axis:
    """A convolution or pooling: each output reads a window of the input, or of what continues it."""
    n = len(axis.windows)
    place = PLACES[mode]
    reads = ([place(s * j + d * m - before, n) for m in range(k)] for j in range(out))
    windows = tuple(_hull(axis.windows[i] for i in read if i is not None) for read in reads)
    low, high = axis.low - axis.jump * before, axis.high + axis.jump * (d * (k - 1) - before)
    return _Axis(windows, axis.jump * s, low, high)


def _inside(i: int, n: int) -> int | None:
    return i if 0 <= i < n else None


#: Where position i of an axis of n is read, by padding mode; ``None`` is a zero.
PLACES: dict[str, Callable[[int, int], int | None]] = {
    "zeros": _inside,
    "reflect": lambda i, n: abs(i) if i < n else 2 * (n - 1) - i,
    "replicate": lambda i, n: min(max(i, 0), n - 1),
    "circular": lambda i, n: i % n,
}


def _scattered(axis: _Axis, out: int, k: int, s: int, cut: int, d: int) -> _Axis:
    """A transposed convolution: each input is stamped onto a window of the output."""
    reached: list[list[Window]] = [[] for _ in range(out)]
    for i, window in enumerate(axis.windows):
        for j in range(s * i - cut, s * i - cut + d * (k - 1) + 1, d):
            if 0 <= j < out:
                reached[j].append(window)
    step = axis.jump / s
    low, high = axis.low + step * (cut - d * (k - 1)), axis.high + step * cut
    return _Axis(tuple(_hull(r) for r in reached), step, low, high)


def _upsampled(layer: Any, axes: list[_Axis]) -> list[_Axis]:
    """Nearest-neighbour upsampling by a whole factor: each position is repeated."""
    factors = layer.scale_factor if isinstance(layer.scale_factor, tuple) else (layer.scale_factor,) * len(axes)
    if layer.mode != "nearest" or any(f is None or f != int(f) for f in factors):
        raise unknown(f"Upsample with mode {layer.mode!r} and scale_factor {layer.scale_factor}")
    grown = []
    for axis, factor in zip(axes, map(int, factors), strict=True):
        windows = tuple(axis.windows[j // factor] for j in range(len(axis.windows) * factor))
        step = axis.jump / factor
        grown.append(_Axis(windows, step, axis.low - step * (factor - 1), axis.high))
    return grown


def _whole(axis: _Axis) -> _Axis:
    n = len(axis.windows)
    return _Axis((_hull(axis.windows),), axis.jump * n, axis.low, axis.high + axis.jump * (n - 1))


def _meet(name: str, a: _Axis, b: _Axis) -> _Axis:
    """Branches that are added or joined: each output sees what either saw."""
    if len(a.windows) != len(b.windows):
        raise ShapeError(
            f"{name}",
            got=f"{len(a.windows)} and {len(b.windows)} positions",
            want="as many",
            remedy="Mend the padding.",
        )
    if a.jump != b.jump:
        raise ConfigError(
            f"{name}", got=f"jumps {a.jump} and {b.jump}", want="one jump", remedy="These branches drift apart."
        )
    windows = tuple(_hull(pair) for pair in zip(a.windows, b.windows, strict=True))
    return _Axis(windows, a.jump, min(a.low, b.low), max(a.high, b.high))


def _hull(windows: Iterable[Window]) -> Window:
    known = [w for w in windows if w is not None]
    return (min(w[0] for w in known), max(w[1] for w in known)) if known else None


# ---------------------------------------------------------------- measuring
def _added(name: str, before: list[Tensor]) -> Tensor:
    if name in JOINS:
        return torch.cat(before, 1)
    total = before[0]
    for other in before[1:]:
        total = total + other
    return total


def _positive(name: str, layer: Any, x: Tensor) -> Tensor:
    """Run the skeleton of one layer: positive weights, no bias, a sum for a maximum or a draw."""
    kind = kind_of(layer)
    if kind in POINTWISE:
        return x
    if kind in POOLS:
        return _window_sums(name, layer, x)
    if kind in WHOLE:
        return x.sum(list(range(2, x.ndim)), keepdim=True)
    if kind in CONVOLUTIONS | TRANSPOSED and layer.in_channels != x.shape[1]:
        raise ShapeError(
            f"{name} input",
            got=f"{x.shape[1]} channels",
            want=f"{layer.in_channels}",
            remedy="The first entry of input_shape counts the network's input channels.",
        )
    if parametrize.is_parametrized(layer):  # its copies share a class, which removing would change for all
        raise ConfigError(
            f"gradient_support at {name!r}",
            got=f"a {kind} with parametrised weights",
            want="plain weights, to set them",
            remedy="Build the network without the parametrisation, or call receptive_field alone.",
        )
    copied = copy.deepcopy(layer).to_empty(device="cpu").double()
    for p in copied.parameters():
        p.data.fill_(1.0 / p[0].numel() if p.ndim > 1 else 0.0)
    return copied(x)


def _window_sums(name: str, pool: Any, x: Tensor) -> Tensor:
    axes = x.ndim - 2
    geometry, kernel = _geometry(name, pool, axes)
    out = _sizes(name, x.shape[2:], kernel, geometry, bool(getattr(pool, "ceil_mode", False)))
    flat: list[int] = []
    for n, o, k, s, (before, after), d in zip(x.shape[2:], out, kernel, *geometry[:3], strict=True):
        hangs = (o - 1) * s + d * (k - 1) + 1 - n - before
        flat = [before, max(after, hangs), *flat]
    run = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[axes - 1]
    weight = x.new_ones(x.shape[1], 1, *kernel)
    return run(nn.functional.pad(x, flat), weight, None, geometry.stride, 0, geometry.dilation, x.shape[1])
