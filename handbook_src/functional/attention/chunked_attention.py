"""Attention in chunks: a sequence cut into blocks that don't see each other."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from handbook_src.check import check_size
from handbook_src.dispatch import Backend, resolve
from handbook_src.errors import ShapeError
from handbook_src.functional.attention.attention import check_numbers, check_qkv, scaled_dot_product_attention, shielded
from handbook_src.functional.attention.mask import Mask, block, padding
from handbook_src.functional.attention.mask import causal as causal_rule


def chunked_attention(
    q: Float[Tensor, "b t h e"],
    k: Float[Tensor, "b s g e"],
    v: Float[Tensor, "b s g c"],
    chunk: int,
    *,
    causal: bool = False,
    lengths: Int[Tensor, " b"] | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: Backend = "auto",
) -> Float[Tensor, "b t h c"]:
    r"""Attend within blocks of ``chunk`` positions: the mask is block-diagonal.

    .. math:: y_i = \sum_{j \in A_i} \operatorname{softmax}_{j \in A_i}\!\Big(\frac{q_i \cdot k_j}{\sqrt e}\Big)\, v_j,
        \qquad A_i = \{\, j : \lfloor j / l \rfloor = \lfloor i / l \rfloor \,\}

    Equal to full attention under the rule ``block(chunk)``, at :math:`n l` instead of :math:`n^2` products:
    chunks become samples by a reshape, which copies nothing, and a last chunk that is shorter is attended by itself.

    A NaN or infinite key or value reaches no query that it is hidden from, forward or backward.

    Args:
        q: queries, the last ``t`` of ``s`` positions.
        k: keys; fewer heads are shared by groups of consecutive query heads.
        v: values.
        chunk: positions of a block, :math:`l`; positions are counted from the first key.
        causal: within its chunk a query sees no later key.
        lengths: of each sample, where the batch is padded on the right.
        scale: factor on the scores; :math:`1/\sqrt e` unless given.
        dropout: share of the weights that are dropped; pass 0 outside training.
        backend: of the attention within the chunks.

    Raises:
        ShapeError: shapes, heads or dtypes that don't fit, more queries than keys, lengths that are not one a sample.
        ConfigError: ``chunk`` below 1, ``dropout`` or ``scale`` out of range.

    Source:
        Child et al. 2019, section 4.3 (the first fixed pattern), arXiv:1904.10509; Qiu et al. 2019
        (blocks permuted by head), arXiv:1911.02972
    """
    check_size("chunked attention", "chunk", chunk)
    check_pattern("chunked attention", q, k, v, lengths)
    check_numbers(scale, dropout)
    chosen = resolve("chunked_attention", backend, {"torch": None, "reference": None})

    attend = partial(_chunks, chunk, causal, lengths, scale, chosen)
    return attend(q, k, v, dropout) if chosen == "reference" else shielded(attend, q, k, v, dropout)


def _chunks(
    chunk: int,
    causal: bool,
    lengths: Tensor | None,
    scale: float | None,
    backend: Backend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float,
) -> Tensor:
    """Chunks as samples, a shorter last one by itself."""
    t, s = q.shape[1], k.shape[1]
    first = (s - t) // chunk * chunk  # earlier chunks hold no query
    ahead = s - t - first
    k, v = k[:, first:], v[:, first:]
    q = F.pad(q, (0, 0, 0, 0, ahead, 0)) if ahead else q
    seen = None
    if lengths is not None:
        seen = torch.arange(first, s, device=q.device) < lengths.to(q.device)[:, None]
    whole = q.shape[1] // chunk * chunk
    parts = []
    for cut, size in ((slice(0, whole), chunk), (slice(whole, None), q.shape[1] - whole)):
        if size and q[:, cut].shape[1]:
            rows, keys, values = (rearrange(x[:, cut], "b (n l) h e -> (b n) l h e", l=size) for x in (q, k, v))
            mask = None if seen is None else rearrange(seen[:, cut], "b (n l) -> (b n) 1 1 l", l=size)
            out = scaled_dot_product_attention(
                rows, keys, values, mask, causal=causal, scale=scale, dropout=dropout, backend=backend
            )
            parts.append(rearrange(out, "(b n) l h e -> b (n l) h e", n=q[:, cut].shape[1] // size))
    if not parts:
        return scaled_dot_product_attention(q, k, v, scale=scale, dropout=dropout, backend=backend)
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1))[:, ahead:]


def chunk_rule(chunk: int, causal: bool = False) -> Mask:
    r"""Return the rule that :func:`chunked_attention` obeys.

    .. math:: M(t, s) = [\lfloor t / l \rfloor = \lfloor s / l \rfloor]

    Args:
        chunk: positions of a block, :math:`l`.
        causal: joined with :math:`s \le t`.

    Raises:
        ConfigError: ``chunk`` below 1.

    Source:
        Child et al. 2019, section 4.3, arXiv:1904.10509
    """
    check_size("chunked attention", "chunk", chunk)
    return causal_rule & block(chunk) if causal else block(chunk)


def check_pattern(op: str, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> None:
    """Check what every attention under a fixed pattern wants of its inputs.

    Args:
        op: the operation's name, for messages.
        q: queries.
        k: keys.
        v: values.
        lengths: of each sample, if given.

    Raises:
        ShapeError: shapes, heads or dtypes that don't fit, more queries than keys, lengths that are not one a sample.
    """
    check_qkv(q, k, v)
    t, s = q.shape[1], k.shape[1]
    if t > s:
        want = "t <= s, the queries being the last positions"
        raise ShapeError(f"{op} lengths", got=f"t={t} queries for s={s} keys", want=want, remedy="Pass all keys.")
    if lengths is not None:
        check_lengths(op, lengths, q)


def check_lengths(op: str, lengths: Tensor, x: Tensor) -> None:
    """Refuse lengths that are not one integer for each sample of ``x``."""
    padding(lengths)
    if x.ndim and len(lengths) != len(x):
        got = f"{len(lengths)} for a batch of {len(x)}"
        raise ShapeError(f"{op} lengths", got=got, want="one a sample", remedy="Pass a tensor of shape (b,).")
