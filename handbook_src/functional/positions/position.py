r"""Where a token stands: codes that are added to the embeddings, and biases that are added to the scores.

===================================  =======================================================
:func:`sinusoidal_positions`         sines and cosines of the position, ``t d``, fixed
:func:`learned_positions`            rows of a trained table, ``t d``
:func:`alibi_bias`                   minus slope times distance, ``1 h t s``, fixed
:func:`t5_relative_bias`             one trained number a bucket of distances and head, ``1 h t s``
===================================  =======================================================

A bias goes into attention as its ``mask``, which is added to the scores.  As everywhere in
the handbook the ``t`` queries are the last of ``s`` positions unless ``offset`` says where
they begin.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from handbook_src.check import check_floating, check_integers, check_positive, check_rank, check_size
from handbook_src.errors import ConfigError, ShapeError
from handbook_src.precision import at_least_float32


def sinusoidal_positions(
    length: int,
    dim: int,
    *,
    offset: int = 0,
    base: float = 10000.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "t d"]:
    r"""Return sines and cosines of the position, at speeds from 1 down to about 1/base.

    .. math::
        \mathrm{PE}_{p, 2i} = \sin\!\big(p\, \text{base}^{-2i/d}\big), \qquad
        \mathrm{PE}_{p, 2i+1} = \cos\!\big(p\, \text{base}^{-2i/d}\big)

    The angle is formed in float64 and the result rounded once: float16 has no 2049.
    With an odd ``dim`` the last sine has no cosine.

    Args:
        length: how many positions.
        dim: features a position.
        offset: the first position; in cached decoding, how many came before.
        base: the slowest wave is almost :math:`2\pi\,\text{base}` positions long.
        device: where the result is made.
        dtype: of the result; torch's default unless given.

    Raises:
        ConfigError: ``length`` or ``offset`` is negative, ``dim`` or ``base`` is not positive.

    Source:
        Vaswani et al. 2017, section 3.5, arXiv:1706.03762
    """
    check_size("sinusoidal_positions", "length", length, least=0)
    check_size("sinusoidal_positions", "dim", dim)
    check_size("sinusoidal_positions", "offset", offset, least=0)
    check_positive("sinusoidal_positions", "base", base)
    position = torch.arange(offset, offset + length, device=device, dtype=torch.float64)
    speed = float(base) ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float64) / dim)
    angle = position[:, None] * speed
    waves = torch.stack((angle.sin(), angle.cos()), -1).flatten(-2)
    return waves[:, :dim].to(torch.get_default_dtype() if dtype is None else dtype)


def learned_positions(
    weight: Float[Tensor, "positions d"],
    length: int,
    *,
    offset: int = 0,
) -> Float[Tensor, "t d"]:
    r"""Return consecutive rows of a trained table.

    .. math:: \mathrm{PE}_p = W_p, \qquad p = \text{offset}, \dots, \text{offset} + t - 1

    A view, not a copy: that is all that an embedding of counted positions does.

    Args:
        weight: one row a position.
        length: how many positions.
        offset: the first position; in cached decoding, how many came before.

    Raises:
        ConfigError: ``length`` or ``offset`` is negative.
        ShapeError: the table has fewer rows than positions are asked for.

    Source:
        Gehring et al. 2017, section 3.1, arXiv:1705.03122
    """
    check_rank("learned_positions", weight, (2,), "(positions, features)")
    check_size("learned_positions", "length", length, least=0)
    check_size("learned_positions", "offset", offset, least=0)
    if offset + length > weight.shape[0]:
        raise ShapeError(
            "learned_positions",
            got=f"{length} positions from {offset} on",
            want=f"at most {weight.shape[0]} in all, the rows of the table",
            remedy="Later rows do not exist, so nothing could train them: crop, or take a relative code.",
        )
    return weight[offset : offset + length]


def alibi_slopes(
    heads: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, " h"]:
    r"""Return one slope a head: a geometric sequence that ends at 1/256.

    .. math:: m_k = 2^{-8k/h}, \qquad k = 1, \dots, h

    Where ``heads`` is no power of two: the slopes of the power below, then every other slope
    of the power above, as in the published code.

    Args:
        heads: number of heads.
        device: where the result is made.
        dtype: of the result.

    Raises:
        ConfigError: ``heads`` is not a positive integer.

    Source:
        Press, Smith & Lewis 2021, section 3, and the code published with it, arXiv:2108.12409
    """
    check_size("alibi_slopes", "heads", heads)
    below = 2 ** (int(heads).bit_length() - 1)
    exponents = [8 * k / below for k in range(1, below + 1)]
    exponents += [4 * k / below for k in range(1, 2 * (heads - below), 2)]
    return torch.tensor([2.0**-e for e in exponents], device=device, dtype=dtype)


def alibi_bias(
    slopes: Float[Tensor, " h"],
    t: int,
    s: int | None = None,
    *,
    offset: int | None = None,
    causal: bool = False,
) -> Float[Tensor, "1 h t s"]:
    r"""Return minus slope times distance, for each head.

    .. math:: B_{hts} = -m_h\, |t - s|

    Without ``causal`` it is symmetric, as encoders use it; with ``causal`` later keys get
    :math:`-\infty` and the bias needs no mask beside it. Half-precision slopes are multiplied in float32
    and the product is rounded once: a distance above 256 is no bfloat16.

    Args:
        slopes: one a head, from :func:`alibi_slopes`.
        t: number of queries.
        s: number of keys; ``t`` unless given.
        offset: position of the first query; ``s - t`` unless given.
        causal: hide keys that come later than the query.

    Raises:
        ShapeError: slopes of another rank or dtype, or more queries than keys without an ``offset``.
        ConfigError: a negative size or offset.

    Source:
        Press, Smith & Lewis 2021, section 3, arXiv:2108.12409
    """
    check_rank("alibi_bias", slopes, (1,), "(heads,)")
    check_floating("alibi_bias", slopes)
    s, offset = _keys_and_offset("alibi_bias", t, s, offset)
    distance = _distances(t, s, offset, slopes.device)
    wide = at_least_float32(slopes)
    bias = (-wide[:, None] * distance.abs()).to(slopes.dtype)
    return _along_diagonals(bias.masked_fill(distance > 0, -math.inf) if causal else bias, t, s)


def t5_bucket(
    relative_position: Int[Tensor, "*shape"],
    *,
    bidirectional: bool = True,
    num_buckets: int = 32,
    max_distance: int = 128,
) -> Int[Tensor, "*shape"]:
    r"""Return the bucket of a distance: exact while short, logarithmic up to ``max_distance``.

    .. math::
        \operatorname{bucket}(n) = \begin{cases} n & n < E \\
        \min\!\Big(N - 1,\; E + \Big\lfloor \dfrac{\ln(n / E)}{\ln(D / E)}\,(N - E) \Big\rfloor\Big) & n \ge E
        \end{cases} \qquad E = \lfloor N/2 \rfloor

    One direction: :math:`n = \max(q - k, 0)` and :math:`N` = ``num_buckets``.  Both directions:
    :math:`n = |q - k|`, :math:`N` = ``num_buckets // 2``, and later keys use the second half.
    The logarithm is float32, as in the published code: published weights were trained with its rounding.

    Args:
        relative_position: key's position minus query's.
        bidirectional: tell before from after; otherwise later keys share bucket 0.
        num_buckets: how many buckets in all.
        max_distance: from here on all distances share the last bucket.

    Raises:
        ConfigError: too few buckets, an odd number of them in two directions, or a
            ``max_distance`` that the exact half already reaches.
        ShapeError: ``relative_position`` holds no integers.

    Source:
        Raffel et al. 2019, section 2.1, arXiv:1910.10683
    """
    _check_buckets(bidirectional, num_buckets, max_distance)
    check_integers("t5_bucket", "relative_position", relative_position, "Positions are counted: use torch.arange(t).")
    count = num_buckets // 2 if bidirectional else num_buckets
    exact = count // 2
    relative_position = relative_position.long()  # int8 holds neither the bucket of a far one nor the size of -128
    n = relative_position.abs() if bidirectional else (-relative_position).clamp_min(0)
    octave = (n.clamp_min(1).float() / exact).log() / math.log(max_distance / exact)
    far = (exact + (octave * (count - exact)).to(n.dtype)).clamp_max(count - 1)
    bucket = torch.where(n < exact, n, far)
    return bucket + count * (relative_position > 0) if bidirectional else bucket


def t5_relative_bias(
    weight: Float[Tensor, "buckets h"],
    t: int,
    s: int | None = None,
    *,
    offset: int | None = None,
    bidirectional: bool = True,
    max_distance: int = 128,
) -> Float[Tensor, "1 h t s"]:
    r"""Return the trained number of each head for the bucket of each distance.

    .. math:: B_{hts} = W_{\operatorname{bucket}(s - t),\, h}

    The table is read once a distance, not once a pair: the matrix is constant along its diagonals.

    Args:
        weight: one number a bucket and head.
        t: number of queries.
        s: number of keys; ``t`` unless given.
        offset: position of the first query; ``s - t`` unless given.
        bidirectional: as for :func:`t5_bucket`.
        max_distance: as for :func:`t5_bucket`.

    Raises:
        ConfigError: a negative size or offset, or what :func:`t5_bucket` refuses.
        ShapeError: more queries than keys without an ``offset``, or a weight of another rank.

    Source:
        Raffel et al. 2019, section 2.1, arXiv:1910.10683
    """
    check_rank("t5_relative_bias weight", weight, (2,), "(buckets, heads)")
    s, offset = _keys_and_offset("t5_relative_bias", t, s, offset)
    buckets = weight.shape[0]
    _check_buckets(bidirectional, buckets, max_distance)
    distance = _distances(t, s, offset, weight.device)
    bucket = t5_bucket(distance, bidirectional=bidirectional, num_buckets=buckets, max_distance=max_distance)
    return _along_diagonals(weight[bucket].T, t, s)


def _distances(t: int, s: int, offset: int, device: torch.device) -> Int[Tensor, " distances"]:
    """All differences of key and query that occur; the first query's window lies last."""
    return torch.arange(1 - t - offset, s - offset if t and s else 1 - t - offset, device=device)


