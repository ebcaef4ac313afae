"""Squeeze-and-excitation: a gate per channel, decided by the means of all channels."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from handbook_src.errors import ConfigError
from handbook_src.layers.cnn.conv_block import Layer, activation, check_image, check_sizes, reset_parts


@final
class SEBlock(nn.Module):
    r"""Scale each channel by a gate that a small network computes from the means of all channels.

    .. math::
        z_c = \frac{1}{HW} \sum_{i,j} x_{c,i,j}, \qquad
        s = \sigma\bigl(W_2\, \phi(W_1 z + b_1) + b_2\bigr), \qquad
        y_{c,i,j} = s_c\, x_{c,i,j}

    :math:`\phi` is ReLU, :math:`\sigma` the sigmoid. The paper writes no biases; every implementation has them.
    The two matrices are kept as 1 × 1 convolutions under torchvision's and timm's names, so their state dicts load.

    Args:
        channels: of the input and the output.
        reduction: the squeezed vector has ``channels // reduction`` entries.
        squeeze_channels: that number itself; then ``reduction`` is not used.
        act_layer: :math:`\phi`; called without arguments.
        gate_layer: :math:`\sigma`; called without arguments (MobileNetV3: ``nn.Hardsigmoid``).
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        ``(b, channels, height, width)`` to the same.

    Typical values:
        ``reduction=16`` (the paper); EfficientNet squeezes to a quarter of its block's input channels.

    Raises:
        ConfigError: a size is not a positive integer, or ``reduction`` is larger than ``channels``.
        ShapeError: wrong rank, channel count or dtype; no pixels.

    Source:
        Hu et al. 2017, eq. 2 to 4, arXiv:1709.01507
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 16,
        *,
        squeeze_channels: int | None = None,
        act_layer: Layer = nn.ReLU,
        gate_layer: Layer = nn.Sigmoid,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes("SEBlock", channels=channels, reduction=reduction)
        if squeeze_channels is None:
            squeeze_channels = _squeezed(channels, reduction)
        check_sizes("SEBlock", squeeze_channels=squeeze_channels)
        self.fc1 = nn.Conv2d(channels, squeeze_channels, 1, device=device, dtype=dtype)
        self.act = activation(act_layer)
        self.fc2 = nn.Conv2d(squeeze_channels, channels, 1, device=device, dtype=dtype)
        self.gate = activation(gate_layer)

    def reset_parameters(self) -> None:
        """Draw weights and biases as torch's convolutions do."""
        reset_parts(self)

    def forward(self, x: Tensor) -> Tensor:
        check_image("SEBlock", x, self.fc1.weight, self.fc1.in_channels)
        z = x.mean((2, 3), keepdim=True)
        return x * self.gate(self.fc2(self.act(self.fc1(z))))


def _squeezed(channels: int, reduction: int) -> int:
    if reduction > channels:
        raise ConfigError(
            "SEBlock reduction",
            got=f"{reduction} of {channels} channels",
            want="at most the channels, or nothing is left to decide by",
            remedy=f"Pass reduction={max(1, channels // 4)}, or squeeze_channels.",
        )
    return channels // reduction
