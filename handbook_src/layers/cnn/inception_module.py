"""The inception module of GoogLeNet: four views of one input side by side."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from handbook_src.check import as_tuple
from handbook_src.errors import ConfigError
from handbook_src.layers.cnn.conv_block import Layer, check_image, check_sizes, convolution, normalisation, reset_parts


class _ConvNormReLU(nn.Module):
    """Convolution, norm (or none), ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, norm_layer: Layer, **place: Any) -> None:
        super().__init__()
        self.conv = convolution(in_channels, out_channels, kernel_size, norm_layer=norm_layer, **place)
        self.bn = normalisation(norm_layer, out_channels, **place)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


@final
class InceptionModule(nn.Module):
    r"""Join the channels of a 1 × 1, a 3 × 3 and a 5 × 5 convolution and a max pooling.

    .. math:: y = \bigl[\, W_1 x \,\big\Vert\, W_3\, R_3 x \,\big\Vert\, W_5\, R_5 x
        \,\big\Vert\, P\, \mathrm{MaxPool}_{3 \times 3}(x) \,\bigr]

    Each letter is a convolution followed by ReLU (and a norm before it, if one is given); :math:`R_3`, :math:`R_5` and
    :math:`P` are 1 × 1 and keep the large kernels affordable; :math:`\Vert` joins channels in this order.
    Defaults are the paper's: 5 × 5, no norm. torchvision's GoogLeNet has 3 × 3 in its place (a known slip of the
    weights it was converted from) and batch norm with ``eps=1e-3``: pass ``kernel_size=3`` and
    ``norm_layer=partial(BatchNorm2d, eps=1e-3)``, and its state dicts load.

    Args:
        in_channels: of the input.
        ch1x1: channels of the first branch.
        ch3x3: channels of :math:`R_3` and of the 3 × 3 convolution.
        ch5x5: channels of :math:`R_5` and of the 5 × 5 convolution.
        pool_proj: channels of :math:`P`.
        kernel_size: of the third branch; odd.
        norm_layer: called with a number of channels; with ``nn.Identity`` the convolutions get biases.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        ``(b, in_channels, height, width)`` to
        ``(b, ch1x1 + ch3x3[1] + ch5x5[1] + pool_proj, height, width)``.

    Typical values:
        GoogLeNet's 3a: ``InceptionModule(192, 64, (96, 128), (16, 32), 32)``.

    Raises:
        ConfigError: a size is not a positive integer, or ``kernel_size`` is even.
        ShapeError: wrong rank, channel count or dtype; no pixels.

    Source:
        Szegedy et al. 2014, figure 2b and table 1, arXiv:1409.4842
    """

    def __init__(
        self,
        in_channels: int,
        ch1x1: int,
        ch3x3: tuple[int, int],
        ch5x5: tuple[int, int],
        pool_proj: int,
        *,
        kernel_size: int = 5,
        norm_layer: Layer = nn.Identity,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(
            "InceptionModule", in_channels=in_channels, ch1x1=ch1x1, pool_proj=pool_proj, kernel_size=kernel_size
        )
        reduce3, out3 = as_tuple("InceptionModule", "ch3x3", ch3x3, 2, least=1)
        reduce5, out5 = as_tuple("InceptionModule", "ch5x5", ch5x5, 2, least=1)
        if kernel_size % 2 == 0:
            raise ConfigError(
                "InceptionModule kernel_size",
                got=kernel_size,
                want="an odd size, so that the branch keeps the image's",
                remedy="5 is the paper's, 3 torchvision's.",
            )

        def stage(of: int, to: int, kernel: int) -> _ConvNormReLU:
            return _ConvNormReLU(of, to, kernel, norm_layer, device=device, dtype=dtype)

        self.branch1 = stage(in_channels, ch1x1, 1)
        self.branch2 = nn.Sequential(stage(in_channels, reduce3, 1), stage(reduce3, out3, 3))
        self.branch3 = nn.Sequential(stage(in_channels, reduce5, 1), stage(reduce5, out5, kernel_size))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1), stage(in_channels, pool_proj, 1))

    def reset_parameters(self) -> None:
        """Draw the convolutions as torch does; gains one, biases zero."""
        reset_parts(self)

    def forward(self, x: Tensor) -> Tensor:
        check_image("InceptionModule", x, self.branch1.conv.weight, self.branch1.conv.in_channels)
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)
