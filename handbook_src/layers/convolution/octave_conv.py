"""Octave convolution with the state dict of torch's ``Conv2d``, and its arguments after ``alpha``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import final

import torch
from torch import Tensor, nn

from handbook_src.check import as_tuple, check_size
from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.convolution import octave_conv as maths


@final
class OctaveConv2d(nn.Module):
    r"""Convolve two octaves of channels into two: see :func:`handbook_src.functional.octave_conv2d`.

    A network of them starts with ``alpha_in=0`` and ends with ``alpha_out=0``. One weight serves all four
    paths, so the number of parameters is ``Conv2d``'s whatever the shares, and its state dict loads.

    Args:
        in_channels: of both octaves together.
        out_channels: of both octaves together.
        kernel_size: taps along height and width.
        alpha: the shares of the low octave, ``(alpha_in, alpha_out)``, or one for both; low channels are
            rounded down. It stands where ``Conv2d`` has ``stride``: name the arguments after it.
        stride: of each of the four convolutions, on its own grid.
        padding: zeros on all sides of each grid.
        dilation: pixels between neighbouring taps.
        groups: parts of the channels that do not mix.
        bias: learn one shift for each output channel.

    Shape:
        ``(b, high, height, width)`` and ``(b, low, ceil(height / 2), ceil(width / 2))`` to a pair alike;
        ``None`` stands for an octave without channels.

    Typical values:
        ``alpha`` 0.125 to 0.5, the same in all layers but the first and the last; odd kernels with
        ``padding = dilation * (kernel_size - 1) // 2``.

    Raises:
        ConfigError: a share or a size that is none.
        ShapeError: groups that do not divide the four counts; octaves that do not fit.

    Source:
        Chen et al. 2019, section 3.2 and eq. 3 and 4, arXiv:1904.05049

    Example:
        >>> first, last = OctaveConv2d(3, 8, 3, (0.0, 0.25), padding=1), OctaveConv2d(8, 4, 3, (0.25, 0.0), padding=1)
        >>> high, low = first(torch.randn(2, 3, 9, 9))
        >>> high.shape, low.shape
        (torch.Size([2, 6, 9, 9]), torch.Size([2, 2, 5, 5]))
        >>> last(high, low)[0].shape
        torch.Size([2, 4, 9, 9])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        alpha: float | Sequence[float] = 0.5,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        op = "OctaveConv2d"
        check_size(op, "groups", groups)
        shares = tuple(alpha) if isinstance(alpha, Sequence) else (alpha, alpha)
        if len(shares) != 2 or not all(isinstance(a, Real) for a in shares):
            want = "one share, or two, (alpha_in, alpha_out)"
            raise ConfigError(f"{op} alpha", got=repr(alpha), want=want, remedy="Pass 0.25.")
        self.alpha_in, self.alpha_out = shares
        self.in_split = maths.split_channels(in_channels, self.alpha_in)
        self.out_split = maths.split_channels(out_channels, self.alpha_out)
        if any(count % groups for count in (*self.in_split, *self.out_split)):
            raise ShapeError(
                f"{op} groups",
                got=f"{groups} for {self.in_split} input and {self.out_split} output channels (high, low)",
                want="groups that divide all four",
                remedy="Change the shares or the channels.",
            )
        self.kernel_size = as_tuple(op, "kernel_size", kernel_size, 2)
        self.stride = as_tuple(op, "stride", stride, 2)
        self.padding = as_tuple(op, "padding", padding, 2, least=0)
        self.dilation = as_tuple(op, "dilation", dilation, 2)
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw as torch's convolutions do: uniform within one over the root of the whole fan-in, both octaves'."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, high: Tensor | None, low: Tensor | None = None) -> maths.Octaves:
        for name, x, want in (("high", high, self.in_split[0]), ("low", low, self.in_split[1])):
            got = 0 if x is None else x.shape[1] if x.ndim == 4 else want  # a wrong rank is the function's to refuse
            if got != want:
                raise ShapeError(
                    f"OctaveConv2d {name}",
                    got=f"{got} channels",
                    want=f"{want} of {sum(self.in_split)}, with alpha_in={self.alpha_in}",
                    remedy="Pass both octaves of the layer before, or alpha=(0, ...) for a first layer.",
                )
        rest = (self.stride, self.padding, self.dilation, self.groups)
        return maths.octave_conv2d(high, low, self.weight, self.bias, self.alpha_out, *rest)

    def extra_repr(self) -> str:
        said = f"{sum(self.in_split)}, {sum(self.out_split)}, kernel_size={self.kernel_size}"
        said += f", alpha=({self.alpha_in}, {self.alpha_out}), stride={self.stride}, padding={self.padding}"
        return said + f", dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}"
