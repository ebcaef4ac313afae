"""Transposed convolution layers with torch's names, arguments and state dict.

Each is parameters, ``reset_parameters`` and one call of :mod:`handbook_src.functional.convolution.conv_transpose`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from handbook_src.check import check_rank
from handbook_src.dispatch import Backend
from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.convolution import conv_transpose as maths
from handbook_src.functional.convolution.conv_input import AXES, read_geometry, read_transposed_sizes
from handbook_src.layers.convolution.conv import Kernels


class _ConvTranspose(Kernels):
    """A transposed convolution over ``axes`` axes; abstract."""

    transposed = True
    run: ClassVar[Callable[..., Tensor]]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | Sequence[int] = 1,
        padding_mode: Literal["zeros"] = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if padding_mode != "zeros":
            raise ConfigError(
                f"{name} padding_mode",
                got=repr(padding_mode),
                want="'zeros': padding cuts the output here, nothing is filled in",
                remedy="Crop the output yourself, or put a padded convolution after an upsampling.",
            )
        self._build(in_channels, out_channels, kernel_size, groups, bias, {"device": device, "dtype": dtype})
        self._geometry = read_geometry(name, self.kernel_size, stride, padding, dilation, groups, words=())
        self.stride, self.dilation = self._geometry.stride, self._geometry.dilation
        self.padding = tuple(p for p, _ in self._geometry.padding)
        long = [2 * p + 1 for p in self.padding]  # an input of which the cut leaves something
        self.output_padding, _ = read_transposed_sizes(name, long, self.kernel_size, self._geometry, output_padding)
        self.padding_mode, self.backend = padding_mode, backend
        self.reset_parameters()

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        extra = self.output_padding if output_size is None else self._extra_for(input, output_size)
        cut: Any = self.padding
        rest = (self.stride, cut, extra, self.groups, self.dilation)
        return type(self).run(input, self.weight, self.bias, *rest, backend=self.backend)

    def _extra_for(self, input: Tensor, output_size: Sequence[int]) -> tuple[int, ...]:
        """Return the output padding that makes the output ``output_size``, its last axes.

        Raises:
            ShapeError: no output padding makes it that.
        """
        name = type(self).__name__
        check_rank(name, input, (self.axes + 2, self.axes + 1), f"([batch,] channels, {AXES[self.axes - 1]})")
        wanted = tuple(output_size)[-self.axes :]
        _, least = read_transposed_sizes(name, input.shape[-self.axes :], self.kernel_size, self._geometry, 0)
        extra = tuple(w - n for w, n in zip(wanted, least, strict=False))
        fits = len(extra) == self.axes and all(0 <= e < s for e, s in zip(extra, self.stride, strict=True))
        if not fits or len(output_size) not in (self.axes, input.ndim):
            most = tuple(n + s - 1 for n, s in zip(least, self.stride, strict=True))
            raise ShapeError(
                f"{name} output_size",
                got=tuple(output_size),
                want=f"from {least} to {most} for an input of {tuple(input.shape)}",
                remedy="The stride decides the size up to stride - 1 entries; resize or pad for others.",
            )
        return extra


@final
class ConvTranspose1d(_ConvTranspose):
    """Stamp kernels along a sequence: see :func:`handbook_src.functional.conv_transpose1d`.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: taps.
        stride: output steps for one input step.
        padding: entries cut off at both ends of the output.
        output_padding: entries added at the output's end; less than stride or dilation.
        groups: parts of the channels that do not mix.
        bias: learn a shift for each output channel.
        dilation: output steps between neighbouring taps.
        padding_mode: ``zeros`` only.
        device: of the parameters.
        dtype: of the parameters.
        backend: who runs it.

    Shape:
        ``([b,] in_channels, length)`` to ``([b,] out_channels, s(length - 1) + d(k-1) + 1 - 2p + a)``.

    Typical values:
        ``kernel_size`` twice the stride, ``padding=stride // 2`` (HiFi-GAN's upsampling).

    Raises:
        ConfigError: a setting that is no size, an output padding that reaches past the stamps.
        ShapeError: an input of another rank, channel count or dtype; an ``output_size`` out of reach.

    Source:
        Zeiler et al. 2010, section 3, doi:10.1109/CVPR.2010.5539957; Dumoulin & Visin 2016,
        relationship 14, arXiv:1603.07285
    """

    axes = 1
    run = maths.conv_transpose1d


@final
class ConvTranspose2d(_ConvTranspose):
    """Stamp kernels onto an image: see :func:`handbook_src.functional.conv_transpose2d`.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: taps along height and width.
        stride: output steps for one input step.
        padding: entries cut off at both ends of the output.
        output_padding: entries added at the output's end; less than stride or dilation.
        groups: parts of the channels that do not mix.
        bias: learn a shift for each output channel.
        dilation: output steps between neighbouring taps.
        padding_mode: ``zeros`` only.
        device: of the parameters.
        dtype: of the parameters.
        backend: who runs it.

    Shape:
        ``([b,] in_channels, height, width)`` to ``([b,] out_channels, height2, width2)``, each axis
        ``s(n - 1) + d(k-1) + 1 - 2p + a``.

    Typical values:
        ``kernel_size=4, stride=2, padding=1`` doubles (DCGAN's sizes): the stride divides the kernel.
        ``kernel_size=2, stride=2`` (U-Net) has no overlap at all.

    Raises:
        ConfigError: a setting that is no size, an output padding that reaches past the stamps.
        ShapeError: an input of another rank, channel count or dtype; an ``output_size`` out of reach.

    Source:
        Zeiler et al. 2010, section 3, doi:10.1109/CVPR.2010.5539957; Dumoulin & Visin 2016,
        relationship 14, arXiv:1603.07285
    """

    axes = 2
    run = maths.conv_transpose2d


@final
class ConvTranspose3d(_ConvTranspose):
    """Stamp kernels into a volume: see :func:`handbook_src.functional.conv_transpose3d`.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: taps along depth, height and width.
        stride: output steps for one input step.
        padding: entries cut off at both ends of the output.
        output_padding: entries added at the output's end; less than stride or dilation.
        groups: parts of the channels that do not mix.
        bias: learn a shift for each output channel.
        dilation: output steps between neighbouring taps.
        padding_mode: ``zeros`` only.
        device: of the parameters.
        dtype: of the parameters.
        backend: who runs it.

    Shape:
        ``([b,] in_channels, depth, height, width)`` to ``([b,] out_channels, depth2, height2, width2)``,
        each axis ``s(n - 1) + d(k-1) + 1 - 2p + a``.

    Typical values:
        ``kernel_size=2, stride=2`` (3-d U-Net).

    Raises:
        ConfigError: a setting that is no size, an output padding that reaches past the stamps.
        ShapeError: an input of another rank, channel count or dtype; an ``output_size`` out of reach.

    Source:
        Zeiler et al. 2010, section 3, doi:10.1109/CVPR.2010.5539957; Dumoulin & Visin 2016,
        relationship 14, arXiv:1603.07285
    """

    axes = 3
    run = maths.conv_transpose3d
