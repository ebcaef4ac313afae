r"""Pooling: choose windows, then say what one number each window becomes.

The readable maths is in two halves.  *Which windows:* positions along each axis, one row
an output, -1 where a window reaches outside.  *What becomes of them:* the largest value,
the mean, or (in :mod:`handbook_src.functional.pooling.random_pooling`) one value drawn at random.
Every pooling of the family is a choice of both, see :func:`cut`.

Activations are ``b channels *spatial``; a missing batch axis is read as one sample, as in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from handbook_src.check import as_tuple, check_floating, check_rank, check_size
from handbook_src.dispatch import Backend, resolve
from handbook_src.errors import ConfigError, ShapeError
from handbook_src.precision import at_least_float32

Sizes = int | Sequence[int]
AXES = {1: "length", 2: "height, width", 3: "depth, height, width"}


class Windows(NamedTuple):
    """The contents of every window, flat along the last axis."""

    values: Float[Tensor, "b channels *out_and_k"]
    #: which entries lie inside the input; the others hold zero.
    inside: Bool[Tensor, "*planes_out_and_k"]
    #: each entry's place in the flattened spatial axes.
    places: Int[Tensor, "*planes_out_and_k"]


def cut(x: Float[Tensor, "b channels *spatial"], positions: Sequence[Int[Tensor, ...]]) -> Windows:
    r"""Gather the windows whose positions along each axis are given.

    .. math:: R_{o} = \bigl\{ x_{p_1, \dots, p_n} : p_i \in P^{(i)}_{o_i} \bigr\}

    Args:
        x: the activations.
        positions: for each spatial axis, the positions ``out k`` of each output's window; -1 is outside.
            ``b channels out k`` gives every plane windows of its own.

    Source:
        Boureau, Ponce & LeCun 2010, section 2.1, proceedings of ICML 27
    """
    spatial, axes = x.shape[2:], len(positions)
    lead = positions[0].shape[:-2]
    outs, taps = [p.shape[-2] for p in positions], [p.shape[-1] for p in positions]
    place = torch.zeros((), dtype=torch.long, device=x.device)
    inside = torch.ones((), dtype=torch.bool, device=x.device)
    for i, p in enumerate(positions):
        shape = [1] * (2 * axes)
        shape[i], shape[axes + i] = outs[i], taps[i]
        p = p.reshape(*lead, *shape)
        place = place * spatial[i] + p.clamp(min=0)
        inside = inside & (p >= 0)
    place, inside = (t.reshape(*lead, *outs, prod(taps)) for t in (place, inside))
    flat = place.expand(*x.shape[:2], *outs, prod(taps)).flatten(2)
    values = x.flatten(2).gather(2, flat).view(*x.shape[:2], *outs, prod(taps))
    return Windows(values.masked_fill(~inside, 0), inside, place)  # 0 times NaN would leak


def strided(size: int, kernel: int, stride: int, padding: int, dilation: int = 1, ceil_mode: bool = False) -> Tensor:
    r"""Return the positions of sliding windows along one axis.

    .. math:: P_o = \{ o s - p + d j : 0 \le j < k \}, \qquad
        n_{out} = \Bigl\lfloor \frac{n + 2p - d(k - 1) - 1}{s} \Bigr\rfloor + 1

    With ``ceil_mode`` the fraction is rounded up, unless the last window would start in the padding on the right.

    Args:
        size: n, the input's.
        kernel: k.
        stride: s.
        padding: p.
        dilation: d.
        ceil_mode: keep the window that begins inside and ends outside.

    Raises:
        ShapeError: no window fits.

    Source:
        Dumoulin & Visin 2016, section 3, arXiv:1603.07285
    """
    count = count_strided(size, kernel, stride, padding, dilation, ceil_mode)
    at = torch.arange(count)[:, None] * stride - padding + dilation * torch.arange(kernel)
    return at.masked_fill((at < 0) | (at >= size), -1)


def count_strided(size: int, kernel: int, stride: int, padding: int, dilation: int = 1, ceil_mode: bool = False) -> int:
    """Return how many windows :func:`strided` places.

    Raises:
        ShapeError: none fits.
    """
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    count = (room + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (count - 1) * stride >= size + padding:
        count -= 1
    if count < 1 or size < 1:
        raise ShapeError(
            "pooling input",
            got=f"{size} positions, padding {padding}",
            want=f"at least {dilation * (kernel - 1) + 1}, the reach of a kernel of {kernel} with dilation {dilation}",
            remedy="Take a smaller kernel, or adaptive pooling, which fits any input.",
        )
    return count


def misses(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> bool:
    """Whether some window of :func:`strided` holds only padding, which takes a dilation."""
    if dilation == 1:
        return False
    count = count_strided(size, kernel, stride, padding, dilation, ceil_mode)
    starts = (o * stride - padding for o in range(count))
    first = ((a, max(0, -(a // dilation))) for a in starts)  # the first tap that is not left of the input
    return any(j >= kernel or a + dilation * j >= size for a, j in first)


def adaptive(size: int, out: int) -> Tensor:
    r"""Return the positions of windows that cover one axis with ``out`` outputs.

    .. math:: P_o = \{ p : \lfloor o\, n / n_{out} \rfloor \le p < \lceil (o + 1)\, n / n_{out} \rceil \}

    Neighbours overlap where ``out`` does not divide the size, and windows then differ in length by at most one.

    Args:
        size: n, the input's.
        out: the number of outputs.

    Source:
        He et al. 2014, section 2.2, arXiv:1406.4729 (spatial pyramid pooling, where bins were made to fit)
    """
    o = torch.arange(out)
    start, end = o * size // out, -((-(o + 1) * size) // out)
    at = start[:, None] + torch.arange(int((end - start).max()))
    return at.masked_fill(at >= end[:, None], -1)


def max_pool2d(
    input: Float[Tensor, "*lead channels height width"],
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Keep the largest value of each window.

    .. math:: y_o = \max_{p \in R_o} x_p

    Outside the input stands minus infinity, so padding never wins.  Where values tie, the first in
    reading order wins, and it alone receives the gradient.

    Args:
        input: ``b channels height width``, or without the batch.
        kernel_size: of a window, one for each axis or one for all.
        stride: from window to window; ``kernel_size`` if not given.
        padding: on both sides, at most half the kernel.
        dilation: from entry to entry within a window.
        ceil_mode: keep a last window that reaches outside.
        return_indices: also return where each value came from, flat in the plane.
        backend: ``auto`` takes torch's operation.

    Raises:
        ConfigError: sizes that are not positive integers, or padding above half the kernel.
        ShapeError: another number of axes, no floating dtype, or no window fits.

    Source:
        Zhou & Chellappa 1988, doi:10.1109/ICNN.1988.23914; Scherer et al. 2010, doi:10.1007/978-3-642-15825-4_10
    """
    settings = _read("max_pool2d", input, 2, kernel_size, stride, padding, dilation, ceil_mode)
    return _max_pool(2, input, settings, ceil_mode, return_indices, backend)


