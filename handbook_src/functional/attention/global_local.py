"""Longformer's attention: a window for most positions, and a few that see all and are seen by all."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from handbook_src.check import check_size, known_finite
from handbook_src.dispatch import Backend
from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.attention import check_alike, check_qkv, scaled_dot_product_attention
from handbook_src.functional.attention.block_sparse import block_sparse_attention
from handbook_src.functional.attention.mask import Mask, marked, window
from handbook_src.functional.attention.mask import causal as causal_rule

#: positions that all samples share, or marks, one row a sample
Positions = Sequence[int] | Bool[Tensor, "b s"]


def global_local_rule(window: int, positions: Positions, *, causal: bool = False, rows: bool = True) -> Mask:
    r"""Return Longformer's rule: near, or global.

    .. math:: M(t, s) = [\,|t - s| < n\,] \lor [s \in G] \lor [t \in G]

    The rule of positions that all samples share is made once, so that its plans are kept.

    Args:
        window: the distance ``n`` from which on a key is hidden from a position that is not global.
        positions: :math:`G`, as numbers, or as marks (true = global) for each sample.
        causal: whether later keys are hidden, from global positions as well.
        rows: whether global positions see all; without, they are only seen by all.

    Raises:
        ConfigError: ``window`` is not an integer of at least 1, or a position is not one of at least 0.
        ShapeError: marks that are not a boolean matrix.

    Source:
        Beltagy et al. 2020, section 3.1, arXiv:2004.05150
    """
    check_size("global_local_attention", "window", window)
    if isinstance(positions, Tensor):
        return _near_or(window, marked(positions, rows=rows), causal)
    return _kept(int(window), position_numbers(positions), bool(causal), bool(rows))


def global_local_attention(
    q: Float[Tensor, "b t h e"],
    k: Float[Tensor, "b s g e"],
    v: Float[Tensor, "b s g c"],
    window: int,
    positions: Positions,
    *,
    global_qkv: tuple[Tensor, Tensor, Tensor] | None = None,
    causal: bool = False,
    mask: Mask | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    block_size: int = 64,
    backend: Backend = "auto",
) -> Float[Tensor, "b t h c"]:
    r"""Attend within a window, to the global positions, and from the global positions to all.

    .. math::
        y_t = \begin{cases}
            \operatorname{Attention}\big(q_t,\; K_{N(t) \cup G},\; V_{N(t) \cup G}\big) & t \notin G \\
            \operatorname{Attention}\big(q^g_t,\; K^g,\; V^g\big) & t \in G
        \end{cases}

    Longformer gives the second line projections of its own; without ``global_qkv`` both lines
    use the same, and the result is dense attention under :func:`global_local_rule`.  A local
    query reads the global keys from ``k`` and ``v``, as the published code does.

    Computed by blocks: the work grows with ``t (window + |G|)``.

    Args:
        q: queries; without ``global_qkv`` they may be the last ``t`` of ``s`` positions.
        k: keys; fewer heads than ``q`` are shared by groups of consecutive query heads.
        v: values.
        window: the distance ``n`` from which on a key is hidden; Longformer's ``attention_window``
            counts both sides and is ``2 (n - 1)``.
        positions: global positions, as numbers, or as marks (true = global) for each sample.
        global_qkv: :math:`q^g, K^g, V^g`, the queries for the positions in their order (for marks:
            for all ``t`` positions), the keys and values for all.
        causal: whether later keys are hidden, from global positions as well.
        mask: a further rule, for instance ``padding(lengths)``; joined by *and*.
        scale: factor on the scores; :math:`1/\sqrt e` unless given.
        dropout: share of the weights that are dropped; pass 0 outside training.
        block_size: positions of a block.
        backend: ``reference`` is the dense masked formula; ``torch`` and ``auto`` work by blocks.

    Raises:
        ConfigError: a bad ``window``, position, ``scale``, ``dropout`` or ``block_size``; a mask that is no rule.
        ShapeError: shapes that don't fit each other, a position that is not there.

    Source:
        Beltagy et al. 2020, section 3.1, arXiv:2004.05150
    """
    check_qkv(q, k, v)
    if mask is not None and not isinstance(mask, Mask):
        raise ConfigError(
            "global_local_attention mask", got=type(mask).__name__, want="a Mask", remedy="Use padding(lengths)."
        )
    rule = global_local_rule(window, positions, causal=causal, rows=global_qkv is None)
    if not isinstance(positions, Tensor) and max(position_numbers(positions), default=-1) >= k.shape[1]:
        raise ShapeError(
            "global position", got=max(positions), want=f"below {k.shape[1]} keys", remedy="Name positions that exist."
        )
    if isinstance(positions, Tensor) and positions.shape != (len(q), k.shape[1]):
        want = f"{(len(q), k.shape[1])}, one mark for each key"
        raise ShapeError("global marks", got=tuple(positions.shape), want=want, remedy="Mark every position.")
    index = None if global_qkv is None else _index(q, k, v, positions, global_qkv)
    rule = rule if mask is None else rule & mask
    out = block_sparse_attention(q, k, v, rule, block_size=block_size, scale=scale, dropout=dropout, backend=backend)
    if global_qkv is None or index is None or index.shape[1] == 0:
        return out
    return _with_global_rows(out, index, positions, global_qkv, causal, mask, scale, dropout, backend)


def _with_global_rows(
    out: Tensor,
    index: Tensor,
    positions: Positions,
    global_qkv: tuple[Tensor, Tensor, Tensor],
    causal: bool,
    mask: Mask | None,
    scale: float | None,
    dropout: float,
    backend: Backend,
) -> Tensor:
    """Put the answers of the global queries, ``index`` (``b n``), in the place of the local ones."""
    q, k, v = global_qkv
    marks = isinstance(positions, Tensor)
    where = index[:, :, None, None]
    if marks:
        q = q.gather(1, where.expand(-1, -1, *q.shape[2:]))
    rule, seen = (causal_rule if causal else None), None
    if mask is not None:
        rule = mask if rule is None else rule & mask
    if rule is not None:
        b = torch.arange(len(index), device=q.device).view(-1, 1, 1, 1)
        h = torch.arange(q.shape[2], device=q.device).view(-1, 1, 1)
        keys = torch.arange(k.shape[1], device=q.device)
        seen = rule.allows(b, h, index[:, None, :, None], keys).expand(len(index), -1, -1, len(keys))
    if seen is not None and not known_finite(q, k, v):
        backend = "reference"  # for its shield: the rows are few
    rows = scaled_dot_product_attention(q, k, v, seen, scale=scale, dropout=dropout, backend=backend)
    where = where.expand_as(rows)
    if marks:  # samples with fewer global positions keep their local answers
        assert isinstance(positions, Tensor)
        rows = torch.where(positions.gather(1, index)[:, :, None, None], rows, out.gather(1, where))
    return out.scatter(1, where, rows)


def _index(q: Tensor, k: Tensor, v: Tensor, positions: Positions, global_qkv: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Where the global queries stand, ``b n``; refuses projections of other shapes."""
    b, t, h, _ = q.shape
    if isinstance(positions, Tensor):
        most, rows = int(positions.sum(1).max()) if positions.numel() else 0, t
        index = (~positions).to(torch.int8).argsort(dim=1, stable=True)[:, :most]
    else:
        index = torch.tensor(position_numbers(positions), device=q.device).long().expand(b, -1)
        rows = index.shape[1]
    if not isinstance(global_qkv, Sequence) or len(global_qkv) != 3:
        raise ConfigError("global_qkv", got=type(global_qkv).__name__, want="q, k and v", remedy="Pass all three.")
    check_alike(q, *global_qkv)
    check_qkv(*global_qkv)
    got, keys, values = (tuple(x.shape) for x in global_qkv)
    if t != k.shape[1] or got[:3] != (b, rows, h) or keys[:2] != (b, t) or values[3] != v.shape[3]:
        raise ShapeError(
            "global_qkv",
            got=f"{[got, keys, values]} for {t} queries, {k.shape[1]} keys",
            want=f"queries ({b}, {rows}, {h}, e), keys ({b}, {t}, g, e), values ({b}, {t}, g, {v.shape[3]}), all t = s",
            remedy="Project the global positions for the queries, all positions for keys and values.",
        )
    return index


def position_numbers(positions: Sequence[int]) -> tuple[int, ...]:
    """Global positions as integers, each once, in their order; refuses what is none."""
    try:
        numbers = tuple(positions)
    except TypeError as e:
        raise ConfigError(
            "global positions", got=repr(positions), want="integers, or marks of each sample", remedy="Pass [0]."
        ) from e
    for p in numbers:
        check_size("global_local_attention", "position", p, least=0)
    return tuple(dict.fromkeys(int(p) for p in numbers))


@lru_cache(maxsize=64)
def _kept(n: int, positions: tuple[int, ...], causal: bool, rows: bool) -> Mask:
    text = f"global_{'tokens' if rows else 'keys'}({', '.join(map(str, positions))})"

    def either(b, h, t, s):  # type: ignore[no-untyped-def]  # tensors, or spans of them
        found = (s < 0) | (t < 0)
        for p in positions:
            found = found | (s == p) | (t == p) if rows else found | (s == p)
        return found

    return _near_or(n, Mask(text, either), causal)


def _near_or(n: int, rule: Mask, causal: bool) -> Mask:
    return causal_rule & (window(n) | rule) if causal else window(n) | rule
