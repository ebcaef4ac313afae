"""What the tiles of flash attention share: which keys they look at, how a score is made, and how large they are.

A query at position ``p`` (the ``t`` queries are the last of ``s`` positions) sees key ``j`` where ``j <= p`` under a
causal rule and ``|p - j| < window`` under a window.  Both leave an interval of keys to a tile of queries, and an
interval of queries to a tile of keys; inside lies an interval of tiles whose every pair is seen.  Those run without a
mask; only the tiles on the border compare positions, and the tiles outside are never loaded.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class Tile(NamedTuple):
    """Rows of queries, rows of keys, warps, and stages of the pipeline that loads ahead."""

    queries: int
    keys: int
    warps: int
    stages: int


@triton.jit
def rows_of(
    X, start, stride, rows, cols, HIGH: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr, MASKED: tl.constexpr,
    AGAIN: tl.constexpr = False,
):  # fmt: skip
    # AGAIN: what does not change in a loop is loaded in it nevertheless, for the compiler would keep it in registers.
    # The tile's address is 64 bits, an offset inside it 32: 64-bit offsets for every element would cost registers.
    row, col = tl.arange(0, HIGH), tl.arange(0, WIDE)
    at = X + start.to(tl.int64) * stride + row[:, None] * stride + col[None, :]
    if MASKED and EVEN:
        return tl.load(at, mask=(start + row < rows)[:, None], other=0.0, volatile=AGAIN)
    if MASKED:
        mask = (start + row < rows)[:, None] & (col < cols)[None, :]
        return tl.load(at, mask=mask, other=0.0, volatile=AGAIN)
    if EVEN:
        return tl.load(at)
    return tl.load(at, mask=(col < cols)[None, :], other=0.0)


@triton.jit
def store_rows(X, x, start, stride, rows, cols, HIGH: tl.constexpr, WIDE: tl.constexpr):
    row, col = tl.arange(0, HIGH), tl.arange(0, WIDE)
    at = X + start.to(tl.int64) * stride + row[:, None] * stride + col[None, :]
    tl.store(at, x.to(X.dtype.element_ty), mask=(start + row < rows)[:, None] & (col < cols)[None, :])


@triton.jit
def shielded(x):
    # NaN and infinity become 0, and their rows are named: a weight of 0 times NaN would be NaN.  Told by their bits,
    # which costs half the registers of a comparison in float32.
    if x.dtype == tl.float32:
        fine = (x.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < 0x7F800000
    else:
        infinity: tl.constexpr = 0x7C00 if x.dtype == tl.float16 else 0x7F80
        fine = (x.to(tl.int16, bitcast=True) & 0x7FFF) < infinity
    return tl.where(fine, x, tl.zeros_like(x)), tl.min(fine.to(tl.int32), axis=1) == 0


@triton.jit
def allowed(query, key, keys, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    keep = key < keys
    if CAUSAL:
        keep = keep & (key <= query)
    if WINDOW:
        keep = keep & (query - key < window)
        if not CAUSAL:
            keep = keep & (key - query < window)
    return keep


@triton.jit
def bent(x):
    # tanh, which Triton lacks outside libdevice.
    return 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)


@triton.jit
def scores(x, query, key, scale, cap, slope, ALIBI: tl.constexpr, CAP: tl.constexpr):
    # From products to scores in base 2, up to a factor that is returned (the plain case multiplies nothing); and by
    # what the cap flattened them, for the gradient.
    unit, flat = scale * LOG2E, 1.0
    if CAP:
        t = bent(x * (scale / cap))
        x, flat = t * (cap * LOG2E), 1.0 - t * t
    elif ALIBI:
        x = x * unit
    if ALIBI:
        x -= tl.abs(query - key).to(tl.float32) * (slope * LOG2E)
    if CAP or ALIBI:
        unit = 1.0
    return x, unit, flat


@triton.jit
def sequence(CU_Q, CU_K, b, times, keys, VARLEN: tl.constexpr):
    # Where the sample's queries and keys begin, and how many there are.
    if VARLEN:
        q0, k0 = tl.load(CU_Q + b), tl.load(CU_K + b)
        return q0, tl.load(CU_Q + b + 1) - q0, k0, tl.load(CU_K + b + 1) - k0
    return b * 0, times, b * 0, keys


@triton.jit
def keys_seen(
    first, last, keys, window, BLOCK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr
):  # fmt: skip
    # Queries at positions first..last: where their keys begin; where every pair is seen, from and to; the tiles' end.
    low, high, inner, outer = first * 0, keys, first * 0, keys
    if WINDOW:
        low = tl.maximum(first - window + 1, 0)
        inner = tl.maximum(last - window + 1, 0)
        if not CAUSAL:
            high = tl.minimum(keys, last + window)
            outer = tl.minimum(keys, first + window)
    if CAUSAL:
        high = tl.minimum(keys, last + 1)
        outer = tl.minimum(keys, first + 1)
    return _aligned(low, high, inner, outer, BLOCK)


@triton.jit
def queries_seeing(
    first, last, times, offset, window, BLOCK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr
):  # fmt: skip
    # Keys first..last: the same for the rows of queries that see them; row i stands at position i + offset.
    low, high, inner, outer = first * 0, times, first * 0, times
    if CAUSAL:
        low, inner = first - offset, last - offset
    elif WINDOW:
        low, inner = first - offset - window + 1, last - offset - window + 1
    if WINDOW:
        high = tl.minimum(times, last - offset + window)
        outer = tl.minimum(outer, first - offset + window)
    return _aligned(tl.maximum(low, 0), high, tl.maximum(inner, 0), outer, BLOCK)


@triton.jit
def _aligned(low, high, inner, outer, BLOCK: tl.constexpr):
    # Tiles are whole: low and outer go down, inner and high up.  Nothing negative is divided, whose rounding differs.
    low = low // BLOCK * BLOCK
    high = tl.maximum((tl.maximum(high, 0) + BLOCK - 1) // BLOCK * BLOCK, low)
    inner = tl.minimum(tl.maximum((inner + BLOCK - 1) // BLOCK * BLOCK, low), high)
    outer = tl.minimum(tl.maximum(tl.maximum(outer, 0) // BLOCK * BLOCK, inner), high)
    return low, inner, outer, high


# Families of GPUs whose shared memory holds the tile that is loaded ahead.
AHEAD = ("hopper", "blackwell")
# (queries, keys, warps, stages) by width of a head, up to and including: no spill on Hopper, and shared memory that
# fits (kernels/flash_attention/worklog.md).  Nobody has timed them: not measured.
HOPPER: dict[str, dict[int, tuple[int, int, int, int]]] = {
    "forward": {64: (128, 128, 8, 2), 128: (128, 64, 8, 3), 256: (128, 32, 8, 2)},
    "dq": {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
    "dkv": {64: (64, 64, 8, 2), 128: (32, 64, 8, 2), 256: (16, 64, 8, 2)},
}
# Elsewhere a product's operands are held in registers and there is less shared memory (64 KB on AMD): half the tile,
# and nothing is loaded ahead but by the compiler's own choice.
ELSEWHERE: dict[str, dict[int, tuple[int, int, int, int]]] = {
    "forward": {64: (128, 64, 8, 1), 128: (64, 64, 8, 1), 256: (64, 32, 8, 1)},
    "dq": {64: (64, 32, 8, 1), 128: (64, 32, 8, 1), 256: (32, 32, 8, 1)},
    "dkv": {64: (32, 64, 8, 1), 128: (32, 32, 8, 1), 256: (16, 32, 8, 1)},
}
FLOAT32: dict[str, dict[int, tuple[int, int, int, int]]] = {
    "forward": {64: (64, 32, 4, 2), 256: (32, 16, 8, 1)},
    "dq": {64: (64, 32, 4, 1), 256: (16, 16, 8, 1)},
    "dkv": {64: (32, 32, 4, 1), 256: (16, 16, 8, 1)},
}

# What Blackwell and the others spill of these.
BLACKWELL = HOPPER | {"dkv": {**HOPPER["dkv"], 128: (32, 64, 8, 1)}}
FLOAT32_ELSEWHERE = FLOAT32 | {"dq": {**FLOAT32["dq"], 64: (32, 32, 8, 1)}}


def plan(kind: str, width: int, dtype: torch.dtype, family: str) -> Tile:
    """Return the tile of ``forward``, ``dq`` or ``dkv`` for heads of ``width`` features."""
    half = {"hopper": HOPPER, "blackwell": BLACKWELL}.get(family, ELSEWHERE)
    full = FLOAT32 if family == "hopper" else FLOAT32_ELSEWHERE
    sizes = (full if dtype == torch.float32 else half)[kind]
    queries, keys, warps, stages = next(tile for widest, tile in sizes.items() if width <= widest)
    if family == "amd":  # a lane may hold 512 registers where a program has 256 threads
        warps = 4
    return Tile(queries, keys, warps, stages if family in AHEAD else 1)


def parts(width: int) -> int:
    """Return into how many parts the features of dk and dv are cut: the sums of 256 would not fit in registers."""
    return 1 if width <= 128 else 2


def again(dtype: torch.dtype, width: int) -> bool:
    """Return whether queries are loaded in every step: 16 rows of 256 features in float32 leave no register."""
    return dtype == torch.float32 and width > 128


def strides_of(x: Tensor, packed: bool) -> tuple[int, int, int]:
    """Return the strides of sample, position and head; packed sequences are one sample."""
    return (0 if packed else x.stride(0)), x.stride(1), x.stride(2)


def row_strides(x: Tensor, packed: bool) -> tuple[int, int]:
    """Return the strides of sample and head of what has one number a row, ``b h t``."""
    return (0 if packed else x.stride(0)), x.stride(1)


def adjacent(x: Tensor) -> Tensor:
    """Return ``x`` with neighbouring features; a copy only where they are not."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def precision(dtype: torch.dtype, family: str, width: int) -> str:
    """Return how a product of float32 tiles is taken: never one TF32 product, whose error is 1e-3.

    Three TF32 products hold both parts of an operand in registers: 16 rows of 128 features are 128 of them a lane.
    """
    return "tf32x3" if dtype == torch.float32 and family != "amd" and width <= 64 else "ieee"