def _along_diagonals(values: Float[Tensor, "h distances"], t: int, s: int) -> Float[Tensor, "1 h t s"]:
    """Write one value a distance out as a matrix: its rows are windows that move by one.

    One copy of the result's size; looking up each pair took 5 to 17 times as long (256 by 256, 8 heads).
    """
    if t == 0 or s == 0:
        return values.new_zeros((1, len(values), t, s))
    return values.unfold(-1, s, 1).flip(-2)[None]


def _keys_and_offset(op: str, t: int, s: int | None, offset: int | None) -> tuple[int, int]:
    """Fill in the defaults: as many keys as queries, and the queries are the last of them."""
    s = t if s is None else s
    check_size(op, "t", t, least=0)
    check_size(op, "s", s, least=0)
    if offset is None and t > s:
        raise ShapeError(
            f"{op} queries",
            got=f"{t} queries, {s} keys",
            want="at most as many queries as keys",
            remedy="The queries are the last of the keys' positions; give offset= where they are not.",
        )
    offset = s - t if offset is None else offset
    check_size(op, "offset", offset, least=0)
    return s, offset


def _check_buckets(bidirectional: bool, num_buckets: int, max_distance: int) -> None:
    check_size("t5_bucket", "num_buckets", num_buckets, least=4 if bidirectional else 2)
    check_size("t5_bucket", "max_distance", max_distance)
    if bidirectional and num_buckets % 2:
        raise ConfigError(
            "t5_bucket num_buckets",
            got=num_buckets,
            want="an even number: half for each direction",
            remedy=f"Pass {num_buckets + 1}, or bidirectional=False.",
        )
    exact = num_buckets // (4 if bidirectional else 2)
    if max_distance <= exact:
        raise ConfigError(
            "t5_bucket max_distance",
            got=max_distance,
            want=f"more than {exact}, the distances that have a bucket of their own",
            remedy="128 with 32 buckets is T5's choice.",
        )
