"""The Sparse Transformer's two factorised patterns, each in two halves or joined in one softmax."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from handbook_src.check import check_size
from handbook_src.dispatch import Backend, resolve
from handbook_src.errors import ConfigError
from handbook_src.functional.attention.attention import (
    check_numbers,
    scaled_dot_product_attention,
    shielded,
    under_rule,
)
from handbook_src.functional.attention.chunked_attention import check_pattern, chunked_attention
from handbook_src.functional.attention.dilated_attention import dilated_attention
from handbook_src.functional.attention.mask import Mask, block, causal, dilated, fixed, strided, window
from handbook_src.functional.attention.partial_softmax import Partial, join, partial_softmax

StridedPart = Literal["both", "local", "column"]
FixedPart = Literal["both", "local", "summary"]


def strided_attention(
    q: Float[Tensor, "b t h e"],
    k: Float[Tensor, "b s g e"],
    v: Float[Tensor, "b s g c"],
    stride: int,
    *,
    part: StridedPart = "both",
    scale: float | None = None,
    dropout: float = 0.0,
    backend: Backend = "auto",
) -> Float[Tensor, "b t h c"]:
    r"""Attend to the ``stride`` positions before the query, and to every ``stride``-th one.

    .. math:: A_i^{(1)} = \{\max(0, i - l), \dots, i\}, \qquad
        A_i^{(2)} = \{\, j \le i : (i - j) \bmod l = 0 \,\}

    With :math:`l \approx \sqrt n` both are of size :math:`O(\sqrt n)`, and two steps lead from any position to any
    later one.  The local half runs as a window in blocks, the column half as :math:`l` streams of :math:`n / l`
    positions; ``both`` is one softmax over the union, of two parts that share no key.

    Joined, the scores of a block and of a stream are written out, :math:`n (2 l + n / l)` of them, in float32 or
    better.  Queries that are fewer than the keys (a cache) are attended densely under the rule.  A NaN or infinite key
    or value reaches no query that it is hidden from.

    Args:
        q: queries, the last ``t`` of ``s`` positions.
        k: keys; fewer heads are shared by groups of consecutive query heads.
        v: values.
        stride: :math:`l`; for pictures the width.
        part: ``local`` is :math:`A^{(1)}`, ``column`` is :math:`A^{(2)}`, ``both`` their union ("merged head").
        scale: factor on the scores; :math:`1/\sqrt e` unless given.
        dropout: share of the weights that are dropped; pass 0 outside training.
        backend: ``reference`` is the dense masked matrix, ``torch`` (and ``auto``) the blocks and streams.

    Raises:
        ShapeError: shapes, heads or dtypes that don't fit, more queries than keys.
        ConfigError: ``stride`` below 1, a part that is none, ``dropout`` or ``scale`` out of range.

    Source:
        Child et al. 2019, sections 4.2 and 4.3, arXiv:1904.10509
    """
    _check_strided(stride, part)
    check_pattern("strided attention", q, k, v)
    check_numbers(scale, dropout)
    chosen = resolve("strided_attention", backend, {"torch": None, "reference": None})
    if chosen == "torch" and part == "both" and q.shape[1] == k.shape[1] and q.shape[1] * len(q) > 0:
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return shielded(partial(_strided, min(stride, q.shape[1]), scale), q, k, v, dropout)  # beyond, all is near
    if chosen == "torch" and part != "both" and q.shape[1] == k.shape[1]:  # which shields itself
        reach, gap = (stride + 1, 1) if part == "local" else (-(-q.shape[1] // stride), stride)
        return dilated_attention(q, k, v, max(reach, 1), gap, causal=True, scale=scale, dropout=dropout)
    return under_rule(strided_rule(stride, part), chosen, q, k, v, scale, dropout)


def _strided(stride: int, scale: float, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """One softmax over both sets, in parts that share no key."""
    t = q.shape[1]
    missing = -t % stride  # the padding stands last, where no causal query looks
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x for x in (q, k, v))
    parts = [_nearest(q, k, v, stride, scale, dropout), _columns(q, k, v, stride, scale, dropout)]
    return join(parts)[:, :t].to(v.dtype)


def strided_rule(stride: int, part: StridedPart = "both") -> Mask:
    r"""Return the rule that :func:`strided_attention` obeys.

    .. math:: M(t, s) = [s \le t] \land \big( [t - s \le l] \lor [(t - s) \bmod l = 0] \big)

    Args:
        stride: :math:`l`.
        part: both sets, or one.

    Raises:
        ConfigError: ``stride`` below 1, a part that is none.

    Source:
        Child et al. 2019, section 4.3, arXiv:1904.10509
    """
    _check_strided(stride, part)
    rules = {"both": strided(stride), "local": causal & window(stride + 1), "column": causal & dilated(stride)}
    return rules[part]


def fixed_attention(
    q: Float[Tensor, "b t h e"],
    k: Float[Tensor, "b s g e"],
    v: Float[Tensor, "b s g c"],
    stride: int,
    summary: int = 1,
    *,
    part: FixedPart = "both",
    scale: float | None = None,
    dropout: float = 0.0,
    backend: Backend = "auto",
) -> Float[Tensor, "b t h c"]:
    r"""Attend within the query's block, and to the last ``summary`` positions of every block before.

    .. math:: A_i^{(1)} = \{\, j \le i : \lfloor j / l \rfloor = \lfloor i / l \rfloor \,\}, \qquad
        A_i^{(2)} = \{\, j \le i : j \bmod l \ge l - c \,\}

    The last positions of a block are what later blocks read of it.  A block's queries get its own keys and all
    summaries as one list, so ``both`` is a single softmax by one call: :math:`n (l + c n / l)` products.  With
    ``part="summary"`` the first :math:`l - c` queries see nothing and get zeros.

    Queries that are fewer than the keys (a cache) are attended densely under the rule.  A NaN or infinite key or value
    reaches no query that it is hidden from.

    Args:
        q: queries, the last ``t`` of ``s`` positions.
        k: keys; fewer heads are shared by groups of consecutive query heads.
        v: values.
        stride: length of a block, :math:`l`.
        summary: positions of a block that all later ones see, :math:`c`.
        part: ``local`` is :math:`A^{(1)}`, ``summary`` is :math:`A^{(2)}`, ``both`` their union ("merged head").
        scale: factor on the scores; :math:`1/\sqrt e` unless given.
        dropout: share of the weights that are dropped; pass 0 outside training.
        backend: ``reference`` is the dense masked matrix, ``torch`` (and ``auto``) the blocks and summaries.

    Raises:
        ShapeError: shapes, heads or dtypes that don't fit, more queries than keys.
        ConfigError: ``stride`` below 1, ``summary`` outside 1 to ``stride``, a part that is none, ``dropout`` or
            ``scale`` out of range.

    Source:
        Child et al. 2019, sections 4.2 and 4.3, arXiv:1904.10509
    """
    _check_fixed(stride, summary, part)
    check_pattern("fixed attention", q, k, v)
    check_numbers(scale, dropout)
    chosen = resolve("fixed_attention", backend, {"torch": None, "reference": None})
    (b, t), s = q.shape[:2], k.shape[1]
    if chosen == "reference" or t < s or t * b == 0:
        return under_rule(fixed_rule(stride, summary, part), chosen, q, k, v, scale, dropout)
    if part == "local" or (t <= stride and part == "both"):  # which shields itself
        return chunked_attention(q, k, v, stride, causal=True, scale=scale, dropout=dropout)
    if stride > t:  # one block that is cut off; of its summary stands what stands before the end
        stride, summary = t, max(summary - (stride - t), 0)
    return shielded(partial(_fixed, stride, summary, part, scale), q, k, v, dropout)


def _fixed(
    stride: int, summary: int, part: FixedPart, scale: float | None, q: Tensor, k: Tensor, v: Tensor, dropout: float
) -> Tensor:
    """A block's queries over its own keys and all summaries, or over the summaries alone."""
    b, t = q.shape[:2]
    n, at = -(-t // stride), torch.arange(t, device=q.device)
    ends = torch.arange(n, device=q.device)[:, None] * stride + torch.arange(stride - summary, stride, device=q.device)
    ends = ends.flatten()[: t // stride * summary + max(t % stride - stride + summary, 0)]
    if part == "summary":
        seen = at[:, None] >= ends
        return scaled_dot_product_attention(q, k[:, ends], v[:, ends], seen, scale=scale, dropout=dropout)
    k_ends, v_ends = (x[:, ends] for x in (k, v))
    q, k, v = (_blocks(x, stride) for x in (q, k, v))
    k, v = (torch.cat([x, repeat(y, "b s g e -> (b n) s g e", n=n)], 1) for x, y in ((k, k_ends), (v, v_ends)))
    own = torch.ones(stride, stride, dtype=torch.bool, device=q.device).tril().expand(n, -1, -1)
    earlier = ends // stride < torch.arange(n, device=q.device)[:, None]
    seen = torch.cat([own, earlier[:, None].expand(-1, stride, -1)], -1).repeat(b, 1, 1)[:, None]
    out = scaled_dot_product_attention(q, k, v, seen, scale=scale, dropout=dropout)
    return rearrange(out, "(b n) l h e -> b (n l) h e", n=n)[:, :t]


def fixed_rule(stride: int, summary: int = 1, part: FixedPart = "both") -> Mask:
    r"""Return the rule that :func:`fixed_attention` obeys.

    .. math:: M(t, s) = [s \le t] \land
        \big( [\lfloor t / l \rfloor = \lfloor s / l \rfloor] \lor [s \bmod l \ge l - c] \big)

    Args:
        stride: length of a block, :math:`l`.
        summary: positions of a block that all later ones see, :math:`c`.
        part: both sets, or one.

    Raises:
        ConfigError: ``stride`` below 1, ``summary`` outside 1 to ``stride``, a part that is none.

    Source:
        Child et al. 2019, section 4.3, arXiv:1904.10509
    """
    _check_fixed(stride, summary, part)
    ends = Mask(f"ends({stride}, {summary})", lambda b, h, t, s: s % stride >= stride - summary)
    rules = {"both": fixed(stride, summary), "local": causal & block(stride), "summary": causal & ends}
    return rules[part]


def _nearest(q: Tensor, k: Tensor, v: Tensor, stride: int, scale: float, dropout: float) -> Partial:
    """The query and the ``stride - 1`` keys before it, in blocks that see themselves and the one before."""
    n = q.shape[1] // stride
    q, k, v = (_blocks(x, stride) for x in (q, k, v))
    pairs = (x.unflatten(0, (-1, n)) for x in (k, v))
    k, v = (torch.cat([F.pad(x[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0)), x], 2).flatten(0, 1) for x in pairs)
    at, slot = torch.arange(stride, device=q.device)[:, None], torch.arange(2 * stride, device=q.device)
    seen = (slot <= at + stride) & (slot > at)
    first = seen & (slot >= stride)  # before the first block stands nothing
    seen = torch.cat([first[None], seen.expand(n - 1, -1, -1)]).repeat(len(q) // n, 1, 1)[:, None]
    return _unblocked(partial_softmax(q, k, v, seen, scale, dropout), "(b n) l ... -> b (n l) ...", n=n)


def _columns(q: Tensor, k: Tensor, v: Tensor, stride: int, scale: float, dropout: float) -> Partial:
    """The keys ``stride``, ``2 * stride``, ... positions before the query."""
    n = q.shape[1] // stride
    q, k, v = (rearrange(x, "b (n l) h e -> (b l) n h e", l=stride) for x in (q, k, v))
    before = torch.ones(n, n, dtype=torch.bool, device=q.device).tril(-1)[None, None]
    return _unblocked(partial_softmax(q, k, v, before, scale, dropout), "(b l) n ... -> b (n l) ...", l=stride)


def _unblocked(part: Partial, pattern: str, **sizes: int) -> Partial:
    return Partial(*(rearrange(x, pattern, **sizes) for x in part))


def _blocks(x: Tensor, size: int) -> Tensor:
    missing = -x.shape[1] % size
    x = F.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x
    return rearrange(x, "b (n l) h e -> (b n) l h e", l=size)


def _check_strided(stride: int, part: str) -> None:
    check_size("strided attention", "stride", stride)
    _check_part("strided attention", part, ("both", "local", "column"))


def _check_fixed(stride: int, summary: int, part: str) -> None:
    check_size("fixed attention", "stride", stride)
    check_size("fixed attention", "summary", summary)
    if summary > stride:
        remedy = "With summary = stride it is causal attention."
        raise ConfigError("fixed attention summary", got=summary, want=f"at most the stride {stride}", remedy=remedy)
    _check_part("fixed attention", part, ("both", "local", "summary"))


def _check_part(op: str, part: str, parts: tuple[str, ...]) -> None:
    if part not in parts:
        raise ConfigError(f"{op} part", got=repr(part), want=f"one of {list(parts)}", remedy="Pass part='both'.")
