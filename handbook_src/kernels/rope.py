# Bytes moved per rotated element, e bytes each; the tables are read once for all heads, 8 bytes a pair and position:
#   forward   read x, write y      2e   (four products 4e, two sums 3e, one concatenation 2e: 9e in float32)
#   backward  read dy, write dx    2e   (the same rotation, the other way round)
# Kept for the backward: the tables, which are there anyway; nothing of the size of x.
"""Rotary embedding in one pass: pairs of features turned by the angle of their position.

A rotation is orthogonal, so the gradient is the rotation by minus the angle: forward and backward are one kernel with
another sign, and derivatives of any order come for nothing.

* A program takes some rows ``(b, t, h)``; the tables' rows come from the L1 cache for all heads but the first.
* Neighbouring pairs are loaded as they lie, 16 bytes at a time, and taken apart in registers.
* Tensors of any stride over ``b t h`` are read in place (a slice of a packed projection); a last axis that is not
  contiguous is copied first.  Features past the tables' width pass through.

dtypes: float32, float16, bfloat16, for ``x`` and the tables apart; the products are float32 and rounded once.  Runs on
CUDA and ROCm, and on CPU tensors under Triton's interpreter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from handbook_src.errors import KernelUnavailable, ShapeError
from handbook_src.kernels.launch import check_tensors

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Pairs in a program: 16 elements a thread at 4 warps (kernels/rope/worklog.md).
TILE, WARPS = 1024, 4


@triton.jit
def _pieces(t, b_stride, t_stride, h_stride, times, heads):
    # A row's number is ((b t) h): where it starts, and its sample and position for the tables.
    at = t // heads
    return at // times * b_stride + at % times * t_stride + t % heads * h_stride, at // times, at % times


@triton.jit
def _rotate(
    X, COS, SIN, Y, b_stride, t_stride, h_stride, table_stride, rows, times, heads, half, rest, sign,
    INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    start, sample, time = _pieces(row, b_stride, t_stride, h_stride, times, heads)
    x, y = X + start[:, None], Y + (row * (2 * half + rest))[:, None]
    pair = tl.arange(0, BLOCK)
    mask = live[:, None] & (pair < half)[None, :]
    angle = (sample * table_stride + time * half)[:, None] + pair[None, :]
    cos = tl.load(COS + angle, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(SIN + angle, mask=mask, other=0.0).to(tl.float32) * sign
    if INTERLEAVED:
        col = tl.arange(0, 2 * BLOCK)
        both = live[:, None] & (col < 2 * half)[None, :]
        a, b = tl.split(tl.reshape(tl.load(x + col[None, :], mask=both, other=0.0).to(tl.float32), (ROWS, BLOCK, 2)))
        turned = tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (ROWS, 2 * BLOCK))
        tl.store(y + col[None, :], turned.to(Y.dtype.element_ty), mask=both)
    else:
        a = tl.load(x + pair[None, :], mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x + half + pair[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(y + pair[None, :], (a * cos - b * sin).to(Y.dtype.element_ty), mask=mask)
        tl.store(y + half + pair[None, :], (a * sin + b * cos).to(Y.dtype.element_ty), mask=mask)
    if REST:
        col = tl.arange(0, REST)
        mask = live[:, None] & (col < rest)[None, :]
        kept = tl.load(x + 2 * half + col[None, :], mask=mask, other=0.0)
        tl.store(y + 2 * half + col[None, :], kept, mask=mask)


def plan(rows: int, width: int) -> tuple[int, int, int]:
    """Return rows a program, its columns, and warps."""
    block = triton.next_power_of_2(width)
    high = max(1, min(TILE // block, triton.next_power_of_2(rows)))
    return high, block, max(1, min(16, high * block * WARPS // TILE))


@torch.library.custom_op("handbook::rope", mutates_args=())
def _rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, backwards: bool) -> Tensor:
    """Return ``x`` turned by the tables' angles, or by minus them."""
    y = _rope_fake(x, cos, sin, interleaved, backwards)
    if y.numel() == 0:
        return y
    x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    times, half = cos.shape[-2:]
    rest, rows = x.shape[-1] - 2 * half, x.shape[0] * x.shape[1] * x.shape[2]
    per_sample = cos.ndim == 3 and cos.shape[0] > 1
    high, block, warps = plan(rows, half)
    with torch.cuda.device_of(x):
        _rotate[(triton.cdiv(rows, high),)](
            x, cos, sin, y, x.stride(0), x.stride(1), x.stride(2), times * half if per_sample else 0,
            rows, times, x.shape[2], half, rest, -1.0 if backwards else 1.0,
            INTERLEAVED=interleaved, ROWS=high, BLOCK=block, REST=triton.next_power_of_2(rest) if rest else 0,
            num_warps=warps,
        )  # fmt: skip
    return y


@_rope.register_fake
def _rope_fake(x, cos, sin, interleaved, backwards):
    return x.new_empty(x.shape)


def _save(ctx, inputs, output):
    _, cos, sin, ctx.interleaved, ctx.backwards = inputs
    ctx.save_for_backward(cos, sin)


def _pull(ctx, dy):
    return _rope(dy, *ctx.saved_tensors, ctx.interleaved, not ctx.backwards), None, None, None, None


_rope.register_autograd(_pull, setup_context=_save)


def rope_triton(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Return ``x`` with pairs of features turned by the angle of their position, in one pass.

    Args:
        x: ``b t h e``; float32, float16 or bfloat16.
        cos: ``t r/2`` or ``b t r/2``, ``r`` at most ``e``; one of the three dtypes.
        sin: of the same shape.
        interleaved: pairs are neighbours; otherwise they are half of ``r`` apart.

    Raises:
        ShapeError: the tables don't fit ``x``, or a dtype is not one of the three.
        KernelUnavailable: no GPU and no interpreter, or the tables require a gradient.
    """
    check_tensors("rotary embedding", x, DTYPES, like_x={}, per_feature={})
    wide, fits = x.shape[-1], cos.shape == sin.shape and cos.ndim in (2, 3) and x.ndim == 4
    if not fits or cos.shape[-2] != x.shape[1] or cos.shape[0] not in (1, x.shape[-4 if cos.ndim == 3 else 1]):
        fits = False
    if not fits or not 0 < 2 * cos.shape[-1] <= wide:
        raise ShapeError(
            "cos and sin",
            got=f"{tuple(cos.shape)} and {tuple(sin.shape)}",
            want=f"(t, r/2) or (b, t, r/2) for x of {tuple(x.shape)}",
            remedy="One entry a pair of features.",
        )
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype not in DTYPES or table.device != x.device:
            raise ShapeError(
                name,
                got=f"{table.dtype} on {table.device}",
                want=f"one of {DTYPES} on {x.device}",
                remedy="Use backend='reference'.",
            )
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise KernelUnavailable(
            "rotary embedding",
            got="cos or sin that require a gradient",
            want="fixed tables",
            remedy="Use backend='reference', which differentiates them.",
        )
    return _rope(x, cos, sin, interleaved, False)
