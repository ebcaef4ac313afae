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
from torch import Tensor, fx, nn

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.check import as_tuple
from handbook_src.functional.conv_input import Geometry, check_sizes, read_geometry, read_transposed_sizes

Window = tuple[int, int] | None

_LAYERS = """
Identity Dropout Dropout1d Dropout2d Dropout3d AlphaDropout BatchNorm1d BatchNorm2d BatchNorm3d SyncBatchNorm
FrozenBatchNorm2d ReLU ReLU6 LeakyReLU PReLU RReLU ELU CELU SELU GELU SiLU Mish Sigmoid LogSigmoid Tanh Softplus
Softsign Hardtanh Hardswish Hardsigmoid Hardshrink Threshold
"""
#: Layers that leave every position where it is, by name: torch's and this package's alike.
POINTWISE = frozenset(_LAYERS.split())
POINTWISE_CALLS = {"relu", "relu_", "relu6", "leaky_relu", "gelu", "silu", "sigmoid", "tanh", "dropout", "clone"}
MEETINGS = {"add", "iadd", "add_", "sub", "mul", "imul", "mul_", "cat", "concat"}


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

    Convolutions of torch and of this package, their transposes, pooling, nearest-neighbour upsampling,
    batch norm (as in evaluation), activations, sums, products and concatenations are understood.

    Args:
        module: traced by ``torch.fx``: no branches that depend on values.
        input_shape: ``(channels, *spatial)``, without the batch.

    Raises:
        ConfigError: a layer whose reach is not known here, or branches of different jump that meet.
        ShapeError: a kernel longer than its padded input, or branches of different size that meet.

    Source:
        Araujo, Norris & Sim 2019, doi:10.23915/distill.00021; Dumoulin & Visin 2016, arXiv:1603.07285

    Example:
        >>> field = receptive_field(nn.Sequential(nn.Conv2d(1, 1, 3, 2), nn.Conv2d(1, 1, 3)), (1, 32, 32))[-1]
        >>> field.size, field.field
        ((13, 13), (7, 7))
    """
    graph = _Leaves().trace(module)
    spatial = as_tuple("receptive_field", "input_shape", input_shape, len(input_shape))[1:]
    start = [_Axis(tuple((i, i) for i in range(n)), Fraction(1), Fraction(0), Fraction(0)) for n in spatial]
    values: dict[fx.Node, list[_Axis]] = {}
    found = []
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = start
        elif node.op == "output":
            found.append(_summary("output", values[_single(node.args[0])]))
        elif node.op != "get_attr":
            before = [values[n] for n in node.all_input_nodes if n in values]
            values[node] = _after(module, node, before)
            if values[node] is not before[0]:
                found.append(_summary(str(node.target) if node.op == "call_module" else node.name, values[node]))
    return found


def gradient_support(module: nn.Module, input_shape: Sequence[int]) -> tuple[tuple[Window, ...], ...]:
    """Measure the windows of :class:`Field` of the output by differentiating it.

    A copy of ``module`` runs in float64 with positive weights, no activations, and a sum in place of each
    maximum, so that no path is cut and no two cancel: an input is seen where its gradient is not zero.

    Args:
        module: as for :func:`receptive_field`.
        input_shape: ``(channels, *spatial)``, without the batch.
    """
    positive = _positive(module)
    x = torch.ones(1, *input_shape, dtype=torch.float64, requires_grad=True)
    y = positive(x)
    windows = []
    for axis in range(2, x.ndim):
        rows = []
        others = [i for i in range(y.ndim) if i != axis]
        for total in y.sum(others):
            (gradient,) = torch.autograd.grad(total, x, retain_graph=True, materialize_grads=True)
            seen = gradient.sum([i for i in range(x.ndim) if i != axis]).nonzero().flatten().tolist()
            rows.append((seen[0], seen[-1]) if seen else None)
        windows.append(tuple(rows))
    return tuple(windows)


class _Leaves(fx.Tracer):
    """Stops at layers with a kernel and at modules without parts; goes into everything else."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return hasattr(m, "kernel_size") or next(m.children(), None) is None


def _single(output: Any) -> fx.Node:
    if not isinstance(output, fx.Node):
        raise ConfigError(
            "receptive_field output", got=f"{type(output).__name__}", want="one tensor", remedy="Return one of them."
        )
    return output


def _summary(name: str, axes: list[_Axis]) -> Field:
    return Field(
        name=name,
        size=tuple(len(a.windows) for a in axes),
        field=tuple(math.floor(a.high - a.low) + 1 for a in axes),
        jump=tuple(a.jump for a in axes),
        start=tuple((a.low + a.high) / 2 for a in axes),
        windows=tuple(a.windows for a in axes),
    )


