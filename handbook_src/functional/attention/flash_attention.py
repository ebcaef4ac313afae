"""Exact attention without the matrix of scores, with what today's models add to it: for batches and packed sequences.

:mod:`handbook_src.functional.attention.flash_tiles` is the algorithm to read,
``handbook_src.kernels.flash_attention`` the kernels,
:mod:`handbook_src.functional.attention.flash_decode` one new query over a paged cache.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from einops import repeat
from jaxtyping import Float, Int
from torch import Tensor

from handbook_src.check import (
    check_floating,
    check_one_dtype,
    check_positive,
    check_size,
    check_tensors,
    known_finite,
)
from handbook_src.dispatch import Backend, Resolved, needs_for_triton, resolve
from handbook_src.errors import ShapeError
from handbook_src.functional.attention.attention import (
    broken_rows,
    check_mask,
    check_qkv,
    scaled_dot_product_attention,
    without_nan,
)
from handbook_src.functional.attention.mask import Mask
from handbook_src.functional.attention.mask import causal as causal_rule
from handbook_src.functional.attention.mask import window as window_rule
from handbook_src.functional.positions.position import alibi_bias
from handbook_src.precision import statistic_dtype

OP = "flash_attention"
WIDEST = 256  # features of a head in the kernels
BAND = 128  # queries at a time on a CPU


class Options(NamedTuple):
    """What changes a score, or who sees whom."""

    causal: bool
    window: int | None
    alibi: Tensor | None
    soft_cap: float | None
    sinks: Tensor | None
    scale: float


def flash_attention(
    q: Float[Tensor, "b t h e"],
    k: Float[Tensor, "b s g e"],
    v: Float[Tensor, "b s g c"],
    *,
    causal: bool = False,
    window: int | None = None,
    alibi: Float[Tensor, " h"] | None = None,
    soft_cap: float | None = None,
    sinks: Float[Tensor, " h"] | None = None,
    scale: float | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    backend: Backend = "auto",
) -> Float[Tensor, "b t h c"] | tuple[Float[Tensor, "b t h c"], Float[Tensor, "b t h"]]:
    r"""Attention, tile by tile: no score is ever written to memory.

    .. math::
        O_i = \frac{\sum_j e^{z_{ij}} V_j}{e^{\sigma} + \sum_j e^{z_{ij}}}, \qquad
        z_{ij} = c \tanh\!\Big(\frac{a\, q_i^\top k_j}{c}\Big) - m\,|p_i - j|, \qquad
        L_i = \log\Big(e^{\sigma} + \sum_j e^{z_{ij}}\Big)

    over the keys that query :math:`i`, at position :math:`p_i = i + s - t`, may see: :math:`j \le p_i` under
    ``causal``, :math:`|p_i - j| < w` under ``window``. Slope :math:`m`, cap :math:`c` and sink
    :math:`\sigma` are left out where they are not given; :math:`a` is the scale.

    The kernels keep sums in float32 and add in a fixed order, so their gradients are the same bits each time.
    A NaN or infinite key or value reaches the queries that see it and no other: so the kernels and the reference;
    torch's operation leaks it, and on a CPU ``auto`` does not take it there.
    A query that sees nothing gets zeros and a log-sum-exp of :math:`-\infty`. Not for ``torch.func.vmap``.

    Args:
        q: queries.
        k: keys; fewer heads than ``q`` are shared by groups of consecutive query heads.
        v: values; their features may differ in number from the keys'.
        causal: queries are the last ``t`` of ``s`` positions and see no later key.
        window: keys nearer than so many positions; with ``causal``, so many keys, the query's own among them.
        alibi: one slope a head; the reference and torch differentiate it, the kernels refuse.
        soft_cap: bends scores into the open interval from minus to plus this (Gemma 2: 50), before ALiBi.
        sinks: one logit a head that joins the denominator and has no value, as in GPT-OSS.
        scale: factor on the products; :math:`1/\sqrt e` unless given.
        deterministic: take no backend whose gradients change from run to run, which torch's may on a GPU.
        return_lse: return :math:`L` as well, differentiable, ``b t h``, float32 at least.
        backend: ``auto`` takes torch's fused operation where it computes the same; on a GPU the kernels where torch
            would need a mask in memory (``window``, ``alibi``) or has nothing (``soft_cap``, ``sinks``).

    Raises:
        ShapeError: shapes, dtypes or devices that don't fit; heads that don't divide; more queries than keys
            under ``causal``, ``window`` or ``alibi``; heads wider than 256 features in the kernels.
        ConfigError: a window that is not a positive integer, a cap or scale that is not positive.
        KernelUnavailable: a named backend that cannot run here.

    Source:
        Dao 2023, algorithms 1 and 2, arXiv:2307.08691; Milakov & Gimelshein 2018, algorithm 3, arXiv:1805.02867;
        cap: Gemma 2, section 2, arXiv:2408.00118; sinks: GPT-OSS, arXiv:2508.10925
    """
    check_qkv(q, k, v)
    options = _checked(q, k, v, causal, window, alibi, soft_cap, sinks, scale)
    able = _candidates(q, k, v, options, deterministic, return_lse, backend)
    runs = resolve(OP, backend, able)
    lse = None
    if runs == "torch":
        out = _torch(q, k, v, options)
    elif runs == "triton":
        from handbook_src.kernels.flash_attention import flash_attention_triton

        out, rows = flash_attention_triton(q, k, v, **options._asdict())
        lse = rows.transpose(1, 2)
    else:
        out, lse = _written_out(q, k, v, options, return_lse)
    return (out, lse) if return_lse and lse is not None else out


def flash_attention_varlen(
    q: Float[Tensor, "n h e"],
    k: Float[Tensor, "m g e"],
    v: Float[Tensor, "m g c"],
    cu_seqlens_q: Int[Tensor, " edges"],
    cu_seqlens_k: Int[Tensor, " edges"] | None = None,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    window: int | None = None,
    alibi: Float[Tensor, " h"] | None = None,
    soft_cap: float | None = None,
    sinks: Float[Tensor, " h"] | None = None,
    scale: float | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    backend: Backend = "auto",
) -> Float[Tensor, "n h c"] | tuple[Float[Tensor, "n h c"], Float[Tensor, "n h"]]:
    r"""Attention within each of several sequences that lie one behind the other, without padding.

    .. math::
        O_{[a_i, a_{i+1})} = \operatorname{attention}(q_{[a_i, a_{i+1})},\; k_{[c_i, c_{i+1})},\; v_{[c_i, c_{i+1})})

    with :math:`a` and :math:`c` the two lists of edges. On a GPU the edges are read and checked unless both
    longest lengths are given, which waits for the device; given, nothing is checked, positions past the last edge get
    zeros, and a sequence of more queries than keys under ``causal`` gives its first ones zeros.

    Args:
        q: queries of all sequences.
        k: keys of all sequences.
        v: values of all sequences.
        cu_seqlens_q: where each sequence's queries begin, and the end: from 0 to ``n``, int32 or int64.
        cu_seqlens_k: the same for keys; the queries' unless given.
        max_seqlen_q: the most queries of one sequence.
        max_seqlen_k: the most keys of one sequence.
        causal: as for :func:`flash_attention`, and so are the others.
        window: keys nearer than so many positions.
        alibi: one slope a head.
        soft_cap: bends scores.
        sinks: one logit a head that joins the denominator.
        scale: factor on the products.
        deterministic: take no backend whose gradients change from run to run.
        return_lse: return the log-sum-exp as well.
        backend: ``auto`` takes the kernels on a GPU; elsewhere the sequences run one by one.

    Raises:
        ShapeError: edges that are not integers, don't begin at 0, fall, or don't end at ``n``; and as above.
        ConfigError: as above.
        KernelUnavailable: a named backend that cannot run here.

    Source:
        Dao 2023, section 3, arXiv:2307.08691; the interface is flash-attn's
    """
    _check_packed(q, k, v)
    edges_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    _check_edges(cu_seqlens_q, edges_k, q)
    options = _checked(q[None], k[None], v[None], causal, window, alibi, soft_cap, sinks, scale, packed=True)
    able = _candidates(q[None], k[None], v[None], options, deterministic, return_lse, backend, packed=True)
    runs = resolve("flash_attention_varlen", backend, able)
    if runs != "triton" or q.device.type == "cpu" or max_seqlen_q is None or max_seqlen_k is None:
        starts, ends = _edges(cu_seqlens_q, len(q), "q"), _edges(edges_k, len(k), "k")
        _check_lengths(starts, ends, options)
        max_seqlen_q, max_seqlen_k = _longest(starts), _longest(ends)
    if runs == "triton":
        from handbook_src.kernels.flash_attention import flash_attention_triton

        out, lse = flash_attention_triton(
            q[None], k[None], v[None], cu_q=cu_seqlens_q, cu_k=edges_k, times=max_seqlen_q, keys=max_seqlen_k,
            **options._asdict(),
        )  # fmt: skip
        return (out[0], lse[0].T) if return_lse else out[0]
    parts = []
    for (a, b), (c, d) in zip(pairwise(starts), pairwise(ends), strict=True):
        one = q[None, a:b], k[None, c:d], v[None, c:d]
        parts.append((_torch(*one, options), None) if runs == "torch" else _written_out(*one, options, return_lse))
    parts = parts or [_written_out(q[None], k[None], v[None], options, return_lse)]
    out = torch.cat([o[0] for o, _ in parts])
    return (out, torch.cat([x[0] for _, x in parts if x is not None])) if return_lse else out


def _rule(o: Options) -> Mask | None:
    """Who may attend to whom, in the words of the mask vocabulary."""
    if o.window is None:
        return causal_rule if o.causal else None
    return causal_rule & window_rule(o.window) if o.causal else window_rule(o.window)


def _torch(q: Tensor, k: Tensor, v: Tensor, o: Options) -> Tensor:
    """Torch's fused operation, with a bias where it knows no rule."""
    t, s, rule = q.shape[1], k.shape[1], _rule(o)
    if o.alibi is None and (o.window is None or not o.causal):
        return scaled_dot_product_attention(q, k, v, rule, scale=o.scale, backend="torch")
    seen = None if rule is None else rule.dense(t, s, device=q.device)
    bias = None if o.alibi is None else alibi_bias(o.alibi.to(q.dtype), t, s)
    outs = []
    for rows, cols in bands(t, s, o.causal, o.window, q.device):
        mask = None if seen is None else seen[rows, cols]
        if bias is not None:
            part = bias[..., rows, cols]
            mask = part if mask is None else part.masked_fill(~mask, -math.inf)
        one = q[:, rows], k[:, cols], v[:, cols]
        outs.append(scaled_dot_product_attention(*one, mask, scale=o.scale, backend="torch"))
    return outs[0] if len(outs) == 1 else torch.cat(outs, 1)


