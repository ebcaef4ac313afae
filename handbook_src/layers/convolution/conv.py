"""Convolution layers with torch's names, arguments and state dict, and a fourth axis.

Each is parameters, ``reset_parameters`` and one call of :mod:`handbook_src.functional.convolution.conv`;
replacing ``torch.nn.Conv2d`` by this module's changes neither outputs nor a checkpoint's keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handbook_src.check import as_tuple, check_features, check_size
from handbook_src.dispatch import Backend
from handbook_src.errors import ConfigError
from handbook_src.functional.convolution import conv as maths
from handbook_src.functional.convolution.conv_input import check_conv, read_geometry

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
MODES = ("zeros", "reflect", "replicate", "circular")


class Kernels(nn.Module):
    """Weight, bias and settings that convolutions and their transposes share; abstract."""

    axes: ClassVar[int]
    transposed: ClassVar[bool] = False

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]

    def _build(
        self, in_channels: int, out_channels: int, kernel_size: int | Sequence[int], groups: int, bias: bool, like: Any
    ) -> None:
        """Check the sizes and make the parameters; ``like`` holds their device and dtype."""
        name = type(self).__name__
        for what, count in (("in_channels", in_channels), ("out_channels", out_channels), ("groups", groups)):
            check_size(name, what, count)
        for what, count in (("in_channels", in_channels), ("out_channels", out_channels)):
            if count % groups:
                raise ConfigError(
                    f"{name} groups",
                    got=f"{groups} for {what}={count}",
                    want="groups that divide the channels",
                    remedy=f"Take one of {[g for g in range(1, count + 1) if count % g == 0]}.",
                )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = as_tuple(name, "kernel_size", kernel_size, self.axes)
        first, second = (in_channels, out_channels) if self.transposed else (out_channels, in_channels)
        self.weight = nn.Parameter(torch.empty(first, second // groups, *self.kernel_size, **like))
        self.bias = nn.Parameter(torch.empty(out_channels, **like)) if bias else None

    def reset_parameters(self) -> None:
        """Draw weight and bias uniformly within one over the root of the fan-in, as torch does."""
        reset(self.weight, self.bias)

    def extra_repr(self) -> str:
        said = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        usual = {"padding": 0, "dilation": 1, "output_padding": 0}
        for name, value in usual.items():
            if getattr(self, name) != (value,) * self.axes:
                said += f", {name}={getattr(self, name)}"
        said += f", groups={self.groups}" if self.groups != 1 else ""
        return said + (", bias=False" if self.bias is None else "")


class _Conv(Kernels):
    """A convolution over ``axes`` axes; abstract."""

    run: ClassVar[Callable[..., Tensor]]  # read from the class: an instance would bind it

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: maths.Padding = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if padding_mode not in MODES:
            raise ConfigError(
                f"{name} padding_mode", got=repr(padding_mode), want=f"one of {MODES}", remedy="Pass 'zeros'."
            )
        self._build(in_channels, out_channels, kernel_size, groups, bias, {"device": device, "dtype": dtype})
        self._geometry = read_geometry(name, self.kernel_size, stride, padding, dilation, groups)
        self.stride, self.dilation = self._geometry.stride, self._geometry.dilation
        self.padding = padding if isinstance(padding, str) else tuple(p for p, _ in self._geometry.padding)
        self.output_padding, self.padding_mode, self.backend = (0,) * self.axes, padding_mode, backend
        self.reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        padding: Any = self.padding
        if self.backend == "auto" and self.padding_mode == "zeros" and self.axes < 4 and padding != "same":
            # Checked after a refusal only: the checks take 40 us, a tenth of what a small layer takes.
            run = (F.conv1d, F.conv2d, F.conv3d)[self.axes - 1]
            try:
                return run(input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)
            except RuntimeError:
                check_conv(type(self).__name__, self.axes, input, self.weight, self.bias, self.groups)
        if self.padding_mode != "zeros":
            check_conv(type(self).__name__, self.axes, input, self.weight, self.bias, self.groups)
            input, padding = maths.pad_borders(input, self._geometry, self.padding_mode), 0
        rest = (self.stride, padding, self.dilation, self.groups)
        return type(self).run(input, self.weight, self.bias, *rest, backend=self.backend)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", padding_mode={self.padding_mode}" if self.padding_mode != "zeros" else "")


@final
class Conv1d(_Conv):
    """Slide kernels along a sequence: see :func:`handbook_src.functional.conv1d`.

    Args:
        in_channels: channels of the input.
        out_channels: kernels, each over all input channels of its group.
        kernel_size: taps.
        stride: input steps for one output step.
        padding: entries added at both ends; ``"same"`` or ``"valid"``.
        dilation: input steps between neighbouring taps.
        groups: parts of the channels that do not mix.
        bias: learn a shift for each output channel.
        padding_mode: what is added: zeros, or the input reflected, replicated or taken round.
        device: of the parameters.
        dtype: of the parameters.
        backend: who runs it.

    Shape:
        ``([b,] in_channels, length)`` to ``([b,] out_channels, (length + 2p - d(k-1) - 1) // s + 1)``.

    Typical values:
        ``kernel_size`` 3 to 5 with ``padding=kernel_size // 2``; WaveNet: 2, dilations 1, 2, 4, ..., 512.

    Raises:
        ConfigError: a setting that is no size, groups that do not divide the channels, ``"same"`` with a stride.
        ShapeError: an input of another rank, channel count or dtype, or shorter than the kernel.

    Source:
        Waibel et al. 1989, section II, doi:10.1109/29.21701
    """

    axes = 1
    run = maths.conv1d


@final
class Conv2d(_Conv):
    """Slide kernels over an image: see :func:`handbook_src.functional.conv2d`.

    Args:
        in_channels: channels of the input.
        out_channels: kernels, each over all input channels of its group.
        kernel_size: taps along height and width.
        stride: input steps for one output step.
        padding: entries added at both ends of both axes; ``"same"`` or ``"valid"``.
        dilation: input steps between neighbouring taps.
        groups: parts of the channels that do not mix.
        bias: learn a shift for each output channel.
        padding_mode: what is added: zeros, or the input reflected, replicated or taken round.
        device: of the parameters.
        dtype: of the parameters.
        backend: who runs it.

    Shape:
        ``([b,] in_channels, height, width)`` to ``([b,] out_channels, height2, width2)``, each axis
        ``(n + 2p - d(k-1) - 1) // s + 1``.

    Typical values:
        ``kernel_size=3, padding=1``, with ``stride=2`` to halve; dilation 1, 2, 4, ... (Yu & Koltun, DeepLab);
        32 groups (ResNeXt), as many groups as channels (MobileNet); ``bias=False`` in front of a batch norm.

    Raises:
        ConfigError: a setting that is no size, groups that do not divide the channels, ``"same"`` with a stride.
        ShapeError: an input of another rank, channel count or dtype, or smaller than the kernel.

    Source:
        LeCun et al. 1998, section II.A, doi:10.1109/5.726791; dilation: Yu & Koltun 2015, eq. 2, arXiv:1511.07122;
        groups: Xie et al. 2016, figure 3c, arXiv:1611.05431
    """

    axes = 2
    run = maths.conv2d


@final
class Conv3d(_Conv):
    """Slide kernels through a volume or a video: see :func:`handbook_src.functional.conv3d`.

    Args:
        in_channels: channels of the input.
        out_channels: kernels, each over all input channels of its group.
        kernel_size: taps along depth, height and width.
        stride: input steps for one output step.
        padding: entries added at both ends of each axis; ``"same"`` or ``"valid"``.
        dilation: input steps between neighbouring taps.
        groups: parts of the channels that do not mix.
        bias: learn a shift for each output channel.
        padding_mode: what is added: zeros, or the input reflected, replicated or taken round.
        device: of the parameters.
        dtype: of the parameters.
        backend: who runs it.

    Shape:
        ``([b,] in_channels, depth, height, width)`` to ``([b,] out_channels, depth2, height2, width2)``, each
        axis ``(n + 2p - d(k-1) - 1) // s + 1``.

    Typical values:
        ``kernel_size=3, padding=1`` (C3D); ``(1, 3, 3)`` then ``(3, 1, 1)`` where space and time are apart.

    Raises:
        ConfigError: a setting that is no size, groups that do not divide the channels, ``"same"`` with a stride.
        ShapeError: an input of another rank, channel count or dtype, or smaller than the kernel.

    Source:
        Ji et al. 2013, eq. 2, doi:10.1109/TPAMI.2012.59; Tran et al. 2014, section 3.1, arXiv:1412.0767
    """

    axes = 3
    run = maths.conv3d


@final
class Conv4d(_Conv):
    """Slide kernels through a volume that changes in time: see :func:`handbook_src.functional.conv4d`.

    Args:
        in_channels: channels of the input.
        out_channels: kernels, each over all input channels of its group.
        kernel_size: taps along time, depth, height and width.
        stride: input steps for one output step.
        padding: entries added at both ends of each axis; ``"same"`` or ``"valid"``.
        dilation: input steps between neighbouring taps.
        groups: parts of the channels that do not mix.
        bias: learn a shift for each output channel.
        padding_mode: what is added: zeros, or the input reflected, replicated or taken round.
        device: of the parameters.
        dtype: of the parameters.
        backend: who runs it; ``auto`` adds 3-d convolutions.

    Shape:
        ``([b,] in_channels, t, depth, height, width)`` to ``([b,] out_channels, t2, depth2, height2, width2)``,
        each axis ``(n + 2p - d(k-1) - 1) // s + 1``.

    Typical values:
        ``kernel_size=3, padding=1``: 81 taps for each pair of channels, so few channels.

    Raises:
        ConfigError: a setting that is no size, groups that do not divide the channels, ``"same"`` with a stride.
        ShapeError: an input of another rank, channel count or dtype, or smaller than the kernel.

    Source:
        Choy et al. 2019, eq. 2 with D = 4 on a dense grid, arXiv:1904.08755
    """

    axes = 4
    run = maths.conv4d


@final
class DepthwiseSeparableConv2d(nn.Module):
    """Filter each channel, then mix: see :func:`handbook_src.functional.depthwise_separable_conv2d`.

    Nothing stands between the two steps. MobileNets put batch norm and ReLU there: build those
    from ``Conv2d(c, c, 3, groups=c)`` and ``Conv2d(c, out, 1)``. A bias of the first step would be
    absorbed in that of the second.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: taps of the depthwise step along height and width.
        stride: of the depthwise step.
        padding: zeros at both ends of both axes; ``"same"`` or ``"valid"``. There is no ``dilation``: the
            limit on a constructor's arguments leaves no room; the function has it.
        multiplier: depthwise filters for each input channel.
        bias: learn a shift for each output channel.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        ``([b,] in_channels, height, width)`` to ``([b,] out_channels, height2, width2)``, each axis
        ``(n + 2p - k) // s + 1``.

    Typical values:
        ``kernel_size=3, padding=1, multiplier=1`` (MobileNet, Xception).

    Raises:
        ConfigError: a setting that is no size, ``"same"`` with a stride.
        ShapeError: an input of another rank, channel count or dtype, or smaller than the kernel.

    Source:
        Howard et al. 2017, eq. 3, arXiv:1704.04861; Chollet 2016, figure 4, arXiv:1610.02357
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: maths.Padding = 0,
        multiplier: int = 1,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        for what, count in (("in_channels", in_channels), ("out_channels", out_channels), ("multiplier", multiplier)):
            check_size(name, what, count)
        self.in_channels, self.out_channels, self.multiplier = in_channels, out_channels, multiplier
        self.kernel_size = as_tuple(name, "kernel_size", kernel_size, 2)
        geometry = read_geometry(name, self.kernel_size, stride, padding, 1, 1)
        self.stride, self.dilation = geometry.stride, geometry.dilation
        self.padding = padding if isinstance(padding, str) else tuple(p for p, _ in geometry.padding)
        mid, like = in_channels * multiplier, {"device": device, "dtype": dtype}
        self.depthwise = nn.Parameter(torch.empty(mid, 1, *self.kernel_size, **like))
        self.pointwise = nn.Parameter(torch.empty(out_channels, mid, 1, 1, **like))
        self.bias = nn.Parameter(torch.empty(out_channels, **like)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw both weights, and the bias, uniformly within one over the root of their fan-in."""
        reset(self.depthwise, None)
        reset(self.pointwise, self.bias)

    def forward(self, input: Tensor) -> Tensor:
        check_features(type(self).__name__, input, self.in_channels, axis=-3)
        padding: Any = self.padding
        return maths.depthwise_separable_conv2d(input, self.depthwise, self.pointwise, self.bias, self.stride, padding)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding!r}, multiplier={self.multiplier}, bias={self.bias is not None}"
        )


def reset(weight: Tensor, bias: Tensor | None) -> None:
    """Draw ``weight`` and ``bias`` uniformly within one over the root of the weight's fan-in, as torch does."""
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    if bias is not None:
        bound = 1 / math.sqrt(weight[0].numel())
        nn.init.uniform_(bias, -bound, bound)
