r"""Normalisation: one operation, :func:`standardise`, over different axes.

With activations ``x`` of shape ``b channels *spatial``:

==============  ==========================================================
batch norm      every axis but the channels: one statistic a channel
layer norm      the trailing axes: one statistic a sample (or token)
instance norm   the spatial axes: one statistic a sample and channel
group norm      the spatial axes and a group of channels, per sample
RMS norm        the last axis, and the mean is left where it is
==============  ==========================================================

Statistics of float16 and bfloat16 activations are computed in float32, and
the result is rounded once, at the end: in float16 a mean square overflows as
soon as a single feature passes 255 (255.9 squared is its largest number).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from handbook_src.check import check_size
from handbook_src.dispatch import Backend
from handbook_src.functional.normalisation.norm_input import (
    as_shape,
    check_channels,
    check_count,
    check_groups,
    check_input,
    check_running,
    check_trailing,
    kernel,
    like_torchs,
    one_dtype,
)
from handbook_src.operation import operation
from handbook_src.precision import statistic_dtype

Stat = Tensor | None  # one entry a channel, where it is given


def standardise(x: Float[Tensor, "*shape"], axes: tuple[int, ...], eps: float) -> Float[Tensor, "*shape"]:
    r"""Subtract the mean over ``axes`` and divide by the standard deviation.

    .. math:: \hat x = \frac{x - \mu}{\sqrt{\sigma^2 + \varepsilon}}

    The variance is the biased one (divided by the count), formed from the centred
    values: the shortcut :math:`E[x^2] - E[x]^2` cancels when the mean is large.

    Args:
        x: activations, already in the dtype that the statistic needs.
        axes: the axes that share one mean and one variance.
        eps: added to the variance.

    Source:
        Ioffe & Szegedy 2015, algorithm 1, arXiv:1502.03167
    """
    centred = x - x.mean(axes, keepdim=True)
    variance = centred.square().mean(axes, keepdim=True)
    return centred / torch.sqrt(variance + eps)


@operation(widens="x")
def layer_norm(
    x: Float[Tensor, "*shape"],
    normalized_shape: int | Sequence[int],
    weight: Float[Tensor, "*features"] | None = None,
    bias: Float[Tensor, "*features"] | None = None,
    eps: float = 1e-5,
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "*shape"]:
    r"""Standardise each sample over its trailing axes, then scale and shift.

    .. math::
        y_i = \frac{x_i - \mu}{\sqrt{\sigma^2 + \varepsilon}}\, w_i + b_i, \qquad
        \mu = \tfrac1d \sum_j x_j, \quad \sigma^2 = \tfrac1d \sum_j (x_j - \mu)^2

    The statistics are computed in float32 for half-precision ``x``.

    Args:
        x: activations; any leading axes.
        normalized_shape: the trailing axes that share one statistic, as their sizes.
        weight: one gain per feature, of shape ``normalized_shape``.
        bias: one shift per feature, of shape ``normalized_shape``.
        eps: added to the variance.
        backend: ``auto`` takes the fastest that can run.

    Raises:
        ConfigError: ``eps`` is not positive, or ``normalized_shape`` is empty.
        ShapeError: the trailing axes, ``weight`` or ``bias`` have another shape, or ``x`` is not floating.

    Source:
        Ba, Kiros & Hinton 2016, eq. 3 and 4, arXiv:1607.06450
    """
    x_hat = standardise(x, trailing(normalized_shape), eps)  # (x_i - mu) / sqrt(sigma^2 + eps)
    return affine(x_hat, weight, bias)  # w_i x_hat_i + b_i


@layer_norm.refuses
def _(x: Tensor, normalized_shape: Any, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    check_input("layer_norm", x, eps)
    check_trailing("layer_norm", x, as_shape(normalized_shape), weight, bias)


@layer_norm.torch(needs=lambda x, weight, bias: one_dtype(x, weight, bias, mixed=not x.is_cuda))
def _(x: Tensor, normalized_shape: Any, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, as_shape(normalized_shape), weight, bias, eps)


@layer_norm.triton(needs=lambda x, weight, bias: kernel(x, weight, bias))
def _(x: Tensor, normalized_shape: Any, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    from handbook_src.kernels.norm import layer_norm_triton

    flat = layer_norm_triton(x.flatten(-len(as_shape(normalized_shape))), _flat(weight), _flat(bias), eps)
    return flat.view(x.shape)


@operation(widens="x")
def rms_norm(
    x: Float[Tensor, "*shape"],
    weight: Float[Tensor, "*features"] | None = None,
    eps: float | None = 1e-6,
    *,
    axes: int = 1,
    backend: Backend = "auto",
) -> Float[Tensor, "*shape"]:
    r"""Divide each vector by its root mean square, then rescale.

    .. math:: y_i = \frac{x_i}{\sqrt{\tfrac1d \sum_j x_j^2 + \varepsilon}}\, w_i

    The statistic is computed in float32 for half-precision ``x``.

    Args:
        x: activations; any leading axes.
        weight: one gain per feature.
        eps: added inside the root; ``None`` is the machine epsilon of the statistic's dtype.
        axes: how many trailing axes share one mean square.
        backend: ``auto`` takes the fastest that can run.

    Raises:
        ConfigError: ``eps`` is not positive, or ``axes`` no positive integer.
        ShapeError: ``weight`` does not have the shape of these axes, or ``x`` is not floating.

    Source:
        Zhang & Sennrich 2019, eq. 4, arXiv:1910.07467
    """
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    mean_square = x.square().mean(tuple(range(-axes, 0)), keepdim=True)  # 1/d sum_j x_j^2
    y = x / torch.sqrt(mean_square + eps)  # y_i = x_i / sqrt(... + eps)
    return y if weight is None else y * weight  #       * w_i


@rms_norm.refuses
def _(x: Tensor, weight: Tensor | None, eps: float | None, axes: int) -> None:
    check_input("rms_norm", x, eps, optional=True)
    check_size("rms_norm", "axes", axes)
    check_trailing("rms_norm", x, tuple(x.shape[-axes:]), weight, None)


@rms_norm.torch(needs=lambda x, weight: one_dtype(x, weight))
def _(x: Tensor, weight: Tensor | None, eps: float | None, axes: int) -> Tensor:
    return F.rms_norm(x, x.shape[-axes:], weight, _or_machine_epsilon(eps, x))


@rms_norm.triton(needs=lambda x, weight: kernel(x, weight))
def _(x: Tensor, weight: Tensor | None, eps: float | None, axes: int) -> Tensor:
    from handbook_src.kernels.norm import rms_norm_triton

    return rms_norm_triton(x.flatten(-axes), _flat(weight), _or_machine_epsilon(eps, x)).view(x.shape)


@operation(widens="x")
def batch_norm(
    x: Float[Tensor, "b channels *spatial"],
    running_mean: Float[Tensor, " channels"] | None,
    running_var: Float[Tensor, " channels"] | None,
    weight: Float[Tensor, " channels"] | None = None,
    bias: Float[Tensor, " channels"] | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "b channels *spatial"]:
    r"""Standardise each channel over the batch and the spatial axes.

    .. math::
        y = \frac{x - \mu_c}{\sqrt{\sigma_c^2 + \varepsilon}}\, w_c + b_c, \qquad
        \mu_c = \tfrac1m \sum_{b, s} x_{bcs}, \quad \sigma_c^2 = \tfrac1m \sum_{b, s} (x_{bcs} - \mu_c)^2

    In training the running statistics move towards the batch's, in place, by
    ``momentum``; the running variance takes the unbiased one, :math:`m/(m-1)\,\sigma^2_c`.
    Otherwise they stand in for :math:`\mu_c, \sigma_c^2` and the layer is a fixed affine map.

    Args:
        x: activations, channels second.
        running_mean: what evaluation subtracts; updated in training where given.
        running_var: what evaluation divides by; updated in training where given.
        weight: one gain per channel.
        bias: one shift per channel.
        training: use and track the batch's own statistics.
        momentum: the share of the new batch in the running statistics.
        eps: added to the variance.
        backend: ``auto`` takes the fastest that can run.

    Raises:
        ConfigError: ``eps`` is not positive, or evaluation without running statistics.
        ShapeError: wrong rank, channel count or dtype, or training on one value per channel.

    Source:
        Ioffe & Szegedy 2015, algorithms 1 and 2, arXiv:1502.03167
    """
    axes = (0, *range(2, x.ndim))  # all but the channels
    if training:
        x_hat = standardise(x, axes, eps)  # (x - mu_c) / sqrt(sigma_c^2 + eps)
        track(running_mean, running_var, x, axes, momentum)
    else:
        x_hat = standardise_with(running_mean, running_var, x, eps)
    return affine(x_hat, per_channel(weight, x), per_channel(bias, x))


@batch_norm.refuses
def _(
    x: Tensor,
    running_mean: Stat,
    running_var: Stat,
    weight: Stat,
    bias: Stat,
    training: bool,
    momentum: float,
    eps: float,
) -> None:
    check_input("batch_norm", x, eps)
    check_channels("batch_norm", x, running_mean, running_var, weight, bias)
    check_running("batch_norm", running_mean, running_var, momentum, required=not training)
    if training and x.numel():
        check_count("batch_norm", x, x.shape[0] * x.shape[2:].numel(), "batch and positions")


@batch_norm.torch(needs=like_torchs)
def _(*given: Any) -> Tensor:
    return F.batch_norm(*given)


@operation(widens="x")
def instance_norm(
    x: Float[Tensor, "b channels *spatial"],
    running_mean: Float[Tensor, " channels"] | None = None,
    running_var: Float[Tensor, " channels"] | None = None,
    weight: Float[Tensor, " channels"] | None = None,
    bias: Float[Tensor, " channels"] | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "b channels *spatial"]:
    r"""Standardise each channel of each sample over its spatial axes.

    .. math::
        y = \frac{x - \mu_{bc}}{\sqrt{\sigma_{bc}^2 + \varepsilon}}\, w_c + b_c, \qquad
        \mu_{bc} = \tfrac1m \sum_s x_{bcs}, \quad \sigma_{bc}^2 = \tfrac1m \sum_s (x_{bcs} - \mu_{bc})^2

    Running statistics, where given, take the batch's average of the per-sample
    mean and of the per-sample unbiased variance.

    Args:
        x: activations, channels second, at least one spatial axis.
        running_mean: used instead of the sample's own where ``use_input_stats`` is off.
        running_var: used instead of the sample's own where ``use_input_stats`` is off.
        weight: one gain per channel.
        bias: one shift per channel.
        use_input_stats: standardise with the sample's own statistics (and track them).
        momentum: the share of the new batch in the running statistics.
        eps: added to the variance.
        backend: ``auto`` takes the fastest that can run.

    Raises:
        ConfigError: ``eps`` is not positive, or no statistics to use at all.
        ShapeError: wrong rank, channel count or dtype, or a single spatial position.

    Source:
        Ulyanov, Vedaldi & Lempitsky 2016, eq. 4, arXiv:1607.08022
    """
    axes = tuple(range(2, x.ndim))  # the positions
    if use_input_stats:
        x_hat = standardise(x, axes, eps)  # (x - mu_bc) / sqrt(sigma_bc^2 + eps)
        track(running_mean, running_var, x, axes, momentum)
    else:
        x_hat = standardise_with(running_mean, running_var, x, eps)
    return affine(x_hat, per_channel(weight, x), per_channel(bias, x))


@instance_norm.refuses
def _(
    x: Tensor,
    running_mean: Stat,
    running_var: Stat,
    weight: Stat,
    bias: Stat,
    use_input_stats: bool,
    momentum: float,
    eps: float,
) -> None:
    check_input("instance_norm", x, eps)
    check_channels("instance_norm", x, running_mean, running_var, weight, bias, spatial=True)
    check_running("instance_norm", running_mean, running_var, momentum, required=not use_input_stats)
    if use_input_stats:
        check_count("instance_norm", x, x[0:1, 0:1].numel() if len(x) else 2, "positions")


@instance_norm.torch(needs=like_torchs)
def _(
    x: Tensor, running_mean: Stat, running_var: Stat, weight: Stat, bias: Stat, use_input_stats: bool, *rest: Any
) -> Tensor:
    if use_input_stats and len(x) == 0:  # nothing to track: the mean of no samples is NaN, in torch's operation too
        running_mean = running_var = None
    return F.instance_norm(x, running_mean, running_var, weight, bias, use_input_stats, *rest)


@operation(widens="x")
def group_norm(
    x: Float[Tensor, "b channels *spatial"],
    num_groups: int,
    weight: Float[Tensor, " channels"] | None = None,
    bias: Float[Tensor, " channels"] | None = None,
    eps: float = 1e-5,
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "b channels *spatial"]:
    r"""Standardise each group of channels of each sample, with its spatial axes.

    .. math::
        y = \frac{x - \mu_{bg}}{\sqrt{\sigma_{bg}^2 + \varepsilon}}\, w_c + b_c, \qquad
        g = \lfloor c\, G / C \rfloor

    One group is layer norm over channels and positions, as many groups as channels
    is instance norm, both with this operation's per-channel gain and shift.

    Args:
        x: activations, channels second.
        num_groups: how many groups the channels are cut into, in order.
        weight: one gain per channel.
        bias: one shift per channel.
        eps: added to the variance.
        backend: ``auto`` takes the fastest that can run.

    Raises:
        ConfigError: ``eps`` is not positive, or ``num_groups`` is not.
        ShapeError: the groups do not divide the channels; wrong rank, channel count or dtype.

    Source:
        Wu & He 2018, eq. 7, arXiv:1803.08494
    """
    grouped = rearrange(x, "b (g c) ... -> b g (c ...)", g=num_groups)
    x_hat = standardise(grouped, (-1,), eps).reshape(x.shape)
    return affine(x_hat, per_channel(weight, x), per_channel(bias, x))


@group_norm.refuses
def _(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    check_input("group_norm", x, eps)
    check_channels("group_norm", x, weight, bias)
    check_groups("group_norm", num_groups, x.shape[1])


def _torch_groups(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None) -> str | None:
    """What torch's operation lacks; it refuses one value a group, where the answer is the bias."""
    alone = x.numel() == num_groups and x.shape[0] == 1
    return "more than one value per group" if alone else one_dtype(x, weight, bias, mixed=not x.is_cuda)


