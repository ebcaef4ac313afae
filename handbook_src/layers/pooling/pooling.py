"""Pooling layers with torch's names and arguments, and global pooling under a name of its own.

None has parameters; each is one call of :mod:`handbook_src.functional.pooling.pooling` or
:mod:`handbook_src.functional.pooling.random_pooling`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, final

from torch import Generator, Tensor, nn

from handbook_src.check import as_tuple, check_size
from handbook_src.dispatch import Backend
from handbook_src.errors import ConfigError
from handbook_src.functional.pooling import pooling as maths
from handbook_src.functional.pooling.pooling import Sizes
from handbook_src.functional.pooling.random_pooling import fractional_max_pool2d, read_ratio, stochastic_pool2d


class _Windowed(nn.Module):
    """Windows of one size; abstract."""

    axes: ClassVar[int]
    run: ClassVar[Callable[..., Any]]
    settings: tuple[str, ...]

    def _read(self, kernel_size: Sizes, stride: Sizes | None, padding: Sizes, dilation: Sizes = 1) -> None:
        name = type(self).__name__
        as_tuple(name, "kernel_size", kernel_size, self.axes)
        as_tuple(name, "stride", kernel_size if stride is None else stride, self.axes)
        as_tuple(name, "padding", padding, self.axes, least=0)
        as_tuple(name, "dilation", dilation, self.axes)
        self.kernel_size, self.padding = kernel_size, padding
        self.stride = kernel_size if stride is None else stride

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)}" for name in self.settings)


class _MaxPool(_Windowed):
    settings = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")

    def __init__(
        self,
        kernel_size: Sizes,
        stride: Sizes | None = None,
        padding: Sizes = 0,
        dilation: Sizes = 1,
        return_indices: bool = False,
        ceil_mode: bool = False,
        *,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self._read(kernel_size, stride, padding, dilation)
        self.dilation, self.return_indices, self.ceil_mode = dilation, return_indices, ceil_mode
        self.backend: Backend = backend

    def forward(self, input: Tensor) -> Any:
        """Pool each plane."""
        return type(self).run(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            self.return_indices,
            backend=self.backend,
        )


@final
class MaxPool1d(_MaxPool):
    """Keep the largest value of each window: see :func:`handbook_src.functional.max_pool1d`.

    Arguments as :class:`MaxPool2d`, over one axis.
    """

    axes, run = 1, maths.max_pool1d


@final
class MaxPool2d(_MaxPool):
    """Keep the largest value of each window: see :func:`handbook_src.functional.max_pool2d`.

    Args:
        kernel_size: of a window, one for each axis or one for all.
        stride: from window to window; ``kernel_size`` if not given.
        padding: on both sides, at most half the kernel.
        dilation: from entry to entry within a window.
        return_indices: also return where each value came from.
        ceil_mode: keep a last window that reaches outside.
        backend: who runs it.

    Shape:
        ``(b, channels, height, width)`` to ``(b, channels, out_height, out_width)``.

    Typical values:
        Kernel 2, stride 2 (VGG); kernel 3, stride 2 (AlexNet, and with padding 1 ResNet's stem).

    Raises:
        ConfigError: sizes that are not positive integers, or padding above half the kernel.
        ShapeError: another number of axes, no floating dtype, or no window fits.

    Source:
        Zhou & Chellappa 1988, doi:10.1109/ICNN.1988.23914; Scherer et al. 2010, doi:10.1007/978-3-642-15825-4_10
    """

    axes, run = 2, maths.max_pool2d


@final
class MaxPool3d(_MaxPool):
    """Keep the largest value of each window: see :func:`handbook_src.functional.max_pool3d`.

    Arguments as :class:`MaxPool2d`, over three axes.
    """

    axes, run = 3, maths.max_pool3d


@final
class AvgPool1d(_Windowed):
    """Replace each window by its mean: see :func:`handbook_src.functional.avg_pool1d`.

    Arguments as :class:`AvgPool2d`, over one axis and without ``divisor_override``.
    """

    axes, settings = 1, ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")

    def __init__(
        self,
        kernel_size: Sizes,
        stride: Sizes | None = None,
        padding: Sizes = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        *,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self._read(kernel_size, stride, padding)
        self.ceil_mode, self.count_include_pad = ceil_mode, count_include_pad
        self.backend: Backend = backend

    def forward(self, input: Tensor) -> Tensor:
        """Pool each plane."""
        return maths.avg_pool1d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            backend=self.backend,
        )


class _AvgPool(_Windowed):
    settings = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")

    def __init__(
        self,
        kernel_size: Sizes,
        stride: Sizes | None = None,
        padding: Sizes = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
        *,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self._read(kernel_size, stride, padding)
        self.ceil_mode, self.count_include_pad, self.divisor_override = ceil_mode, count_include_pad, divisor_override
        self.backend: Backend = backend

    def forward(self, input: Tensor) -> Tensor:
        """Pool each plane."""
        return type(self).run(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
            backend=self.backend,
        )


@final
class AvgPool2d(_AvgPool):
    """Replace each window by its mean: see :func:`handbook_src.functional.avg_pool2d`.

    Args:
        kernel_size: of a window, one for each axis or one for all.
        stride: from window to window; ``kernel_size`` if not given.
        padding: zeros on both sides, at most half the kernel.
        ceil_mode: keep a last window that reaches outside.
        count_include_pad: divide by the window's size even where it holds padding.
        divisor_override: divide by this instead.
        backend: who runs it.

    Shape:
        ``(b, channels, height, width)`` to ``(b, channels, out_height, out_width)``.

    Typical values:
        Kernel 2, stride 2 (LeNet, DenseNet's transitions).

    Raises:
        ConfigError: sizes that are not positive integers, padding above half the kernel, or a divisor of zero.
        ShapeError: another number of axes, no floating dtype, or no window fits.

    Source:
        LeCun et al. 1998, section II.A, doi:10.1109/5.726791
    """

    axes, run = 2, maths.avg_pool2d


@final
class AvgPool3d(_AvgPool):
    """Replace each window by its mean: see :func:`handbook_src.functional.avg_pool3d`.

    Arguments as :class:`AvgPool2d`, over three axes.
    """

    axes, run = 3, maths.avg_pool3d


class _Adaptive(nn.Module):
    """Windows made to fit; abstract."""

    axes: ClassVar[int]

    def _keep(self, output_size: int | Sequence[int | None] | None, backend: Backend) -> None:
        sizes = list(output_size) if isinstance(output_size, Sequence) else [output_size] * self.axes
        if len(sizes) != self.axes:
            raise ConfigError(
                f"{type(self).__name__} output_size",
                got=repr(output_size),
                want=f"one size, or {self.axes}",
                remedy="Give one for each axis.",
            )
        for size in sizes:
            if size is not None:
                check_size(type(self).__name__, "output_size", size)
        self.output_size = output_size
        self.backend: Backend = backend

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}"


class _AdaptiveAvgPool(_Adaptive):
    def __init__(self, output_size: int | Sequence[int | None] | None, *, backend: Backend = "auto") -> None:
        super().__init__()
        self._keep(output_size, backend)

    def forward(self, input: Tensor) -> Tensor:
        """Pool each plane."""
        return maths.adaptive_avg_pool(input, self.output_size, self.axes, backend=self.backend)


class _AdaptiveMaxPool(_Adaptive):
    def __init__(
        self,
        output_size: int | Sequence[int | None] | None,
        return_indices: bool = False,
        *,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self._keep(output_size, backend)
        self.return_indices = return_indices

    def forward(self, input: Tensor) -> Any:
        """Pool each plane."""
        return maths.adaptive_max_pool(input, self.output_size, self.axes, self.return_indices, backend=self.backend)


@final
class AdaptiveAvgPool1d(_AdaptiveAvgPool):
    """As :class:`AdaptiveAvgPool2d`, over one axis."""

    axes = 1


@final
class AdaptiveAvgPool2d(_AdaptiveAvgPool):
    """Shrink or stretch to a given size by means: see :func:`handbook_src.functional.adaptive_avg_pool`.

    Args:
        output_size: outputs along each axis; None keeps the input's size.
        backend: who runs it.

    Shape:
        ``(b, channels, height, width)`` to ``(b, channels, *output_size)``.

    Typical values:
        1 (ResNet's head), 7 (torchvision's VGG).

    Raises:
        ConfigError: an output size that is not a positive integer.
        ShapeError: another number of axes, no floating dtype, or an input without positions.

    Source:
        He et al. 2014, section 2.2, arXiv:1406.4729
    """

    axes = 2


@final
class AdaptiveAvgPool3d(_AdaptiveAvgPool):
    """As :class:`AdaptiveAvgPool2d`, over three axes."""

    axes = 3


@final
class AdaptiveMaxPool1d(_AdaptiveMaxPool):
    """As :class:`AdaptiveMaxPool2d`, over one axis."""

    axes = 1


@final
class AdaptiveMaxPool2d(_AdaptiveMaxPool):
    """Shrink to a given size by maxima: see :func:`handbook_src.functional.adaptive_max_pool`.

    Arguments as :class:`AdaptiveAvgPool2d`, and ``return_indices``.
    """

    axes = 2


@final
class AdaptiveMaxPool3d(_AdaptiveMaxPool):
    """As :class:`AdaptiveMaxPool2d`, over three axes."""

    axes = 3


@final
class GlobalPool(nn.Module):
    """Replace each channel by one number: see :func:`handbook_src.functional.global_pool`.

    Args:
        reduce: ``mean`` or ``max``.
        keepdim: keep the spatial axes with size 1.

    Shape:
        ``(b, channels, *spatial)`` to ``(b, channels)``.

    Typical values:
        ``mean`` (Network in Network, ResNet and most since).

    Raises:
        ConfigError: another ``reduce``.
        ShapeError: no spatial axis or position, or no floating dtype.

    Source:
        Lin, Chen & Yan 2013, section 3.2, arXiv:1312.4400
    """

    def __init__(self, reduce: str = "mean", keepdim: bool = False) -> None:
        super().__init__()
        if reduce not in ("mean", "max"):
            raise ConfigError("GlobalPool reduce", got=repr(reduce), want="'mean' or 'max'", remedy="Choose one.")
        self.reduce, self.keepdim = reduce, keepdim

    def forward(self, input: Tensor) -> Tensor:
        """Pool each plane to one number."""
        return maths.global_pool(input, self.reduce, self.keepdim)

    def extra_repr(self) -> str:
        return f"{self.reduce!r}, keepdim={self.keepdim}"


@final
class StochasticPool2d(_Windowed):
    """Draw one value of each window: see :func:`handbook_src.functional.stochastic_pool2d`.

    In evaluation mode it takes the expectation of the draw.

    Args:
        kernel_size: of a window, one for each axis or one for both.
        stride: from window to window; ``kernel_size`` if not given.
        padding: on both sides, at most half the kernel; never drawn.
        generator: where the draws come from; not kept by ``state_dict``.

    Shape:
        ``(b, channels, height, width)`` to ``(b, channels, out_height, out_width)``.

    Typical values:
        Kernel 3, stride 2, behind a ReLU (the paper's CIFAR-10 network).

    Raises:
        ConfigError: sizes that are not positive integers, or padding above half the kernel.
        DataError: a negative activation.
        ShapeError: another number of axes, no floating dtype, or no window fits.

    Source:
        Zeiler & Fergus 2013, eq. 3 to 6, arXiv:1301.3557
    """

    axes, settings = 2, ("kernel_size", "stride", "padding")

    def __init__(
        self,
        kernel_size: Sizes,
        stride: Sizes | None = None,
        padding: Sizes = 0,
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        self._read(kernel_size, stride, padding)
        pairs = zip(as_tuple("", "", padding, 2, least=0), as_tuple("", "", kernel_size, 2), strict=True)
        if any(2 * p > k for p, k in pairs):
            raise ConfigError(
                "StochasticPool2d padding",
                got=padding,
                want=f"at most half of {kernel_size}",
                remedy="Pad the input itself.",
            )
        self.generator = generator

    def forward(self, input: Tensor) -> Tensor:
        """Draw while training, take the expectation in evaluation."""
        return stochastic_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.training, generator=self.generator
        )


@final
class FractionalMaxPool2d(nn.Module):
    """Shrink by any ratio: see :func:`handbook_src.functional.fractional_max_pool2d`.

    Args:
        kernel_size: of a window, one for each axis or one for both.
        output_size: outputs along each axis.
        output_ratio: outputs as a share of the input; instead of ``output_size``.
        return_indices: also return where each value came from.
        _random_samples: where the windows stand; drawn at every call if not given.
        backend: who runs it.

    Shape:
        ``(b, channels, height, width)`` to ``(b, channels, out_height, out_width)``.

    Typical values:
        Kernel 2 and ratio 0.71 or 0.79 (the paper's steps of about the square and cube root of two).

    Raises:
        ConfigError: not exactly one of size and ratio, a ratio outside (0, 1), or sizes that are not positive.
        ShapeError: another number of axes, no floating dtype, or windows that don't fit.

    Source:
        Graham 2014, section 2, arXiv:1412.6071
    """

    _random_samples: Tensor | None

    def __init__(
        self,
        kernel_size: Sizes,
        output_size: Sizes | None = None,
        output_ratio: float | Sequence[float] | None = None,
        return_indices: bool = False,
        _random_samples: Tensor | None = None,
        *,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        as_tuple("FractionalMaxPool2d", "kernel_size", kernel_size, 2)
        if (output_size is None) == (output_ratio is None):
            raise ConfigError(
                "FractionalMaxPool2d output",
                got=f"output_size={output_size!r}, output_ratio={output_ratio!r}",
                want="exactly one of them",
                remedy="A size fixes the output's shape; a ratio follows the input's.",
            )
        if output_size is not None:
            as_tuple("FractionalMaxPool2d", "output_size", output_size, 2)
        else:
            read_ratio("FractionalMaxPool2d", output_ratio)
        self.kernel_size, self.output_size, self.output_ratio = kernel_size, output_size, output_ratio
        self.return_indices = return_indices
        self.register_buffer("_random_samples", _random_samples)
        self.backend: Backend = backend

    def forward(self, input: Tensor) -> Any:
        """Pool each plane, with windows placed anew."""
        return fractional_max_pool2d(
            input,
            self.kernel_size,
            self.output_size,
            self.output_ratio,
            self.return_indices,
            _random_samples=self._random_samples,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        what = "output_size" if self.output_size is not None else "output_ratio"
        return f"kernel_size={self.kernel_size}, {what}={getattr(self, what)}"
