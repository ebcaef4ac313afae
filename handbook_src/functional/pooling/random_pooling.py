"""Pooling with dice: which value a window keeps, or where the windows stand, is drawn anew each time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor

from handbook_src.check import as_tuple, check_floating, check_rank
from handbook_src.dispatch import Backend, resolve
from handbook_src.errors import ConfigError, DataError, ShapeError
from handbook_src.functional.pooling.pooling import Sizes, cut, strided
from handbook_src.precision import at_least_float32, statistic_dtype


def stochastic_pool2d(
    input: Float[Tensor, "*lead channels height width"],
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    training: bool = True,
    generator: Generator | None = None,
) -> Float[Tensor, "*lead channels out_height out_width"]:
    r"""Keep one value of each window, drawn in proportion to the values; in evaluation, their weighted mean.

    .. math::
        p_i = \frac{x_i}{\sum_{k \in R_o} x_k}, \qquad
        y_o = x_l,\ l \sim p \quad\text{(training)}, \qquad
        y_o = \sum_{i \in R_o} p_i x_i \quad\text{(evaluation)}

    A window of zeros gives zero, one that holds NaN gives NaN, and infinity outweighs all that
    is finite.  In training the whole gradient goes to the drawn value; the
    evaluation is the expectation of the training, :math:`E[y_o] = \sum x_i^2 / \sum x_i`.

    Args:
        input: activations that are not negative, as behind a ReLU.
        kernel_size: of a window, one for each axis or one for all.
        stride: from window to window; ``kernel_size`` if not given.
        padding: on both sides, at most half the kernel; never drawn.
        training: draw, or take the expectation.
        generator: where the draws come from.

    Raises:
        ConfigError: sizes that are not positive integers, or padding above half the kernel.
        DataError: a negative activation, which is no probability.
        ShapeError: another number of axes, no floating dtype, or no window fits.

    Source:
        Zeiler & Fergus 2013, eq. 3 to 6, arXiv:1301.3557
    """
    op = "stochastic_pool2d"
    check_rank(op, input, [3, 4], "(channels, height, width) with or without a batch in front")
    check_floating(op, input)
    kernel = as_tuple(op, "kernel_size", kernel_size, 2)
    step = kernel if stride is None else as_tuple(op, "stride", stride, 2)
    pad = as_tuple(op, "padding", padding, 2, least=0)
    if any(2 * p > k for p, k in zip(pad, kernel, strict=True)):
        raise ConfigError(f"{op} padding", got=pad, want=f"at most half of {kernel}", remedy="Pad the input itself.")
    _refuse_negative(op, input)
    x = (input if input.ndim == 4 else input[None]).to(statistic_dtype(input))
    each = zip(x.shape[2:], kernel, step, pad, strict=True)
    values = cut(x, [strided(*one).to(x.device) for one in each]).values
    total = values.sum(-1)
    if training:
        y = _drawn(values, generator)
    else:  # each weight first: a square would leave the range of the dtype
        weights = values / total.where(total > 0, 1)[..., None]
        y = torch.where(total.isinf(), total, (weights * values).sum(-1))
    return y.to(input.dtype).view(*input.shape[:-2], *y.shape[2:])


def fractional_max_pool2d(
    input: Float[Tensor, "*lead channels height width"],
    kernel_size: Sizes,
    output_size: Sizes | None = None,
    output_ratio: float | Sequence[float] | None = None,
    return_indices: bool = False,
    _random_samples: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Shrink by any ratio: windows of one size stand at pseudo-random, nearly even places.

    .. math::
        P_o = \{ a_o, \dots, a_o + k - 1 \}, \qquad
        a_o = \lfloor \alpha (o + u) \rfloor - \lfloor \alpha u \rfloor, \quad
        \alpha = \frac{n - k}{n_{out} - 1}, \quad a_{n_{out}-1} = n - k

    One :math:`u \sim U(0, 1)` is drawn for each plane and axis, in evaluation too.  Windows overlap where
    :math:`k` exceeds the step; this is the paper's *pseudo-random overlapping* kind.

    Args:
        input: ``b channels height width``, or without the batch.
        kernel_size: k of a window, one for each axis or one for both.
        output_size: outputs along each axis.
        output_ratio: outputs as a share of the input, between 0 and 1; instead of ``output_size``.
        return_indices: also return where each value came from, flat in the plane.
        _random_samples: u, of shape ``b channels 2``, width first; drawn if not given.
        backend: ``auto`` takes torch's operation.

    Raises:
        ConfigError: not exactly one of size and ratio, a ratio outside (0, 1), or sizes that are not positive.
        ShapeError: another number of axes, no floating dtype, samples of another shape, or windows that don't fit.

    Source:
        Graham 2014, section 2, arXiv:1412.6071
    """
    op = "fractional_max_pool2d"
    check_rank(op, input, [3, 4], "(channels, height, width) with or without a batch in front")
    check_floating(op, input)
    kernel = as_tuple(op, "kernel_size", kernel_size, 2)
    outs = _output_size(op, input, output_size, output_ratio)
    for n, k, o in zip(input.shape[-2:], kernel, outs, strict=True):
        if o + k - 1 > n:
            raise ShapeError(
                f"{op} input",
                got=f"{n} positions",
                want=f"at least {o + k - 1}, for {o} windows of {k}",
                remedy="Ask for fewer outputs or a smaller kernel.",
            )
    x = input if input.ndim == 4 else input[None]
    samples = _samples(op, x, _random_samples)
    if resolve(op, backend, {"torch": None, "reference": None}) == "torch":
        run: Callable[..., Tensor] = F.fractional_max_pool2d
        return run(input, kernel, outs, None, return_indices, samples)
    axes = zip(x.shape[2:], outs, kernel, (samples[..., 1], samples[..., 0]), strict=True)
    found = cut(x, [_scattered(n, o, k, u) for n, o, k, u in axes])
    values, at = found.values.max(-1)
    places = found.places.gather(-1, at[..., None])[..., 0]
    shape = (*input.shape[:-2], *outs)
    return (values.view(shape), places.view(shape)) if return_indices else values.view(shape)


