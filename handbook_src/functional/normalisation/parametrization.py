"""Norms of the weights instead of the activations: weight norm and spectral norm.

Both rewrite a weight as a function of what is trained, before the layer uses it,
so they cost the same at batch size 1 as at 1000 and see no data at all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.precision import at_least_float32


def norm_except(v: Float[Tensor, "*shape"], dim: int | None = 0) -> Float[Tensor, "*ones"]:
    """Return the Euclidean norm over every axis but ``dim``, kept as axes of size 1.

    Args:
        v: a weight.
        dim: the axis that keeps its entries; ``None`` gives one norm for the whole weight.

    Raises:
        ConfigError: ``dim`` is not an axis of ``v``.
    """
    if dim is None:
        return torch.linalg.vector_norm(v)
    kept = axis("weight_norm", dim, v.ndim)
    others = [a for a in range(v.ndim) if a != kept]
    return torch.linalg.vector_norm(v, dim=others, keepdim=True) if others else v.abs()


def weight_norm(v: Float[Tensor, "*shape"], g: Float[Tensor, "*ones"], dim: int | None = 0) -> Float[Tensor, "*shape"]:
    r"""Return the weight whose direction is ``v``'s and whose length is ``g``.

    .. math:: w = g\, \frac{v}{\lVert v \rVert_2}

    The norm runs over every axis but ``dim``, so with ``dim=0`` each output unit has
    one length. Half-precision norms are summed in float32.

    Args:
        v: directions; any length but zero.
        g: lengths, of the shape that :func:`norm_except` returns.
        dim: the axis with one length an entry; ``None`` for one length in all.

    Raises:
        ConfigError: ``dim`` is not an axis of ``v``.
        ShapeError: ``g`` does not have one entry for each entry of ``dim``.

    Source:
        Salimans & Kingma 2016, eq. 2, arXiv:1602.07868
    """
    wide = at_least_float32(v)
    length = norm_except(wide, dim)
    if g.shape != length.shape:
        raise ShapeError(
            "weight_norm g",
            got=tuple(g.shape),
            want=f"{tuple(length.shape)} for a v of {tuple(v.shape)} with dim={dim}",
            remedy="norm_except(v, dim) gives a g of the right shape.",
        )
    return (wide * (g / length)).to(v.dtype)


def as_matrix(weight: Float[Tensor, "*shape"], dim: int = 0) -> Float[Tensor, "rows cols"]:
    """Return ``weight`` with ``dim`` as rows and every other axis as columns.

    Raises:
        ConfigError: ``dim`` is not an axis of ``weight``.
    """
    return weight.movedim(axis("spectral_norm", dim, weight.ndim), 0).flatten(1)


@torch.no_grad()
def power_iteration(
    matrix: Float[Tensor, "rows cols"],
    u: Float[Tensor, " rows"],
    v: Float[Tensor, " cols"],
    steps: int = 1,
    eps: float = 1e-12,
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " cols"]]:
    r"""Pull ``u`` and ``v`` towards the leading singular vectors of ``matrix``.

    .. math::
        u \leftarrow \frac{W v}{\lVert W v \rVert_2}, \qquad
        v \leftarrow \frac{W^\top u}{\lVert W^\top u \rVert_2}

    Each step shrinks the other directions by :math:`(\sigma_2 / \sigma_1)^2`.

    Args:
        matrix: the weight as a matrix.
        u: the present left vector, of length 1.
        v: the present right vector, of length 1.
        steps: how many times; 0 returns ``u`` and ``v``.
        eps: the smallest length divided by.

    Source:
        Miyato et al. 2018, algorithm 1, arXiv:1802.05957
    """
    for _ in range(steps):
        u = F.normalize(matrix @ v, dim=0, eps=eps)
        v = F.normalize(matrix.mT @ u, dim=0, eps=eps)
    return u, v


def spectral_norm(
    weight: Float[Tensor, "*shape"],
    u: Float[Tensor, " rows"],
    v: Float[Tensor, " cols"],
    dim: int = 0,
) -> Float[Tensor, "*shape"]:
    r"""Divide a weight by the estimate of its largest singular value that ``u`` and ``v`` give.

    .. math:: \bar W = \frac{W}{\sigma(W)}, \qquad \sigma(W) \approx u^\top W v

    ``u`` and ``v`` are constants to the gradient, and need not be differentiated:
    at the true singular vectors :math:`\partial \sigma / \partial W = u v^\top` all the same.

    Args:
        weight: the trained weight; axes other than ``dim`` are flattened into columns.
        u: left singular vector of the leading singular value, as :func:`power_iteration` returns it.
        v: right singular vector of the leading singular value.
        dim: the axis of the outputs.

    Raises:
        ConfigError: ``dim`` is not an axis of ``weight``.

    Source:
        Miyato et al. 2018, eq. 8 and 12, arXiv:1802.05957
    """
    sigma = u @ (as_matrix(weight, dim) @ v)
    return weight / sigma


def axis(op: str, dim: int, ndim: int) -> int:
    """Return ``dim`` counted from the front.

    Raises:
        ConfigError: there is no such axis.
    """
    if not -ndim <= dim < ndim:
        raise ConfigError(
            f"{op} dim", got=dim, want=f"an axis of {ndim}", remedy="Outputs are axis 0 (axis 1 in ConvTranspose)."
        )
    return dim % ndim