@group_norm.torch(needs=_torch_groups)
def _(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return F.group_norm(x, num_groups, weight, bias, eps)


def affine(x_hat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    r"""Scale and shift: :math:`w \odot \hat x + b`, each where it is given."""
    y = x_hat if weight is None else x_hat * weight
    return y if bias is None else y + bias


def per_channel(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    """A column of one entry a channel, so that it broadcasts over the positions."""
    return None if parameter is None else parameter.view(-1, *[1] * (x.ndim - 2))


def track(mean: Tensor | None, var: Tensor | None, x: Tensor, axes: tuple[int, ...], momentum: float) -> None:
    r"""Move the running statistics in place, :math:`\mu \leftarrow (1 - m)\, \mu + m\, \mu_x`.

    Those of ``x`` are averaged over the samples; the variance is the unbiased one.
    """
    if mean is None or var is None or x.numel() == 0:
        return
    with torch.no_grad():
        batch_var, batch_mean = torch.var_mean(x, axes, correction=1, keepdim=True)
        for running, batch in ((mean, batch_mean), (var, batch_var)):
            running.lerp_(batch.mean(0).flatten().to(running.dtype), momentum)


def standardise_with(mean: Tensor | None, var: Tensor | None, x: Tensor, eps: float) -> Tensor:
    """Standardise with statistics that are given, one of each a channel."""
    assert mean is not None  # check_running has refused the rest
    assert var is not None
    column = (-1, *[1] * (x.ndim - 2))
    mu, variance = mean.to(x.dtype).view(column), var.to(x.dtype).view(column)
    return (x - mu) / torch.sqrt(variance + eps)


def trailing(normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    """The last axes, as many as ``normalized_shape`` has entries: ``(-2, -1)`` for ``(3, 5)``."""
    return tuple(range(-len(as_shape(normalized_shape)), 0))


def _flat(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.flatten()


def _or_machine_epsilon(eps: float | None, x: Tensor) -> float:
    return torch.finfo(statistic_dtype(x)).eps if eps is None else eps
