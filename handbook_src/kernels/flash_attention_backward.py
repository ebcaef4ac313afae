# Bytes: see flash_attention.py.  Two kernels, each tensor read by both but out by the first and dk, dv by the second.
"""The gradient of flash attention: weights computed again from the log-sum-exp, every sum in a fixed order.

With ``p = exp(s - lse)`` and ``delta = sum(dout * out) - dlse``::

    dv = p^T dout     ds = p * (dout v^T - delta)     dq = scale ds k     dk = scale ds^T q

* ``_queries``: a program owns a tile of queries, computes delta for it, and walks over the keys: dq.
* ``_keys``: a program owns a tile of keys and walks over the queries of every head of its group: dk and dv.

One kernel for both would need five products a pair of tiles instead of seven, and atomic additions to dq, whose order
changes from run to run.  Here nothing is added to another program's result: the same bits each time.

Neither transposes a product: scores are made as ``k q^T`` where keys are rows.  A product that is transposed for the
next one is miscompiled on Hopper by Triton 3.4 to 3.7.0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from handbook_src.errors import KernelUnavailable
from handbook_src.kernels import launch
from handbook_src.kernels.flash_attention_tile import (
    LOG2E,
    adjacent,
    again,
    allowed,
    keys_seen,
    parts,
    plan,
    precision,
    queries_seeing,
    row_strides,
    rows_of,
    scores,
    sequence,
    shielded,
    store_rows,
    strides_of,
)


@triton.jit
def passable(lse):
    # Rows past the end weigh exp(x - inf) = 0.  So do rows that saw no key, at -inf, or something that is not finite,
    # at NaN: nothing goes back through them.
    return tl.where(lse > float("-inf"), lse, float("inf"))


@triton.jit
def _query_step(
    dq, q, do, lse, delta, Q, DOUT, first, q_stride, do_stride, times,
    K, V, start, query, k_stride, v_stride, keys, e, c, scale, cap, slope, window,
    BM: tl.constexpr, BN: tl.constexpr, E: tl.constexpr, C: tl.constexpr, EVEN_E: tl.constexpr, EVEN_C: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, ALIBI: tl.constexpr, CAP: tl.constexpr, IP: tl.constexpr,
    MASKED: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    key = start + tl.arange(0, BN)
    k = rows_of(K, start, k_stride, keys, e, BN, E, EVEN_E, MASKED)
    v = rows_of(V, start, v_stride, keys, c, BN, C, EVEN_C, MASKED)
    if MASKED:
        k, bad = shielded(k)
    if AGAIN:
        q = rows_of(Q, first, q_stride, times, e, BM, E, EVEN_E, True, True)
    x = tl.dot(q, tl.trans(k), input_precision=IP)
    x, unit, flat = scores(x, query[:, None], key[None, :], scale, cap, slope, ALIBI, CAP)
    if MASKED:
        keep = allowed(query[:, None], key[None, :], keys, window, CAUSAL, WINDOW)
        x = tl.where(keep, x, float("-inf"))
    p = tl.exp2(x * unit - lse[:, None])
    if AGAIN:
        do = rows_of(DOUT, first, do_stride, times, c, BM, C, EVEN_C, True, True)
    dp = tl.dot(do, tl.trans(v), input_precision=IP)
    ds = p * (dp - delta[:, None]) * flat
    if MASKED:
        ds = tl.where(keep, tl.where(bad[None, :], float("nan"), ds), 0.0)
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=IP)


@triton.jit
def _queries(
    Q, K, V, OUT, DOUT, LSE, DLSE, DELTA, DQ, CU_Q, CU_K, SLOPES,
    q_b, q_t, q_h, k_b, k_s, k_h, v_b, v_s, v_h, o_b, o_t, o_h, do_b, do_t, do_h, dq_b, dq_t, dq_h, lse_b, lse_h,
    times, keys, batch, heads, group, e, c, scale, cap, window,
    BM: tl.constexpr, BN: tl.constexpr, E: tl.constexpr, C: tl.constexpr, EVEN_E: tl.constexpr, EVEN_C: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, ALIBI: tl.constexpr, CAP: tl.constexpr, VARLEN: tl.constexpr,
    IP: tl.constexpr, DOWN: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    tile = tl.cdiv(times, BM) - 1 - tl.program_id(0) // (batch * heads)
    b, h = tl.program_id(0) % (batch * heads) // heads, tl.program_id(0) % heads
    q0, times, k0, keys = sequence(CU_Q, CU_K, b, times, keys, VARLEN)
    b, hk, q0, k0 = b.to(tl.int64), (h // group).to(tl.int64), q0.to(tl.int64), k0.to(tl.int64)
    wide = h.to(tl.int64)
    first = tile * BM
    row, offset = first + tl.arange(0, BM), keys - times
    live, at = row < times, b * lse_b + wide * lse_h + q0 + row
    Q += b * q_b + q0 * q_t + wide * q_h
    DOUT += b * do_b + q0 * do_t + wide * do_h
    q = rows_of(Q, first, q_t, times, e, BM, E, EVEN_E, True)
    do = rows_of(DOUT, first, do_t, times, c, BM, C, EVEN_C, True)
    out = rows_of(OUT + b * o_b + q0 * o_t + wide * o_h, first, o_t, times, c, BM, C, EVEN_C, True)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    if DOWN:
        delta -= tl.load(DLSE + at, mask=live, other=0.0)
    lse = passable(tl.load(LSE + at, mask=live, other=float("inf"))) * LOG2E
    delta = tl.where(lse < float("inf"), delta, 0.0)
    tl.store(DELTA + at, delta, mask=live)
    K, V = K + (b * k_b + k0 * k_s + hk * k_h), V + (b * v_b + k0 * v_s + hk * v_h)
    query = row + offset
    slope = tl.load(SLOPES + h).to(tl.float32) if ALIBI else 0.0
    dq = tl.zeros([BM, E], tl.float32)
    last = tl.minimum(first + BM, times) - 1 + offset
    low, inner, outer, high = keys_seen(first + offset, last, keys, window, BN, CAUSAL, WINDOW)
    high = tl.where(first < times, high, low)
    outer = tl.where(first < times, outer, inner)
    for i in tl.range(0, (outer - inner) // BN):
        dq = _query_step(
            dq, q, do, lse, delta, Q, DOUT, first, q_t, do_t, times, K, V, inner + i * BN, query, k_s, v_s, keys, e, c,
            scale, cap, slope, window, BM, BN, E, C, EVEN_E, EVEN_C, CAUSAL, WINDOW, ALIBI, CAP, IP, False, AGAIN,
        )  # fmt: skip
    before = (inner - low) // BN
    for i in tl.range(0, before + (high - outer) // BN):
        start = tl.where(i < before, low + i * BN, outer + (i - before) * BN)
        dq = _query_step(
            dq, q, do, lse, delta, Q, DOUT, first, q_t, do_t, times, K, V, start, query, k_s, v_s, keys, e, c,
            scale, cap, slope, window, BM, BN, E, C, EVEN_E, EVEN_C, CAUSAL, WINDOW, ALIBI, CAP, IP, True, AGAIN,
        )  # fmt: skip
    store_rows(DQ + b * dq_b + q0 * dq_t + wide * dq_h, dq * scale, first, dq_t, times, e, BM, E)


@triton.jit
def _key_step(
    dk, dv, k, v, part, Q, DOUT, LSE, DELTA, SLOPES, start, h, key, offset, q_t, q_h, do_t, do_h, lse_h,
    times, keys, e, c, scale, cap, window,
    BM: tl.constexpr, E: tl.constexpr, C: tl.constexpr, EVEN_E: tl.constexpr, EVEN_C: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, ALIBI: tl.constexpr, CAP: tl.constexpr, IP: tl.constexpr,
    MASKED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    row, wide = start + tl.arange(0, BM), h.to(tl.int64)
    q = rows_of(Q + wide * q_h, start, q_t, times, e, BM, E, EVEN_E, MASKED)
    do = rows_of(DOUT + wide * do_h, start, do_t, times, c, BM, C, EVEN_C, MASKED)
    lse = passable(tl.load(LSE + wide * lse_h + row, mask=row < times, other=float("inf"))) * LOG2E
    delta = tl.load(DELTA + wide * lse_h + row, mask=row < times, other=0.0)
    slope = tl.load(SLOPES + h).to(tl.float32) if ALIBI else 0.0
    query = row + offset
    x = tl.dot(k, tl.trans(q), input_precision=IP)
    x, unit, flat = scores(x, query[None, :], key[:, None], scale, cap, slope, ALIBI, CAP)
    if MASKED:
        x = tl.where(allowed(query[None, :], key[:, None], keys, window, CAUSAL, WINDOW), x, float("-inf"))
    p = tl.exp2(x * unit - lse[None, :])
    # Of the sums only this program's share of the features: for one of several it is loaded again.
    PE: tl.constexpr = dk.shape[1]
    PC: tl.constexpr = dv.shape[1]
    some = do
    if PARTS > 1:
        at, left = DOUT + wide * do_h + part * PC, c - part * PC
        some = rows_of(at, start, do_t, times, left, BM, PC, EVEN_C and C == PARTS * PC, MASKED)
    dv = tl.dot(p.to(do.dtype), some, dv, input_precision=IP)
    dp = tl.dot(v, tl.trans(do), input_precision=IP)
    ds = p * (dp - delta[None, :]) * flat
    some = q
    if PARTS > 1:
        at, left = Q + wide * q_h + part * PE, e - part * PE
        some = rows_of(at, start, q_t, times, left, BM, PE, EVEN_E and E == PARTS * PE, MASKED)
    return tl.dot(ds.to(q.dtype), some, dk, input_precision=IP), dv


@triton.jit
def _keys(
    Q, K, V, DOUT, LSE, DELTA, DK, DV, CU_Q, CU_K, SLOPES,
    q_b, q_t, q_h, k_b, k_s, k_h, v_b, v_s, v_h, do_b, do_t, do_h, dk_b, dk_s, dk_h, dv_b, dv_s, dv_h, lse_b, lse_h,
    times, keys, batch, kv_heads, group, e, c, scale, cap, window,
    BM: tl.constexpr, BN: tl.constexpr, E: tl.constexpr, C: tl.constexpr, EVEN_E: tl.constexpr, EVEN_C: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, ALIBI: tl.constexpr, CAP: tl.constexpr, VARLEN: tl.constexpr,
    IP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    # The first keys are seen by most queries under a causal rule: they start first.
    first = tl.program_id(0) // (batch * kv_heads * PARTS) * BN
    part = tl.program_id(0) // (batch * kv_heads) % PARTS
    b, hk = tl.program_id(0) % (batch * kv_heads) // kv_heads, tl.program_id(0) % kv_heads
    q0, times, k0, keys = sequence(CU_Q, CU_K, b, times, keys, VARLEN)
    b, q0, k0, wide = b.to(tl.int64), q0.to(tl.int64), k0.to(tl.int64), hk.to(tl.int64)
    Q += b * q_b + q0 * q_t
    DOUT += b * do_b + q0 * do_t
    LSE += b * lse_b + q0
    DELTA += b * lse_b + q0
    k = rows_of(K + b * k_b + k0 * k_s + wide * k_h, first, k_s, keys, e, BN, E, EVEN_E, True)
    v = rows_of(V + b * v_b + k0 * v_s + wide * v_h, first, v_s, keys, c, BN, C, EVEN_C, True)
    key, offset = first + tl.arange(0, BN), keys - times
    PE: tl.constexpr = max(16, E // PARTS)
    PC: tl.constexpr = max(16, C // PARTS)
    dk, dv = tl.zeros([BN, PE], tl.float32), tl.zeros([BN, PC], tl.float32)
    last = tl.minimum(first + BN, keys) - 1
    low, inner, outer, high = queries_seeing(first, last, times, offset, window, BM, CAUSAL, WINDOW)
    high = tl.where(first < keys, high, low)
    outer = tl.where(first < keys, outer, inner)
    tiles = (outer - inner) // BM
    for i in tl.range(0, tiles * group):  # every head of the group, one after the other
        dk, dv = _key_step(
            dk, dv, k, v, part, Q, DOUT, LSE, DELTA, SLOPES, inner + i % tiles * BM, hk * group + i // tiles, key,
            offset, q_t, q_h, do_t, do_h, lse_h, times, keys, e, c, scale, cap, window,
            BM, E, C, EVEN_E, EVEN_C, CAUSAL, WINDOW, ALIBI, CAP, IP, False, PARTS,
        )  # fmt: skip
    before = (inner - low) // BM
    tiles = before + (high - outer) // BM
    for i in tl.range(0, tiles * group):
        at = i % tiles
        start = tl.where(at < before, low + at * BM, outer + (at - before) * BM)
        dk, dv = _key_step(
            dk, dv, k, v, part, Q, DOUT, LSE, DELTA, SLOPES, start, hk * group + i // tiles, key, offset,
            q_t, q_h, do_t, do_h, lse_h, times, keys, e, c, scale, cap, window,
            BM, E, C, EVEN_E, EVEN_C, CAUSAL, WINDOW, ALIBI, CAP, IP, True, PARTS,
        )  # fmt: skip
    DK += b * dk_b + k0 * dk_s + wide * dk_h + part * PE
    DV += b * dv_b + k0 * dv_s + wide * dv_h + part * PC
    store_rows(DK, dk * scale, first, dk_s, keys, e - part * PE, BN, PE)
    store_rows(DV, dv, first, dv_s, keys, c - part * PC, BN, PC)


@torch.library.custom_op("handbook::flash_attention_backward", mutates_args=())
def flash_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None,
    cu_q: Tensor | None, cu_k: Tensor | None, slopes: Tensor | None,
    times: int, keys: int, causal: bool, window: int, cap: float, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k and v, and delta, float32 and one a row: ``b h t``."""
    dq, dk, dv, delta = _fake(
        q, k, v, out, lse, dout, dlse, cu_q, cu_k, slopes, times, keys, causal, window, cap, scale
    )
    packed, group = cu_q is not None, q.shape[2] // max(1, k.shape[2])
    if packed:  # rows that belong to no sequence
        for gradient in (dq, dk, dv, delta):
            gradient.zero_()
    batch = len(cu_q) - 1 if cu_q is not None else q.shape[0]
    q, k, v, dout = (adjacent(x) for x in (q, k, v, dout))
    dlse = dlse if dlse is None or dlse.stride() == lse.stride() else dlse.contiguous()
    e, c = q.shape[3], v.shape[3]
    wide_e, wide_c = (max(16, triton.next_power_of_2(n)) for n in (e, c))
    flags = {
        "E": wide_e, "C": wide_c, "EVEN_E": e == wide_e, "EVEN_C": c == wide_c, "CAUSAL": causal,
        "WINDOW": window > 0, "ALIBI": slopes is not None, "CAP": cap > 0, "VARLEN": packed,
        "IP": precision(q.dtype, launch.family(q), max(wide_e, wide_c)),
    }  # fmt: skip
    read = [n for x in (q, k, v) for n in strides_of(x, packed)]
    down = strides_of(dout, packed)
    with torch.cuda.device_of(q):
        tile = plan("dq", max(wide_e, wide_c), q.dtype, launch.family(q))
        if times and batch:
            _queries[(triton.cdiv(times, tile.queries) * batch * q.shape[2],)](
                q, k, v, out, dout, lse, dlse, delta, dq, cu_q, cu_k, slopes, *read, *strides_of(out, packed), *down,
                *strides_of(dq, packed), *row_strides(lse, packed), times, keys, batch, q.shape[2], group, e, c,
                scale, cap, window, BM=tile.queries, BN=tile.keys, DOWN=dlse is not None,
                AGAIN=again(q.dtype, max(wide_e, wide_c)), num_warps=tile.warps, num_stages=tile.stages, **flags,
            )  # fmt: skip
        tile = plan("dkv", max(wide_e, wide_c), q.dtype, launch.family(q))
        if keys and batch:
            share = parts(max(wide_e, wide_c))
            _keys[(triton.cdiv(keys, tile.keys) * batch * k.shape[2] * share,)](
                q, k, v, dout, lse, delta, dk, dv, cu_q, cu_k, slopes, *read, *down,
                *strides_of(dk, packed), *strides_of(dv, packed), *row_strides(lse, packed),
                times, keys, batch, k.shape[2], group, e, c, scale, cap, window, BM=tile.queries, BN=tile.keys,
                PARTS=share, num_warps=tile.warps, num_stages=tile.stages, **flags,
            )  # fmt: skip
    return dq, dk, dv, delta


@flash_backward.register_fake
def _fake(q, k, v, out, lse, dout, dlse, cu_q, cu_k, slopes, times, keys, causal, window, cap, scale):
    return (*(x.new_empty(x.shape) for x in (q, k, v)), lse.new_empty(lse.shape))


def _no_second_derivative(ctx, *_):
    what, got, want = "second derivative of flash attention", "backward through backward", "first derivatives only"
    raise KernelUnavailable(what, got=got, want=want, remedy="Use backend='reference', which has all derivatives.")


flash_backward.register_autograd(_no_second_derivative)
