"""Attention of one new query a sequence over keys and values that lie in pages, as a server decodes."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from handbook_src.check import check_floating, check_one_dtype, check_positive, check_size, check_tensors
from handbook_src.dispatch import Backend, needs_for_triton, resolve
from handbook_src.errors import ShapeError
from handbook_src.functional.attention.flash_attention import WIDEST, flash_attention

OP = "paged_decode_attention"


def paged_decode_attention(
    q: Float[Tensor, "b h e"],
    k_pages: Float[Tensor, "pages page_size g e"],
    v_pages: Float[Tensor, "pages page_size g c"],
    block_table: Int[Tensor, "b blocks"],
    lengths: Int[Tensor, " b"],
    *,
    window: int | None = None,
    alibi: Float[Tensor, " h"] | None = None,
    soft_cap: float | None = None,
    sinks: Float[Tensor, " h"] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: Backend = "auto",
) -> Float[Tensor, "b h c"] | tuple[Float[Tensor, "b h c"], Float[Tensor, "b h"]]:
    r"""Attend from the newest position of each sequence to its past, page by page.

    .. math:: O_b = \operatorname{attention}(q_b, K_b, V_b), \qquad
        K_{b,j} = \mathrm{pages}\big[\mathrm{table}_{b,\lfloor j/P \rfloor},\; j \bmod P\big], \quad j < n_b

    with :math:`P` keys a page and :math:`n_b` the sequence's length.

    The kernel cuts the keys into splits :math:`i`, which run side by side, and merges their parts:
    :math:`O = \sum_i e^{L_i - L} O_i` with :math:`L = \log \sum_i e^{L_i}`. All query heads of a key head share one
    read of the cache. A sequence of length 0 gets zeros. On a GPU the table and the lengths are not looked at, which
    would wait for the device.

    Args:
        q: the newest query of each sequence, whose own key is in the cache already.
        k_pages: the store of keys, as ``PagePool.k``.
        v_pages: the store of values.
        block_table: the pages of each sequence, in order; what lies past its length is not read.
        lengths: keys of each sequence.
        window: only the last so many keys.
        alibi: one slope a head.
        soft_cap: bends scores, as in :func:`handbook_src.functional.flash_attention`.
        sinks: one logit a head that joins the denominator.
        scale: factor on the products; :math:`1/\sqrt e` unless given.
        return_lse: return the log-sum-exp as well.
        backend: ``reference`` gathers the pages and is differentiable; ``triton`` is neither; ``auto`` takes the
            kernel on a GPU.

    Raises:
        ShapeError: shapes, dtypes or devices that don't fit; on a CPU, a page that is not in the store, or a length
            that the table does not hold.
        ConfigError: a window that is not a positive integer, a cap or scale that is not positive.
        KernelUnavailable: a named backend that cannot run here.

    Source:
        Dao et al. 2023, Flash-Decoding (crfm.stanford.edu/2023/10/12/flashdecoding.html); Kwon et al. 2023, section
        4.1, arXiv:2309.06180
    """
    _check_tensors(q, k_pages, v_pages, block_table, lengths, {"alibi": alibi, "sinks": sinks})
    if window is not None:
        check_size(OP, "window", window)
    for name, value in (("soft_cap", soft_cap), ("scale", scale)):
        if value is not None:
            check_positive(OP, name, value)
    _check_values(k_pages, block_table, lengths)
    reason: str | None = "a reason to prefer it: tensors on a GPU"
    if max(q.shape[-1], v_pages.shape[-1]) > WIDEST or q.dtype == torch.float64:
        reason = f"at most {WIDEST} features a head, in float32, float16 or bfloat16"
    elif backend == "triton" or q.is_cuda:
        reason = needs_for_triton(q, k_pages, v_pages, block_table, lengths, alibi, sinks)
    options: dict[str, Any] = {"window": window, "alibi": alibi, "soft_cap": soft_cap, "sinks": sinks, "scale": scale}
    if resolve(OP, backend, {"triton": reason, "reference": None}) == "triton":
        from handbook_src.kernels.flash_decode import paged_decode_triton

        out, lse = paged_decode_triton(q, k_pages, v_pages, block_table, lengths, **options)
        return (out, lse) if return_lse else out
    rows = []
    for b, length in enumerate(lengths.tolist()):
        pages = block_table[b, : -(-length // k_pages.shape[1])].long()
        k, v = (x[pages].flatten(0, 1)[None, :length] for x in (k_pages, v_pages))
        # no key, and so no position to measure a distance from
        these = options if length else {**options, "window": None, "alibi": None}
        rows.append(flash_attention(q[b, None, None], k, v, **these, return_lse=True, backend="reference"))
    if not rows:
        return (
            (v_pages.new_empty(0, q.shape[1], v_pages.shape[3]), q.new_empty(q.shape[:2]))
            if return_lse
            else (v_pages.new_empty(0, q.shape[1], v_pages.shape[3]))
        )
    out, lse = (torch.cat([row[i][0] for row in rows]) for i in range(2))
    return (out, lse) if return_lse else out


def _check_tensors(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, per_head: dict[str, Tensor | None]
) -> None:
    check_tensors(OP, q, k, v, table, lengths, *(x for x in per_head.values() if x is not None))
    check_floating(OP, q, k, v)
    check_one_dtype(OP, q, k, v)
    shapes = f"q {tuple(q.shape)}, k_pages {tuple(k.shape)}, v_pages {tuple(v.shape)}"
    if not (q.ndim == 3 and k.ndim == v.ndim == 4 and k.shape[:3] == v.shape[:3] and q.shape[2] == k.shape[3]):
        want = "q (b, h, e), k_pages (pages, page_size, g, e), v_pages (pages, page_size, g, c)"
        raise ShapeError(f"{OP} inputs", got=shapes, want=want, remedy="One query a sequence, without a time axis.")
    if 0 in (*k.shape[1:], v.shape[3]) or q.shape[1] % k.shape[2]:
        want = "query heads a multiple of key heads, pages of one key or more"
        raise ShapeError(f"{OP} heads", got=shapes, want=want, remedy="Share each key head evenly.")
    for name, x, want_shape in (("block_table", table, (len(q), -1)), ("lengths", lengths, (len(q),))):
        fits = x.ndim == len(want_shape) and x.shape[0] == len(q) and x.dtype in (torch.int32, torch.int64)
        if not fits:
            want = f"{want_shape} of int32 or int64"
            raise ShapeError(f"{OP} {name}", got=f"{tuple(x.shape)} {x.dtype}", want=want, remedy="One row a query.")
    for name, y in per_head.items():
        if y is not None and (y.shape != q.shape[1:2] or not y.is_floating_point()):
            got, want = f"{tuple(y.shape)} {y.dtype}", f"({q.shape[1]},) of floating point"
            raise ShapeError(f"{OP} {name}", got=got, want=want, remedy="One number a query head.")
    others = {"k_pages": k, "v_pages": v, "block_table": table, "lengths": lengths, **per_head}
    for name, y in others.items():
        if y is not None and y.device != q.device:
            raise ShapeError(f"{OP} {name}", got=y.device, want=f"{q.device}, as q", remedy="Move the cache beside q.")


def _check_values(k: Tensor, table: Tensor, lengths: Tensor) -> None:
    """Only on a CPU: elsewhere looking would wait for the device."""
    if table.device.type != "cpu" or torch.compiler.is_compiling():
        return
    most = table.shape[1] * k.shape[1]
    for b, length in enumerate(lengths.tolist()):
        if not 0 <= length <= most:
            got, want = f"{length} of sequence {b}", f"0 to {most}: {table.shape[1]} pages of {k.shape[1]}"
            raise ShapeError(f"{OP} lengths", got=got, want=want, remedy="Give the sequence more pages.")
        used = table[b, : -(-length // k.shape[1])]
        if used.numel() and not 0 <= int(used.min()) <= int(used.max()) < len(k):
            want = f"0 to {len(k) - 1}"
            raise ShapeError(f"{OP} block_table", got=used.tolist(), want=want, remedy="Pages are rows of k_pages.")
