# Bytes moved per logit, e bytes each; per row 16 bytes more each way (target, loss or its gradient, log-sum-exp):
#   forward   read the logit                                e    (log-softmax, then the pick: 2e)
#   backward  read the logit, write its gradient           2e    (scatter, then the log-softmax's: 4e)
# Kept for the backward: the logits, which are there anyway, and 4 bytes a row; log-probabilities would be e a logit.
"""Fused cross-entropy over a vocabulary: an online softmax forward, probabilities computed again backward.

* Forward, one pass: every lane keeps a running maximum and a running sum of its own columns, one exponential a logit,
  and the lanes are merged once at the end of the row.  No log-probability is ever stored.
* Backward, one pass: ``p = exp(x - lse)`` from the saved log-sum-exp.  The gradient that comes down is read on the
  device, row by row: there is no synchronisation and no second pass that multiplies by it.
* float32 inside, whatever the dtype.  A row whose target is ``ignore_index`` has loss and gradient zero, and its logits
  are not looked at.  A target outside the vocabulary reads nothing; its loss and its gradients are NaN.
* ``z_loss`` adds ``z_loss * lse**2`` (PaLM, section 5), which keeps the log-sum-exp near zero.

dtypes: float32, float16, bfloat16.  Runs on CUDA and ROCm, and on CPU tensors under Triton's interpreter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from handbook_src.errors import KernelUnavailable, ShapeError
from handbook_src.kernels.launch import as_rows, check_tensors

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# 16 columns a lane: maximum, sum and the logits of the next step fit the registers twice over
# (kernels/cross_entropy/worklog.md).
BLOCK, WARPS = 4096, 8
TILE = 2048


@triton.jit
def _forward(
    X, T, LOSS, LSE, stride, rows, cols, ignore, smoothing, z_loss,
    SMOOTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    target = tl.load(T + row, mask=live, other=0)
    counted = live & (target != ignore)
    # The least float32, not -inf: differences from it are finite, and a logit of -inf weighs exp(-inf) = 0.
    top = tl.full([ROWS, BLOCK], -3.4028234663852886e38, tl.float32)
    mass, total = tl.zeros([ROWS, BLOCK], tl.float32), tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.range(0, cols, BLOCK, num_stages=3):
        col = start + tl.arange(0, BLOCK)
        mask = counted[:, None] & (col < cols)[None, :]
        x = tl.load(X + row[:, None] * stride + col[None, :], mask=mask, other=float("-inf")).to(tl.float32)
        # Milakov & Gimelshein 2018, algorithm 3, per lane.  Of exp(top - new) and exp(x - new) one is 1.
        e = tl.exp(-tl.abs(x - top))
        mass = tl.where(x > top, mass * e + 1.0, mass + e)
        top = tl.where(x > top, x, top)
        if SMOOTH:
            total += tl.where(mask, x, 0.0)
    highest = tl.max(top, axis=1)
    weight = tl.sum(mass * tl.exp(top - highest[:, None]), axis=1)
    lse = tl.where(counted, highest + tl.log(tl.where(counted, weight, 1.0)), 0.0)
    known = counted & (target >= 0) & (target < cols)
    chosen = tl.load(X + row * stride + target, mask=known, other=0.0).to(tl.float32)
    loss = lse - chosen
    if SMOOTH:
        loss = (1.0 - smoothing) * loss + smoothing * (lse - tl.sum(total, axis=1) / cols)
    loss += z_loss * lse * lse
    loss = tl.where(counted, tl.where(known, loss, float("nan")), 0.0)
    tl.store(LOSS + row, loss, mask=live)
    tl.store(LSE + row, lse, mask=live)


@triton.jit
def _backward(
    X, T, LSE, DLOSS, DX, stride, dloss_stride, rows, cols, ignore, smoothing, z_loss,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # dx = dloss ((1 + 2 z lse) p - (1 - s) [column is the target] - s / cols)
    across = tl.cdiv(cols, BLOCK)  # one-dimensional grid: the second dimension of a grid ends at 65535
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = (tl.program_id(0) % across) * BLOCK + tl.arange(0, BLOCK)
    live = row < rows
    target = tl.load(T + row, mask=live, other=0)
    counted = live & (target != ignore)
    known = (target >= 0) & (target < cols)
    lse = tl.load(LSE + row, mask=live, other=0.0)
    dloss = tl.load(DLOSS + row * dloss_stride, mask=counted, other=0.0).to(tl.float32)
    dloss = tl.where(known | (target == ignore), dloss, float("nan"))
    mask = counted[:, None] & (col < cols)[None, :]
    x = tl.load(X + row[:, None] * stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    slope = tl.exp(x - lse[:, None]) * (1.0 + 2.0 * z_loss * lse)[:, None] - smoothing / cols
    slope -= tl.where(col[None, :] == target[:, None], 1.0 - smoothing, 0.0)
    dx = tl.where(mask, slope * dloss[:, None], 0.0)
    tl.store(
        DX + row[:, None] * cols + col[None, :], dx.to(DX.dtype.element_ty), mask=live[:, None] & (col < cols)[None, :]
    )


def plan(rows: int, cols: int, widest: int) -> tuple[int, int, int]:
    """Return rows and columns of a tile, and warps: several short rows, or one row in blocks."""
    block = min(widest, triton.next_power_of_2(cols))
    high = max(1, min(TILE // block, triton.next_power_of_2(rows)))
    return high, block, max(1, min(WARPS, high * block // 512))


@torch.library.custom_op("handbook::cross_entropy_forward", mutates_args=())
def _cross_entropy(
    logits: Tensor, target: Tensor, ignore: int, smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    """Return the loss and the log-sum-exp of every row, in float32."""
    loss, lse = _cross_entropy_fake(logits, target, ignore, smoothing, z_loss)
    flat = as_rows(logits)
    rows, cols = flat.shape
    if rows == 0:
        return loss, lse
    high, block, warps = plan(rows, cols, BLOCK)
    with torch.cuda.device_of(logits):
        _forward[(triton.cdiv(rows, high),)](
            flat, target.contiguous(), loss, lse, flat.stride(0), rows, cols, ignore, smoothing, z_loss,
            SMOOTH=smoothing > 0, ROWS=high, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return loss, lse


@_cross_entropy.register_fake
def _cross_entropy_fake(logits, target, ignore, smoothing, z_loss):
    return tuple(logits.new_empty(target.shape, dtype=torch.float32) for _ in range(2))


@torch.library.custom_op("handbook::cross_entropy_backward", mutates_args=())
def _cross_entropy_backward(
    logits: Tensor, target: Tensor, lse: Tensor, dloss: Tensor, ignore: int, smoothing: float, z_loss: float
) -> Tensor:
    """Return the gradient of the logits."""
    dx = _cross_entropy_backward_fake(logits, target, lse, dloss, ignore, smoothing, z_loss)
    flat, down = as_rows(logits), dloss.reshape(-1)
    rows, cols = flat.shape
    if rows == 0:
        return dx
    high, block, warps = plan(rows, cols, TILE)
    with torch.cuda.device_of(logits):
        _backward[(triton.cdiv(rows, high) * triton.cdiv(cols, block),)](
            flat, target.contiguous(), lse, down, dx, flat.stride(0), down.stride(0), rows, cols,
            ignore, smoothing, z_loss, ROWS=high, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return dx


@_cross_entropy_backward.register_fake
def _cross_entropy_backward_fake(logits, target, lse, dloss, ignore, smoothing, z_loss):
    return logits.new_empty(logits.shape)


def _save(ctx, inputs, output):
    logits, target, *ctx.settings = inputs
    _, lse = output
    ctx.save_for_backward(logits, target, lse)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _pull(ctx, dloss, _):
    logits, target, lse = ctx.saved_tensors
    if dloss is None:
        return None, None, None, None, None
    dx = _cross_entropy_backward(logits, target, lse, dloss, *ctx.settings)
    return dx, None, None, None, None


def _no_second_derivative(ctx, *_):
    what, got, want = "second derivative of fused cross-entropy", "backward through backward", "first derivatives only"
    raise KernelUnavailable(what, got=got, want=want, remedy="Use backend='reference', which has all derivatives.")


_cross_entropy.register_autograd(_pull, setup_context=_save)
_cross_entropy_backward.register_autograd(_no_second_derivative)


def cross_entropy_triton(
    logits: Tensor, target: Tensor, ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return ``(loss, lse)`` of each row, float32, classes on the last axis; the loss is differentiable, not the lse.

    Args:
        logits: float32, float16 or bfloat16, any leading axes.
        target: int64, one class for each row, of the leading axes' shape.
        ignore_index: the target whose rows count nothing; their loss is 0.
        label_smoothing: the share of the target's mass that all classes divide equally.
        z_loss: the weight of the squared log-sum-exp.

    Raises:
        ShapeError: ``target`` does not fit, or a dtype is wrong.
        KernelUnavailable: no GPU and no interpreter; or a second derivative is asked for.
    """
    check_tensors("fused cross-entropy", logits, DTYPES, like_x={}, per_feature={})
    if target.shape != logits.shape[:-1] or target.dtype != torch.int64 or target.device != logits.device:
        raise ShapeError(
            "target",
            got=f"{tuple(target.shape)} of {target.dtype} on {target.device}",
            want=f"{tuple(logits.shape[:-1])} of torch.int64 on {logits.device}",
            remedy="One class index for each row of logits.",
        )
    return _cross_entropy(logits, target, ignore_index, label_smoothing, z_loss)
