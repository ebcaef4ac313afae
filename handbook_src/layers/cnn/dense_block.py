"""Dense blocks: every layer reads all that was made before it."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from handbook_src.check import check_probability
from handbook_src.errors import ShapeError
from handbook_src.layers.cnn.conv_block import (
    Layer,
    activation,
    check_image,
    check_sizes,
    convolution,
    normalisation,
    reset_he,
)
from handbook_src.layers.normalisation.norm import BatchNorm2d


class _DenseLayer(nn.Module):
    """One :math:`H_l`: norm, activation, convolution, once or (bottleneck) twice."""

    def __init__(
        self,
        in_channels: int,
        growth_rate: int,
        bn_size: int | None,
        dropout: float,
        norm_layer: Layer,
        act_layer: Layer,
        place: dict[str, Any],
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.act = activation(act_layer, in_place=False)
        self.norm1 = normalisation(norm_layer, in_channels, **place)
        if bn_size is None:
            self.conv1 = convolution(in_channels, growth_rate, 3, norm_layer=norm_layer, **place)
        else:
            inner = bn_size * growth_rate
            self.conv1 = convolution(in_channels, inner, 1, norm_layer=norm_layer, **place)
            self.norm2 = normalisation(norm_layer, inner, **place)
            self.conv2 = convolution(inner, growth_rate, 3, norm_layer=norm_layer, **place)
        self.bottleneck = bn_size is not None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.act(self.norm1(x)))
        if self.bottleneck:
            y = self.conv2(self.act(self.norm2(y)))
        return F.dropout(y, self.dropout, self.training) if self.dropout else y


@final
class DenseBlock(nn.Module):
    r"""Append to the channels, layer by layer, what each layer makes of all channels so far.

    .. math:: x_l = \bigl[\,x_{l-1} \,\big\Vert\, H_l(x_{l-1})\,\bigr], \qquad
        H_l = \text{Conv}_{3 \times 3} \circ \phi \circ \mathrm{BN}
        \;(\circ\; \text{Conv}_{1 \times 1} \circ \phi \circ \mathrm{BN})

    :math:`\Vert` joins channels, :math:`\phi` is ReLU; each :math:`H_l` adds ``growth_rate`` channels :math:`k`. Since
    nothing is overwritten, the input stays in the first channels of the output. With a bottleneck (DenseNet-B)
    the 1 × 1 convolution goes to ``bn_size * growth_rate`` channels first. State dicts of torchvision's
    ``densenet._DenseBlock`` load; the activations of all layers are kept, without its checkpointing.

    Args:
        in_channels: :math:`C`, of the input.
        num_layers: :math:`L`.
        growth_rate: :math:`k`.
        bn_size: the bottleneck's width in growth rates; ``None`` for the plain layer of one 3 × 3 convolution.
        dropout: of single numbers, on what each layer adds.
        norm_layer: called with a number of channels; with ``nn.Identity`` the convolutions get biases.
        act_layer: called without arguments; an ``inplace`` one is switched to copying.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        ``(b, in_channels, height, width)`` to ``(b, in_channels + num_layers * growth_rate, height, width)``.

    Typical values:
        DenseNet-121: ``growth_rate=32``, blocks of 6, 12, 24 and 16 layers, ``bn_size=4``; ``dropout=0.2``
        without data augmentation (the paper).

    Raises:
        ConfigError: a size is not a positive integer, or ``dropout`` is not in [0, 1).
        ShapeError: wrong rank, channel count or dtype; no pixels; one value per channel in training.

    Source:
        Huang et al. 2016, eq. 2 and section 3, arXiv:1608.06993
    """

    def __init__(
        self,
        in_channels: int,
        num_layers: int,
        growth_rate: int,
        *,
        bn_size: int | None = 4,
        dropout: float = 0.0,
        norm_layer: Layer = BatchNorm2d,
        act_layer: Layer = nn.ReLU,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes("DenseBlock", in_channels=in_channels, num_layers=num_layers, growth_rate=growth_rate)
        if bn_size is not None:
            check_sizes("DenseBlock", bn_size=bn_size)
        check_probability("DenseBlock", "dropout", dropout)
        self.in_channels, self.growth_rate = in_channels, growth_rate
        self.out_channels = in_channels + num_layers * growth_rate
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        for i in range(num_layers):
            width = in_channels + i * growth_rate
            layer = _DenseLayer(width, growth_rate, bn_size, dropout, norm_layer, act_layer, place)
            self.add_module(f"denselayer{i + 1}", layer)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the convolutions by He's rule, as the paper does; gains one, biases zero."""
        reset_he(self)

    def forward(self, x: Tensor) -> Tensor:
        check_image("DenseBlock", x, next(self.parameters()), self.in_channels)
        for layer in self.children():
            x = torch.cat([x, layer(x)], 1)
        return x

    def extra_repr(self) -> str:
        return f"{self.in_channels} + {self.growth_rate} a layer = {self.out_channels} channels"


@final
class Transition(nn.Module):
    r"""What stands between two dense blocks: fewer channels, half the size.

    .. math:: y = \mathrm{AvgPool}_{2 \times 2}(W * \phi(\mathrm{BN}(x)))

    :math:`W` is 1 × 1. An odd last row or column is dropped by the pooling. State dicts of torchvision's
    ``densenet._Transition`` load.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        norm_layer: called with a number of channels; with ``nn.Identity`` the convolution gets a bias.
        act_layer: called without arguments; an ``inplace`` one is switched to copying.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        ``(b, in_channels, height, width)`` to ``(b, out_channels, height // 2, width // 2)``.

    Typical values:
        ``out_channels = in_channels // 2``: DenseNet-BC's compression of 0.5.

    Raises:
        ConfigError: a size is not a positive integer.
        ShapeError: wrong rank, channel count or dtype; fewer than two pixels on a side.

    Source:
        Huang et al. 2016, section 3, "Pooling layers" and "Compression", arXiv:1608.06993
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        norm_layer: Layer = BatchNorm2d,
        act_layer: Layer = nn.ReLU,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes("Transition", in_channels=in_channels, out_channels=out_channels)
        self.norm = normalisation(norm_layer, in_channels, device, dtype)
        self.act = activation(act_layer, in_place=False)
        self.conv = convolution(in_channels, out_channels, 1, norm_layer=norm_layer, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the convolution by He's rule, as the paper does; gains one, biases zero."""
        reset_he(self)

    def forward(self, x: Tensor) -> Tensor:
        check_image("Transition", x, self.conv.weight, self.conv.in_channels)
        if min(x.shape[2:]) < 2:
            raise ShapeError(
                "Transition input",
                got=tuple(x.shape),
                want="at least two pixels on each side",
                remedy="Pooling by 2 leaves nothing of one; drop the last transition or use larger images.",
            )
        return F.avg_pool2d(self.conv(self.act(self.norm(x))), 2)