def bands(t: int, s: int, causal: bool, window: int | None, device: torch.device) -> list[tuple[slice, slice]]:
    """Bands of queries and the keys that any of them sees: scores that fit a CPU's cache, and few hidden ones."""
    if device.type != "cpu" or torch.compiler.is_compiling() or t <= BAND:
        return [(slice(0, t), slice(0, s))]
    found = []
    for first in range(0, t, BAND):
        last, offset = min(first + BAND, t), s - t
        low = 0 if window is None else max(0, first + offset - window + 1)
        high = last + offset if causal else s if window is None else min(s, last + offset + window - 1)
        found.append((slice(first, last), slice(low, high)))
    return found


def _written_out(q: Tensor, k: Tensor, v: Tensor, o: Options, wants_lse: bool) -> tuple[Tensor, Tensor | None]:
    """The formula as it stands, in float32 at least; a row of scores is never empty, for a query sees itself."""
    wide, t, s, rule = statistic_dtype(q), q.shape[1], k.shape[1], _rule(o)
    broken, mask = None, None if rule is None else rule.dense(t, s, device=q.device)
    if not known_finite(q, k, v):
        (q, k, v), (bad_q, bad_k, bad_v) = without_nan(q, k, v)
        broken = broken_rows(bad_q, bad_k | bad_v, None if mask is None else mask[None, None])
    r, dtype = q.shape[2] // k.shape[2], q.dtype
    keys, values = (x if r == 1 else repeat(x, "b s g e -> b s (g r) e", r=r) for x in (k, v))
    factor = o.scale if o.soft_cap is None else o.scale / o.soft_cap  # on the queries: a pass less over the scores
    q, keys, values = (x.transpose(1, 2).contiguous() for x in (q.to(wide) * factor, keys.to(wide), values.to(wide)))
    bias = None if o.alibi is None else alibi_bias(o.alibi.to(wide), t, s)
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    for rows, cols in bands(t, s, o.causal, o.window, q.device):
        x = q[:, :, rows] @ keys[:, :, cols].mT
        if o.soft_cap is not None:
            x = o.soft_cap * torch.tanh(x)
        if bias is not None:
            x += bias[..., rows, cols]
        if mask is not None:
            x.masked_fill_(~mask[rows, cols], -math.inf)
        if o.sinks is not None:
            x = torch.cat([x, o.sinks.to(wide)[:, None, None].expand(*x.shape[:3], 1)], -1)
        weights = x.softmax(-1)[..., : cols.stop - cols.start]
        outs.append(weights @ values[:, :, cols])
        lses += [x.logsumexp(-1)] if wants_lse else []
    out = torch.cat(outs, 2).transpose(1, 2).to(dtype)
    lse = torch.cat(lses, 2) if wants_lse else None
    if broken is not None:
        out = out.masked_fill(broken.transpose(1, 2), math.nan)
        lse = None if lse is None else lse.masked_fill(broken[..., 0], math.nan)
    return out, None if lse is None else lse.transpose(1, 2)


