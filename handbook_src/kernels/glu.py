# Bytes moved per element of the product, e bytes each:
#   forward   read gate, value, write product                     3e   (activation, then product: 5e)
#   backward  read gate, value, dproduct, write dgate, dvalue     5e   (two products, then the activation's: 9e)
# Kept for the backward: gate and value, 2e; the separate operations keep activation(gate) as well, 3e.
"""Fused activation and gate: ``activation(gate) * value``, the middle of every gated feed-forward layer.

* The activation is computed in float32 whatever the dtype; the product is rounded once.  The backward computes the
  activation again from ``gate``: arithmetic is free here, a stored activation is not.
* Tensors that are contiguous are one long row; rows with a stride (the halves of a packed projection) are read in
  place; a last axis that is not contiguous is copied first.
* One sigmoid serves three of the five activations: ``(1 + tanh(u)) / 2 = sigmoid(2u)``.

dtypes: float32, float16, bfloat16, the same for both.  Runs on CUDA and ROCm, and on CPU tensors under Triton's
interpreter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from handbook_src.errors import ConfigError, KernelUnavailable, ShapeError
from handbook_src.kernels.launch import as_rows, check_tensors

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS = ("sigmoid", "relu", "gelu", "gelu_tanh", "silu")
# 16 elements a thread at 4 warps: two 16-byte loads of bfloat16 from each tensor in flight, and no spill
# (kernels/glu/worklog.md).
TILE, WARPS = 2048, 4


@triton.jit
def _sigmoid(x):
    # exp of a negative number only: it cannot overflow, and what is small stays exact.
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _activation(x, ACTIVATION: tl.constexpr):
    # Return the activation and its derivative; what a caller leaves unused is compiled out.
    if ACTIVATION == "relu":  # written so that NaN passes
        value, slope = tl.where(x <= 0, 0.0, x), tl.where(x <= 0, 0.0, 1.0)
    elif ACTIVATION == "gelu":
        value = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        slope = value + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
        value *= x
    else:
        if ACTIVATION == "gelu_tanh":  # 2 sqrt(2 / pi) (x + 0.044715 x^3) and its derivative
            inner = 1.5957691216057308 * x * (1.0 + 0.044715 * x * x)
            rise = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        else:
            inner, rise = x, 1.0
        s = _sigmoid(inner)
        value, slope = s, s * (1.0 - s)
        if ACTIVATION != "sigmoid":
            value, slope = x * s, s + x * slope * rise
    return value, slope


@triton.jit
def _place(rows, cols, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    # One-dimensional grid: the second dimension of a grid ends at 65535.
    across = tl.cdiv(cols, BLOCK)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = (tl.program_id(0) % across).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return row, col, (row < rows)[:, None] & (col < cols)[None, :]


@triton.jit
def _forward(
    G, V, Y, g_stride, v_stride, rows, cols,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, col, mask = _place(rows, cols, ROWS, BLOCK)
    gate = tl.load(G + row[:, None] * g_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    value = tl.load(V + row[:, None] * v_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    act, _ = _activation(gate, ACTIVATION)
    tl.store(Y + row[:, None] * cols + col[None, :], (act * value).to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    G, V, DY, DG, DV, g_stride, v_stride, dy_stride, rows, cols,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, col, mask = _place(rows, cols, ROWS, BLOCK)
    gate = tl.load(G + row[:, None] * g_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    value = tl.load(V + row[:, None] * v_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(DY + row[:, None] * dy_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    act, slope = _activation(gate, ACTIVATION)
    at = row[:, None] * cols + col[None, :]
    tl.store(DG + at, (dy * value * slope).to(DG.dtype.element_ty), mask=mask)
    tl.store(DV + at, (dy * act).to(DV.dtype.element_ty), mask=mask)


def rows_of(*tensors: Tensor) -> list[Tensor]:
    """Return tensors of one shape as rows: one long row where all are contiguous, so that no tile is ragged inside."""
    if all(t.is_contiguous() for t in tensors):
        return [t.view(1, -1) for t in tensors]
    return [as_rows(t) for t in tensors]


def plan(rows: int, cols: int) -> tuple[int, int, int]:
    """Return rows and columns of a tile, and how many tiles there are."""
    block = min(TILE, triton.next_power_of_2(cols))
    high = min(TILE // block, triton.next_power_of_2(rows))
    return high, block, triton.cdiv(rows, high) * triton.cdiv(cols, block)


@torch.library.custom_op("handbook::glu_forward", mutates_args=())
def _glu(gate: Tensor, value: Tensor, activation: str) -> Tensor:
    """Return ``activation(gate) * value``."""
    y = _glu_fake(gate, value, activation)
    if y.numel() == 0:
        return y
    g, v = rows_of(gate, value)
    rows, cols = g.shape
    high, block, tiles = plan(rows, cols)
    with torch.cuda.device_of(gate):
        _forward[(tiles,)](
            g, v, y, g.stride(0), v.stride(0), rows, cols,
            ACTIVATION=activation, ROWS=high, BLOCK=block, num_warps=WARPS,
        )  # fmt: skip
    return y


@_glu.register_fake
def _glu_fake(gate, value, activation):
    return gate.new_empty(gate.shape)


@torch.library.custom_op("handbook::glu_backward", mutates_args=())
def _glu_backward(gate: Tensor, value: Tensor, dy: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``gate`` and ``value``."""
    dg, dv = _glu_backward_fake(gate, value, dy, activation)
    if dy.numel() == 0:
        return dg, dv
    g, v, dy = rows_of(gate, value, dy)
    rows, cols = g.shape
    high, block, tiles = plan(rows, cols)
    with torch.cuda.device_of(gate):
        _backward[(tiles,)](
            g, v, dy, dg, dv, g.stride(0), v.stride(0), dy.stride(0), rows, cols,
            ACTIVATION=activation, ROWS=high, BLOCK=block, num_warps=WARPS,
        )  # fmt: skip
    return dg, dv


