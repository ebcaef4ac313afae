r"""Dropout, residual add and norm in one call: what stands between two sublayers.

In eager torch these are three kernels that read and write the activations seven
times over; the fused kernel reads ``x`` and ``residual`` once and writes the sum
and its norm once, four passes.  The maths is the same.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from handbook_src.check import check_probability
from handbook_src.dispatch import Backend
from handbook_src.errors import ShapeError
from handbook_src.functional.normalisation.norm import layer_norm, rms_norm
from handbook_src.functional.normalisation.norm_input import check_input, check_trailing, kernel, one_dtype
from handbook_src.operation import operation


@operation()
def dropout_add_layer_norm(
    x: Float[Tensor, "*lead d"],
    residual: Float[Tensor, "*lead d"],
    weight: Float[Tensor, " d"] | None = None,
    bias: Float[Tensor, " d"] | None = None,
    eps: float = 1e-5,
    *,
    dropout: float = 0.0,
    training: bool = False,
    backend: Backend = "auto",
) -> tuple[Float[Tensor, "*lead d"], Float[Tensor, "*lead d"]]:
    r"""Drop, add to the residual stream, and layer-normalise the sum.

    .. math::
        r' = r + \frac{m \odot x}{1 - p}, \quad m_i \sim \mathrm{Bernoulli}(1 - p), \qquad
        y = \mathrm{LayerNorm}(r')

    Returns ``(y, r')``: a pre-norm network feeds ``y`` to the next sublayer and carries
    ``r'``; a post-norm network carries ``y``. The backends draw different masks.

    Args:
        x: a sublayer's output.
        residual: the stream it is added to.
        weight: one gain per feature.
        bias: one shift per feature.
        eps: added to the variance.
        dropout: the probability that an entry of ``x`` is dropped.
        training: whether to drop at all.
        backend: ``auto`` takes the fastest that can run.

    Raises:
        ConfigError: ``eps`` is not positive or ``dropout`` outside [0, 1).
        ShapeError: ``x`` and ``residual`` differ in shape, or a parameter does not fit.

    Source:
        Vaswani et al. 2017, section 5.4, arXiv:1706.03762; Ba et al. 2016, eq. 3 and 4, arXiv:1607.06450
    """
    total = residual + F.dropout(x, dropout, training)  # r' = r + m x / (1 - p)
    return layer_norm(total, total.shape[-1:], weight, bias, eps, backend="reference"), total


@dropout_add_layer_norm.refuses
def _(x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dropout: float) -> None:
    _check_both("dropout_add_layer_norm", x, residual, weight, bias, eps, dropout)


@dropout_add_layer_norm.torch(
    needs=lambda x, residual, weight, bias: one_dtype(x, residual, weight, bias, mixed=not x.is_cuda)
)
def _(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dropout: float, training: bool
) -> tuple[Tensor, Tensor]:
    total = residual + F.dropout(x, dropout, training)
    return layer_norm(total, total.shape[-1:], weight, bias, eps), total


@dropout_add_layer_norm.triton(needs=lambda x, residual, weight, bias: kernel(x, residual, weight, bias))
def _(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dropout: float, training: bool
) -> tuple[Tensor, Tensor]:
    from handbook_src.kernels.norm import dropout_add_norm_triton

    return dropout_add_norm_triton(x, residual, weight, bias, eps, dropout=dropout if training else 0.0)


@operation()
def dropout_add_rms_norm(
    x: Float[Tensor, "*lead d"],
    residual: Float[Tensor, "*lead d"],
    weight: Float[Tensor, " d"] | None = None,
    eps: float = 1e-6,
    *,
    dropout: float = 0.0,
    training: bool = False,
    backend: Backend = "auto",
) -> tuple[Float[Tensor, "*lead d"], Float[Tensor, "*lead d"]]:
    r"""Drop, add to the residual stream, and divide the sum by its root mean square.

    .. math::
        r' = r + \frac{m \odot x}{1 - p}, \quad m_i \sim \mathrm{Bernoulli}(1 - p), \qquad
        y = \mathrm{RMSNorm}(r')

    Returns ``(y, r')``, as :func:`dropout_add_layer_norm` does.

    Args:
        x: a sublayer's output.
        residual: the stream it is added to.
        weight: one gain per feature.
        eps: added inside the root.
        dropout: the probability that an entry of ``x`` is dropped.
        training: whether to drop at all.
        backend: ``auto`` takes the fastest that can run.

    Raises:
        ConfigError: ``eps`` is not positive or ``dropout`` outside [0, 1).
        ShapeError: ``x`` and ``residual`` differ in shape, or ``weight`` does not fit.

    Source:
        Vaswani et al. 2017, section 5.4, arXiv:1706.03762; Zhang & Sennrich 2019, eq. 4, arXiv:1910.07467
    """
    total = residual + F.dropout(x, dropout, training)  # r' = r + m x / (1 - p)
    return rms_norm(total, weight, eps, backend="reference"), total


@dropout_add_rms_norm.refuses
def _(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, dropout: float) -> None:
    _check_both("dropout_add_rms_norm", x, residual, weight, None, eps, dropout)


@dropout_add_rms_norm.torch(needs=lambda x, residual, weight: one_dtype(x, residual, weight))
def _(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, dropout: float, training: bool
) -> tuple[Tensor, Tensor]:
    total = residual + F.dropout(x, dropout, training)
    return rms_norm(total, weight, eps), total


@dropout_add_rms_norm.triton(needs=lambda x, residual, weight: kernel(x, residual, weight))
def _(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, dropout: float, training: bool
) -> tuple[Tensor, Tensor]:
    from handbook_src.kernels.norm import dropout_add_norm_triton

    p = dropout if training else 0.0
    return dropout_add_norm_triton(x, residual, weight, None, eps, dropout=p, centre=False)


def _check_both(
    op: str, x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dropout: float
) -> None:
    check_input(op, x, eps)
    check_probability(op, "dropout", dropout)
    check_trailing(op, x, x.shape[-1:], weight, bias)
    if x.shape != residual.shape:
        raise ShapeError(
            f"{op} residual",
            got=f"{tuple(residual.shape)} beside x of {tuple(x.shape)}",
            want="the same shape",
            remedy="A residual add that broadcasts is nearly always a lost axis.",
        )
