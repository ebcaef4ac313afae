"""What arguments must satisfy, said once for every operation of the floor.

Each check names the operation, what it got, what it wants and the remedy.  A size
or count that is wrong by itself is a :class:`ConfigError`; a tensor that does not fit
is a :class:`ShapeError`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from handbook_src.errors import ConfigError, ShapeError


def check_tensors(op: str, *tensors: object) -> None:
    """Refuse what is no tensor.

    Raises:
        ConfigError: one is a list, a number, None or the like.
    """
    for x in tensors:
        if not isinstance(x, Tensor):
            raise ConfigError(f"{op} inputs", got=type(x).__name__, want="tensors", remedy="Make it a tensor.")


def check_floating(op: str, *tensors: Tensor | None) -> None:
    """Refuse tensors that are not floating point.

    Raises:
        ConfigError: one is neither a tensor nor None.
        ShapeError: one holds integers, booleans or complex numbers.
    """
    for x in tensors:
        if x is None:
            continue
        check_tensors(op, x)
        if not x.is_floating_point():
            raise ShapeError(
                f"{op} input dtype",
                got=x.dtype,
                want="a floating-point dtype",
                remedy="Convert first, for instance x.float().",
            )


def check_integers(op: str, name: str, x: Tensor, remedy: str) -> None:
    """Refuse class indices, tokens and positions of a floating, complex or boolean dtype, which ``long()`` would cut.

    Raises:
        ShapeError: another dtype than an integer one.
    """
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise ShapeError(f"{op} {name} dtype", got=x.dtype, want="an integer dtype", remedy=remedy)


def check_parameter_dtype(op: str, dtype: torch.dtype | None) -> None:
    """Refuse a dtype of parameters that is not floating point; None is torch's default.

    Raises:
        ConfigError: it is not, or is no dtype at all.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"{op} dtype", got=dtype, want="a floating-point dtype", remedy="Pass dtype=torch.float32.")


def check_one_dtype(op: str, x: Tensor, *others: Tensor) -> None:
    """Refuse tensors of another dtype than ``x``.

    Raises:
        ShapeError: one has another.
    """
    check_tensors(op, x, *others)
    for other in others:
        if other.dtype != x.dtype:
            raise ShapeError(
                f"{op} dtypes",
                got=f"{other.dtype} beside {x.dtype}",
                want="one dtype for all",
                remedy="Convert with .to(dtype).",
            )


def check_one_device(op: str, x: Tensor, *others: Tensor) -> None:
    """Refuse tensors on another device than ``x``.

    Raises:
        ShapeError: one is on another.
    """
    check_tensors(op, x, *others)
    for other in others:
        if other.device != x.device:
            raise ShapeError(
                f"{op} devices",
                got=f"{other.device} beside {x.device}",
                want="one device for all",
                remedy="Move with .to(device).",
            )


def check_features(op: str, x: Tensor, features: int, *, name: str = "input", axis: int = -1) -> None:
    """Check that axis ``axis`` of ``x`` holds ``features``.

    Raises:
        ShapeError: it holds another number, or there is no such axis.
    """
    check_tensors(op, x)
    if x.ndim < (-axis if axis < 0 else axis + 1) or x.shape[axis] != features:
        raise ShapeError(
            f"{op} {name}",
            got=tuple(x.shape),
            want=f"{features} features on axis {axis}",
            remedy="Move the features there with movedim, or build the layer with the input's size.",
        )


def check_rank(op: str, x: Tensor, ranks: Sequence[int], axes: str) -> None:
    """Check the number of axes of ``x``.

    Args:
        op: the operation's name.
        x: the tensor.
        ranks: the numbers of axes that are right.
        axes: what they are, for instance ``(batch, channels, height, width)``.

    Raises:
        ShapeError: another number of axes.
    """
    check_tensors(op, x)
    if x.ndim not in ranks:
        raise ShapeError(
            f"{op} input",
            got=f"{x.ndim} axes, {tuple(x.shape)}",
            want=f"{' or '.join(map(str, ranks))} axes, {axes}",
            remedy="Add a missing axis with unsqueeze, or merge some with flatten.",
        )