def _samples(op: str, x: Tensor, given: Tensor | None) -> Tensor:
    """Return one u for each plane and axis: the given ones, checked, or new ones."""
    if given is None:
        return torch.rand(*x.shape[:2], 2, dtype=x.dtype, device=x.device)
    if not given.is_floating_point() or given.device != x.device:
        raise ShapeError(
            f"{op} _random_samples",
            got=f"{given.dtype} on {given.device}",
            want=f"a floating-point dtype on {x.device}",
            remedy="Leave it out to have them drawn.",
        )
    if tuple(given.shape) != (*x.shape[:2], 2):
        raise ShapeError(
            f"{op} _random_samples",
            got=tuple(given.shape),
            want=f"{(*x.shape[:2], 2)}: one u for each plane and axis",
            remedy="Leave it out to have them drawn.",
        )
    return given.to(x.dtype)


def _refuse_negative(op: str, x: Tensor) -> None:
    if torch.compiler.is_compiling() or x.is_meta or not x.numel():
        return  # reading a value would break the graph
    if (least := x.detach().amin().item()) < 0:
        raise DataError(
            f"{op} activations",
            got=f"{least:.3g} as the smallest",
            want="none below zero: they are weights of a draw",
            remedy="Put a ReLU in front.",
        )


def _drawn(values: Tensor, generator: Generator | None) -> Tensor:
    """Draw by inverting the cumulated weights: the first entry whose running sum exceeds u times the total."""
    weights = values.detach()
    top = weights.amax(-1, keepdim=True)
    endless = (weights == top) & ~top.isfinite()  # infinity alone is drawn beside finite weights
    weights = torch.where(top.isfinite(), weights / top.where(top > 0, 1), endless.to(weights.dtype))
    u = torch.rand(weights.shape[:-1], dtype=values.dtype, device=values.device, generator=generator)
    running = weights.cumsum(-1)
    at = (running <= u[..., None] * running[..., -1:]).sum(-1)
    last = (weights > 0).long().cumsum(-1).argmax(-1)  # rounding must not run past the last possible one
    drawn = values.gather(-1, torch.minimum(at, last)[..., None])[..., 0]
    return torch.where(top[..., 0].isnan(), torch.nan, drawn)


def _output_size(op: str, x: Tensor, size: Sizes | None, ratio: float | Sequence[float] | None) -> tuple[int, ...]:
    if (size is None) == (ratio is None):
        raise ConfigError(
            f"{op} output",
            got=f"output_size={size!r}, output_ratio={ratio!r}",
            want="exactly one of them",
            remedy="A size fixes the output's shape; a ratio follows the input's.",
        )
    if size is not None:
        return as_tuple(op, "output_size", size, 2)
    ratios = read_ratio(op, ratio)
    outs = tuple(int(n * r) for n, r in zip(x.shape[-2:], ratios, strict=True))
    return as_tuple(op, "output_size from output_ratio", outs, 2)


def read_ratio(op: str, ratio: float | Sequence[float] | None) -> tuple[float, ...]:
    """Return ``output_ratio`` as one number for each axis.

    Raises:
        ConfigError: it is not one or two numbers strictly between 0 and 1.
    """
    ratios = tuple(ratio) if isinstance(ratio, Sequence) else (ratio, ratio)
    found = tuple(r for r in ratios if isinstance(r, float) and 0 < r < 1)
    if len(ratios) != 2 or len(found) != 2:
        raise ConfigError(
            f"{op} output_ratio",
            got=repr(ratio),
            want="one or two numbers strictly between 0 and 1",
            remedy="The paper shrinks by 1.26 or 1.41 a layer: ratios of 0.79 and 0.71.",
        )
    return found


def _scattered(size: int, out: int, kernel: int, u: Tensor) -> Tensor:
    """Return the positions ``b channels out kernel`` of windows at pseudo-random places."""
    alpha = (size - kernel) / (out - 1) if out > 1 else 0.0
    u = at_least_float32(u)  # places of halves would be rounded
    o = torch.arange(out, device=u.device)
    start = ((o + u[..., None]) * alpha).long() - (u[..., None] * alpha).long()
    start = torch.where(o == out - 1, size - kernel, start)
    return start[..., None] + torch.arange(kernel, device=u.device)
