"""Sliding-window attention: time and memory that grow with the length, not with its square."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from handbook_src.check import check_size, known_finite
from handbook_src.dispatch import Backend, resolve
from handbook_src.functional.attention.attention import (
    check_numbers,
    check_qkv,
    refuse,
    scaled_dot_product_attention,
    under_rule,
    without_nan,
)
from handbook_src.functional.attention.block_sparse import attend, rows_first
from handbook_src.functional.attention.mask import Mask, full, window
from handbook_src.functional.attention.mask import causal as causal_rule


def window_rule(n: int, causal: bool = False) -> Mask:
    """``window(n)``, or ``causal & window(n)``: always the same object, so that its plans are kept."""
    check_size("window_rule", "n", n)
    return _kept(int(n), bool(causal))


@lru_cache(maxsize=64)
def _kept(n: int, causal: bool) -> Mask:
    return causal_rule & window(n) if causal else window(n)


def sliding_window_attention(
    q: Float[Tensor, "b t h e"],
    k: Float[Tensor, "b s g e"],
    v: Float[Tensor, "b s g c"],
    window: int,
    *,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    block_size: int | None = None,
    backend: Backend = "auto",
) -> Float[Tensor, "b t h c"]:
    r"""Scaled dot-product attention in which a query sees only the keys near it.

    .. math::
        y_t = \sum_{s \in N(t)}
            \frac{\exp(q_t^\top k_s / \sqrt e)}{\sum_{r \in N(t)} \exp(q_t^\top k_r / \sqrt e)}\, v_s,
            \qquad N(t) = \{\, s : |t - s| < n \,\}

    Causal: :math:`N(t) = \{ s : 0 \le t - s < n \}`, ``n`` keys with the query's own.

    A block of queries reads one stretch of keys; the stretches of neighbouring blocks overlap,
    and are a strided view of one buffer: forward, no key is copied twice.  The work is
    proportional to ``t (window + block_size)``.  A query that sees nothing gets zeros; a NaN or
    infinite key or value reaches no query that it is hidden from, forward or backward.

    Args:
        q: queries, the last ``t`` of ``s`` positions.
        k: keys; fewer heads than ``q`` are shared by groups of consecutive query heads.
        v: values.
        window: the distance ``n`` from which on a key is hidden; Longformer's ``w`` counts both
            sides and is ``2 (n - 1)``, Mistral's is ``n``.
        causal: whether later keys are hidden as well.
        scale: factor on the scores; :math:`1/\sqrt e` unless given.
        dropout: share of the weights that are dropped; pass 0 outside training.
        block_size: queries that share a stretch of keys; 32, or 64 where gradients are needed.
        backend: ``torch`` (and ``auto``) works by blocks; ``reference`` is the dense masked formula.

    Raises:
        ConfigError: ``window`` or ``block_size`` is not an integer of at least 1; a bad ``scale`` or ``dropout``.
        ShapeError: shapes that don't fit, heads that don't divide, more queries than keys.

    Source:
        Beltagy et al. 2020, section 3.1, arXiv:2004.05150; Jiang et al. 2023, section 2, arXiv:2310.06825
    """
    check_size("sliding_window_attention", "window", window)
    check_qkv(q, k, v)
    check_numbers(scale, dropout)
    (b, t, h, e), s = q.shape, k.shape[1]
    if t > s:
        refuse(
            "queries under a window", f"t={t} queries for s={s} keys", "t <= s", "The queries are the last positions."
        )
    if block_size is None:  # measured on a CPU: 32 is up to 1.3 times as fast forward, 64 forward and backward
        block_size = 64 if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad) else 32
    check_size("sliding_window_attention", "block_size", block_size)
    chosen = resolve("sliding_window_attention", backend, {"torch": None, "reference": None})
    if chosen == "reference":
        rule = window_rule(int(window), causal)
        return scaled_dot_product_attention(q, k, v, rule, scale=scale, dropout=dropout, backend="reference")
    if window >= s or 0 in (b, t, h, v.shape[-1]):  # nothing to save, or nothing to do
        return _whole(q, k, v, causal, scale, dropout)
    scale = 1 / math.sqrt(e) if scale is None else scale
    if known_finite(q, k, v):
        return _banded(q, k, v, int(window), causal, min(block_size, t), scale, dropout)
    (q, k, v), (bad_q, bad_k, bad_v) = without_nan(q, k, v)
    broken = bad_q | _near(bad_k | bad_v, t, window, causal).repeat_interleave(h // k.shape[2], 2)
    out = _banded(q, k, v, int(window), causal, min(block_size, t), scale, dropout)
    return out.masked_fill(broken[..., None], math.nan)


def _whole(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None, dropout: float) -> Tensor:
    """Every key is within the window."""
    return under_rule(causal_rule if causal else full, "auto", q, k, v, scale, dropout)


def _banded(
    q: Tensor, k: Tensor, v: Tensor, window: int, causal: bool, size: int, scale: float, dropout: float
) -> Tensor:
    (b, t, h, _), s = q.shape, k.shape[1]
    n, ahead = -(-t // size), 0 if causal else window - 1
    before = min(window - 1, s - t)  # keys before the first query that it sees
    k, v = k[:, s - t - before :], v[:, s - t - before :]
    length = window - 1 + size + ahead
    q = rows_first(q, n * size).unflatten(0, (n, size)).transpose(1, 2)
    k, v = (_stretches(x, window - 1 - before, length, size, n) for x in (k, v))
    inner, offset = torch.arange(size, device=q.device)[:, None], torch.arange(length, device=q.device) - (window - 1)
    band = (inner - offset < window) & (offset - inner <= ahead)
    # keys that don't exist: before the first, in the first blocks, and after the last, in the last ones
    first = min(n, -(-(window - 1 - before) // size))
    last = min(n - first, -(-max(0, n * size + ahead - t) // size))
    parts = [(0, first), (first, n - last), (n - last, n)]
    outs = []
    for start, stop in parts:
        if start == stop:
            continue
        mask: Tensor | None = band[None, None]
        if (start, stop) != parts[1]:
            key = torch.arange(start, stop, device=q.device)[:, None] * size + offset
            mask = band & ((key >= -before) & (key < t))[:, None, None]
        elif size == 1:
            mask = None  # a single query sees its whole stretch: decoding
        outs.append(attend(q[start:stop], k[start:stop], v[start:stop], mask, scale, dropout))
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    return out.transpose(1, 2).flatten(0, 1)[:t].unflatten(1, (b, h)).transpose(0, 1)


def _stretches(x: Tensor, missing: int, length: int, size: int, blocks: int) -> Tensor:
    """The keys of each block of queries, ``blocks b*h length features``: overlapping views of one buffer."""
    x = rows_first(x, x.shape[1])
    behind = max(0, (blocks - 1) * size + length - missing - x.shape[0])
    x = torch.nn.functional.pad(x, (0, 0, 0, 0, missing, behind))
    return x.unfold(0, length, size).transpose(2, 3)


def _near(bad: Tensor, t: int, window: int, causal: bool) -> Tensor:
    """Queries, ``b t g``, that may see a marked key: differences of a running count."""
    s = bad.shape[1]
    count = torch.nn.functional.pad(bad.long().cumsum(1), (0, 0, 1, 0))
    position = torch.arange(s - t, s, device=bad.device)
    until = position + 1 if causal else (position + window).clamp(max=s)
    return count[:, until] > count[:, (position - window + 1).clamp(min=0)]
