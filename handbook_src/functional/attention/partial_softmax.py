"""A softmax in parts: attention over some keys now, over others later, joined without loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from handbook_src.precision import statistic_dtype


class Partial(NamedTuple):
    """What one set of keys adds to a softmax: weighted values, the weights' sum, and the largest score."""

    numerator: Float[Tensor, "b t h c"]
    denominator: Float[Tensor, "b t h"]
    top: Float[Tensor, "b t h"]


def partial_softmax(
    q: Float[Tensor, "b t h e"],
    k: Float[Tensor, "b s g e"],
    v: Float[Tensor, "b s g c"],
    seen: Bool[Tensor, "#b #h #t s"] | None,
    scale: float,
    dropout: float = 0.0,
) -> Partial:
    r"""Return numerator and denominator of an attention apart, so that others can be added.

    .. math:: m_i = \max_j a_{ij}, \qquad N_i = \sum_j e^{a_{ij} - m_i} v_j, \qquad Z_i = \sum_j e^{a_{ij} - m_i},
        \qquad a_{ij} = \frac{q_i \cdot k_j}{\sqrt e}

    Computed in float32 or better.  A query that sees no key has :math:`N = Z = 0` and :math:`m = -\infty`.

    Args:
        q: queries.
        k: keys; fewer heads are shared by groups of consecutive query heads.
        v: values.
        seen: true where the query may attend.
        scale: factor on the scores.
        dropout: share of the weights that are dropped from the numerator, as after a softmax.

    Source:
        Milakov & Gimelshein 2018, section 3, arXiv:1805.02867
    """
    wide, (h, g) = statistic_dtype(q), (q.shape[2], k.shape[2])
    grouped = rearrange(q.to(wide) * scale, "b t (g r) e -> b g (r t) e", g=g)
    keys, values = (rearrange(x.to(wide), "b s g e -> b g s e") for x in (k, v))
    scores = rearrange(grouped @ keys.mT, "b g (r t) s -> b (g r) t s", r=h // g)
    if seen is not None:
        scores = scores.masked_fill(~seen, -math.inf)
    top = scores.detach().amax(-1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], -math.inf)
    weights = (scores - top.masked_fill(top.isneginf(), 0.0)[..., None]).exp()
    total = weights.sum(-1)
    weights = F.dropout(weights, dropout) if dropout else weights
    mixed = rearrange(weights, "b (g r) t s -> b g (r t) s", g=g) @ values
    return Partial(rearrange(mixed, "b g (r t) c -> b t (g r) c", r=h // g), total.transpose(1, 2), top.transpose(1, 2))


def join(parts: Sequence[Partial]) -> Float[Tensor, "b t h c"]:
    r"""Join parts over different keys to the attention over all of them; a query that saw none gets zeros.

    .. math:: y_i = \frac{\sum_p e^{m_i^{(p)} - m_i} N_i^{(p)}}{\sum_p e^{m_i^{(p)} - m_i} Z_i^{(p)}},
        \qquad m_i = \max_p m_i^{(p)}

    A key that stands in two parts counts twice.

    Args:
        parts: of the same queries.

    Source:
        Milakov & Gimelshein 2018, section 3, arXiv:1805.02867; Ding et al. 2023, section 2.2, arXiv:2307.02486
    """
    top = torch.stack([p.top for p in parts]).amax(0)
    top = top.masked_fill(top.isneginf(), 0.0)
    factors = [(p.top - top).exp() for p in parts]
    numerator = reduce(torch.add, (p.numerator * f[..., None] for p, f in zip(parts, factors, strict=True)))
    denominator = reduce(torch.add, (p.denominator * f for p, f in zip(parts, factors, strict=True)))
    return numerator / denominator.masked_fill(denominator == 0, 1.0)[..., None]
