"""Residual blocks: two convolutions, or a bottleneck of three, around a shortcut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, final, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from handbook_src.check import as_tuple
from handbook_src.errors import ConfigError
from handbook_src.layers.cnn.conv_block import (
    Layer,
    activation,
    check_groups,
    check_image,
    check_sizes,
    convolution,
    normalisation,
    reset_he,
)
from handbook_src.layers.normalisation.norm import BatchNorm2d

Shortcut = Literal["projection", "pad", "none"]


@final
class ResidualBlock(nn.Module):
    r"""Add to the input what two 3 × 3 convolutions make of it.

    .. math::
        y &= \phi\bigl(S(x) + \mathrm{BN}_2(W_2 * \phi(\mathrm{BN}_1(W_1 * x)))\bigr)
        && \text{(2015)} \\
        y &= S(x) + W_2 * \phi(\mathrm{BN}_2(W_1 * \phi(\mathrm{BN}_1(x))))
        && \text{(pre-activation, 2016)}

    :math:`\phi` is ReLU, :math:`*` convolution, :math:`S` the shortcut: the identity where input and
    output have one shape, else what ``shortcut`` says. Without ``preactivation`` this is
    torchvision's ``BasicBlock`` with the shortcut built in; its state dicts load.
    The pre-activation block projects :math:`\phi(\mathrm{BN}_1(x))`, as its authors' code does.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        stride: of the first convolution, and of the shortcut.
        shortcut: ``projection`` is a strided 1 × 1 convolution (option B of 2015), ``pad`` subsamples and
            appends channels of zeros (option A, no parameters), ``none`` leaves the shortcut out, always:
            the plain network.
        preactivation: norm and activation before each convolution, nothing after the sum; an ``inplace``
            activation is switched to copying, since the shortcut reads what it would overwrite.
        norm_layer: called with a number of channels; with ``nn.Identity`` the convolutions get biases.
        act_layer: called without arguments.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        ``(b, in_channels, height, width)`` to ``(b, out_channels, ceil(height / stride), ceil(width / stride))``.

    Typical values:
        64 to 512 channels (ResNet-18 and -34), ``stride=2`` where the channels double; the last norm's gain
        starts at zero in large-batch training (Goyal et al. 2017).

    Raises:
        ConfigError: a size is not a positive integer, an unknown ``shortcut``, or ``pad`` to fewer channels.
        ShapeError: wrong rank, channel count or dtype; no pixels; one value per channel in training.

    Source:
        He et al. 2015, eq. 1 and 2, arXiv:1512.03385; He et al. 2016, figure 4e, arXiv:1603.05027
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        shortcut: Shortcut = "projection",
        preactivation: bool = False,
        norm_layer: Layer = BatchNorm2d,
        act_layer: Layer = nn.ReLU,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes("ResidualBlock", in_channels=in_channels, out_channels=out_channels, stride=stride)
        _check_shortcut(shortcut, in_channels, out_channels)
        self.stride, self.shortcut, self.preactivation = stride, shortcut, preactivation
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv1 = convolution(in_channels, out_channels, 3, stride, norm_layer=norm_layer, **place)
        self.bn1 = normalisation(norm_layer, in_channels if preactivation else out_channels, **place)
        self.conv2 = convolution(out_channels, out_channels, 3, norm_layer=norm_layer, **place)
        self.bn2 = normalisation(norm_layer, out_channels, **place)
        self.act = activation(act_layer, in_place=not preactivation)
        self.downsample: nn.Sequential | None = None
        if shortcut == "projection" and (stride != 1 or in_channels != out_channels):
            self.downsample = _projection(
                in_channels, out_channels, stride, norm_layer, normed=not preactivation, **place
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the convolutions by He's rule, as the paper does; gains one, biases zero."""
        reset_he(self)

    def forward(self, x: Tensor) -> Tensor:
        check_image("ResidualBlock", x, self.conv1.weight, self.conv1.in_channels)
        if self.preactivation:
            ready = self.act(self.bn1(x))
            return self._add(self.conv2(self.act(self.bn2(self.conv1(ready)))), x, ready)
        y = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        return self.act(self._add(y, x, x))

    def _add(self, y: Tensor, x: Tensor, ready: Tensor) -> Tensor:
        """Add the shortcut of ``x``; a projection reads ``ready``."""
        if self.shortcut == "none":
            return y
        if self.downsample is not None:
            return y + self.downsample(ready)
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        missing = y.shape[1] - x.shape[1]
        return y + (F.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x)

    def extra_repr(self) -> str:
        return f"stride={self.stride}, shortcut={self.shortcut!r}, preactivation={self.preactivation}"


@final
class Bottleneck(nn.Module):
    r"""Add to the input what a narrow 3 × 3 convolution between two 1 × 1 convolutions makes of it.

    .. math:: y = \phi\bigl(S(x) + \mathrm{BN}_3(W_3 * \phi(\mathrm{BN}_2(W_2 *
        \phi(\mathrm{BN}_1(W_1 * x)))))\bigr)

    :math:`W_1` is 1 × 1 down to ``width`` channels, :math:`W_2` 3 × 3 among them, :math:`W_3` 1 × 1 up again;
    :math:`S` is the identity where input and output have one shape, else a strided 1 × 1 convolution and a norm.
    Weights: :math:`\text{in} \cdot w + 9 w^2 / g + w \cdot \text{out}` (and :math:`\text{in} \cdot \text{out}` of a
    projection). It is torchvision's ``Bottleneck`` with the shortcut built in; its state dicts load.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        stride: of the 3 × 3 convolution and the shortcut, as in torchvision ("ResNet v1.5"); a pair is
            the strides of the first 1 × 1 and the 3 × 3, so that ``(2, 1)`` is the paper's block.
        width: channels of the 3 × 3; a quarter of ``out_channels`` unless given.
        groups: of the 3 × 3; above 1 it is ResNeXt's block.
        norm_layer: called with a number of channels; with ``nn.Identity`` the convolutions get biases.
        act_layer: called without arguments.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        ``(b, in_channels, height, width)`` to ``(b, out_channels, ceil(height / stride), ceil(width / stride))``.

    Typical values:
        ResNet-50's first block: 64 to 256 channels, ``width`` 64; ResNeXt-50 32x4d: ``width=128, groups=32``;
        Wide ResNet-50-2: ``width=128``.

    Raises:
        ConfigError: a size is not a positive integer, or ``groups`` doesn't divide ``width``.
        ShapeError: wrong rank, channel count or dtype; no pixels; one value per channel in training.

    Source:
        He et al. 2015, figure 5 right, arXiv:1512.03385; groups: Xie et al. 2016, figure 3c, arXiv:1611.05431
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int | tuple[int, int] = 1,
        *,
        width: int | None = None,
        groups: int = 1,
        norm_layer: Layer = BatchNorm2d,
        act_layer: Layer = nn.ReLU,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes("Bottleneck", in_channels=in_channels, out_channels=out_channels)
        width = out_channels // 4 if width is None else width
        check_sizes("Bottleneck", width=width)
        check_groups("Bottleneck", groups, width)
        pair = stride if isinstance(stride, Sequence) and len(stride) == 2 else (1, stride)
        first, second = as_tuple("Bottleneck", "stride", pair, 2, least=1)
        self.stride = first * second
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv1 = convolution(in_channels, width, 1, first, norm_layer=norm_layer, **place)
        self.bn1 = normalisation(norm_layer, width, **place)
        self.conv2 = convolution(width, width, 3, second, groups=groups, norm_layer=norm_layer, **place)
        self.bn2 = normalisation(norm_layer, width, **place)
        self.conv3 = convolution(width, out_channels, 1, norm_layer=norm_layer, **place)
        self.bn3 = normalisation(norm_layer, out_channels, **place)
        self.act = activation(act_layer)
        self.downsample: nn.Sequential | None = None
        if self.stride != 1 or in_channels != out_channels:
            self.downsample = _projection(in_channels, out_channels, self.stride, norm_layer, normed=True, **place)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the convolutions by He's rule, as the paper does; gains one, biases zero."""
        reset_he(self)

    def forward(self, x: Tensor) -> Tensor:
        check_image("Bottleneck", x, self.conv1.weight, self.conv1.in_channels)
        y = self.act(self.bn1(self.conv1(x)))
        y = self.act(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.act(y + (x if self.downsample is None else self.downsample(x)))


def _projection(
    in_channels: int, out_channels: int, stride: int, norm_layer: Layer, *, normed: bool, **place: Any
) -> nn.Sequential:
    parts: list[nn.Module] = [convolution(in_channels, out_channels, 1, stride, norm_layer=norm_layer, **place)]
    if normed:
        parts.append(normalisation(norm_layer, out_channels, **place))
    return nn.Sequential(*parts)


def _check_shortcut(shortcut: str, in_channels: int, out_channels: int) -> None:
    if shortcut not in get_args(Shortcut):
        raise ConfigError(
            "ResidualBlock shortcut", got=repr(shortcut), want=f"one of {get_args(Shortcut)}", remedy="Choose one."
        )
    if shortcut == "pad" and out_channels < in_channels:
        raise ConfigError(
            "ResidualBlock shortcut",
            got=f"'pad' from {in_channels} to {out_channels} channels",
            want="at least as many channels as before",
            remedy="Padding can't drop channels; use shortcut='projection'.",
        )
