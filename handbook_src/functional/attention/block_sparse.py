"""Attention that computes only the blocks in which a mask rule lets something through."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from handbook_src.dispatch import Backend, resolve
from handbook_src.errors import ShapeError
from handbook_src.functional.attention.attention import (
    check_mask,
    check_numbers,
    check_qkv,
    scaled_dot_product_attention,
    shielded,
)
from handbook_src.functional.attention.block_plan import BlockPlan, Group, plan_blocks
from handbook_src.functional.attention.mask import Mask

__all__ = ["BlockPlan", "block_sparse_attention", "plan_blocks"]


def block_sparse_attention(
    q: Float[Tensor, "b t h e"],
    k: Float[Tensor, "b s g e"],
    v: Float[Tensor, "b s g c"],
    rule: Mask | BlockPlan,
    *,
    block_size: int = 64,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: Backend = "auto",
) -> Float[Tensor, "b t h c"]:
    r"""Scaled dot-product attention under a rule, computed only where the rule has live blocks.

    .. math::
        Y_i = \operatorname{softmax}\!\Big(\frac{Q_i K_{N(i)}^\top}{\sqrt e} + M_{i, N(i)}\Big) V_{N(i)},
        \qquad N(i) = \{\, j : L_{ij} = 1 \,\}

    :math:`i` and :math:`j` number blocks of queries and of keys, and :math:`L` is the layout
    of :func:`handbook_src.functional.plan_blocks`.  The result is that of
    :func:`handbook_src.functional.scaled_dot_product_attention` under the same rule;
    time and memory follow the number of live blocks.

    Query blocks with equally many live blocks run as one batch of torch's fused operation, so
    one row that sees all does not widen the others.  A query that sees nothing gets zeros.  A NaN
    or infinite key or value reaches no query that it is hidden from, forward or backward.

    Args:
        q: queries, the last ``t`` of ``s`` positions.
        k: keys; fewer heads than ``q`` are shared by groups of consecutive query heads.
        v: values.
        rule: which query may attend to which key, or its plan, made once for all calls
            (under ``torch.compile`` make the plan outside).
        block_size: positions of a block; ignored where a plan is given.
        scale: factor on the scores; :math:`1/\sqrt e` unless given.
        dropout: share of the weights that are dropped; pass 0 outside training.
        backend: ``torch`` (and ``auto``) computes live blocks only; ``reference`` is the dense
            masked formula.

    Raises:
        ShapeError: shapes that don't fit each other or the rule, a plan of other lengths.
        ConfigError: no rule, a bad ``block_size``, ``scale`` or ``dropout``.

    Source:
        Child et al. 2019, section 5.5, arXiv:1904.10509; Zaheer et al. 2020, appendix D, arXiv:2007.14062
    """
    check_qkv(q, k, v)
    check_numbers(scale, dropout)
    t, s = q.shape[1], k.shape[1]
    plan = rule if isinstance(rule, BlockPlan) else plan_blocks(rule, t, s, block_size, device=q.device)
    check_mask(plan.rule, q.shape[0], q.shape[2], t, s)
    if (plan.t, plan.s) != (t, s):
        raise ShapeError(
            "block plan", got=f"t={t}, s={s}", want=f"t={plan.t}, s={plan.s}", remedy="Plan for these lengths."
        )
    chosen = resolve("block_sparse_attention", backend, {"torch": None, "reference": None})
    if chosen == "reference":
        return scaled_dot_product_attention(q, k, v, plan.rule, scale=scale, dropout=dropout, backend="reference")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return shielded(partial(_run, plan, scale), q, k, v, dropout)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout: float = 0.0) -> Tensor:
    """Torch's fused operation on ``m heads block features``; rows that see nothing are zero."""
    grouped, wide = q.shape[1] != k.shape[1], v.shape[-1]
    if q.shape[-1] != wide:  # torch's tiled kernel for CPUs wants one width, and is 3 to 4 times as fast
        q, k, v = (F.pad(x, (0, max(wide, x.shape[-1]) - x.shape[-1])) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale, enable_gqa=grouped)
    if mask is not None and mask.device.type != "cpu":  # CPU gives zeros by itself (torch 2.11 to 2.13)
        out = out.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return out[..., :wide]


def rows_first(x: Tensor, rows: int) -> Tensor:
    """``b n h e`` as ``rows b*h e``, zeros added: one copy, and none for one sample that needs no zeros."""
    x = x.permute(1, 0, 2, 3).flatten(1, 2)
    return F.pad(x, (0, 0, 0, 0, 0, rows - x.shape[0])) if rows > x.shape[0] else x


def _run(plan: BlockPlan, scale: float, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    if plan.parts[0][0] is None:
        return _part(q, k, v, plan.parts[0][1], plan, scale, dropout)
    shared, outs = q.shape[2] // k.shape[2], []
    order: list[int] = []
    for heads, groups in plan.parts:
        assert heads is not None
        own = [h // shared for h in heads]
        outs.append(_part(q[:, :, heads], k[:, :, own], v[:, :, own], groups, plan, scale, dropout))
        order += heads
    back = torch.tensor(order, device=q.device).argsort()
    return torch.cat(outs, 2).index_select(2, back)


def _part(
    q: Tensor, k: Tensor, v: Tensor, groups: tuple[Group, ...], plan: BlockPlan, scale: float, dropout: float
) -> Tensor:
    """All blocks of queries, for heads that share a pattern."""
    (b, t, h, _), size, c = q.shape, plan.block_size, v.shape[-1]
    n, m = -(-t // size), -(-k.shape[1] // size)
    if not groups or 0 in (b, h, c):
        return (q.sum() + k.sum() + v.sum()) * 0 + q.new_zeros(b, t, h, c)  # a graph with zero gradients
    blocks = rows_first(q, n * size).unflatten(0, (n, size))
    keys, values = (rows_first(x, m * size).unflatten(0, (m, size)) for x in (k, v))
    outs = [
        attend(
            blocks.index_select(0, g.rows).transpose(1, 2),
            _gathered(keys, g),
            _gathered(values, g),
            None if g.mask is None else _for_samples(g.mask, b, h),
            scale,
            dropout,
        ).transpose(1, 2)
        for g in groups
    ]
    done = torch.cat(outs)  # blocks in the order of the groups, position, b*h, c
    rows = torch.cat([g.rows for g in groups])
    if len(rows) < n:  # blocks that see nothing
        done = torch.cat([done, done.new_zeros(1, *done.shape[1:])])
    place = torch.full((n,), len(rows), device=rows.device)
    place[rows] = torch.arange(len(rows), device=rows.device)
    return done.index_select(0, place).flatten(0, 1)[:t].unflatten(1, (b, h)).transpose(0, 1)


def _gathered(blocks: Tensor, group: Group) -> Tensor:
    """The key blocks of each query block, ``m heads width*block features``; a run of them is no copy."""
    if group.run is not None:
        first, last = group.run
        return blocks[first : last + 1].flatten(0, 1)[None].transpose(1, 2)
    many, width = group.columns.shape
    taken = blocks.index_select(0, group.columns.flatten()).unflatten(0, (many, width))
    return taken.flatten(1, 2).transpose(1, 2)


def _for_samples(mask: Tensor, b: int, h: int) -> Tensor:
    """``m b|1 h|1 block keys`` as ``m b*h|1 block keys``, or one row for all."""
    if mask.shape[1:3] == (1, 1):
        return mask[:, 0]
    return mask.expand(-1, b, h, -1, -1).flatten(1, 2)
