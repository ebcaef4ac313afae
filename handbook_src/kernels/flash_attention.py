# Bytes moved, each tensor once, e bytes an element (the scores, t x s a head, are never written):
#   forward   read q, k, v; write out; 4 bytes a row of log-sum-exp
#   backward  read q, k, v, out, dout; write dq, dk, dv; 12 bytes a row of log-sum-exp and delta
# Multiplications and additions: forward 4 t s e a head, backward 14 t s e (scores and dp are made twice, so that no
# program adds to another's gradient).  Kept for the backward: the inputs, out, and the log-sum-exp.
"""Flash attention: tiles of keys pass by a tile of queries under a running maximum; no score leaves the chip.

* A program takes a tile of queries of one head.  Scores are in base 2: one ``exp2`` each.
* Causal, window: tiles that nobody sees are not loaded, tiles that everybody sees are not masked (``_tile.py``).
* ALiBi, soft cap (Gemma 2: before the mask), sinks (a logit a head that joins the denominator): compiled in or out.
* Fewer key heads than query heads: the heads of a group are neighbours in the grid and find the keys in the L2 cache.
* Packed sequences of any length: offsets in ``cu_seqlens``, read on the device.
* A query that sees no key gets zeros, and a log-sum-exp of -inf.  NaN in a key, NaN or infinity in a value reach the
  queries that see it, and no other; nothing goes back through those.  A key whose score is -inf weighs nothing.
* The backward (``flash_attention_backward.py``) adds in a fixed order: the same bits each time, without a switch.

dtypes: float32, float16, bfloat16.  Runs on CUDA and ROCm, and on CPU tensors under Triton's interpreter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from handbook_src.errors import KernelUnavailable
from handbook_src.kernels import launch
from handbook_src.kernels.flash_attention_backward import flash_backward
from handbook_src.kernels.flash_attention_tile import (
    LN2,
    LOG2E,
    adjacent,
    allowed,
    keys_seen,
    plan,
    precision,
    row_strides,
    rows_of,
    scores,
    sequence,
    shielded,
    store_rows,
    strides_of,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST = 256


@triton.jit
def _step(
    acc, mass, top, q, K, V, start, query, k_stride, v_stride, keys, e, c, scale, cap, slope, window,
    BN: tl.constexpr, E: tl.constexpr, C: tl.constexpr, EVEN_E: tl.constexpr, EVEN_C: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, ALIBI: tl.constexpr, CAP: tl.constexpr, IP: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    key = start + tl.arange(0, BN)
    k = rows_of(K, start, k_stride, keys, e, BN, E, EVEN_E, MASKED)
    x = tl.dot(q, tl.trans(k), input_precision=IP)
    x, unit, _ = scores(x, query[:, None], key[None, :], scale, cap, slope, ALIBI, CAP)
    if MASKED:
        keep = allowed(query[:, None], key[None, :], keys, window, CAUSAL, WINDOW)
        x = tl.where(keep, x, float("-inf"))
    new = tl.maximum(top, tl.max(x, 1) * unit)
    # A row that has seen nothing has a maximum of -inf, and -inf less -inf is NaN.
    base = tl.where(new == float("-inf"), 0.0, new) if MASKED else new
    p = tl.exp2(x * unit - base[:, None])
    v = rows_of(V, start, v_stride, keys, c, BN, C, EVEN_C, MASKED)
    if MASKED:
        v, bad = shielded(v)
        p = tl.where(keep & bad[None, :], float("nan"), p)
    fade = tl.exp2(top - base)
    mass = mass * fade + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision=IP)
    return acc, mass, new


@triton.jit
def _finish(acc, mass, top, SINKS, h, SINK: tl.constexpr):
    # The sink joins the denominator; then the division, and the log-sum-exp.
    if SINK:
        sink = tl.load(SINKS + h).to(tl.float32) * LOG2E
        new = tl.maximum(top, sink)
        base = tl.where(new == float("-inf"), 0.0, new)
        fade = tl.exp2(top - base)
        mass = mass * fade + tl.exp2(sink - base)
        acc, top = acc * fade[:, None], new
    empty = mass == 0.0
    acc = acc / tl.where(empty, 1.0, mass)[:, None]
    lse = tl.where(empty, float("-inf"), (top + tl.log2(tl.where(empty, 1.0, mass))) * LN2)
    # What is not finite shows in the log-sum-exp, by which the backward knows such rows.
    fine = tl.min((tl.abs(acc) < float("inf")).to(tl.int32), 1) == 1
    return acc, tl.where(fine, lse, float("nan"))


@triton.jit
def _forward(
    Q, K, V, OUT, LSE, CU_Q, CU_K, SLOPES, SINKS,
    q_b, q_t, q_h, k_b, k_s, k_h, v_b, v_s, v_h, o_b, o_t, o_h, lse_b, lse_h,
    times, keys, batch, heads, group, e, c, scale, cap, window,
    BM: tl.constexpr, BN: tl.constexpr, E: tl.constexpr, C: tl.constexpr, EVEN_E: tl.constexpr, EVEN_C: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, ALIBI: tl.constexpr, CAP: tl.constexpr, SINK: tl.constexpr,
    VARLEN: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    # One-dimensional grid, the longest causal rows first, the heads of a tile beside each other.
    tile = tl.cdiv(times, BM) - 1 - tl.program_id(0) // (batch * heads)
    b, h = tl.program_id(0) % (batch * heads) // heads, tl.program_id(0) % heads
    q0, times, k0, keys = sequence(CU_Q, CU_K, b, times, keys, VARLEN)
    b, hk, q0, k0 = b.to(tl.int64), (h // group).to(tl.int64), q0.to(tl.int64), k0.to(tl.int64)
    Q += b * q_b + q0 * q_t + h.to(tl.int64) * q_h
    K += b * k_b + k0 * k_s + hk * k_h
    V += b * v_b + k0 * v_s + hk * v_h
    OUT += b * o_b + q0 * o_t + h.to(tl.int64) * o_h
    first = tile * BM
    row, offset = first + tl.arange(0, BM), keys - times
    query = row + offset
    q = rows_of(Q, first, q_t, times, e, BM, E, EVEN_E, True)
    slope = tl.load(SLOPES + h).to(tl.float32) if ALIBI else 0.0
    top = tl.full([BM], float("-inf"), tl.float32)
    mass = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, C], tl.float32)
    last = tl.minimum(first + BM, times) - 1 + offset
    low, inner, outer, high = keys_seen(first + offset, last, keys, window, BN, CAUSAL, WINDOW)
    high = tl.where(first < times, high, low)  # a packed sequence may end before this tile
    outer = tl.where(first < times, outer, inner)
    for i in tl.range(0, (outer - inner) // BN):
        acc, mass, top = _step(
            acc, mass, top, q, K, V, inner + i * BN, query, k_s, v_s, keys, e, c, scale, cap, slope, window,
            BN, E, C, EVEN_E, EVEN_C, CAUSAL, WINDOW, ALIBI, CAP, IP, False,
        )  # fmt: skip
    before = (inner - low) // BN
    for i in tl.range(0, before + (high - outer) // BN):
        start = tl.where(i < before, low + i * BN, outer + (i - before) * BN)
        acc, mass, top = _step(
            acc, mass, top, q, K, V, start, query, k_s, v_s, keys, e, c, scale, cap, slope, window,
            BN, E, C, EVEN_E, EVEN_C, CAUSAL, WINDOW, ALIBI, CAP, IP, True,
        )  # fmt: skip
    acc, lse = _finish(acc, mass, top, SINKS, h, SINK)
    store_rows(OUT, acc, first, o_t, times, c, BM, C)
    tl.store(LSE + b * lse_b + h.to(tl.int64) * lse_h + q0 + row, lse, mask=row < times)


@torch.library.custom_op("handbook::flash_attention_forward", mutates_args=())
def _flash(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, slopes: Tensor | None,
    sinks: Tensor | None, times: int, keys: int, causal: bool, window: int, cap: float, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the output, ``b t h c``, and the log-sum-exp, float32 and ``b h t``."""
    out, lse = _flash_fake(q, k, v, cu_q, cu_k, slopes, sinks, times, keys, causal, window, cap, scale)
    packed = cu_q is not None
    if packed:  # rows that belong to no sequence
        out.zero_(), lse.fill_(-torch.inf)
    batch = len(cu_q) - 1 if cu_q is not None else q.shape[0]
    if not (times and batch):
        return out, lse
    q, k, v = adjacent(q), adjacent(k), adjacent(v)
    e, c = q.shape[3], v.shape[3]
    wide_e, wide_c = (max(16, triton.next_power_of_2(n)) for n in (e, c))
    width, family = max(wide_e, wide_c), launch.family(q)
    tile = plan("forward", width, q.dtype, family)
    with torch.cuda.device_of(q):
        _forward[(triton.cdiv(times, tile.queries) * batch * q.shape[2],)](
            q, k, v, out, lse, cu_q, cu_k, slopes, sinks, *strides_of(q, packed), *strides_of(k, packed),
            *strides_of(v, packed), *strides_of(out, packed), *row_strides(lse, packed),
            times, keys, batch, q.shape[2], q.shape[2] // k.shape[2], e, c, scale, cap, window,
            BM=tile.queries, BN=tile.keys, E=wide_e, C=wide_c, EVEN_E=e == wide_e, EVEN_C=c == wide_c,
            CAUSAL=causal, WINDOW=window > 0, ALIBI=slopes is not None, CAP=cap > 0, SINK=sinks is not None,
            VARLEN=packed, IP=precision(q.dtype, family, width), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out, lse


@_flash.register_fake
def _flash_fake(q, k, v, cu_q, cu_k, slopes, sinks, times, keys, causal, window, cap, scale):
    b, t, h, _ = q.shape
    return q.new_empty((b, t, h, v.shape[3])), q.new_empty((b, h, t), dtype=torch.float32)


def _save(ctx, inputs, output):
    q, k, v, cu_q, cu_k, slopes, sinks, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k, slopes, sinks)
    ctx.set_materialize_grads(False)


