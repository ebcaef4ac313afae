r"""Softmax, its logarithm, and the form that reads the scores once.

The largest score is subtracted first: that changes nothing, since softmax only depends on
differences, and leaves exponentials of numbers that are not positive.  The subtraction comes
before the division by the temperature, so a small temperature can't overflow either.

A row of minus infinities has no softmax: the answer is NaN, here as in torch, and so is a row
that holds NaN or plus infinity.  A row of which a part is minus infinity is a masked one and
gets zeros there.
"""

from __future__ import annotations

from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor

from handbook_src.check import check_floating, check_positive, check_size
from handbook_src.dispatch import Backend, resolve
from handbook_src.errors import ConfigError
from handbook_src.precision import at_least_float32


def softmax(
    x: Float[Tensor, "*shape"],
    dim: int,
    dtype: torch.dtype | None = None,
    *,
    temperature: float = 1.0,
    backend: Backend = "auto",
) -> Float[Tensor, "*shape"]:
    r"""Turn scores into positive weights that sum to one along ``dim``.

    .. math::
        p_i = \frac{e^{(z_i - m) / T}}{\sum_k e^{(z_k - m) / T}}, \quad m = \max_k z_k, \qquad
        \frac{\partial p_i}{\partial z_j} = \tfrac1T\, p_i\,(\delta_{ij} - p_j)

    Computed in float32 at least and rounded once.

    Args:
        x: scores; minus infinity gets weight zero.
        dim: the axis that sums to one; torch's guess for ``None`` is deprecated and refused here.
        dtype: of the result and the computation, instead of that of ``x``.
        temperature: :math:`T`; towards 0 the largest takes all, towards infinity all are equal.
        backend: ``auto`` takes torch's operation.

    Raises:
        ConfigError: ``temperature`` is not positive and finite or is zero in float32, or ``x`` has no axis ``dim``.
        ShapeError: ``x`` is not floating.

    Source:
        Bridle 1990, NeurIPS 2; temperature: Hinton, Vinyals & Dean 2015, eq. 1, arXiv:1503.02531;
        the maximum: Milakov & Gimelshein 2018, algorithm 2, arXiv:1805.02867
    """
    z = _scores("softmax", x, dim, dtype, temperature)
    torchs = resolve("softmax", backend, {"torch": None, "reference": None}) == "torch"
    if torchs and temperature == 1:
        return torch.softmax(z, dim)
    shifted = _shifted(z, dim) / temperature
    if torchs:
        return torch.softmax(shifted, dim).to(z.dtype)
    e = torch.exp(shifted)
    return (e / e.sum(dim, keepdim=True)).to(z.dtype)


def log_softmax(
    x: Float[Tensor, "*shape"],
    dim: int,
    dtype: torch.dtype | None = None,
    *,
    temperature: float = 1.0,
    backend: Backend = "auto",
) -> Float[Tensor, "*shape"]:
    r"""The logarithm of :func:`softmax`, without taking the logarithm of a number that rounded to zero.

    .. math::
        \ln p_i = \frac{z_i - m}{T} - \ln \sum_k e^{(z_k - m) / T}, \quad m = \max_k z_k, \qquad
        \frac{\partial \ln p_i}{\partial z_j} = \tfrac1T\,(\delta_{ij} - p_j)

    The reference is computed in float32 at least and rounded once; torch's operation rounds
    half-precision scores up to three times.

    Args:
        x: scores; minus infinity stays minus infinity.
        dim: the axis along which the exponentials sum to one.
        dtype: of the result and the computation, instead of that of ``x``.
        temperature: :math:`T`.
        backend: ``auto`` takes torch's operation.

    Raises:
        ConfigError: ``temperature`` is not positive and finite, or ``x`` has no axis ``dim``.
        ShapeError: ``x`` is not floating.

    Source:
        Milakov & Gimelshein 2018, algorithm 2, arXiv:1805.02867 (the maximum); Bridle 1990, NeurIPS 2
    """
    z = _scores("log_softmax", x, dim, dtype, temperature)
    torchs = resolve("log_softmax", backend, {"torch": None, "reference": None}) == "torch"
    if torchs and temperature == 1:
        return torch.log_softmax(z, dim)
    shifted = _shifted(z, dim) / temperature
    if torchs:
        return torch.log_softmax(shifted, dim).to(z.dtype)
    return (shifted - torch.log(torch.exp(shifted).sum(dim, keepdim=True))).to(z.dtype)


