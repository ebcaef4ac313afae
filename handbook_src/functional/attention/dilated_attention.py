"""Dilated attention: a window with gaps, and LongNet's mixture of segments with gaps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from handbook_src.check import check_size
from handbook_src.dispatch import Backend, resolve
from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.attention import (
    check_numbers,
    scaled_dot_product_attention,
    shielded,
    under_rule,
)
from handbook_src.functional.attention.chunked_attention import check_pattern
from handbook_src.functional.attention.mask import Mask, dilated, padding, window
from handbook_src.functional.attention.mask import causal as causal_rule
from handbook_src.functional.attention.partial_softmax import Partial, join, partial_softmax
from handbook_src.functional.attention.sliding_window import sliding_window_attention
from handbook_src.precision import statistic_dtype


def dilated_attention(
    q: Float[Tensor, "b t h e"],
    k: Float[Tensor, "b s g e"],
    v: Float[Tensor, "b s g c"],
    reach: int,
    dilation: int,
    *,
    causal: bool = False,
    lengths: Int[Tensor, " b"] | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: Backend = "auto",
) -> Float[Tensor, "b t h c"]:
    r"""Attend to every ``dilation``-th position, ``reach`` of them to each side, the query's own among them.

    .. math:: A_i = \{\, j : (i - j) \bmod r = 0,\; |i - j| < w r \,\}

    Equal to full attention under the rule ``window(reach * dilation) & dilated(dilation)``.  Positions that leave
    the same remainder form a stream; streams become samples by a reshape, and each is attended in blocks that see
    themselves and their neighbours: :math:`O(n w)` products and memory, whatever the dilation.

    A NaN or infinite key or value reaches no query that it is hidden from, forward or backward.

    Args:
        q: queries, the last ``t`` of ``s`` positions.
        k: keys; fewer heads are shared by groups of consecutive query heads.
        v: values.
        reach: keys to one side with the query's own, :math:`w`: a causal query sees ``reach`` keys, another
            ``2 * reach - 1``.
        dilation: the gap :math:`r`; 1 is the plain sliding window.
        causal: a query sees no later key.
        lengths: of each sample, where the batch is padded on the right.
        scale: factor on the scores; :math:`1/\sqrt e` unless given.
        dropout: share of the weights that are dropped; pass 0 outside training.
        backend: ``reference`` is the dense masked matrix, ``torch`` (and ``auto``) the streams.

    Raises:
        ShapeError: shapes, heads or dtypes that don't fit, more queries than keys, lengths that are not one a sample.
        ConfigError: ``reach`` or ``dilation`` below 1, ``dropout`` or ``scale`` out of range.

    Source:
        Beltagy et al. 2020, section 3.1 (dilated sliding window), arXiv:2004.05150
    """
    check_size("dilated attention", "reach", reach)
    check_size("dilated attention", "dilation", dilation)
    check_pattern("dilated attention", q, k, v, lengths)
    check_numbers(scale, dropout)
    chosen = resolve("dilated_attention", backend, {"torch": None, "reference": None})
    dilation = min(dilation, max(k.shape[1], 1))  # from there on a query sees itself alone; streams would be padding
    t, behind = q.shape[1], (reach - 1) * dilation
    cut = max(k.shape[1] - t - behind, 0)  # no query looks further back
    k, v = k[:, cut:], v[:, cut:]
    lengths = None if lengths is None else (lengths.to(q.device) - cut).clamp_min(0)
    ahead = k.shape[1] - t
    if chosen == "reference" or t <= ahead or len(q) == 0:
        rule = dilated_rule(reach, dilation, causal)
        rule = rule if lengths is None else rule & padding(lengths)
        return under_rule(rule, chosen, q, k, v, scale, dropout)
    return shielded(partial(_streamed, reach, dilation, causal, lengths, scale), q, k, v, dropout)


def _streamed(
    reach: int,
    dilation: int,
    causal: bool,
    lengths: Tensor | None,
    scale: float | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float,
) -> Tensor:
    """A sliding window in each stream."""
    t, ahead = q.shape[1], k.shape[1] - q.shape[1]
    q = F.pad(q, (0, 0, 0, 0, ahead, 0)) if ahead else q
    rows, keys, values = (_streams(x, dilation) for x in (q, k, v))
    if lengths is not None or (not causal and q.shape[1] % dilation):
        lengths = _stream_lengths(lengths, q, dilation)
    out = _windowed(rows, keys, values, reach, causal, lengths, {"scale": scale, "dropout": dropout})
    return rearrange(out, "(b r) n h e -> b (n r) h e", r=dilation)[:, ahead : ahead + t]


def dilated_rule(reach: int, dilation: int, causal: bool = False) -> Mask:
    r"""Return the rule that :func:`dilated_attention` obeys.

    .. math:: M(t, s) = [(t - s) \bmod r = 0] \land [|t - s| < w r]

    Args:
        reach: keys to one side with the query's own, :math:`w`.
        dilation: the gap, :math:`r`.
        causal: joined with :math:`s \le t`.

    Raises:
        ConfigError: ``reach`` or ``dilation`` below 1.

    Source:
        Beltagy et al. 2020, section 3.1, arXiv:2004.05150
    """
    check_size("dilated attention", "reach", reach)
    check_size("dilated attention", "dilation", dilation)
    rule = window(reach * dilation) & dilated(dilation)
    return causal_rule & rule if causal else rule


def _streams(x: Tensor, dilation: int) -> Tensor:
    """Positions of one remainder become a sample; the end is padded to a whole row."""
    missing = -x.shape[1] % dilation
    x = F.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x
    return rearrange(x, "b (n r) h e -> (b r) n h e", r=dilation)


def _stream_lengths(lengths: Tensor | None, q: Tensor, dilation: int) -> Tensor:
    """How many positions of each stream are real: those below the sample's length."""
    b, t = q.shape[:2]
    lengths = torch.full((b,), t, device=q.device) if lengths is None else lengths.clamp_max(t)
    ahead = dilation - 1 - torch.arange(dilation, device=q.device)
    return ((lengths[:, None] + ahead) // dilation).flatten()


def _windowed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    reach: int,
    causal: bool,
    lengths: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """A sliding window over ``b n h e``; streams of unequal length in blocks of queries and the keys any may see."""
    b, n = q.shape[:2]
    if lengths is None:
        return sliding_window_attention(q, k, v, reach, causal=causal, **options)
    if n <= reach:  # the window hides nothing
        return scaled_dot_product_attention(q, k, v, padding(lengths), causal=causal, **options)
    size = max(reach, 32)  # queries of a block; smaller ones cost more in calls than they save in products
    before, after = reach - 1, 0 if causal else reach - 1
    blocks, span = -(-n // size), size + before + after
    k, v = (F.pad(x, (0, 0, 0, 0, before, blocks * size - n + after)).unfold(1, span, size) for x in (k, v))
    q = F.pad(q, (0, 0, 0, 0, 0, blocks * size - n)) if blocks * size > n else q
    slot = torch.arange(span, device=q.device)
    distance = torch.arange(size, device=q.device)[:, None] + before - slot
    near = (distance < reach) & (distance >= 0 if causal else distance > -reach)
    key = torch.arange(blocks, device=q.device)[:, None] * size + slot - before
    real = (key >= 0) & (key < n)
    real = real & (key < lengths[:, None, None])
    seen = (near & real[:, :, None]).expand(b, -1, -1, -1).reshape(b * blocks, 1, size, span)
    q = rearrange(q, "b (n l) h e -> (b n) l h e", l=size)
    k, v = (rearrange(x, "b n g e s -> (b n) s g e") for x in (k, v))
    out = scaled_dot_product_attention(q, k, v, seen, **options)
    return rearrange(out, "(b n) l h e -> b (n l) h e", n=blocks)[:, :n]


def longnet_attention(
    q: Float[Tensor, "b t h e"],
    k: Float[Tensor, "b t g e"],
    v: Float[Tensor, "b t g c"],
    segments: Sequence[int],
    dilations: Sequence[int],
    *,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: Backend = "auto",
) -> Float[Tensor, "b t h c"]:
    r"""Mix several dilated attentions, fine ones over short segments and coarse ones over long segments.

    .. math:: y_i = \sum_p \alpha_i^{(p)} y_i^{(p)}, \qquad \alpha_i^{(p)} = \frac{Z_i^{(p)}}{\sum_{p'} Z_i^{(p')}}

    Pattern :math:`p` cuts the sequence into segments of :math:`w_p` and keeps of each the positions whose number in
    the segment leaves the remainder :math:`h \bmod r_p` by :math:`r_p`, :math:`h` being the head: these attend to
    each other.  :math:`Z` is the denominator of the softmax, so the mixture is one softmax over all patterns, in
    which a key that stands in several counts several times.  A query that no pattern keeps gets zeros.
    :math:`\sum_p n w_p / r_p^2` products for each head: linear in :math:`n`.

    The softmax is taken in float32 or better; key heads that are shared are written out for each query head.  A NaN
    or infinite key or value reaches no query that it is hidden from.

    Args:
        q: queries.
        k: keys, as many as queries; fewer heads are shared by groups of consecutive query heads.
        v: values.
        segments: lengths of the segments, :math:`w_p`.
        dilations: gaps :math:`r_p`, each a divisor of its segment.
        causal: a query sees no later key.
        scale: factor on the scores; :math:`1/\sqrt e` unless given.
        dropout: share of the weights that are dropped; pass 0 outside training.
        backend: ``reference`` is the dense matrix with the logarithm of the counts added to the scores, ``torch``
            (and ``auto``) the gathered segments.

    Raises:
        ShapeError: shapes, heads or dtypes that don't fit, other keys than queries.
        ConfigError: segments and dilations that don't pair, sizes below 1, a dilation that does not divide its segment.

    Source:
        Ding et al. 2023, sections 2.2 and 2.3, arXiv:2307.02486
    """
    check_pattern("longnet attention", q, k, v)
    check_numbers(scale, dropout)
    _check_pairs(segments, dilations)
    if q.shape[1] != k.shape[1]:
        raise ShapeError(
            "longnet attention lengths",
            got=f"{q.shape[1]} queries, {k.shape[1]} keys",
            want="as many queries as keys",
            remedy="Segments are counted from the first position: pass the whole sequence.",
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    pairs = list(zip(segments, dilations, strict=True))
    if resolve("longnet_attention", backend, {"torch": None, "reference": None}) == "reference":
        counts = longnet_counts(q.shape[1], q.shape[2], segments, dilations, causal, device=q.device)
        bias = counts.to(statistic_dtype(q)).log()[None]
        return scaled_dot_product_attention(q, k, v, bias, scale=scale, dropout=dropout, backend="reference")
    # a segment ends with the sequence: what is longer would be padding
    pairs = [(min(w, r * max(1, -(-q.shape[1] // r))), r) for w, r in pairs]
    return shielded(partial(_mixture, pairs, causal, scale), q, k, v, dropout)


def _mixture(
    pairs: list[tuple[int, int]], causal: bool, scale: float, q: Tensor, k: Tensor, v: Tensor, dropout: float
) -> Tensor:
    """One softmax over all of LongNet's patterns."""
    groups = q.shape[2] // k.shape[2]
    k, v = (x if groups == 1 else repeat(x, "b s g e -> b s (g r) e", r=groups) for x in (k, v))
    return join([_segment(q, k, v, w, r, causal, scale, dropout) for w, r in pairs]).to(v.dtype)


def longnet_counts(
    n: int,
    heads: int,
    segments: Sequence[int],
    dilations: Sequence[int],
    causal: bool = False,
    *,
    device: torch.device | str | None = None,
) -> Float[Tensor, "h n n"]:
    r"""Return in how many of LongNet's patterns a query sees a key, for each head.

    .. math:: C_{hij} = \sum_p \big[\lfloor i / w_p \rfloor = \lfloor j / w_p \rfloor\big]\,
        \big[i \equiv h\big]_{r_p} \big[j \equiv h\big]_{r_p}

    :func:`longnet_attention` is full attention with :math:`\log C` added to the scores.

    Args:
        n: positions.
        heads: heads; the remainder is counted within the segment.
        segments: lengths of the segments.
        dilations: gaps.
        causal: without later keys.
        device: where the table is made.

    Raises:
        ConfigError: as for :func:`longnet_attention`, and counts that are negative or fractions.

    Source:
        Ding et al. 2023, sections 2.2 and 2.3, arXiv:2307.02486
    """
    check_size("longnet_counts", "n", n, least=0)
    check_size("longnet_counts", "heads", heads)
    _check_pairs(segments, dilations)
    at, head = torch.arange(n, device=device), torch.arange(heads, device=device)[:, None]
    counts = torch.zeros(heads, n, n, device=device)
    for w, r in zip(segments, dilations, strict=True):
        kept = at % w % r == head % r
        counts += kept[:, :, None] & kept[:, None] & (at[:, None] // w == at // w)
    return counts * (at[:, None] >= at) if causal else counts


def _segment(q: Tensor, k: Tensor, v: Tensor, w: int, r: int, causal: bool, scale: float, dropout: float) -> Partial:
    """One of LongNet's patterns, with zeros where a head keeps no query."""
    (b, t, h), m, n = q.shape[:3], w // r, -(-q.shape[1] // w)
    head = torch.arange(h, device=q.device)
    kept = [F.pad(x, (0, 0, 0, 0, 0, n * w - t)).unflatten(1, (n, m, r)) for x in (q, k, v)]
    kept = [x[:, :, :, head % r, head].flatten(0, 1) for x in kept]
    at = (
        torch.arange(n, device=q.device)[:, None, None] * w + torch.arange(m, device=q.device) * r + (head % r)[:, None]
    )
    seen = (at < t)[:, :, None]
    seen = seen & torch.ones(m, m, dtype=torch.bool, device=q.device).tril() if causal else seen.expand(n, h, m, m)
    part = partial_softmax(kept[0], kept[1], kept[2], seen.repeat(b, 1, 1, 1), scale, dropout)
    spread = []
    for x, empty in zip(part, (0.0, 0.0, -torch.inf), strict=True):
        whole = x.new_full((b, n, m, r, *x.shape[2:]), empty)
        whole[:, :, :, head % r, head] = x.unflatten(0, (b, n))
        spread.append(whole.flatten(1, 3)[:, :t])
    return Partial(*spread)


def _check_pairs(segments: Sequence[int], dilations: Sequence[int]) -> None:
    for sizes in (segments, dilations):
        if not isinstance(sizes, Sequence):
            got = type(sizes).__name__
            raise ConfigError("longnet patterns", got=got, want="lists of sizes", remedy="Pass [64, 256], [1, 4].")
    if len(segments) != len(dilations) or not segments:
        got = f"{len(segments)} segments, {len(dilations)} dilations"
        raise ConfigError("longnet patterns", got=got, want="as many of each, at least one", remedy="They are pairs.")
    for w, r in zip(segments, dilations, strict=True):
        check_size("longnet attention", "segment", w)
        check_size("longnet attention", "dilation", r)
        if w % r:
            raise ConfigError(
                "longnet dilation", got=f"{r} in segments of {w}", want="a divisor", remedy="Powers of two fit."
            )
