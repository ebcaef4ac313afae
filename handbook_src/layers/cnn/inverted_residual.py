"""The inverted residual block of MobileNetV2: wide inside, narrow at the ends, linear at the last."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from handbook_src.check import check_positive
from handbook_src.layers.cnn.conv_block import (
    Layer,
    activation,
    check_image,
    check_sizes,
    convolution,
    normalisation,
    reset_parts,
)
from handbook_src.layers.cnn.se_block import SEBlock
from handbook_src.layers.normalisation.norm import BatchNorm2d


@final
class InvertedResidual(nn.Module):
    r"""Expand by a 1 × 1 convolution, filter each channel alone, project back without an activation.

    .. math::
        h &= \phi(\mathrm{BN}_2(W_2 \circledast \phi(\mathrm{BN}_1(W_1 * x)))), \\
        y &= \mathrm{BN}_3(W_3 * h) \;(+\; x \text{ where stride is 1 and input and output channels agree})

    :math:`W_1` is 1 × 1 up to :math:`t\,C` channels (left out at :math:`t = 1`), :math:`\circledast` a depthwise
    3 × 3, :math:`\phi` ReLU6, :math:`W_3` 1 × 1.
    With ``squeeze_channels`` an :class:`SEBlock` gates :math:`h` (MBConv).
    Weights of the convolutions: :math:`t C^2 + 9 t C + t C C'`. State dicts of torchvision's
    ``mobilenetv2.InvertedResidual`` load.

    Args:
        in_channels: :math:`C`.
        out_channels: :math:`C'`.
        stride: of the depthwise convolution.
        expand_ratio: :math:`t`; the hidden channels are rounded.
        squeeze_channels: width of a squeeze-and-excitation on the hidden channels; ``None`` for none.
        norm_layer: called with a number of channels; with ``nn.Identity`` the convolutions get biases.
        act_layer: called without arguments.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        ``(b, in_channels, height, width)`` to ``(b, out_channels, ceil(height / stride), ceil(width / stride))``.

    Typical values:
        ``expand_ratio=6`` (MobileNetV2); EfficientNet: ``squeeze_channels=in_channels // 4``, ``act_layer=nn.SiLU``.

    Raises:
        ConfigError: a size is not a positive integer, or ``expand_ratio`` is not positive or leaves no channel.
        ShapeError: wrong rank, channel count or dtype; no pixels; one value per channel in training.

    Source:
        Sandler et al. 2018, table 1 and figure 4d, arXiv:1801.04381; with the gate: Tan & Le 2019, arXiv:1905.11946
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        expand_ratio: float | int = 6,
        *,
        squeeze_channels: int | None = None,
        norm_layer: Layer = BatchNorm2d,
        act_layer: Layer = nn.ReLU6,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes("InvertedResidual", in_channels=in_channels, out_channels=out_channels, stride=stride)
        check_positive("InvertedResidual", "expand_ratio", expand_ratio)
        hidden = round(in_channels * expand_ratio)
        check_sizes("InvertedResidual", **{"hidden channels": hidden})
        self.in_channels, self.residual = in_channels, stride == 1 and in_channels == out_channels
        place: dict[str, Any] = {"device": device, "dtype": dtype}

        def stage(of: int, kernel_size: int, step: int, groups: int) -> nn.Sequential:
            conv = convolution(of, hidden, kernel_size, step, groups=groups, norm_layer=norm_layer, **place)
            return nn.Sequential(conv, normalisation(norm_layer, hidden, **place), activation(act_layer))

        parts: list[nn.Module] = [] if expand_ratio == 1 else [stage(in_channels, 1, 1, 1)]
        parts.append(stage(hidden, 3, stride, hidden))
        if squeeze_channels is not None:
            parts.append(SEBlock(hidden, squeeze_channels=squeeze_channels, act_layer=act_layer, **place))
        parts.append(convolution(hidden, out_channels, 1, norm_layer=norm_layer, **place))
        self.conv = nn.Sequential(*parts, normalisation(norm_layer, out_channels, **place))

    def reset_parameters(self) -> None:
        """Draw the convolutions as torch does; gains one, biases zero."""
        reset_parts(self)

    def forward(self, x: Tensor) -> Tensor:
        project = self.conv[-2]
        check_image("InvertedResidual", x, project.weight, self.in_channels)  # type: ignore[arg-type]
        y = self.conv(x)
        return x + y if self.residual else y

    def extra_repr(self) -> str:
        return f"residual={self.residual}"