def max_pool1d(
    input: Float[Tensor, "*lead channels length"],
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`handbook_src.functional.max_pool2d` over one spatial axis."""
    settings = _read("max_pool1d", input, 1, kernel_size, stride, padding, dilation, ceil_mode)
    return _max_pool(1, input, settings, ceil_mode, return_indices, backend)


def max_pool3d(
    input: Float[Tensor, "*lead channels depth height width"],
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`handbook_src.functional.max_pool2d` over three spatial axes."""
    settings = _read("max_pool3d", input, 3, kernel_size, stride, padding, dilation, ceil_mode)
    return _max_pool(3, input, settings, ceil_mode, return_indices, backend)


def avg_pool2d(
    input: Float[Tensor, "*lead channels height width"],
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "*lead channels out_height out_width"]:
    r"""Replace each window by its mean.

    .. math:: y_o = \frac{1}{n_o} \sum_{p \in R_o} x_p

    :math:`n_o` counts the window's entries with the padding (``count_include_pad``, torch's default, which darkens
    borders) or without; what a ``ceil_mode`` window covers beyond the padding is never counted.

    Args:
        input: ``b channels height width``, or without the batch.
        kernel_size: of a window, one for each axis or one for all.
        stride: from window to window; ``kernel_size`` if not given.
        padding: zeros on both sides, at most half the kernel.
        ceil_mode: keep a last window that reaches outside.
        count_include_pad: divide by the window's size even where it holds padding.
        divisor_override: divide by this instead; 1 gives sums.
        backend: ``auto`` takes torch's operation.

    Raises:
        ConfigError: sizes that are not positive integers, padding above half the kernel, or a divisor of zero.
        ShapeError: another number of axes, no floating dtype, or no window fits.

    Source:
        LeCun et al. 1998, section II.A, doi:10.1109/5.726791
    """
    settings = _read("avg_pool2d", input, 2, kernel_size, stride, padding, 1, ceil_mode)
    return _avg_pool(2, input, settings, ceil_mode, count_include_pad, divisor_override, backend)


def avg_pool1d(
    input: Float[Tensor, "*lead channels length"],
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "*lead channels out_length"]:
    """:func:`handbook_src.functional.avg_pool2d` over one spatial axis."""
    settings = _read("avg_pool1d", input, 1, kernel_size, stride, padding, 1, ceil_mode)
    return _avg_pool(1, input, settings, ceil_mode, count_include_pad, None, backend)


def avg_pool3d(
    input: Float[Tensor, "*lead channels depth height width"],
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "*lead channels out_depth out_height out_width"]:
    """:func:`handbook_src.functional.avg_pool2d` over three spatial axes."""
    settings = _read("avg_pool3d", input, 3, kernel_size, stride, padding, 1, ceil_mode)
    return _avg_pool(3, input, settings, ceil_mode, count_include_pad, divisor_override, backend)


def adaptive_avg_pool(
    input: Float[Tensor, "*lead"],
    output_size: int | Sequence[int | None] | None,
    axes: int,
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "*out"]:
    r"""Replace the input by the means of ``output_size`` windows that cover it.

    .. math:: y_o = \frac{1}{|P_o|} \sum_{p \in P_o} x_p, \qquad
        P_o = \bigl[ \lfloor o\, n / n_{out} \rfloor,\ \lceil (o + 1)\, n / n_{out} \rceil \bigr)

    The kernel follows from the input's size, so that a linear layer behind it fits inputs of any size.

    Args:
        input: ``b channels *spatial``, or without the batch.
        output_size: outputs along each axis; None keeps the input's size.
        axes: how many spatial axes there are, 1 to 3.
        backend: ``auto`` takes torch's operation.

    Raises:
        ConfigError: an output size that is not a positive integer.
        ShapeError: another number of axes, no floating dtype, or an input without positions.

    Source:
        He et al. 2014, section 2.2, arXiv:1406.4729
    """
    sizes = _read_adaptive("adaptive_avg_pool", input, output_size, axes)
    if resolve("adaptive_avg_pool", backend, {"torch": None, "reference": None}) == "torch":
        op: Callable[..., Tensor] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}[axes]
        return op(input, sizes if axes > 1 else sizes[0])
    x = _batched(input, axes)
    found = cut(at_least_float32(x), _adaptive_positions(x, sizes))
    mean = found.values.sum(-1) / found.inside.sum(-1)
    return mean.to(input.dtype).view(*input.shape[:-axes], *sizes)