def _candidates(
    q: Tensor, k: Tensor, v: Tensor, o: Options, deterministic: bool, lse: bool, backend: Backend, packed: bool = False
) -> dict[Resolved, str | None]:
    theirs: str | None = None
    ours: str | None = "a reason to prefer it: torch's own can run"
    if o.soft_cap is not None or o.sinks is not None or lse:
        theirs = "no soft_cap, sinks or return_lse: torch has none"
    elif o.alibi is not None and q.dtype in (torch.float16, torch.bfloat16):
        theirs = "float32 beside alibi: torch rounds the bias to half precision"
    elif backend == "auto" and q.device.type == "cpu" and o.alibi is not None and not torch.compiler.is_compiling():
        theirs = "a reason to prefer it: with alibi the formula in bands is faster on a CPU"
    elif deterministic and q.is_cuda and not torch.are_deterministic_algorithms_enabled():
        theirs = "torch.use_deterministic_algorithms(True) beside deterministic=True"
    # Under the interpreter the kernels run on a CPU, for tests; nobody gets them there without asking.
    if backend == "triton" or (backend == "auto" and q.is_cuda):
        ours = _missing(q, k, v, o)
    first = packed or o.window is not None or o.alibi is not None
    pair: list[tuple[Resolved, str | None]] = [("torch", theirs), ("triton", ours)]
    return dict([*(reversed(pair) if first and q.is_cuda else pair), ("reference", None)])