def check_size(op: str, name: str, value: int, *, least: int = 1) -> None:
    """Refuse a size that is not an integer of at least ``least``.

    Raises:
        ConfigError: it is a fraction, a boolean or too small.
    """
    if type(value) is int and value >= least:
        return  # isinstance of an abstract class costs a microsecond
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ConfigError(
            f"{op} {name}", got=repr(value), want=f"an integer of at least {least}", remedy=f"Pass {name}={least}."
        )


def check_finite(op: str, name: str, value: float | int) -> None:
    """Refuse what is not a finite real number.

    Raises:
        ConfigError: it is infinite, NaN, a boolean or no number.
    """
    if type(value) is float and math.isfinite(value):  # the usual case, without asking an abstract class
        return
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        raise ConfigError(f"{op} {name}", got=repr(value), want="a finite number", remedy=f"Pass {name}=0.25.")


def check_positive(op: str, name: str, value: float | int, remedy: str | None = None) -> None:
    """Refuse a number that is not positive and finite.

    Raises:
        ConfigError: it is zero, negative, infinite, NaN, a boolean or no number.
    """
    if type(value) is float and 0 < value < math.inf:  # the usual case, without asking an abstract class
        return
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 < value < math.inf:
        remedy = f"Pass {name}=1.0." if remedy is None else remedy
        raise ConfigError(f"{op} {name}", got=repr(value), want="a positive number", remedy=remedy)


def check_probability(
    op: str, name: str, value: float | int, remedy: str = "Pass 0.0 to switch it off.", *, below_one: bool = True
) -> None:
    """Refuse a probability outside ``[0, 1)``, or outside ``[0, 1]`` unless ``below_one``.

    Raises:
        ConfigError: it is outside, NaN, a boolean or no number.
    """
    if type(value) is float and 0 <= value < 1:
        return
    real = isinstance(value, Real) and not isinstance(value, bool)
    if not real or not (0 <= value < 1 or (value == 1 and not below_one)):
        interval = "[0, 1)" if below_one else "[0, 1]"
        raise ConfigError(f"{op} {name}", got=repr(value), want=f"a number in {interval}", remedy=remedy)


def as_tuple(op: str, name: str, value: int | Sequence[int], axes: int, *, least: int = 1) -> tuple[int, ...]:
    """Return ``value`` as one integer for each of ``axes`` axes, as torch's convolutions read it.

    Raises:
        ConfigError: another count, or an entry that is not an integer of at least ``least``.
    """
    if type(value) is int and value >= least:
        return (value,) * axes
    if type(value) is tuple and len(value) == axes and all(type(v) is int and v >= least for v in value):
        return value
    entries: tuple[int, ...] = tuple(value) if isinstance(value, Sequence) else (value,)
    if len(entries) == 1:
        entries *= axes
    if len(entries) != axes:
        raise ConfigError(
            f"{op} {name}", got=repr(value), want=f"one integer, or {axes} of them", remedy="Give one for each axis."
        )
    for entry in entries:
        check_size(op, name, entry, least=least)
    return tuple(int(entry) for entry in entries)


def known_finite(*tensors: Tensor) -> bool:
    """Whether it is known that nothing is NaN or infinite: looked at where looking waits for nobody."""
    return _at_hand(*tensors) and _finite(*tensors)


def known_broken(*tensors: Tensor) -> bool:
    """Whether it is known that something is NaN or infinite (or that sums overflow); not the opposite of the above."""
    return _at_hand(*tensors) and not _finite(*tensors)


def _at_hand(*tensors: Tensor) -> bool:
    """Whether values may be looked at: eager, on the processor, no tensor of samples or of shapes alone."""
    return not torch.compiler.is_compiling() and not any(
        x.device.type != "cpu" or isinstance(x, FakeTensor) or torch._C._functorch.is_batchedtensor(x) for x in tensors
    )


def _finite(*tensors: Tensor) -> bool:
    return math.isfinite(sum(float(x.detach().sum(dtype=torch.float32)) for x in tensors))
