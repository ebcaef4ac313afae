"""The fire module of SqueezeNet: squeeze by 1 × 1, expand by 1 × 1 and 3 × 3 side by side."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from handbook_src.errors import ConfigError
from handbook_src.layers.cnn.conv_block import Layer, activation, check_image, check_sizes, reset_parts


@final
class FireModule(nn.Module):
    r"""Squeeze to few channels, then expand them by 1 × 1 and 3 × 3 convolutions side by side.

    .. math::
        s = \phi(W_s * x + b_s), \qquad
        y = \bigl[\,\phi(W_1 * s + b_1) \,\big\Vert\, \phi(W_3 * s + b_3)\,\bigr]

    :math:`\phi` is ReLU, :math:`\Vert` joins channels, 1 × 1 first. Weights: :math:`C s + s e_1 + 9 s e_3`, and a bias
    for each channel made. State dicts of torchvision's ``squeezenet.Fire`` load.

    Args:
        in_channels: :math:`C`.
        squeeze_channels: :math:`s`; fewer than :math:`e_1 + e_3` in the paper.
        expand1x1_channels: :math:`e_1`.
        expand3x3_channels: :math:`e_3`.
        bypass: add the input to the output (the paper's simple bypass); needs :math:`C = e_1 + e_3`.
        act_layer: called without arguments.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        ``(b, in_channels, height, width)`` to ``(b, expand1x1_channels + expand3x3_channels, height, width)``.

    Typical values:
        SqueezeNet's first: 96, 16, 64, 64; the squeeze ratio :math:`s / (e_1 + e_3)` is 1/8.

    Raises:
        ConfigError: a size is not a positive integer, or ``bypass`` with channels that differ.
        ShapeError: wrong rank, channel count or dtype; no pixels.

    Source:
        Iandola et al. 2016, section 3.2 and figure 1, bypass: section 6, arXiv:1602.07360
    """

    def __init__(
        self,
        in_channels: int,
        squeeze_channels: int,
        expand1x1_channels: int,
        expand3x3_channels: int,
        *,
        bypass: bool = False,
        act_layer: Layer = nn.ReLU,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(
            "FireModule",
            in_channels=in_channels,
            squeeze_channels=squeeze_channels,
            expand1x1_channels=expand1x1_channels,
            expand3x3_channels=expand3x3_channels,
        )
        _check_bypass(bypass, in_channels, expand1x1_channels + expand3x3_channels)
        self.bypass = bypass
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.squeeze = nn.Conv2d(in_channels, squeeze_channels, 1, **place)
        self.expand1x1 = nn.Conv2d(squeeze_channels, expand1x1_channels, 1, **place)
        self.expand3x3 = nn.Conv2d(squeeze_channels, expand3x3_channels, 3, padding=1, **place)
        self.act = activation(act_layer)

    def reset_parameters(self) -> None:
        """Draw weights and biases as torch's convolutions do."""
        reset_parts(self)

    def forward(self, x: Tensor) -> Tensor:
        check_image("FireModule", x, self.squeeze.weight, self.squeeze.in_channels)
        s = self.act(self.squeeze(x))
        y = torch.cat([self.act(self.expand1x1(s)), self.act(self.expand3x3(s))], 1)
        return x + y if self.bypass else y

    def extra_repr(self) -> str:
        return f"bypass={self.bypass}"


def _check_bypass(bypass: bool, before: int, after: int) -> None:
    if bypass and before != after:
        raise ConfigError(
            "FireModule bypass",
            got=f"{before} channels in, {after} out",
            want="as many out as in",
            remedy="Pass bypass=False, or expand to the channels of the input.",
        )
