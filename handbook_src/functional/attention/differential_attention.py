"""Differential attention as functions: the difference of two softmax maps."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from handbook_src.check import check_finite, check_floating, check_size, check_tensors
from handbook_src.dispatch import Backend, resolve
from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.attention import (
    MaskLike,
    check_alike,
    check_mask,
    check_numbers,
    check_qkv,
    scaled_dot_product_attention,
)
from handbook_src.functional.attention.flash_attention import bands
from handbook_src.functional.attention.mask import causal as causal_rule
from handbook_src.precision import statistic_dtype


def differential_attention(
    q: Float[Tensor, "b t maps e"],
    k: Float[Tensor, "b s key_maps e"],
    v: Float[Tensor, "b s g c"],
    lam: Float[Tensor, ""] | float,
    mask: MaskLike | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Float[Tensor, "b t h c"]:
    r"""Average the values with the difference of two attention maps.

    .. math::
        \operatorname{DiffAttn}(Q, K, V) = \Big(\operatorname{softmax}\!\Big(\frac{Q_1 K_1^\top}{\sqrt e}\Big)
        - \lambda \operatorname{softmax}\!\Big(\frac{Q_2 K_2^\top}{\sqrt e}\Big)\Big) V

    Neighbours make a pair: head :math:`i` has the maps ``2 i`` and ``2 i + 1`` of ``q``, its key maps
    stand alike, and heads that share a value head share its two key maps.
    :math:`e` is the width of *one* map's query, half of a value's in the paper.
    A row that sees nothing is zero.  The difference is formed in float32 at least and rounded once.
    NaN are kept out as by :func:`handbook_src.functional.scaled_dot_product_attention`.

    Args:
        q: queries, two maps for each of ``h`` heads.
        k: keys, two maps for each of ``g`` value heads.
        v: values; ``g`` divides ``h``.
        lam: :math:`\lambda`, from :func:`differential_lambda`; 0 leaves the first map alone.
        mask: as for :func:`handbook_src.functional.scaled_dot_product_attention`, over ``h`` heads.
        causal: queries are the last ``t`` of ``s`` positions and see no later key.
        scale: factor on the scores of both maps; :math:`1/\sqrt e` unless given.
        backend: ``auto`` takes two of torch's fused operations; on a CPU, without a mask, the difference of two
            maps a band of queries at a time, which multiplies by the values once.

    Raises:
        ShapeError: shapes that don't fit, an odd number of maps, more than one :math:`\lambda`, a mask of
            the wrong shape.
        ConfigError: ``scale`` not positive.

    Source:
        Ye et al. 2024, eq. 1, arXiv:2410.05258
    """
    _check(q, k, v, lam)
    chosen = resolve("differential_attention", backend, {"torch": None, "reference": None})
    wide = statistic_dtype(v)
    if chosen == "torch" and mask is None and _banded(q, k, v):
        return _in_bands(q, k, v, lam, causal, scale)
    if chosen == "reference":  # the two means in float32 too, where torch's come rounded
        q, k, v, dtype = q.to(wide), k.to(wide), v.to(wide), v.dtype
    else:
        dtype = v.dtype
    first, second = (
        scaled_dot_product_attention(
            q[:, :, i::2], k[:, :, i::2], v, mask, causal=causal, scale=scale, backend=chosen
        ).to(wide)
        for i in (0, 1)
    )
    return (first - lam * second).to(dtype)


def _banded(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the maps are made in bands: wide dtypes on a CPU, and with gradients no more than 2 x 64 MB of maps."""
    if q.device.type != "cpu" or v.dtype not in (torch.float32, torch.float64) or torch.compiler.is_compiling():
        return False
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    few = q.shape[0] * (q.shape[2] // 2) * q.shape[1] * k.shape[1] <= 2**24
    return q.shape[1] > 8 and (few or not learns) and not torch.is_autocast_enabled("cpu")


def _in_bands(
    q: Tensor, k: Tensor, v: Tensor, lam: Tensor | float, causal: bool, scale: float | None
) -> Float[Tensor, "b t h c"]:
    """The formula as it stands, some queries at a time: scores that fit the cache, and one product with the values."""
    for i in (0, 1):
        check_qkv(q[:, :, i::2], k[:, :, i::2], v)
    check_numbers(scale, 0.0)
    if causal:
        check_mask(causal_rule, q.shape[0], q.shape[2] // 2, q.shape[1], k.shape[1])
    t, s, r = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    q = q * (1 / math.sqrt(q.shape[3]) if scale is None else scale)
    qs = [q[:, :, i::2].transpose(1, 2).contiguous() for i in (0, 1)]
    ks = [k[:, :, i::2].repeat_interleave(r, 2).transpose(1, 2).contiguous() for i in (0, 1)]
    v = v.repeat_interleave(r, 2).transpose(1, 2).contiguous()
    hidden = ~causal_rule.dense(t, s, device=q.device) if causal else None
    outs = []
    for rows, cols in bands(t, s, causal, None, q.device):
        scores = (a[:, :, rows] @ b[:, :, cols].mT for a, b in zip(qs, ks, strict=True))
        if hidden is not None:
            scores = (x.masked_fill(hidden[rows, cols], -math.inf) for x in scores)
        first, second = (x.softmax(-1) for x in scores)
        outs.append((first - lam * second) @ v[:, :, cols])
    return torch.cat(outs, 2).transpose(1, 2)


def differential_lambda(
    q1: Float[Tensor, " e"],
    k1: Float[Tensor, " e"],
    q2: Float[Tensor, " e"],
    k2: Float[Tensor, " e"],
    init: float,
) -> Float[Tensor, ""]:
    r"""Return the weight of the second map, from four learnt vectors.

    .. math::
        \lambda = \exp(\lambda_{q_1} \cdot \lambda_{k_1}) - \exp(\lambda_{q_2} \cdot \lambda_{k_2})
        + \lambda_{\text{init}}

    Formed in float32 at least.  At zero vectors it is ``init``; nothing bounds it.

    Args:
        q1: :math:`\lambda_{q_1}`.
        k1: :math:`\lambda_{k_1}`.
        q2: :math:`\lambda_{q_2}`.
        k2: :math:`\lambda_{k_2}`.
        init: :math:`\lambda_{\text{init}}`, from :func:`differential_lambda_init`.

    Raises:
        ShapeError: vectors of unequal length or with more axes, or not floating point.

    Source:
        Ye et al. 2024, eq. 2, arXiv:2410.05258
    """
    check_tensors("differential_lambda", q1, k1, q2, k2)
    check_finite("differential_lambda", "init", init)
    check_floating("differential_lambda", q1, k1, q2, k2)
    shapes = [tuple(x.shape) for x in (q1, k1, q2, k2)]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1:
        raise ShapeError(
            "differential_lambda vectors", got=shapes, want="four of one length", remedy="One a map's width."
        )
    wide = statistic_dtype(q1)
    plus, minus = ((a.to(wide) * b.to(wide)).sum().exp() for a, b in ((q1, k1), (q2, k2)))
    return plus - minus + init


def differential_lambda_init(layer: int) -> float:
    r"""Return where :math:`\lambda` starts in a layer of a stack; layers count from one.

    .. math:: \lambda_{\text{init}} = 0.8 - 0.6 \exp(-0.3\, (l - 1))

    0.2 in the first layer, towards 0.8 in deep ones.

    Args:
        layer: number of the layer, :math:`l \ge 1`.

    Raises:
        ConfigError: no integer of at least 1.

    Source:
        Ye et al. 2024, section 2.1, arXiv:2410.05258

    Example:
        >>> [round(differential_lambda_init(layer), 3) for layer in (1, 2, 12)]
        [0.2, 0.356, 0.778]
    """
    check_size("differential_lambda_init", "layer", layer)
    return 0.8 - 0.6 * math.exp(-0.3 * (layer - 1))


def _check(q: Tensor, k: Tensor, v: Tensor, lam: Tensor | float) -> None:
    check_alike(q, k, v)
    fits = q.ndim == k.ndim == v.ndim == 4 and k.shape[2] == 2 * v.shape[2] and q.shape[2] % 2 == 0
    if not fits or q.shape[2] == 0:
        raise ShapeError(
            "differential_attention inputs",
            got=f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}",
            want="q (b, t, 2 h, e), k (b, s, 2 g, e), v (b, s, g, c)",
            remedy="Two maps a head, side by side; values are not doubled.",
        )
    if isinstance(lam, Tensor):
        if lam.ndim or not lam.is_floating_point():
            raise ShapeError(
                "differential_attention lam",
                got=f"{tuple(lam.shape)} {lam.dtype}",
                want="one floating-point number",
                remedy="One lambda serves all heads of a layer.",
            )
    elif isinstance(lam, bool) or not isinstance(lam, int | float) or not math.isfinite(lam):
        raise ConfigError("differential_attention lam", got=repr(lam), want="a finite number", remedy="Pass lam=0.2.")
