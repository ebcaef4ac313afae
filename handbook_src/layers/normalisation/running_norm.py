"""Norms that can remember: batch norm and instance norm, with running statistics.

Imported from :mod:`handbook_src.layers.normalisation.norm`, where all norms stand together.
"""

from __future__ import annotations

from typing import Any, ClassVar, final

import torch
from torch import Tensor
from torch.nn.modules import batchnorm

from handbook_src.check import check_size
from handbook_src.dispatch import Backend
from handbook_src.functional.normalisation import norm as maths
from handbook_src.functional.normalisation.norm_input import check_eps, check_momentum, check_rank


class _RunningNorm(batchnorm._NormBase):
    """Parameters and buffers per channel, torch's, so state dicts go both ways; abstract."""

    ranks: ClassVar[tuple[int, ...]]

    def __init__(
        self,
        num_features: int,
        eps: float,
        momentum: float | None,
        affine: bool,
        track_running_stats: bool,
        device: Any,
        dtype: torch.dtype | None,
        bias: bool,
        backend: Backend,
    ) -> None:
        name = type(self).__name__
        check_eps(name, eps)
        check_momentum(name, momentum)
        check_size(name, "num_features", num_features)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.backend = backend
        if not bias:
            self.register_parameter("bias", None)


class _BatchNorm(_RunningNorm, batchnorm._BatchNorm):
    r"""Standardise each channel over the batch: see :func:`handbook_src.functional.batch_norm`.

    In training it uses the batch's statistics and moves the running ones towards them;
    in evaluation the running ones make it a fixed affine map. Without running
    statistics it uses the batch's in evaluation too. It is one of torch's batch norms to
    ``torch.optim.swa_utils.update_bn`` and ``SyncBatchNorm.convert_sync_batchnorm``.

    Args:
        num_features: channels, the input's axis 1.
        eps: added to the variance.
        momentum: the share of the new batch in the running statistics (0.1 here is 0.9 in
            Keras); ``None`` averages all batches alike.
        affine: learn a gain (and a bias) per channel.
        track_running_stats: keep running statistics for evaluation.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        bias: with ``affine``, learn a bias too.
        backend: who runs it.

    Shape:
        1d ``(b, channels)`` or ``(b, channels, length)``, 2d ``(b, channels, height, width)``,
        3d ``(b, channels, depth, height, width)``; to the same.

    Typical values:
        ``eps=1e-5``, ``momentum=0.1``; 16 or more values per channel, samples times positions.

    Raises:
        ConfigError: ``eps`` not positive, ``momentum`` outside [0, 1], no features.
        ShapeError: wrong rank, channel count or dtype, or training on one value per channel.

    Source:
        Ioffe & Szegedy 2015, algorithms 1 and 2, arXiv:1502.03167
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias, backend)

    def forward(self, x: Tensor) -> Tensor:
        check_rank(type(self).__name__, x, self.ranks, self.num_features)
        own = self.training or self.running_mean is None
        tracked = self.track_running_stats or not own
        mean, var = (self.running_mean, self.running_var) if tracked else (None, None)
        y = maths.batch_norm(x, mean, var, self.weight, self.bias, own, self._share(), self.eps, backend=self.backend)
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return y

    def _share(self) -> float:
        """Return this batch's weight in the running statistics."""
        if self.momentum is not None:
            return self.momentum
        if not self.training or self.num_batches_tracked is None:
            return 0.0
        return 1.0 / float(self.num_batches_tracked + 1)


@final
class BatchNorm1d(_BatchNorm):
    __doc__ = _BatchNorm.__doc__
    ranks = (2, 3)


@final
class BatchNorm2d(_BatchNorm):
    __doc__ = _BatchNorm.__doc__
    ranks = (4,)


@final
class BatchNorm3d(_BatchNorm):
    __doc__ = _BatchNorm.__doc__
    ranks = (5,)


class _InstanceNorm(_RunningNorm):
    r"""Standardise each channel of each sample: see :func:`handbook_src.functional.instance_norm`.

    Training and evaluation are the same function, unless running statistics are tracked:
    then evaluation uses those. An input without batch axis is one sample.

    Args:
        num_features: channels of the input.
        eps: added to the variance.
        momentum: the share of the new batch in the running statistics.
        affine: learn a gain (and a bias) per channel.
        track_running_stats: keep running statistics, and use them in evaluation.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        bias: with ``affine``, learn a bias too.
        backend: who runs it.

    Shape:
        1d ``(b, channels, length)``, 2d ``(b, channels, height, width)``, 3d one axis more; ``b`` may be
        left out; to the same.

    Typical values:
        ``eps=1e-5``, ``affine=False`` (torch's default; style transfer).

    Raises:
        ConfigError: ``eps`` not positive, ``momentum`` outside [0, 1], no features.
        ShapeError: wrong rank, channel count or dtype, or a single spatial position.

    Source:
        Ulyanov, Vedaldi & Lempitsky 2016, eq. 4, arXiv:1607.08022
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias, backend)

    def forward(self, x: Tensor) -> Tensor:
        alone = x.ndim == self.ranks[0]
        check_rank(type(self).__name__, x, self.ranks, self.num_features, axis=0 if alone else 1)
        own = self.training or not self.track_running_stats
        share = 0.0 if self.momentum is None else self.momentum
        y = maths.instance_norm(
            x[None] if alone else x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            own,
            share,
            self.eps,
            backend=self.backend,
        )
        return y[0] if alone else y


@final
class InstanceNorm1d(_InstanceNorm):
    __doc__ = _InstanceNorm.__doc__
    ranks = (2, 3)


@final
class InstanceNorm2d(_InstanceNorm):
    __doc__ = _InstanceNorm.__doc__
    ranks = (3, 4)


@final
class InstanceNorm3d(_InstanceNorm):
    __doc__ = _InstanceNorm.__doc__
    ranks = (4, 5)