def _missing(q: Tensor, k: Tensor, v: Tensor, o: Options) -> str | None:
    if q.dtype == torch.float64:
        return "float16, bfloat16 or float32: the kernels compute in float32"
    if max(q.shape[-1], v.shape[-1]) > WIDEST:
        return f"at most {WIDEST} features a head"
    if o.alibi is not None and o.alibi.requires_grad and torch.is_grad_enabled():
        return "slopes that require no gradient"
    return needs_for_triton(q, k, v, o.alibi, o.sinks)


def _checked(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, alibi: Tensor | None, soft_cap: float | None,
    sinks: Tensor | None, scale: float | None, packed: bool = False,
) -> Options:  # fmt: skip
    check_tensors(OP, q, k, v, *(x for x in (alibi, sinks) if x is not None))
    check_floating(OP, q, k, v)
    check_one_dtype(OP, q, k, v)
    for name, x in (("k", k), ("v", v), ("alibi", alibi), ("sinks", sinks)):
        if x is not None and x.device != q.device:
            raise ShapeError(f"{OP} {name}", got=x.device, want=f"{q.device}, as q", remedy="Move it beside q.")
    if window is not None:
        check_size(OP, "window", window)
    if soft_cap is not None:
        check_positive(OP, "soft_cap", soft_cap)
    if scale is not None:
        check_positive(OP, "scale", scale)
    for name, x in (("alibi", alibi), ("sinks", sinks)):
        if x is not None and (x.shape != q.shape[2:3] or not x.is_floating_point()):
            got, want = f"{tuple(x.shape)} {x.dtype}", f"({q.shape[2]},) of floating point"
            raise ShapeError(f"{OP} {name}", got=got, want=want, remedy="One number a query head.")
    options = Options(causal, window, alibi, soft_cap, sinks, q.shape[-1] ** -0.5 if scale is None else scale)
    if not packed and (_rule(options) is not None or alibi is not None):
        check_mask(causal_rule, q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    return options


def _check_packed(q: Tensor, k: Tensor, v: Tensor) -> None:
    check_tensors("flash_attention_varlen", q, k, v)
    if not q.ndim == k.ndim == v.ndim == 3:
        got = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        want = "three axes: q (n, h, e), k (m, g, e), v (m, g, c)"
        raise ShapeError("flash_attention_varlen inputs", got=got, want=want, remedy="Join the sequences with cat.")
    check_qkv(q[None], k[None], v[None])


def _check_edges(cu_q: Tensor, cu_k: Tensor, q: Tensor) -> None:
    check_tensors("flash_attention_varlen", cu_q, cu_k)
    for name, cu in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        if cu.ndim != 1 or len(cu) == 0 or cu.dtype not in (torch.int32, torch.int64) or cu.device != q.device:
            got, want = f"{tuple(cu.shape)} {cu.dtype} on {cu.device}", f"one axis of int32 or int64 on {q.device}"
            raise ShapeError(name, got=got, want=want, remedy="Pass the sums of lengths: [0, n1, n1 + n2, ...].")
    if len(cu_q) != len(cu_k):
        got, want = f"{len(cu_k)} edges", f"{len(cu_q)}, as cu_seqlens_q"
        raise ShapeError("cu_seqlens_k", got=got, want=want, remedy="One sequence of keys for each of queries.")


def _edges(cu: Tensor, total: int, name: str) -> list[int]:
    edges = [int(x) for x in cu.tolist()]
    if edges[0] != 0 or edges[-1] != total or any(a > b for a, b in pairwise(edges)):
        want = f"from 0 to {total}, never falling"
        raise ShapeError(f"cu_seqlens_{name}", got=edges, want=want, remedy="Pass the sums of the lengths.")
    return edges


def _check_lengths(starts: list[int], ends: list[int], o: Options) -> None:
    if _rule(o) is None and o.alibi is None:
        return
    for i, ((a, b), (c, d)) in enumerate(zip(pairwise(starts), pairwise(ends), strict=True)):
        if b - a > d - c:
            got = f"{b - a} queries for {d - c} keys in sequence {i}"
            want = "no more queries than keys"
            raise ShapeError("flash_attention_varlen", got=got, want=want, remedy="Queries are the last positions.")


def _longest(edges: list[int]) -> int:
    return max((b - a for a, b in pairwise(edges)), default=0)