def _pull(ctx, dout, dlse):
    q, k, v, out, lse, cu_q, cu_k, slopes, sinks = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None,) * (7 + len(ctx.settings))
    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv, delta = flash_backward(q, k, v, out, lse, dout, dlse, cu_q, cu_k, slopes, *ctx.settings)
    down = None
    if sinks is not None and ctx.needs_input_grad[6]:
        # A sink is a key with the value 0: ds = p (0 - delta), summed over all queries of its head.
        weight = (sinks.float()[:, None] - lse).exp()
        down = torch.where(lse.isfinite(), -weight * delta, 0.0).sum((0, 2)).to(sinks.dtype)
    return dq, dk, dv, None, None, None, down, *(None,) * len(ctx.settings)


_flash.register_autograd(_pull, setup_context=_save)


def flash_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, *, cu_q: Tensor | None = None, cu_k: Tensor | None = None,
    alibi: Tensor | None = None, sinks: Tensor | None = None, times: int | None = None, keys: int | None = None,
    causal: bool = False, window: int | None = None, soft_cap: float | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the output, ``b t h c``, and the log of the softmax's denominator, ``b h t``, both differentiable.

    :func:`handbook_src.functional.flash_attention` checks what the user passes; here only what the
    kernel would read wrongly is refused.

    Args:
        q: ``b t h e``; packed sequences are one sample.
        k: ``b s g e``.
        v: ``b s g c``.
        cu_q: where each packed sequence's queries begin, and the end: int32 or int64.
        cu_k: the same of its keys.
        alibi: one slope a head; not differentiated.
        sinks: one logit a head that joins the denominator.
        times: the most queries of a packed sequence.
        keys: the most keys of one.
        causal: the queries are the last ``t`` positions and see no later key.
        window: keys nearer than so many positions.
        soft_cap: scores are bent by ``cap * tanh(score / cap)``.
        scale: factor on the products; one over the root of ``e`` unless given.

    Raises:
        ShapeError: a head of more than 256 features, a dtype that is none of the three, tensors on several devices.
        KernelUnavailable: no GPU and no interpreter; a second derivative, or slopes that require a gradient.
    """
    tensors = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "alibi": alibi, "sinks": sinks}
    launch.check_runs("flash attention", tensors, DTYPES, heads=("q", "v"), most=MOST)
    if alibi is not None and alibi.requires_grad and torch.is_grad_enabled():
        raise KernelUnavailable(
            "flash attention",
            got="ALiBi slopes that require a gradient",
            want="fixed slopes",
            remedy="Use backend='reference', which differentiates them.",
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    times, keys = q.shape[1] if times is None else times, k.shape[1] if keys is None else keys
    one = [None if x is None else x.contiguous() for x in (cu_q, cu_k, alibi, sinks)]
    return _flash(q, k, v, *one, times, keys, causal, window or 0, float(soft_cap or 0.0), float(scale))
