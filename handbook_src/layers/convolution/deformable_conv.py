"""Deformable convolution with torchvision's names and state dict, and the layer that predicts its own offsets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from handbook_src.check import as_tuple, check_rank, check_size
from handbook_src.dispatch import Backend
from handbook_src.errors import ShapeError
from handbook_src.functional.convolution import deformable_conv as maths
from handbook_src.functional.convolution.conv import conv2d


@final
class DeformConv2d(nn.Module):
    r"""A convolution whose taps are told where to read.

    The maths: :func:`handbook_src.functional.deform_conv2d`.

    Arguments, state dict and initialisation are those of ``torchvision.ops.DeformConv2d``. For parameters
    elsewhere than on the CPU in float32, build it under ``with torch.device(...)`` and convert by ``.to(dtype)``.

    Args:
        in_channels: channels of the image.
        out_channels: channels of the result.
        kernel_size: taps along height and width.
        stride: input pixels for one output pixel.
        padding: zeros on all sides.
        dilation: input pixels between neighbouring taps of the rigid grid.
        groups: parts of the channels that do not mix.
        bias: learn one shift for each output channel.
        backend: who runs it.

    Shape:
        ``(b, in_channels, height, width)``, offsets ``(b, 2 offset_groups kh kw, height2, width2)`` and, in
        version 2, a mask ``(b, offset_groups kh kw, height2, width2)`` to ``(b, out_channels, height2, width2)``.

    Typical values:
        3 x 3 kernels, in the last stages of a detector's backbone; one offset group (four in the code that
        Dai et al. published).

    Raises:
        ConfigError: a size that is none.
        ShapeError: groups that do not divide the channels; an input, offset or mask that does not fit.

    Source:
        Dai et al. 2017, section 2.1, arXiv:1703.06211; Zhu et al. 2018, section 3.2, arXiv:1811.11168
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        op = "DeformConv2d"
        for name, size in (("groups", groups), ("in_channels", in_channels), ("out_channels", out_channels)):
            check_size(op, name, size)
            if size % groups:
                raise ShapeError(
                    f"{op} {name}", got=f"{size} in {groups} groups", want="a multiple of groups", remedy="Change one."
                )
        self.in_channels, self.out_channels, self.groups, self.backend = in_channels, out_channels, groups, backend
        self.kernel_size = as_tuple(op, "kernel_size", kernel_size, 2)
        self.stride = as_tuple(op, "stride", stride, 2)
        self.padding = as_tuple(op, "padding", padding, 2, least=0)
        self.dilation = as_tuple(op, "dilation", dilation, 2)
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw as torch's convolutions do: uniform within one over the root of the fan-in."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        return maths.deform_conv2d(
            input, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask, backend=self.backend
        )

    def extra_repr(self) -> str:
        said = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        said += f", padding={self.padding}, dilation={self.dilation}, groups={self.groups}"
        return said + f", bias={self.bias is not None}"


@final
class DeformableConv2d(nn.Module):
    r"""A deformable convolution that predicts its offsets from its input, by a plain convolution beside it.

    .. math::
        y = \operatorname{deform}(x;\, \Delta p, \Delta m), \qquad
        (\Delta p,\, z) = \operatorname{conv}(x), \quad \Delta m = \operatorname{sigmoid}(z)

    The predictor has the kernel, stride, padding and dilation of ``conv`` and starts at zero. So version 1
    starts as the plain convolution, and version 2 with every tap at half strength (:math:`\Delta m = 1/2`).

    Args:
        conv: what is told where to read.
        offset_groups: parts of the channels with offsets of their own.
        modulated: version 2: predict a mask too.

    Shape:
        ``(b, in_channels, height, width)`` to ``(b, out_channels, height2, width2)``.

    Typical values:
        ``offset_groups=1``; a learning rate for the predictor equal to the others' (Dai et al.), or a tenth of
        it (Zhu et al.).

    Raises:
        ConfigError: ``offset_groups`` is not a positive integer.
        ShapeError: ``offset_groups`` does not divide the channels; an input that does not fit.

    Source:
        Dai et al. 2017, section 2.1, arXiv:1703.06211; Zhu et al. 2018, section 3.2, arXiv:1811.11168

    Example:
        >>> layer = DeformableConv2d(DeformConv2d(8, 16, 3, padding=1))
        >>> layer(torch.randn(2, 8, 6, 6)).shape
        torch.Size([2, 16, 6, 6])
    """

    def __init__(self, conv: DeformConv2d, *, offset_groups: int = 1, modulated: bool = True) -> None:
        super().__init__()
        check_size("DeformableConv2d", "offset_groups", offset_groups)
        if conv.in_channels % offset_groups:
            raise ShapeError(
                "DeformableConv2d offset_groups",
                got=f"{offset_groups} for {conv.in_channels} channels",
                want="groups that divide the channels",
                remedy="Pass offset_groups=1.",
            )
        self.offset_groups, self.modulated = offset_groups, modulated
        self.conv = conv
        self.taps = offset_groups * conv.kernel_size[0] * conv.kernel_size[1]
        predicted = (3 if modulated else 2) * self.taps
        self.predictor_weight = nn.Parameter(conv.weight.new_zeros(predicted, conv.in_channels, *conv.kernel_size))
        self.predictor_bias = nn.Parameter(conv.weight.new_zeros(predicted))

    def reset_parameters(self) -> None:
        """Draw the convolution's weights anew and set the predictor to zero."""
        self.conv.reset_parameters()
        nn.init.zeros_(self.predictor_weight)
        nn.init.zeros_(self.predictor_bias)

    def offsets(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what is predicted for ``x``: offsets in pixels, and the mask of version 2."""
        check_rank("DeformableConv2d", x, (4,), "(batch, channels, height, width)")
        said = conv2d(
            x,
            self.predictor_weight,
            self.predictor_bias,
            self.conv.stride,
            self.conv.padding,
            self.conv.dilation,
            backend="reference" if self.conv.backend == "reference" else "auto",
        )
        return said[:, : 2 * self.taps], said[:, 2 * self.taps :].sigmoid() if self.modulated else None

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, *self.offsets(x))

    def extra_repr(self) -> str:
        return f"offset_groups={self.offset_groups}, modulated={self.modulated}"
