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

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from handbook_src.check import check_size
from handbook_src.dispatch import Backend, resolve
from handbook_src.functional.normalisation.norm_input import (
    as_shape,
    candidates,
    check_channels,
    check_count,
    check_groups,
    check_input,
    check_running,
    check_trailing,
)
from handbook_src.precision import at_least_float32, statistic_dtype


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
    return centred * torch.rsqrt(variance + eps)


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
    shape = as_shape(normalized_shape)
    check_input("layer_norm", x, eps)
    check_trailing("layer_norm", x, shape, weight, bias)
    runs = resolve("layer_norm", backend, candidates(backend, x, weight, bias, mixed=not x.is_cuda, triton=True))
    if runs == "torch":
        return F.layer_norm(x, shape, weight, bias, eps)
    if runs == "triton":
        from handbook_src.kernels.norm import layer_norm_triton

        flat = layer_norm_triton(x.flatten(-len(shape)), _flat(weight), _flat(bias), eps)
        return flat.view(x.shape)
    x_hat = standardise(at_least_float32(x), tuple(range(-len(shape), 0)), eps)
    return _affine(x_hat, weight, bias).to(x.dtype)


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
    check_input("rms_norm", x, eps, optional=True)
    check_size("rms_norm", "axes", axes)
    check_trailing("rms_norm", x, tuple(x.shape[-axes:]), weight, None)
    eps = torch.finfo(statistic_dtype(x)).eps if eps is None else eps
    runs = resolve("rms_norm", backend, candidates(backend, x, weight, mixed=False, triton=True))
    if runs == "torch":
        return F.rms_norm(x, x.shape[-axes:], weight, eps)
    if runs == "triton":
        from handbook_src.kernels.norm import rms_norm_triton

        return rms_norm_triton(x.flatten(-axes), _flat(weight), eps).view(x.shape)
    wide, last = at_least_float32(x), tuple(range(-axes, 0))
    mean_square = wide.square().mean(last, keepdim=True)
    return _affine(wide * torch.rsqrt(mean_square + eps), weight, None).to(x.dtype)


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
    check_input("batch_norm", x, eps)
    check_channels("batch_norm", x, running_mean, running_var, weight, bias)
    check_running("batch_norm", running_mean, running_var, momentum, required=not training)
    if training and x.numel():
        check_count("batch_norm", x, x.shape[0] * x.shape[2:].numel(), "batch and positions")
    parameters = (weight, bias, running_mean, running_var)
    if resolve("batch_norm", backend, candidates(backend, x, *parameters, mixed=True)) == "torch":
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    wide, axes = at_least_float32(x), (0, *range(2, x.ndim))
    if training:
        _track(running_mean, running_var, wide, axes, momentum)
        x_hat = standardise(wide, axes, eps)
    else:
        x_hat = _with_running(wide, running_mean, running_var, eps)
    return _affine(x_hat, _per_channel(weight, x), _per_channel(bias, x)).to(x.dtype)


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
    check_input("instance_norm", x, eps)
    check_channels("instance_norm", x, running_mean, running_var, weight, bias, spatial=True)
    check_running("instance_norm", running_mean, running_var, momentum, required=not use_input_stats)
    if use_input_stats:
        check_count("instance_norm", x, x[0:1, 0:1].numel() if len(x) else 2, "positions")
        if x.shape[0] == 0:  # no samples, nothing to track: their mean is NaN, in torch's operation too
            running_mean = running_var = None
    parameters = (weight, bias, running_mean, running_var)
    if resolve("instance_norm", backend, candidates(backend, x, *parameters, mixed=True)) == "torch":
        return F.instance_norm(x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    wide, axes = at_least_float32(x), tuple(range(2, x.ndim))
    if use_input_stats:
        _track(running_mean, running_var, wide, axes, momentum)
        x_hat = standardise(wide, axes, eps)
    else:
        x_hat = _with_running(wide, running_mean, running_var, eps)
    return _affine(x_hat, _per_channel(weight, x), _per_channel(bias, x)).to(x.dtype)


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
    check_input("group_norm", x, eps)
    check_channels("group_norm", x, weight, bias)
    check_groups("group_norm", num_groups, x.shape[1])
    able = candidates(backend, x, weight, bias, mixed=not x.is_cuda)
    if x.numel() == num_groups and x.shape[0] == 1:  # torch refuses this one shape; the answer is the bias
        able["torch"] = "more than one value per group"
    if resolve("group_norm", backend, able) == "torch":
        return F.group_norm(x, num_groups, weight, bias, eps)
    grouped = rearrange(at_least_float32(x), "b (groups c) ... -> b groups (c ...)", groups=num_groups)
    x_hat = standardise(grouped, (-1,), eps).reshape(x.shape)
    return _affine(x_hat, _per_channel(weight, x), _per_channel(bias, x)).to(x.dtype)


def _affine(x_hat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = x_hat if weight is None else x_hat * weight
    return y if bias is None else y + bias


def _per_channel(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    return None if parameter is None else parameter.view(-1, *[1] * (x.ndim - 2))


def _flat(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.flatten()


def _track(mean: Tensor | None, var: Tensor | None, x: Tensor, axes: tuple[int, ...], momentum: float) -> None:
    """Move the running statistics towards those of ``x``, averaged over the samples."""
    if mean is None or var is None or x.numel() == 0:
        return
    with torch.no_grad():
        batch_var, batch_mean = torch.var_mean(x, axes, correction=1, keepdim=True)
        for running, batch in ((mean, batch_mean), (var, batch_var)):
            running.lerp_(batch.mean(0).flatten().to(running.dtype), momentum)


def _with_running(x: Tensor, mean: Tensor | None, var: Tensor | None, eps: float) -> Tensor:
    assert mean is not None  # check_running has refused the rest
    assert var is not None
    column = (-1, *[1] * (x.ndim - 2))
    return (x - mean.to(x.dtype).view(column)) * torch.rsqrt(var.to(x.dtype).view(column) + eps)
