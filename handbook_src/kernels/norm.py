# Bytes moved per element, e bytes each, rows of d elements, statistics and weights aside:
#   norm                       forward  read x, write y                            2e
#   dropout + add + norm       forward  read x, residual, write sum, y             4e   (three kernels: 7e + mask)
#   norm                       backward read x, dy, write dx                       3e
#   dropout + add + norm       backward read sum, dy, dsum, write dx, dresidual    5e   (4e without dropout)
# Longer rows (WHOLE_ROW_*) are read twice: forward 3e (5e fused), the second time from the L2 cache (132 rows in flight
# x 128 KiB = 17 of 50 MB on an H100); backward 5e (7e fused), because dx sums over columns and dW over rows.
"""Fused normalisation: ``dropout(x) + residual``, then LayerNorm or RMSNorm, in one pass each way.

One pair of kernels serves every case; what a call leaves out is compiled out.

* The statistic is float32 whatever the dtype.  Variance is the mean square of the deviations, a second look at
  registers, so a large mean cancels nothing; long rows merge block moments by Chan's formula instead.
* The norm sees the sum as it is handed on, rounded to the residual's dtype: ``normed == norm(new_residual)``.
* Dropout's mask is a function of (seed, row, column) by Philox: the backward computes it again, nothing is stored.
* Weight gradients are deterministic: each program adds its own rows in a fixed order into a float32 partial, and one
  reduction adds the partials.  There are no atomics; the order depends only on the number of multiprocessors.
* Tensors of rows with any stride are read in place; a last axis that is not contiguous is copied first.

dtypes: float32, float16, bfloat16; the weights and the residual may have another one than ``x``.  ``normed`` has
``x``'s dtype, ``new_residual`` the residual's.  Runs on CUDA and ROCm, and on CPU tensors under Triton's interpreter.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from handbook_src.errors import ConfigError, KernelUnavailable
from handbook_src.kernels.launch import LANES, as_rows, check_tensors, multiprocessors, packed

# Longest row held in registers, by the compile reports (kernels/norm/worklog.md).  Forward: no spill at 32768; half of
# it with dropout (64 bytes a thread at 32768) or a wider stream (312).  Backward: no spill at 8192, 56 bytes a thread
# at 16384; half of it, over twice the warps, for a float32 stream with dropout or a narrower x (4 to 24 bytes at 8192).
WHOLE_ROW_FORWARD = 32768
WHOLE_ROW_BACKWARD = 8192
# Columns per step of longer rows.  Forward: 32 warps, one program a multiprocessor, so that the rows in flight fit the
# L2 cache when they are read again.  Backward: 4096 keep 8 warps busy.
LONG_BLOCK_FORWARD = 16384
LONG_BLOCK_BACKWARD = 4096
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _keep(seed, row, quad, dropout):
    # One Philox call yields four words: counter (column // 4, row), key seed.  A call per element would cost
    # 4 x 60 integer operations per 8 bytes, more time than the memory takes.
    zero = (row[:, None] * 0 + quad[None, :] * 0).to(tl.int32)
    column, line = quad[None, :] + zero, row[:, None].to(tl.int32) + zero
    w0, w1, w2, w3 = tl.philox(seed, column, line, zero, zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # innermost axes spell 0 1 2 3
    return tl.uint_to_uniform_float(tl.reshape(words, (w0.shape[0], w0.shape[1] * 4))) >= dropout


@triton.jit
def _dropped(value, SEED, row, start, dropout, BLOCK: tl.constexpr):
    keep = _keep(tl.load(SEED), row, start // 4 + tl.arange(0, BLOCK // 4), dropout)
    return tl.where(keep, value * (1.0 / tl.maximum(1.0 - dropout, 1e-20)), 0.0)  # at 1 nothing is kept


@triton.jit
def _summed(X, R, SEED, Z, row, start, mask, x_stride, r_stride, cols, dropout, BLOCK: tl.constexpr):
    # dropout(x) + residual, rounded as the stream is stored, back in float32; stores it where there is a stream.
    at = row[:, None] * x_stride + (start + tl.arange(0, BLOCK))[None, :]
    z = tl.load(X + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    if SEED is not None:
        z = _dropped(z, SEED, row, start, dropout, BLOCK)
    if R is not None:
        at = row[:, None] * r_stride + (start + tl.arange(0, BLOCK))[None, :]
        z += tl.load(R + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    if Z is not None:
        rounded = z.to(Z.dtype.element_ty)
        at = row[:, None] * cols + (start + tl.arange(0, BLOCK))[None, :]
        tl.store(Z + at, rounded, mask=mask)
        z = rounded.to(tl.float32)
    return z


@triton.jit
def _affine(Y, W, B, normed, row, col, mask, cols):
    if W is not None:
        normed *= tl.load(W + col, mask=col < cols, other=0.0).to(tl.float32)[None, :]
    if B is not None:
        normed += tl.load(B + col, mask=col < cols, other=0.0).to(tl.float32)[None, :]
    tl.store(Y + row[:, None] * cols + col[None, :], normed.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _forward_whole(
    X, R, W, B, SEED, Y, Z, MEAN, RSTD, x_stride, r_stride, rows, cols, eps, dropout,
    CENTRE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (col < cols)[None, :]
    z = _summed(X, R, SEED, Z, row, 0, mask, x_stride, r_stride, cols, dropout, BLOCK)
    if CENTRE:
        mean = tl.sum(z, axis=1) / cols
        tl.store(MEAN + row, mean, mask=row < rows)
        z = tl.where(mask, z - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(z * z, axis=1) / cols + eps)
    tl.store(RSTD + row, rstd, mask=row < rows)
    _affine(Y, W, B, z * rstd[:, None], row, col, mask, cols)


@triton.jit
def _forward_long(
    X, R, W, B, SEED, Y, Z, MEAN, RSTD, x_stride, r_stride, rows, cols, eps, dropout,
    CENTRE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    mean, squares = tl.zeros([1], tl.float32), tl.zeros([1], tl.float32)
    for start in tl.range(0, cols, BLOCK):
        live = (start + tl.arange(0, BLOCK) < cols)[None, :]
        z = _summed(X, R, SEED, Z, row, start, live, x_stride, r_stride, cols, dropout, BLOCK)
        if CENTRE:  # Chan, Golub and LeVeque 1979: merge (count, mean, squares) of the block into the running ones
            count = tl.minimum(cols - start, BLOCK) * 1.0
            share = count / (start + count)
            block_mean = tl.sum(z, axis=1) / count
            shift = block_mean - mean
            z = tl.where(live, z - block_mean[:, None], 0.0)
            squares += shift * shift * start * share
            mean += shift * share
        squares += tl.sum(z * z, axis=1)
    rstd = 1.0 / tl.sqrt(squares / cols + eps)
    tl.store(RSTD + row, rstd)
    if CENTRE:
        tl.store(MEAN + row, mean)
    tl.debug_barrier()  # the row of Z was written by other threads of this program
    for start in tl.range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        live = (col < cols)[None, :]
        source = X + row[:, None] * x_stride if Z is None else Z + row[:, None] * cols
        z = tl.load(source + col[None, :], mask=live, other=0.0).to(tl.float32)
        _affine(Y, W, B, (z - mean[:, None]) * rstd[:, None], row, col, live, cols)


@triton.jit
def _normed(Z, MEAN, rstd, row, col, mask, z_stride, rows):
    z = tl.load(Z + row[:, None] * z_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    if MEAN is not None:
        z -= tl.load(MEAN + row, mask=row < rows, other=0.0)[:, None]
    return z * rstd[:, None]


@triton.jit
def _row_sums(Z, DY, W, MEAN, RSTD, SUMS, z_stride, dy_stride, rows, cols, BLOCK: tl.constexpr):
    # For rows too long for registers: mean(g) and mean(g x_hat), g = dy w, one row per program.
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    rstd = tl.load(RSTD + row)
    plain, along = tl.zeros([1], tl.float32), tl.zeros([1], tl.float32)
    for start in tl.range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        live = (col < cols)[None, :]
        g = tl.load(DY + row[:, None] * dy_stride + col[None, :], mask=live, other=0.0).to(tl.float32)
        if W is not None:
            g *= tl.load(W + col, mask=col < cols, other=0.0).to(tl.float32)[None, :]
        plain += tl.sum(g, axis=1)
        along += tl.sum(g * _normed(Z, MEAN, rstd, row, col, live, z_stride, rows), axis=1)
    tl.store(SUMS + row, along / cols)
    tl.store(SUMS + rows + row, plain / cols)


@triton.jit
def _backward(
    Z, DY, DZ, W, SEED, MEAN, RSTD, SUMS, DX, DR, DW, DB, z_stride, dy_stride, dz_stride, rows, cols, dropout,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # dz = rstd (g - x_hat mean(g x_hat) - mean(g)) + dsum; the last mean only where the row was centred.
    start = tl.program_id(1) * BLOCK
    col = start + tl.arange(0, BLOCK)
    if W is not None:
        w = tl.load(W + col, mask=col < cols, other=0.0).to(tl.float32)[None, :]
    gain, shift = tl.zeros([ROWS, BLOCK], tl.float32), tl.zeros([ROWS, BLOCK], tl.float32)
    # Two stages: the next rows' loads are in flight (cp.async on NVIDIA) while this one is reduced and stored.
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=2):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        live = row < rows
        mask = live[:, None] & (col < cols)[None, :]
        rstd = tl.load(RSTD + row, mask=live, other=0.0)
        dy = tl.load(DY + row[:, None] * dy_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        x_hat = _normed(Z, MEAN, rstd, row, col, mask, z_stride, rows)
        if DW is not None:
            gain += dy * x_hat
        if DB is not None:
            shift += dy
        g = dy * w if W is not None else dy
        if SUMS is None:
            along, plain = tl.sum(g * x_hat, axis=1) / cols, tl.sum(g, axis=1) / cols
        else:
            along = tl.load(SUMS + row, mask=live, other=0.0)
            plain = tl.load(SUMS + rows + row, mask=live, other=0.0)
        dz = g - x_hat * along[:, None]
        if MEAN is not None:
            dz -= plain[:, None]
        dz *= rstd[:, None]
        if DZ is not None:
            dz += tl.load(DZ + row[:, None] * dz_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        at = row[:, None] * cols + col[None, :]
        if DR is not None:
            tl.store(DR + at, dz.to(DR.dtype.element_ty), mask=mask)
        if SEED is not None:
            dz = _dropped(dz, SEED, row, start, dropout, BLOCK)
        tl.store(DX + at, dz.to(DX.dtype.element_ty), mask=mask)
    at = tl.program_id(0).to(tl.int64) * cols + col
    if DW is not None:
        tl.store(DW + at, tl.sum(gain, axis=0), mask=col < cols)
    if DB is not None:
        tl.store(DB + at, tl.sum(shift, axis=0), mask=col < cols)


@triton.jit
def _mask(SEED, KEEP, cols, dropout, BLOCK: tl.constexpr):
    row, start = tl.program_id(0).to(tl.int64) + tl.arange(0, 1), tl.program_id(1) * BLOCK
    col = start + tl.arange(0, BLOCK)
    keep = _keep(tl.load(SEED), row, start // 4 + tl.arange(0, BLOCK // 4), dropout)
    tl.store(KEEP + row[:, None] * cols + col[None, :], keep, mask=(col < cols)[None, :])


class Plan(NamedTuple):
    """What a launch asks for: rows and columns per program, warps, and whether a row fits."""

    rows: int
    block: int
    warps: int
    whole: bool


def plan(cols: int, whole_row: int, long_block: int) -> Plan:
    """Choose the tile: several short rows, one whole row, or one row in blocks."""
    whole = cols <= whole_row
    block = max(4, triton.next_power_of_2(cols)) if whole else long_block
    rows = max(1, 2048 // block) if whole else 1
    warps = max(1, min(1024 // LANES, rows * block // (LANES * (32 if whole and block > 8192 else 16))))
    return Plan(rows, block, warps, whole)


def programs(x: Tensor, tile: Plan) -> int:
    """Return how many programs share the rows: together with the column blocks, 16 warps on every multiprocessor."""
    return max(1, multiprocessors(x) * max(1, 16 // tile.warps) // triton.cdiv(x.shape[-1], tile.block))


@torch.library.custom_op("handbook::norm_forward", mutates_args=())
def _norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, seed: Tensor | None,
    eps: float, dropout: float, centre: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return normed, the new residual (empty where there is none), mean (empty for RMSNorm), 1 / deviation."""
    y, z, mean, rstd = _norm_fake(x, residual, weight, bias, seed, eps, dropout, centre)
    flat, stream = as_rows(x), None if residual is None else as_rows(residual)
    rows, cols = flat.shape
    if rows == 0:
        return y, z, mean, rstd
    # Registers: dropout's four Philox words, or two layouts of one tile where the stream is wider than x.
    crowded = seed is not None or z.dtype != x.dtype
    tile = plan(cols, WHOLE_ROW_FORWARD // (2 if crowded and z.numel() else 1), LONG_BLOCK_FORWARD)
    kernel = _forward_whole if tile.whole else _forward_long
    with torch.cuda.device_of(x):
        kernel[(triton.cdiv(rows, tile.rows),)](
            flat, stream, packed(weight), packed(bias), seed, y, z if z.numel() else None, mean, rstd,
            flat.stride(0), 0 if stream is None else stream.stride(0), rows, cols, eps, dropout,
            CENTRE=centre, ROWS=tile.rows, BLOCK=tile.block, num_warps=tile.warps,
        )  # fmt: skip
    return y, z, mean, rstd


@_norm.register_fake
def _norm_fake(x, residual, weight, bias, seed, eps, dropout, centre):
    rows = math.prod(x.shape[:-1])
    like = x if residual is None else residual
    stream = like.new_empty(x.shape if residual is not None or seed is not None else (0,))
    mean = x.new_empty(rows if centre else 0, dtype=torch.float32)
    return x.new_empty(x.shape), stream, mean, x.new_empty(rows, dtype=torch.float32)


@torch.library.custom_op("handbook::norm_backward", mutates_args=())
def _norm_backward(
    z: Tensor, dy: Tensor, dz: Tensor | None, weight: Tensor | None, bias: Tensor | None, seed: Tensor | None,
    mean: Tensor, rstd: Tensor, dropout: float, x_dtype: torch.dtype, gains: bool, shifts: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dx, dresidual (empty where it equals dx), dweight and dbias (empty where not asked for)."""
    dx, dr, dw, db = _norm_backward_fake(z, dy, dz, weight, bias, seed, mean, rstd, dropout, x_dtype, gains, shifts)
    flat, dy, dz = as_rows(z), as_rows(dy), None if dz is None else as_rows(dz)
    rows, cols = flat.shape
    if rows == 0:
        return dx, dr, dw.zero_(), db.zero_()
    crowded = z.dtype == torch.float32 and (seed is not None or x_dtype != z.dtype)
    tile = plan(cols, WHOLE_ROW_BACKWARD // (1 + crowded), LONG_BLOCK_BACKWARD)
    tile = tile._replace(warps=tile.warps * (1 + crowded))
    grid = min(programs(z, tile), triton.cdiv(rows, tile.rows))
    centre = mean if mean.numel() else None
    partial = z.new_empty((gains + shifts, grid, cols), dtype=torch.float32)
    with torch.cuda.device_of(z):
        sums = None if tile.whole else z.new_empty((2, rows), dtype=torch.float32)
        if sums is not None:
            _row_sums[(rows,)](
                flat, dy, packed(weight), centre, rstd, sums, flat.stride(0), dy.stride(0), rows, cols,
                BLOCK=tile.block, num_warps=tile.warps,
            )  # fmt: skip
        _backward[(grid, triton.cdiv(cols, tile.block))](
            flat, dy, dz, packed(weight), seed, centre, rstd, sums, dx, dr if dr.numel() else None,
            partial[0] if gains else None, partial[-1] if shifts else None,
            flat.stride(0), dy.stride(0), 0 if dz is None else dz.stride(0), rows, cols, dropout,
            ROWS=tile.rows, BLOCK=tile.block, num_warps=tile.warps,
        )  # fmt: skip
    if gains:
        dw.copy_(partial[0].sum(0))
    if shifts:
        db.copy_(partial[-1].sum(0))
    return dx, dr, dw, db


@_norm_backward.register_fake
def _norm_backward_fake(z, dy, dz, weight, bias, seed, mean, rstd, dropout, x_dtype, gains, shifts):
    apart, cols = seed is not None or x_dtype != z.dtype, z.shape[-1]
    dw = z.new_empty(0) if weight is None or not gains else weight.new_empty(cols)
    db = z.new_empty(0) if bias is None or not shifts else bias.new_empty(cols)
    return z.new_empty(z.shape, dtype=x_dtype), z.new_empty(z.shape if apart else (0,)), dw, db


def _save(ctx, inputs, output):
    (x, residual, weight, bias, seed, _, ctx.dropout, _), (_, z, mean, rstd) = inputs, output
    ctx.streams = residual is not None or seed is not None
    ctx.save_for_backward(z if ctx.streams else x, weight, bias, seed, mean, rstd)
    ctx.x_dtype = x.dtype
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _pull(ctx, dy, dz, *_):
    z, weight, bias, seed, mean, rstd = ctx.saved_tensors
    dy, dz = torch.zeros_like(z) if dy is None else dy, dz if ctx.streams else None
    _, for_residual, gains, shifts, *_ = ctx.needs_input_grad
    dx, dr, dw, db = _norm_backward(z, dy, dz, weight, bias, seed, mean, rstd, ctx.dropout, ctx.x_dtype, gains, shifts)
    dresidual = (dr if dr.numel() else dx) if for_residual else None
    return dx, dresidual, dw if gains else None, db if shifts else None, None, None, None, None


def _no_second_derivative(ctx, *_):
    what, got, want = "second derivative of the fused norm", "backward through backward", "first derivatives only"
    raise KernelUnavailable(what, got=got, want=want, remedy="Use backend='reference', which has all derivatives.")


_norm.register_autograd(_pull, setup_context=_save)
_norm_backward.register_autograd(_no_second_derivative)


def dropout_add_norm_triton(
    x: Tensor, residual: Tensor | None = None, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5, *, dropout: float = 0.0, centre: bool = True, seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return ``(norm(dropout(x) + residual), dropout(x) + residual)`` over the last axis, in one pass.

    Args:
        x: float32, float16 or bfloat16, any leading axes.
        residual: the stream to add, of ``x``'s shape; where it is float32 and ``x`` is not, the stream stays float32.
        weight: one gain per feature.
        bias: one shift per feature.
        eps: added to the variance or the mean square.
        dropout: probability with which an element of ``x`` is zeroed; the rest is scaled by 1 / (1 - dropout).
        centre: subtract the mean first (LayerNorm); else RMSNorm.
        seed: one int64 on ``x``'s device that decides the mask; drawn from torch's generator if left out.

    Raises:
        ShapeError: a tensor does not fit ``x``, or a dtype is not one of the three.
        ConfigError: ``eps`` is not positive, or ``dropout`` lies outside 0 to 1.
        KernelUnavailable: no GPU and no interpreter; or a second derivative is asked for.
    """
    check_tensors("fused norm", x, DTYPES, like_x={"residual": residual}, per_feature={"weight": weight, "bias": bias})
    if eps <= 0.0:
        raise ConfigError("eps", got=eps, want="a positive number", remedy="LayerNorm's usual value is 1e-5.")
    if not 0.0 <= dropout <= 1.0:
        raise ConfigError("dropout", got=dropout, want="a probability, 0 to 1", remedy="Pass 0.0 to switch it off.")
    if dropout > 0.0 and seed is None:
        seed = torch.randint(2**62, (1,), device=x.device)
    y, z, *_ = _norm(x, residual, weight, bias, seed if dropout > 0.0 else None, eps, dropout, centre)
    return y, z if residual is not None or dropout > 0.0 else x


def layer_norm_triton(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Return LayerNorm of ``x`` over its last axis, in ``x``'s dtype."""
    return dropout_add_norm_triton(x, None, weight, bias, eps)[0]


def rms_norm_triton(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Return RMSNorm of ``x`` over its last axis, in ``x``'s dtype."""
    return dropout_add_norm_triton(x, None, weight, None, eps, centre=False)[0]


def dropout_mask_triton(shape: tuple[int, ...], dropout: float, seed: Tensor) -> Tensor:
    """Return the mask that ``seed`` decides: true where an element of a tensor of this ``shape`` is kept."""
    keep = torch.empty(shape, dtype=torch.bool, device=seed.device)
    with torch.cuda.device_of(seed):
        if keep.numel():
            grid = math.prod(shape[:-1]), triton.cdiv(shape[-1], 1024)
            _mask[grid](seed, keep, shape[-1], dropout, BLOCK=1024)
    return keep
