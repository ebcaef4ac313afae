# Bytes moved, e bytes an element:
#   each key and value of the cache once, whatever the number of query heads that share it;
#   4 (c + 1) bytes a query head and split, written and read once: 2 % of the cache at 512 keys a split, 4 heads a group
"""One new query a sequence over a paged cache of keys and values, the cache split among programs.

* Decoding reads the cache and little else.  One program a key head and split: all query heads of the group share the
  tile that it loads, padded to the 16 rows of a product.  A group of more heads than registers hold is cut.
* A sequence's keys are cut into splits, so that a batch of one keeps a whole GPU busy; a second kernel merges the parts
  by their log-sum-exp.  A split without keys weighs exp(-inf) = 0.
* Pages are found through a block table (vLLM), lengths are read on the device: nothing waits for it.

dtypes: float32, float16, bfloat16.  Not differentiable.  Runs on CUDA and ROCm, and under Triton's interpreter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from handbook_src.errors import KernelUnavailable
from handbook_src.kernels import launch
from handbook_src.kernels.flash_attention import DTYPES, MOST
from handbook_src.kernels.flash_attention_tile import AHEAD, LN2, LOG2E, adjacent, precision, scores

# Keys of a tile, and keys of a split at least.
BLOCK, LEAST = 64, 256


@triton.jit
def _slots(X, page, page_stride, slot, slot_stride, live, cols, WIDE: tl.constexpr):
    col = tl.arange(0, WIDE)
    at = X + (page * page_stride + slot * slot_stride)[:, None] + col[None, :]
    return tl.load(at, mask=live[:, None] & (col < cols)[None, :], other=0.0)


@triton.jit
def _split(
    Q, K, V, OUT, LSE, TABLE, LENGTHS, SLOPES,
    q_b, q_h, k_p, k_s, k_h, v_p, v_s, v_h, table_b, heads, group, cuts, splits, page_size, e, c, scale, cap, window,
    G: tl.constexpr, BN: tl.constexpr, E: tl.constexpr, C: tl.constexpr, WINDOW: tl.constexpr, ALIBI: tl.constexpr,
    CAP: tl.constexpr, IP: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    shares = heads // group * cuts  # of a sequence's query heads
    split, share = tl.program_id(0) % splits, tl.program_id(0) // splits % shares
    hk, b = share // cuts, (tl.program_id(0) // (splits * shares)).to(tl.int64)
    length = tl.load(LENGTHS + b).to(tl.int32)
    first = tl.maximum(length - window, 0) if WINDOW else length * 0
    per = tl.cdiv(tl.cdiv(length - first, splits), BN) * BN
    start = first + split * per
    end = tl.minimum(start + per, length)
    g, col_e, col_c = share % cuts * G + tl.arange(0, G), tl.arange(0, E), tl.arange(0, C)
    h, mine = hk * group + g, g < group
    Q += b * q_b + h[:, None] * q_h + col_e[None, :]
    q_mask = mine[:, None] & (col_e < e)[None, :]
    q = tl.load(Q, mask=q_mask, other=0.0)
    slope = (tl.load(SLOPES + h, mask=mine, other=0.0).to(tl.float32) if ALIBI else tl.zeros([G], tl.float32))[:, None]
    top, mass, acc = tl.full([G], float("-inf"), tl.float32), tl.zeros([G], tl.float32), tl.zeros([G, C], tl.float32)
    K, V = K + hk.to(tl.int64) * k_h, V + hk.to(tl.int64) * v_h
    for i in tl.range(0, tl.cdiv(tl.maximum(end - start, 0), BN)):
        key = start + i * BN + tl.arange(0, BN)
        live = key < end
        page = tl.load(TABLE + b * table_b + key // page_size, mask=live, other=0).to(tl.int64)
        slot = key % page_size
        k = _slots(K, page, k_p, slot, k_s, live, e, E)
        if AGAIN:
            q = tl.load(Q, mask=q_mask, other=0.0, volatile=True)
        x = tl.dot(q, tl.trans(k), input_precision=IP)
        x, unit, _ = scores(x, length - 1, key[None, :], scale, cap, slope, ALIBI, CAP)
        x = tl.where(live[None, :], x, float("-inf"))
        new = tl.maximum(top, tl.max(x, 1) * unit)
        base = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(x * unit - base[:, None])
        v = _slots(V, page, v_p, slot, v_s, live, c, C)
        fade = tl.exp2(top - base)
        mass = mass * fade + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision=IP)
        top = new
    empty = mass == 0.0
    at = (b * heads + h) * splits + split
    acc = acc / tl.where(empty, 1.0, mass)[:, None]
    tl.store(OUT + at[:, None] * c + col_c[None, :], acc, mask=mine[:, None] & (col_c < c)[None, :])
    tl.store(LSE + at, tl.where(empty, float("-inf"), top + tl.log2(tl.where(empty, 1.0, mass))), mask=mine)


@triton.jit
def _merge(PARTS, LSES, SINKS, OUT, LSE, heads, splits, c, SINK: tl.constexpr, SPLITS: tl.constexpr, C: tl.constexpr):
    at = tl.program_id(0).to(tl.int64)
    split, col = tl.arange(0, SPLITS), tl.arange(0, C)
    lse = tl.load(LSES + at * splits + split, mask=split < splits, other=float("-inf"))
    top = tl.max(lse, 0)
    sink = tl.load(SINKS + at % heads).to(tl.float32) * LOG2E if SINK else float("-inf")
    top = tl.maximum(top, sink)
    base = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2(lse - base)
    mass = tl.sum(weight, 0) + (tl.exp2(sink - base) if SINK else 0.0)
    mask = (split < splits)[:, None] & (col < c)[None, :]
    parts = tl.load(PARTS + (at * splits + split)[:, None] * c + col[None, :], mask=mask, other=0.0)
    empty = mass == 0.0
    out = tl.sum(parts * weight[:, None], 0) / tl.where(empty, 1.0, mass)
    tl.store(OUT + at * c + col, out.to(OUT.dtype.element_ty), mask=col < c)
    tl.store(LSE + at, tl.where(empty, float("-inf"), (base + tl.log2(tl.where(empty, 1.0, mass))) * LN2))


def splits_for(keys: int, programs: int, multiprocessors: int) -> int:
    """Return into how many parts ``keys`` are cut: two programs a multiprocessor, 256 keys a part, at most 128."""
    return max(1, min(-(-2 * multiprocessors // max(1, programs)), -(-keys // LEAST), 128))


def plan(group: int, width: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Return the heads and keys of a tile, and the warps: what spills no register on Hopper."""
    heads = max(16, triton.next_power_of_2(group))
    if dtype == torch.float32:
        wide = width > 64
        return min(heads, 32), max(16, BLOCK // (4 if wide else 2)), 8 if wide else 4
    return min(heads, 64), max(16, BLOCK // (1 if width <= 128 else 2)), 4


@torch.library.custom_op("handbook::paged_decode", mutates_args=())
def _decode(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, slopes: Tensor | None, sinks: Tensor | None,
    window: int, cap: float, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the output, ``b h c``, and the log-sum-exp, ``b h``."""
    out, lse = _fake(q, k, v, table, lengths, slopes, sinks, window, cap, scale)
    (b, h, e), c, page, g = q.shape, v.shape[3], k.shape[1], k.shape[2]
    if out.numel() == 0:
        return out, lse
    q, k, v, table, lengths = adjacent(q), adjacent(k), adjacent(v), adjacent(table), lengths.contiguous()
    wide_e, wide_c = (max(16, triton.next_power_of_2(n)) for n in (e, c))
    family, width = launch.family(q), max(wide_e, wide_c)
    heads, keys, warps = plan(h // g, width, q.dtype)
    cuts = triton.cdiv(h // g, heads)
    splits = splits_for(min(table.shape[1] * page, window or 2**31), b * g * cuts, launch.multiprocessors(q))
    parts, lses = q.new_empty((b, h, splits, c), dtype=torch.float32), q.new_empty((b, h, splits), dtype=torch.float32)
    with torch.cuda.device_of(q):
        _split[(b * g * cuts * splits,)](
            q, k, v, parts, lses, table, lengths, slopes, q.stride(0), q.stride(1), *k.stride()[:3], *v.stride()[:3],
            table.stride(0), h, h // g, cuts, splits, page, e, c, scale, cap, window, G=heads, BN=keys, E=wide_e,
            C=wide_c, WINDOW=window > 0, ALIBI=slopes is not None, CAP=cap > 0, IP=precision(q.dtype, family, width),
            AGAIN=q.dtype == torch.float32 and width > 64, num_warps=warps,
            num_stages=3 if family in AHEAD and q.dtype != torch.float32 else 1,
        )  # fmt: skip
        _merge[(b * h,)](
            parts, lses, sinks, out, lse, h, splits, c, SINK=sinks is not None,
            SPLITS=triton.next_power_of_2(splits), C=wide_c, num_warps=4,
        )  # fmt: skip
    return out, lse


@_decode.register_fake
def _fake(q, k, v, table, lengths, slopes, sinks, window, cap, scale):
    return q.new_empty((*q.shape[:2], v.shape[3])), q.new_empty(q.shape[:2], dtype=torch.float32)


def paged_decode_triton(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, lengths: Tensor, *, alibi: Tensor | None = None,
    sinks: Tensor | None = None, window: int | None = None, soft_cap: float | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the output, ``b h c``, and the log-sum-exp, ``b h``.

    :func:`handbook_src.functional.paged_decode_attention` checks what the user passes.

    Args:
        q: ``b h e``, the newest position of each sequence.
        k_pages: ``pages page_size g e``.
        v_pages: ``pages page_size g c``.
        block_table: ``b n``, the pages of each sequence in order; int32 or int64.
        lengths: ``b``, how many keys each sequence has.
        alibi: one slope a head.
        sinks: one logit a head that joins the denominator.
        window: keys nearer than so many positions.
        soft_cap: scores are bent by ``cap * tanh(score / cap)``.
        scale: factor on the products.

    Raises:
        ShapeError: a head of more than 256 features, a dtype that is none of the three, tensors on several devices.
        KernelUnavailable: no GPU and no interpreter, or a tensor that requires a gradient.
    """
    tensors = {"q": q, "k_pages": k_pages, "v_pages": v_pages, "block_table": block_table, "lengths": lengths}
    launch.check_runs(
        "paged decoding", {**tensors, "alibi": alibi, "sinks": sinks}, DTYPES, heads=("q", "v_pages"), most=MOST
    )
    learned = [x for x in (q, k_pages, v_pages, alibi, sinks) if x is not None and x.requires_grad]
    if learned and torch.is_grad_enabled():
        raise KernelUnavailable(
            "paged decoding",
            got="a tensor that requires a gradient",
            want="inference",
            remedy="Run it under torch.no_grad(), or use backend='reference'.",
        )
    one = [None if x is None else x.contiguous() for x in (alibi, sinks)]
    return _decode(
        q, k_pages, v_pages, block_table, lengths, *one, window or 0, float(soft_cap or 0.0),
        float(q.shape[-1] ** -0.5 if scale is None else scale),
    )  # fmt: skip