def _after(root: nn.Module, node: fx.Node, before: list[list[_Axis]]) -> list[_Axis]:
    """Return what the value of ``node`` sees."""
    if node.op == "call_module":
        layer = root.get_submodule(str(node.target))
        return _through(str(node.target), layer, before[0])
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name in POINTWISE_CALLS:
        return before[0]
    if name in MEETINGS:
        merged = before[0]
        for other in before[1:]:
            merged = [_meet(node.name, a, b) for a, b in zip(merged, other, strict=True)]
        return merged
    raise _unknown(f"the call {name}")


def _through(name: str, layer: nn.Module, axes: list[_Axis]) -> list[_Axis]:
    kind = type(layer).__name__
    if kind in POINTWISE:
        return axes
    if kind == "Upsample":
        return _upsampled(layer, axes)
    if kind.startswith("Adaptive") and set(_tuple(layer.output_size, len(axes))) == {1}:
        return [_whole(a) for a in axes]
    if not hasattr(layer, "kernel_size"):
        raise _unknown(f"{kind} at {name!r}")
    geometry, kernel = _geometry(name, layer, len(axes))
    sizes = [len(a.windows) for a in axes]
    if getattr(layer, "transposed", False):
        extra = _tuple(layer.output_padding, len(axes))
        _, out = read_transposed_sizes(name, sizes, kernel, geometry, extra)
        return [
            _scattered(a, n, k, s, p[0], d) for a, n, k, s, p, d in zip(axes, out, kernel, *geometry[:3], strict=True)
        ]
    out = _sizes(name, sizes, kernel, geometry, bool(getattr(layer, "ceil_mode", False)))
    mode = str(getattr(layer, "padding_mode", "zeros"))
    rows = zip(axes, out, kernel, *geometry[:3], strict=True)
    return [_gathered(a, n, k, s, p[0], d, mode) for a, n, k, s, p, d in rows]


def _geometry(name: str, layer: Any, axes: int) -> tuple[Geometry, tuple[int, ...]]:
    kernel = _tuple(layer.kernel_size, axes)
    padding = layer.padding if isinstance(layer.padding, str) else _tuple(layer.padding, axes)
    dilation = _tuple(getattr(layer, "dilation", 1), axes)
    return read_geometry(name, kernel, _tuple(layer.stride, axes), padding, dilation, 1), kernel


def _tuple(value: Any, axes: int) -> tuple[int, ...]:
    return as_tuple("receptive_field", "setting", value, axes, least=0)


def _sizes(name: str, sizes: Sequence[int], kernel: Sequence[int], geometry: Geometry, ceil: bool) -> tuple[int, ...]:
    """Output sizes; with ``ceil`` a last window may hang over the end, but must start before it."""
    if not ceil:
        return check_sizes(name, sizes, kernel, geometry)
    out = []
    for n, k, s, (before, after), d in zip(sizes, kernel, *geometry[:3], strict=True):
        count = -(-(n + before + after - d * (k - 1) - 1) // s) + 1
        out.append(count if (count - 1) * s < n + before else count - 1)
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
        raise _unknown(f"Upsample with mode {layer.mode!r} and scale_factor {layer.scale_factor}")
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


def _unknown(what: str) -> ConfigError:
    return ConfigError(
        "receptive_field",
        got=what,
        want="convolutions, pooling, upsampling, batch norm, activations, sums and concatenations",
        remedy="Measure the part before it.",
    )


class _Sum(nn.Module):
    """Adds up each window, for a pooling layer's sizes."""

    def __init__(self, pool: Any) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        axes = x.ndim - 2
        geometry, kernel = _geometry("pool", self.pool, axes)
        out = _sizes("pool", x.shape[2:], kernel, geometry, self.pool.ceil_mode)
        flat: list[int] = []
        for n, o, k, s, (before, after), d in zip(x.shape[2:], out, kernel, *geometry[:3], strict=True):
            hangs = (o - 1) * s + d * (k - 1) + 1 - n - before
            flat = [before, max(after, hangs), *flat]
        run = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[axes - 1]
        weight = x.new_ones(x.shape[1], 1, *kernel)
        x = nn.functional.pad(x, flat)
        return run(x, weight, None, geometry.stride, 0, geometry.dilation, x.shape[1])


def _positive(module: nn.Module) -> nn.Module:
    """A copy in float64 with equal positive weights, no activations, and sums for poolings."""
    copied = nn.Sequential(copy.deepcopy(module).double().eval())
    for name, part in list(copied.named_modules()):
        if next(part.children(), None) is not None:
            continue
        if type(part).__name__ in POINTWISE:
            copied.set_submodule(name, nn.Identity())
        elif "Pool" in type(part).__name__ and hasattr(part, "kernel_size"):
            copied.set_submodule(name, _Sum(part))
        for weight in part.parameters(recurse=False):
            weight.data.fill_(1.0 / max(weight.shape[-2:].numel(), 1) if weight.ndim > 1 else 0.0)
    return copied