def normaliser(x: Float[Tensor, "*shape"], dim: int) -> tuple[Float[Tensor, "*kept"], Float[Tensor, "*kept"]]:
    r"""What softmax must know of a chunk of scores: its maximum, and the sum of exponentials below it.

    .. math:: m = \max_k z_k, \qquad d = \sum_k e^{z_k - m}

    The axis stays, with one entry. The maximum carries no gradient: softmax doesn't depend on it.

    Args:
        x: a chunk of scores, with at least one entry along ``dim``.
        dim: the axis of the scores.

    Source:
        Milakov & Gimelshein 2018, algorithm 2, arXiv:1805.02867
    """
    m = x.detach().amax(dim, keepdim=True)
    return m, torch.exp(x - _finite(m)).sum(dim, keepdim=True)


def merge_normalisers(
    left: tuple[Float[Tensor, "*kept"], Float[Tensor, "*kept"]],
    right: tuple[Float[Tensor, "*kept"], Float[Tensor, "*kept"]],
) -> tuple[Float[Tensor, "*kept"], Float[Tensor, "*kept"]]:
    r"""Join what is known of two chunks: bring both sums to the larger maximum.

    .. math::
        m = \max(m_1, m_2), \qquad d = d_1\, e^{m_1 - m} + d_2\, e^{m_2 - m}

    Associative and commutative, so chunks may come in any order and in parallel.

    Args:
        left: maximum and sum of one chunk, from :func:`normaliser` or from here.
        right: of the other.

    Source:
        Milakov & Gimelshein 2018, section 3.1, arXiv:1805.02867
    """
    (m1, d1), (m2, d2) = left, right
    m = torch.maximum(m1, m2)
    return m, d1 * torch.exp(m1 - _finite(m)) + d2 * torch.exp(m2 - _finite(m))


def online_softmax(x: Float[Tensor, "*shape"], dim: int, *, chunk: int = 1) -> Float[Tensor, "*shape"]:
    r"""Softmax whose maximum and sum come from one pass over chunks of the scores.

    .. math::
        m_j = \max(m_{j-1}, z_j), \qquad d_j = d_{j-1}\, e^{m_{j-1} - m_j} + e^{z_j - m_j}, \qquad
        p_i = \frac{e^{z_i - m_n}}{d_n}

    Equal to :func:`softmax`. What it is for: a kernel that reads the scores once, or never
    holds them all, as fused cross-entropy and flash attention do. In eager torch it is slower.

    Args:
        x: scores.
        dim: the axis that sums to one.
        chunk: how many scores are taken up at a time.

    Raises:
        ConfigError: ``chunk`` is not a positive integer, or ``x`` has no axis ``dim``.
        ShapeError: ``x`` is not floating.

    Source:
        Milakov & Gimelshein 2018, algorithm 3, arXiv:1805.02867
    """
    check_size("online_softmax", "chunk", chunk)
    z = at_least_float32(_scores("online_softmax", x, dim, None, 1.0))
    if z.numel() == 0:
        return torch.exp(x)
    rows = torch.atleast_1d(z)
    m, d = reduce(merge_normalisers, (normaliser(piece, dim) for piece in rows.split(chunk, dim)))
    return (torch.exp(rows - m) / d).view(x.shape).to(x.dtype)


def _scores(op: str, x: Tensor, dim: int, dtype: torch.dtype | None, temperature: float) -> Tensor:
    check_floating(op, x)
    check_positive(op, "temperature", temperature)
    if temperature < 1e-45 and (dtype or x.dtype) != torch.float64:  # zero in float32
        raise ConfigError(
            f"{op} temperature",
            got=temperature,
            want="at least 1e-45 in float32",
            remedy="Take argmax for the limit of 0.",
        )
    axes = max(x.ndim, 1)  # torch lets a scalar be a row of one score
    if not isinstance(dim, int) or isinstance(dim, bool) or not -axes <= dim < axes:
        raise ConfigError(
            f"{op} dim",
            got=f"{dim!r} for an input of shape {tuple(x.shape)}",
            want=f"an axis from {-axes} to {axes - 1}",
            remedy="Pass dim=-1 if the scores are on the last axis.",
        )
    if dtype is not None and not dtype.is_floating_point:
        raise ConfigError(f"{op} dtype", got=dtype, want="a floating-point dtype", remedy="Pass dtype=torch.float32.")
    return x if dtype is None else x.to(dtype)


def _shifted(z: Tensor, dim: int) -> Tensor:
    """``z`` less its maximum, which carries no gradient: softmax doesn't depend on it."""
    wide = at_least_float32(z)
    return wide if z.numel() == 0 else wide - wide.detach().amax(dim, keepdim=True)


def _finite(m: Tensor) -> Tensor:
    """A maximum to subtract: 0 where all scores so far are minus infinity, whose exponentials stay 0."""
    return torch.where(m == float("-inf"), 0.0, m)