def adaptive_max_pool(
    input: Float[Tensor, "*lead"],
    output_size: int | Sequence[int | None] | None,
    axes: int,
    return_indices: bool = False,
    *,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Keep the largest value in each of ``output_size`` windows that cover the input.

    .. math:: y_o = \max_{p \in P_o} x_p

    with the windows of :func:`adaptive_avg_pool`.

    Args:
        input: ``b channels *spatial``, or without the batch.
        output_size: outputs along each axis; None keeps the input's size.
        axes: how many spatial axes there are, 1 to 3.
        return_indices: also return where each value came from, flat in the plane.
        backend: ``auto`` takes torch's operation.

    Raises:
        ConfigError: an output size that is not a positive integer.
        ShapeError: another number of axes, no floating dtype, or an input without positions.

    Source:
        He et al. 2014, section 2.2, arXiv:1406.4729
    """
    sizes = _read_adaptive("adaptive_max_pool", input, output_size, axes)
    if resolve("adaptive_max_pool", backend, {"torch": None, "reference": None}) == "torch":
        op: Callable[..., Tensor] = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}[axes]
        return op(input, sizes if axes > 1 else sizes[0], return_indices)
    x = _batched(input, axes)
    return _largest(input, cut(x, _adaptive_positions(x, sizes)), axes, return_indices)


def global_pool(
    input: Float[Tensor, "b channels *spatial"], reduce: str = "mean", keepdim: bool = False
) -> Float[Tensor, "b channels *rest"]:
    r"""Replace each channel by one number, its mean or its largest value.

    .. math:: y_{bc} = \frac{1}{|S|} \sum_{p \in S} x_{bcp} \quad\text{or}\quad y_{bc} = \max_{p \in S} x_{bcp}

    Args:
        input: any number of spatial axes, at least one.
        reduce: ``mean`` or ``max``.
        keepdim: keep the spatial axes with size 1.

    Raises:
        ConfigError: another ``reduce``.
        ShapeError: no spatial axis or position, or no floating dtype.

    Source:
        Lin, Chen & Yan 2013, section 3.2, arXiv:1312.4400
    """
    check_floating("global_pool", input)
    if input.ndim < 3 or 0 in input.shape[1:]:
        raise ShapeError(
            "global_pool input",
            got=tuple(input.shape),
            want="(batch, channels, *spatial) with at least one channel and position",
            remedy="Add a batch axis with unsqueeze(0); nothing has no mean and no largest value.",
        )
    if reduce not in ("mean", "max"):
        raise ConfigError("global_pool reduce", got=repr(reduce), want="'mean' or 'max'", remedy="Choose one.")
    spatial = tuple(range(2, input.ndim))
    if reduce == "mean":
        return input.mean(spatial, keepdim=keepdim)  # torch adds halves in float32
    # not amax, which would share the gradient between ties
    y = F.adaptive_max_pool2d(input, 1) if len(spatial) == 2 else F.adaptive_max_pool1d(input.flatten(2), 1)
    return y.view(*input.shape[:2], *([1] * len(spatial) if keepdim else []))


class _Settings(NamedTuple):
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


def _read(op: str, x: Tensor, axes: int, kernel: Sizes, stride: Sizes | None, padding: Sizes, dilation: Sizes,
          ceil_mode: bool) -> _Settings:  # fmt: skip
    check_rank(op, x, [axes + 1, axes + 2], f"(channels, {AXES[axes]}) with or without a batch in front")
    check_floating(op, x)
    found = _Settings(
        as_tuple(op, "kernel_size", kernel, axes),
        as_tuple(op, "stride", kernel if stride is None else stride, axes),
        as_tuple(op, "padding", padding, axes, least=0),
        as_tuple(op, "dilation", dilation, axes),
    )
    for size, k, s, p, d in zip(x.shape[-axes:], *found, strict=True):
        if 2 * p > k:
            raise ConfigError(
                f"{op} padding",
                got=f"{p} with a kernel of {k}",
                want="at most half the kernel",
                remedy="Pad the input itself with torch.nn.functional.pad.",
            )
        count_strided(size, k, s, p, d, ceil_mode)  # refuses what no window fits
    if x.shape[-axes - 1] == 0:
        raise ShapeError(f"{op} input", got=tuple(x.shape), want="at least one channel", remedy="Drop the layer.")
    return found


def _positions(x: Tensor, axes: int, settings: _Settings, ceil_mode: bool) -> list[Tensor]:
    each = zip(x.shape[-axes:], *settings, strict=True)
    return [strided(*one, ceil_mode).to(x.device) for one in each]


def _batched(x: Tensor, axes: int) -> Tensor:
    return x if x.ndim == axes + 2 else x[None]


def _largest(input: Tensor, found: Windows, axes: int, return_indices: bool) -> Tensor | tuple[Tensor, Tensor]:
    values, at = found.values.masked_fill(~found.inside, -torch.inf).max(-1)
    places = found.places.expand(*values.shape, -1).gather(-1, at[..., None])[..., 0]
    shape = (*input.shape[:-axes], *values.shape[-axes:])
    return (values.view(shape), places.view(shape)) if return_indices else values.view(shape)


def _max_pool(axes: int, input: Tensor, settings: _Settings, ceil_mode: bool, return_indices: bool, backend: Backend
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    # In such a window torch's operation reads outside the plane: a wrong index, and a gradient in foreign memory.
    each = zip(input.shape[-axes:], *settings, strict=True)
    empty = any(misses(n, k, s, p, d, ceil_mode) for n, k, s, p, d in each)
    torchs = "windows that reach the input: torch's max_pool writes elsewhere for others" if empty else None
    if resolve(f"max_pool{axes}d", backend, {"torch": torchs, "reference": None}) == "torch":
        op: Callable[..., Tensor] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[axes]
        return op(input, *settings, ceil_mode, return_indices)
    x = _batched(input, axes)
    return _largest(input, cut(x, _positions(x, axes, settings, ceil_mode)), axes, return_indices)


def _avg_pool(axes: int, input: Tensor, settings: _Settings, ceil_mode: bool, count_include_pad: bool,
              divisor: int | None, backend: Backend) -> Tensor:  # fmt: skip
    if divisor is not None and (isinstance(divisor, bool) or not isinstance(divisor, int) or divisor == 0):
        raise ConfigError(
            f"avg_pool{axes}d divisor_override", got=repr(divisor), want="an integer, not zero", remedy="1 gives sums."
        )
    halves = input.dtype.itemsize == 2 and not torch.is_autocast_enabled("cpu")
    lacks = axes == 3 and halves and input.device.type == "cpu"
    torchs = "float32: torch's avg_pool3d takes no half precision on CPUs" if lacks else None
    if resolve(f"avg_pool{axes}d", backend, {"torch": torchs, "reference": None}) == "torch":
        op: Callable[..., Tensor] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[axes]
        more = () if axes == 1 else (divisor,)
        return op(input, *settings[:3], ceil_mode, count_include_pad, *more)
    x = _batched(input, axes)
    found = cut(at_least_float32(x), _positions(x, axes, settings, ceil_mode))
    counted = found.inside.sum(-1)
    if count_include_pad:
        counted = torch.ones((), dtype=torch.long, device=x.device)
        for size, out, k, st, p in zip(x.shape[2:], found.values.shape[2:-1], *settings[:3], strict=True):
            start = torch.arange(out, device=x.device) * st - p
            counted = counted[..., None] * ((start + k).clamp(max=size + p) - start)
    mean = found.values.sum(-1) / (divisor if divisor is not None else counted)
    return mean.to(input.dtype).view(*input.shape[:-axes], *mean.shape[2:])


def _read_adaptive(op: str, x: Tensor, output_size: int | Sequence[int | None] | None, axes: int) -> tuple[int, ...]:
    if isinstance(axes, bool) or axes not in AXES:
        raise ConfigError(f"{op} axes", got=repr(axes), want="1, 2 or 3", remedy="Count the spatial axes.")
    check_rank(op, x, [axes + 1, axes + 2], f"(channels, {AXES[axes]}) with or without a batch in front")
    check_floating(op, x)
    given = list(output_size) if isinstance(output_size, Sequence) else [output_size] * axes
    if len(given) != axes:
        raise ConfigError(
            f"{op} output_size", got=repr(output_size), want=f"one size, or {axes}", remedy="Give one for each axis."
        )
    sizes = tuple(n if o is None else o for o, n in zip(given, x.shape[-axes:], strict=True))
    for size in sizes:
        check_size(op, "output_size", size)
    if 0 in x.shape[-axes:]:
        raise ShapeError(
            f"{op} input", got=tuple(x.shape), want="at least one position on each axis", remedy="Drop empty samples."
        )
    return sizes


def _adaptive_positions(x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    return [adaptive(n, o).to(x.device) for n, o in zip(x.shape[2:], sizes, strict=True)]
