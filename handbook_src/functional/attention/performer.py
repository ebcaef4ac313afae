"""Performer's random features: inner products whose expectation is the softmax kernel."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from handbook_src.check import (
    check_features,
    check_finite,
    check_floating,
    check_one_device,
    check_parameter_dtype,
    check_size,
)
from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.attention import check_numbers
from handbook_src.functional.attention.linear_attention import (
    Form,
    check_qkv,
    exactly,
    kernel_attention,
    key_mask,
    shielded,
)
from handbook_src.functional.attention.mask import Mask
from handbook_src.precision import at_least_float32

Kind = Literal["positive", "hyperbolic", "trigonometric", "relu"]
#: The largest exponent that causal keys keep: a sum of thousands of exp(64) is a float32 still.
TOP = 64.0
KINDS = ("positive", "hyperbolic", "trigonometric", "relu")


def random_features(
    e: int,
    m: int,
    *,
    orthogonal: bool = True,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "m e"]:
    r"""Draw the directions that Performer projects queries and keys on.

    .. math:: w_i \sim \mathcal N(0, I_e), \qquad w_i^\top w_j = 0 \text{ within each block of } e \text{ rows}

    Each row alone is a standard normal vector, orthogonal or not: orthogonal blocks are uniform over all
    rotations (the signs of the QR decomposition are made unique) and the lengths are those of independent
    normal vectors.

    Args:
        e: features of a head.
        m: number of directions.
        orthogonal: whether the rows of a block of ``e`` are at right angles.
        generator: the stream to draw from, on ``device``.
        device: where the result is made.
        dtype: torch's default unless given.

    Raises:
        ConfigError: a size below 1, a dtype that is not floating point.

    Source:
        Choromanski et al. 2020, sections 2.3 and 2.4, arXiv:2009.14794

    Example:
        >>> w = random_features(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> bool((w[0] @ w[1]).abs() < 1e-12)
        True
    """
    check_size("random features", "e", e)
    check_size("random features", "m", m)
    check_parameter_dtype("random features", dtype)
    dtype = torch.get_default_dtype() if dtype is None else dtype
    device = generator.device if device is None and generator is not None else device
    wide = torch.promote_types(dtype, torch.float32)  # no QR decomposition of halves

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=wide)

    if not orthogonal:
        return normal(m, e).to(dtype)
    turned, corner = torch.linalg.qr(normal(-(-m // e), e, e))
    turned = turned * corner.diagonal(dim1=-2, dim2=-1).sign()[:, None]
    return (turned.mT.reshape(-1, e)[:m] * normal(m, e).norm(dim=-1, keepdim=True)).to(dtype)


def softmax_features(
    x: Float[Tensor, "*lead e"],
    projection: Float[Tensor, "m e"],
    kind: Kind = "positive",
    *,
    shift: Float[Tensor, ...] | float = 0.0,
    eps: float = 0.0,
) -> Float[Tensor, "*lead f"]:
    r"""Map vectors to random features whose inner product estimates the softmax kernel.

    .. math::
        \mathbb E\big[\phi(x)^\top \phi(y)\big] = e^{x^\top y}, \qquad
        \phi(x) = \frac{1}{\sqrt m} \Big( e^{w_1^\top x - \frac12 \lVert x \rVert^2}, \dots,
        e^{w_m^\top x - \frac12 \lVert x \rVert^2} \Big)

    ``hyperbolic`` takes :math:`\pm w_i` with :math:`1 / \sqrt{2m}`; ``trigonometric`` takes
    :math:`e^{\frac12 \lVert x \rVert^2} (\sin w_i^\top x, \cos w_i^\top x)`, which may be negative;
    ``relu`` takes :math:`\max(0, w_i^\top x) / \sqrt m`, another kernel, without an exponential.
    Computed and returned in float32 at least.

    Args:
        x: vectors; scores :math:`q^\top k / \sqrt e` need both divided by :math:`e^{1/4}`.
        projection: the directions, from :func:`random_features`.
        kind: of features; 2m of them where there are two a direction.
        shift: subtracted from the exponents, against overflow; scales :math:`\phi` by :math:`e^{-\text{shift}}`.
        eps: added to each feature before the division by :math:`\sqrt m`.

    Raises:
        ShapeError: features or a device that don't fit the projection, a dtype that is not floating point.
        ConfigError: an unknown kind, ``eps`` negative or not finite, a shift that is not finite.

    Source:
        Choromanski et al. 2020, eq. 5, lemma 1 and section 2.2, arXiv:2009.14794
    """
    _check_projection(x, projection, kind, eps)
    if not isinstance(shift, Tensor):
        check_finite("random features", "shift", shift)
    phi, top = _features(x, projection, kind)
    phi = phi if kind == "relu" else phi * (_logarithm(x, top) - shift).exp()
    return (phi + eps) / math.sqrt(phi.shape[-1] // (2 if kind == "trigonometric" else 1))


def performer_attention(
    q: Float[Tensor, "b t h e"],
    k: Float[Tensor, "b s g e"],
    v: Float[Tensor, "b s g c"],
    projection: Float[Tensor, "m e"],
    mask: Mask | Float[Tensor, ...] | None = None,
    *,
    kind: Kind = "positive",
    causal: bool = False,
    scale: float | None = None,
    eps: float | None = None,
    form: Form = "auto",
    chunk: int = 64,
) -> Float[Tensor, "b t h c"]:
    r"""Estimate softmax attention in linear time by random features (FAVOR+).

    .. math::
        y_i = \frac{\phi(q_i)^\top \sum_j \phi(k_j)\, v_j^\top}{\phi(q_i)^\top \sum_j \phi(k_j)}, \qquad
        \mathbb E\big[\phi(q)^\top \phi(k)\big] = e^{q^\top k / \sqrt e}

    The kernel's estimate is unbiased.  The attention is a ratio of two estimates, so it is biased for every
    finite number of features and exact only in the limit.

    Exponents are shifted by their largest, for each query, and for the keys of each head; both cancel in
    the ratio.  Under ``causal`` the keys are not shifted, since their largest may stand in the future,
    unless it would overflow.
    Where scores are so large (tens) that every product underflows, the output is zeros; ``eps`` makes it a mean.

    Args:
        q: queries.
        k: keys; fewer heads than ``q`` are shared by groups of consecutive query heads.
        v: values.
        projection: the directions, from :func:`random_features`; shared by all heads.
        mask: hides keys from all queries alike, as for
            :func:`handbook_src.functional.linear_attention`.
        kind: of features, as for :func:`softmax_features`; ``relu`` is the paper's generalised attention.
        causal: queries are the last ``t`` of ``s`` positions and see no later key.
        scale: factor on the scores; :math:`1/\sqrt e` unless given.
        eps: added to each feature: 0, or 0.001 for ``relu``, unless given.  The published code adds 0.0001.
        form: as for :func:`handbook_src.functional.linear_attention`.
        chunk: as for :func:`handbook_src.functional.linear_attention`.

    Raises:
        ShapeError: shapes or dtypes that don't fit, a mask that differs by query or head.
        ConfigError: an unknown kind or form, ``scale`` not positive, ``eps`` negative.

    Source:
        Choromanski et al. 2020, eqs. 4 and 5 and lemma 1, arXiv:2009.14794
    """
    check_qkv("Performer attention", q, k, v)
    check_numbers(scale, 0.0)
    eps = (1e-3 if kind == "relu" else 0.0) if eps is None else eps
    _check_projection(q, projection, kind, eps)
    seen, causal = key_mask("Performer attention", mask, q, k, causal)
    dtype, scale = v.dtype, 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    (q, k, v), broken = shielded(q, k, v, seen, causal)
    # heads second while features are made: the sums over positions want them so
    (phi_q, _), (phi_k, top) = (_features(x.transpose(1, 2), projection, kind, scale, bool(eps)) for x in (q, k))
    phi_q, phi_k, weight = phi_q.transpose(1, 2), phi_k.transpose(1, 2), None
    if kind != "relu":  # what a query's features have in common cancels; a key's share of it is its weight
        log = _logarithm(k, top if top is None else top.transpose(1, 2), scale)
        log = log if seen is None else log.masked_fill(~seen[:, :, None, None], -math.inf)
        largest = _largest(log, bool(eps))
        weight = (log - ((largest - TOP).clamp_min(0) if causal else largest)).exp()
    if eps:
        phi_q, phi_k, weight = phi_q + eps, (phi_k if weight is None else phi_k * weight) + eps, None
    weight = None if weight is None else weight[..., 0]
    out = kernel_attention(phi_q, phi_k, v, seen, weight=weight, causal=causal, form=form, chunk=chunk)
    return (out if broken is None else out.masked_fill(broken, torch.nan)).to(dtype)


def _features(
    x: Tensor, projection: Tensor, kind: Kind, scale: float = 1.0, follow: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Features of ``x`` times the root of ``scale``, without what a row has in common; its largest exponent.

    ``follow``: whether gradients follow the largest; they need not where it cancels.
    """
    x = at_least_float32(x)
    with exactly(x):
        u = x @ (projection.to(x.dtype) * math.sqrt(scale)).T
    if kind == "relu":
        return u.relu(), None
    if kind == "trigonometric":
        return torch.cat([u.sin(), u.cos()], -1), None
    u = u if kind == "positive" else torch.cat([u, -u], -1)
    top = (u if follow else u.detach()).amax(-1, keepdim=True)
    return (u - top).exp() if follow else u.sub_(top).exp_(), top  # in place: these are the largest tensors


def _logarithm(x: Tensor, top: Tensor | None, scale: float = 1.0) -> Tensor:
    """The logarithm of what the features of a row have in common: half the square is added under a sine."""
    half = at_least_float32(x).square().sum(-1, keepdim=True) * (scale / 2)
    return half if top is None else top - half


def _largest(log: Tensor, follow: bool) -> Tensor:
    """The largest of all keys of a head; a constant where it cancels."""
    if log.numel() == 0:
        return log.new_zeros(())
    return (log if follow else log.detach()).amax(1, keepdim=True).clamp_min(torch.finfo(log.dtype).min)


def _check_projection(x: Tensor, projection: Tensor, kind: str, eps: float) -> None:
    if kind not in KINDS:
        raise ConfigError(
            "random features kind", got=repr(kind), want=f"one of {list(KINDS)}", remedy="Use 'positive'."
        )
    check_finite("random features", "eps", eps)
    if eps < 0:
        raise ConfigError("random features eps", got=eps, want="at least 0", remedy="Use 0, or 1e-4 as published.")
    check_floating("random features", x, projection)
    check_one_device("random features", x, projection)
    if projection.ndim != 2 or projection.shape[0] == 0:
        remedy = "Draw it with random_features(e, m)."
        raise ShapeError("projection", got=tuple(projection.shape), want="(m, e), m at least 1", remedy=remedy)
    check_features("random features", x, projection.shape[1])
