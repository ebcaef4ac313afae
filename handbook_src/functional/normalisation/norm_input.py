"""What a norm's arguments must satisfy, and which backends can take them."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

from torch import Tensor, float32, float64

from handbook_src.check import check_positive, check_probability, check_size
from handbook_src.dispatch import needs_for_triton
from handbook_src.errors import ConfigError, ShapeError


def as_shape(normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    """Return ``normalized_shape`` as a tuple, one entry an axis.

    Raises:
        ConfigError: it is empty, or an entry is not a positive integer.
    """
    shape = tuple(normalized_shape) if isinstance(normalized_shape, Sequence) else (normalized_shape,)
    if not shape or not all(isinstance(n, Integral) and not isinstance(n, bool) and n > 0 for n in shape):
        raise ConfigError(
            "normalized_shape",
            got=shape,
            want="one positive size for each trailing axis to normalise",
            remedy="For the last axis alone pass its size, for instance x.shape[-1].",
        )
    return shape


def check_eps(op: str, eps: float | None, *, optional: bool = False) -> None:
    """Refuse an ``eps`` that would let a constant input divide by zero.

    Raises:
        ConfigError: ``eps`` is no positive, finite number, or None where it is not ``optional``.
    """
    if eps is None and optional:
        return
    remedy = "Use 1e-5 (torch's default) or 1e-6; without it a constant input gives 0/0."
    check_positive(op, "eps", eps, remedy)  # type: ignore[arg-type]


def check_input(op: str, x: Tensor, eps: float | None, *, optional: bool = False) -> None:
    """Refuse a bad ``eps`` (None is one unless ``optional``) and activations that are not floating point.

    Raises:
        ConfigError: ``eps`` is not positive.
        ShapeError: ``x`` holds integers, booleans or complex numbers, or has no axis.
    """
    check_eps(op, eps, optional=optional)
    if not x.is_floating_point():
        raise ShapeError(
            f"{op} input dtype",
            got=x.dtype,
            want="a floating-point dtype",
            remedy="Convert first, for instance x.float(); a mean of integers is not one.",
        )
    if x.ndim == 0:
        raise ShapeError(
            f"{op} input", got="a scalar", want="at least one axis", remedy="One number has no mean to remove."
        )


def check_trailing(op: str, x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None) -> None:
    """Check that ``x`` ends in ``shape`` and that the parameters have it.

    Raises:
        ShapeError: one of them does not.
    """
    want = tuple(shape)
    if tuple(x.shape[-len(want) :]) != want or x.ndim < len(want):
        raise ShapeError(
            f"{op} input",
            got=tuple(x.shape),
            want=f"trailing axes {want}",
            remedy="Features come last; move the axis with movedim, or build the layer with the input's size.",
        )
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and tuple(parameter.shape) != want:
            raise ShapeError(
                f"{op} {name}",
                got=tuple(parameter.shape),
                want=f"{want}",
                remedy="One entry for each normalised feature.",
            )


def check_channels(op: str, x: Tensor, *per_channel: Tensor | None, spatial: bool = False) -> None:
    """Check that channels come second and that every parameter has one entry a channel.

    Raises:
        ShapeError: too few axes, or another count of channels.
    """
    least = 3 if spatial else 2
    if x.ndim < least:
        raise ShapeError(
            f"{op} input",
            got=tuple(x.shape),
            want=f"at least {least} axes (batch, channels{', positions' if spatial else ''})",
            remedy="Add the missing axis, for instance x.unsqueeze(0) for one sample.",
        )
    for parameter in per_channel:
        if parameter is not None and tuple(parameter.shape) != (x.shape[1],):
            raise ShapeError(
                f"{op} channels",
                got=f"{x.shape[1]} in an input of shape {tuple(x.shape)}",
                want=f"{tuple(parameter.shape)}, as the parameters have",
                remedy="Channels are axis 1; build the layer with the input's channel count.",
            )


def check_count(op: str, x: Tensor, count: int, over: str) -> None:
    """Refuse a statistic over fewer than two values: it is the value itself, and the output the bias.

    Raises:
        ShapeError: ``count`` is 0 or 1.
    """
    if count < 2:
        raise ShapeError(
            f"{op} in training",
            got=f"{count} value per channel over {over}, from an input of shape {tuple(x.shape)}",
            want="at least 2",
            remedy="Drop the last short batch (drop_last=True), call .eval(), or use GroupNorm or LayerNorm.",
        )


def check_groups(op: str, groups: int, channels: int) -> None:
    """Check that ``groups`` cuts ``channels`` into equal parts.

    Raises:
        ConfigError: ``groups`` is no positive integer.
        ShapeError: ``groups`` does not divide ``channels``.
    """
    check_size(op, "num_groups", groups)
    if channels % groups:
        divisors = [g for g in range(1, channels + 1) if channels % g == 0]
        raise ShapeError(
            f"{op} channels",
            got=f"{channels} channels in {groups} groups",
            want="a number of groups that divides the channels",
            remedy=f"Take one of {divisors}.",
        )


def check_running(op: str, mean: Tensor | None, var: Tensor | None, momentum: float, *, required: bool) -> None:
    """Check that running statistics come in pairs, are there where they are needed, and move by a share.

    Raises:
        ConfigError: one without the other, or neither although needed; ``momentum`` outside [0, 1].
    """
    check_momentum(op, momentum)
    missing = [name for name, t in (("running_mean", mean), ("running_var", var)) if t is None]
    if len(missing) == 1 or (required and missing):
        raise ConfigError(
            f"{op} running statistics",
            got=f"{' and '.join(missing)} None",
            want="both running_mean and running_var" if required else "both, or neither",
            remedy="Pass both buffers, or normalise with the input's own statistics.",
        )


def check_rank(name: str, x: Tensor, ranks: Sequence[int] | None, channels: int, axis: int = 1) -> None:
    """Check the number of axes and that axis ``axis`` holds ``channels``.

    Raises:
        ShapeError: another number of axes, or of channels.
    """
    if ranks is not None and x.ndim not in ranks:
        raise ShapeError(
            f"{name} input",
            got=f"{x.ndim} axes, {tuple(x.shape)}",
            want=" or ".join(f"{rank} axes" for rank in ranks),
            remedy="1d norms take sequences, 2d images, 3d volumes.",
        )
    if x.ndim > axis and x.shape[axis] != channels:
        raise ShapeError(
            f"{name} channels",
            got=f"{x.shape[axis]} in an input of shape {tuple(x.shape)}",
            want=f"{channels}, as the layer was built",
            remedy=f"Channels are axis {axis}; move them there, or build the layer for {x.shape[axis]}.",
        )


def check_momentum(name: str, momentum: float | None) -> None:
    """Refuse a share of the new batch outside ``[0, 1]``; ``None`` averages all batches.

    Raises:
        ConfigError: ``momentum`` is negative, above 1, NaN, a boolean or no number.
    """
    if momentum is not None:
        remedy = "None averages all batches. 0.1 here, the share of the new batch, is 0.9 in Keras."
        check_probability(name, "momentum", momentum, remedy, below_one=False)


def one_dtype(x: Tensor, *parameters: Tensor | None, mixed: bool = False) -> str | None:
    """What torch's operation lacks: parameters of the dtype of ``x``, or float32 beside halves if ``mixed``."""
    dtypes = {p.dtype for p in parameters if p is not None}
    fits = dtypes <= {x.dtype} or (mixed and x.dtype.itemsize == 2 and dtypes == {float32})
    return None if fits else f"parameters of dtype {x.dtype}"


def like_torchs(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> str | None:
    """What torch's batch and instance norm lack."""
    return one_dtype(x, running_mean, running_var, weight, bias, mixed=True)


def kernel(x: Tensor, *parameters: Tensor | None) -> str | None:
    """What the handbook's kernel lacks. Nobody has measured it faster than torch's own operation yet."""
    if x.dtype == float64:
        return "float16, bfloat16 or float32 activations: the kernel adds in float32"
    return needs_for_triton(x, *parameters)
