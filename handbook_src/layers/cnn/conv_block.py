"""What the convolutional blocks share: a checked input, and convolutions that know whether a norm follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from handbook_src.check import check_features, check_floating, check_rank, check_size
from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.convolution.conv_input import check_alike
from handbook_src.layers.convolution.conv import Conv2d

Layer = Callable[..., nn.Module]


def check_image(name: str, x: Tensor, weight: Tensor, channels: int) -> None:
    """Check that ``x`` is a batch of images with ``channels`` channels that a block can read.

    Args:
        name: of the block.
        x: its input.
        weight: of one of its convolutions, for the dtype.
        channels: of the input.

    Raises:
        ShapeError: wrong rank, channel count, dtype or device, or no pixels.
    """
    check_floating(name, x)
    check_rank(name, x, (4,), "(batch, channels, height, width)")
    check_features(name, x, channels, axis=1)
    if 0 in x.shape[2:]:
        raise ShapeError(
            f"{name} input",
            got=tuple(x.shape),
            want="at least one pixel on each side",
            remedy="An earlier stride or pooling left nothing; use larger images or fewer of them.",
        )
    check_alike(name, x, weight)


def check_groups(name: str, groups: int, channels: int) -> None:
    """Refuse ``groups`` that don't cut ``channels`` into equal parts.

    Raises:
        ConfigError: not a positive integer, or not a divisor.
    """
    check_size(name, "groups", groups)
    if channels % groups:
        divisors = [g for g in range(1, channels + 1) if channels % g == 0]
        raise ConfigError(
            f"{name} groups",
            got=f"{groups} for {channels} channels",
            want="a divisor of the channels",
            remedy=f"Take one of {divisors}.",
        )


def check_sizes(name: str, **sizes: int) -> None:
    """Refuse sizes that are not positive integers.

    Raises:
        ConfigError: one is not; says which.
    """
    for key, value in sizes.items():
        check_size(name, key, value)


def convolution(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int = 1,
    *,
    norm_layer: Layer,
    groups: int = 1,
    device: Any = None,
    dtype: torch.dtype | None = None,
) -> nn.Conv2d:
    """A convolution that keeps the size at stride 1; its bias is left out where a norm would cancel it."""
    bias = norm_layer is nn.Identity
    return nn.Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        stride,
        kernel_size // 2,
        groups=groups,
        bias=bias,
        device=device,
        dtype=dtype,
    )


def normalisation(norm_layer: Layer, channels: int, device: Any = None, dtype: torch.dtype | None = None) -> nn.Module:
    """Build ``norm_layer(channels)`` where the convolutions are; any callable of one argument will do.

    Raises:
        ConfigError: ``norm_layer`` is a module or not callable.
    """
    _check_layer("norm_layer", norm_layer, "nn.Identity for none")
    return norm_layer(channels).to(device=device, dtype=dtype)


def activation(act_layer: Layer, *, in_place: bool = True) -> nn.Module:
    """Build ``act_layer()``.

    Args:
        act_layer: called without arguments.
        in_place: false where its input is read again, which an activation in place would overwrite.

    Raises:
        ConfigError: ``act_layer`` is a module or not callable.
    """
    _check_layer("act_layer", act_layer, "nn.ReLU without parentheses")
    act = act_layer()
    for part in act.modules():
        if not in_place and getattr(part, "inplace", False):
            part.inplace = False  # type: ignore[assignment]
    return act


def _check_layer(what: str, layer: Any, remedy: str) -> None:
    if not callable(layer) or isinstance(layer, nn.Module):
        raise ConfigError(
            what, got=repr(layer), want="a class, or a function that builds a module", remedy=f"Pass {remedy}."
        )


def reset_he(block: nn.Module) -> None:
    """Draw the convolutions by He's rule over the outgoing connections, as the authors' code does; reset the rest."""
    for part in block.modules():
        if isinstance(part, nn.Conv2d | Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif part is not block:
            _reset(part)


def reset_parts(block: nn.Module) -> None:
    """Reset every part by its own rule."""
    for part in block.modules():
        if part is not block:
            _reset(part)


def _reset(part: Any) -> None:
    if hasattr(part, "reset_parameters"):
        part.reset_parameters()
