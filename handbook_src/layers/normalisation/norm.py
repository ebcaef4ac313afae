"""Normalisation layers with torch's names, arguments and state dict.

Each is parameters, ``reset_parameters`` and one call of
:mod:`handbook_src.functional.normalisation.norm`; replacing ``torch.nn.LayerNorm`` by this module's
changes neither the outputs nor a checkpoint's keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from handbook_src.check import check_size
from handbook_src.dispatch import Backend
from handbook_src.functional.normalisation import norm as maths
from handbook_src.functional.normalisation.norm_input import (
    as_shape,
    check_eps,
    check_groups,
    check_rank,
    check_trailing,
)
from handbook_src.layers.normalisation.running_norm import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
)

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "RMSNorm",
]


def _parameter(shape: Sequence[int], wanted: bool, device: Any, dtype: torch.dtype | None) -> nn.Parameter | None:
    return nn.Parameter(torch.empty(tuple(shape), device=device, dtype=dtype)) if wanted else None


def _reset(weight: Tensor | None, bias: Tensor | None) -> None:
    if weight is not None:
        nn.init.ones_(weight)
    if bias is not None:
        nn.init.zeros_(bias)


@final
class LayerNorm(nn.Module):
    r"""Standardise each token over its features: see :func:`handbook_src.functional.layer_norm`.

    Args:
        normalized_shape: the trailing axes that share one statistic, as their sizes.
        eps: added to the variance.
        elementwise_affine: learn a gain (and a bias).
        bias: with ``elementwise_affine``, learn a bias too.
        device: of the parameters.
        dtype: of the parameters.
        backend: who runs it.

    Shape:
        ``(..., *normalized_shape)`` to the same.

    Typical values:
        ``eps`` 1e-5 (torch, GPT-2), 1e-12 (BERT's released configuration), 1e-6 (ViT).

    Raises:
        ConfigError: ``eps`` is not positive, or ``normalized_shape`` is empty.
        ShapeError: the input has other trailing axes, or is not floating.

    Source:
        Ba, Kiros & Hinton 2016, eq. 3 and 4, arXiv:1607.06450
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        check_eps("LayerNorm", eps)
        self.normalized_shape = as_shape(normalized_shape)
        self.eps, self.elementwise_affine, self.backend = eps, elementwise_affine, backend
        self.weight = _parameter(self.normalized_shape, elementwise_affine, device, dtype)
        self.bias = _parameter(self.normalized_shape, elementwise_affine and bias, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the gain to one and the bias to zero."""
        _reset(self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return maths.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps, backend=self.backend)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"


@final
class RMSNorm(nn.Module):
    r"""Divide each token by its root mean square: see :func:`handbook_src.functional.rms_norm`.

    Args:
        normalized_shape: the trailing axes that share one statistic, as their sizes.
        eps: added inside the root; ``None``, torch's default, is the machine epsilon of the statistic's dtype.
        elementwise_affine: learn a gain.
        device: of the gain.
        dtype: of the gain.
        backend: who runs it.

    Shape:
        ``(..., *normalized_shape)`` to the same.

    Typical values:
        ``eps`` 1e-6 (LLaMA, T5), 1e-5 (LLaMA 2 and 3).

    Raises:
        ConfigError: ``eps`` is not positive, or ``normalized_shape`` is empty.
        ShapeError: the input has other trailing axes, or is not floating.

    Source:
        Zhang & Sennrich 2019, eq. 4, arXiv:1910.07467
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        check_eps("RMSNorm", eps, optional=True)
        self.normalized_shape = as_shape(normalized_shape)
        self.eps, self.elementwise_affine, self.backend = eps, elementwise_affine, backend
        self.weight = _parameter(self.normalized_shape, elementwise_affine, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the gain to one."""
        _reset(self.weight, None)

    def forward(self, x: Tensor) -> Tensor:
        check_trailing("RMSNorm", x, self.normalized_shape, None, None)
        return maths.rms_norm(x, self.weight, self.eps, axes=len(self.normalized_shape), backend=self.backend)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"


@final
class GroupNorm(nn.Module):
    r"""Standardise groups of channels of each sample: see :func:`handbook_src.functional.group_norm`.

    Args:
        num_groups: how many groups the channels are cut into.
        num_channels: channels of the input; a multiple of ``num_groups``.
        eps: added to the variance.
        affine: learn a gain (and a bias) per channel.
        device: of the parameters.
        dtype: of the parameters.
        bias: with ``affine``, learn a bias too.
        backend: who runs it.

    Shape:
        ``(b, num_channels, ...)`` to the same.

    Typical values:
        ``num_groups=32`` (Wu & He 2018), ``eps`` 1e-5, 1e-6 in Stable Diffusion's autoencoder.

    Raises:
        ConfigError: ``eps`` or ``num_groups`` is not positive.
        ShapeError: the groups do not divide the channels; wrong rank, channel count or dtype.

    Source:
        Wu & He 2018, eq. 7, arXiv:1803.08494
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        check_eps("GroupNorm", eps)
        check_size("GroupNorm", "num_channels", num_channels)
        check_groups("GroupNorm", num_groups, num_channels)
        self.num_groups, self.num_channels = num_groups, num_channels
        self.eps, self.affine, self.backend = eps, affine, backend
        self.weight = _parameter([num_channels], affine, device, dtype)
        self.bias = _parameter([num_channels], affine and bias, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the gains to one and the biases to zero."""
        _reset(self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        check_rank("GroupNorm", x, None, self.num_channels)
        return maths.group_norm(x, self.num_groups, self.weight, self.bias, self.eps, backend=self.backend)

    def extra_repr(self) -> str:
        return f"{self.num_groups}, {self.num_channels}, eps={self.eps}, affine={self.affine}"