@_glu_backward.register_fake
def _glu_backward_fake(gate, value, dy, activation):
    return gate.new_empty(gate.shape), value.new_empty(value.shape)


def _save(ctx, inputs, output):
    gate, value, ctx.activation = inputs
    ctx.save_for_backward(gate, value)


def _pull(ctx, dy):
    dg, dv = _glu_backward(*ctx.saved_tensors, dy, ctx.activation)
    return dg, dv, None


def _no_second_derivative(ctx, *_):
    what, got, want = "second derivative of the fused gate", "backward through backward", "first derivatives only"
    raise KernelUnavailable(what, got=got, want=want, remedy="Use backend='reference', which has all derivatives.")


_glu.register_autograd(_pull, setup_context=_save)
_glu_backward.register_autograd(_no_second_derivative)


def glu_triton(gate: Tensor, value: Tensor, activation: str = "silu") -> Tensor:
    """Return ``activation(gate) * value`` in one pass.

    Args:
        gate: what the activation is applied to; float32, float16 or bfloat16.
        value: what it multiplies, of the same shape and dtype.
        activation: ``sigmoid`` (GLU), ``relu`` (ReGLU), ``gelu`` or ``gelu_tanh`` (GEGLU), ``silu`` (SwiGLU).

    Raises:
        ConfigError: another activation.
        ShapeError: shapes or dtypes differ, or the dtype is not one of the three.
        KernelUnavailable: no GPU and no interpreter; or a second derivative is asked for.
    """
    if activation not in ACTIVATIONS:
        raise ConfigError("glu activation", got=repr(activation), want=f"one of {ACTIVATIONS}", remedy="Pass 'silu'.")
    check_tensors("fused gate", gate, DTYPES, like_x={"value": value}, per_feature={})
    if value.dtype != gate.dtype:
        raise ShapeError("value", got=value.dtype, want=f"{gate.dtype}, as gate has", remedy="Cast one of them.")
    return _glu(gate, value, activation)
