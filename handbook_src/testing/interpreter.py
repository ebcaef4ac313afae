"""Run Triton kernels on a machine without a GPU, with the rounding of a GPU.

Triton's interpreter (``TRITON_INTERPRET=1``) executes a kernel in numpy.  Three of
its answers are wrong or missing in triton 3.6 to 3.7.1, silently where it hurts most:

* a cast from float32 to bfloat16 truncates: 52 % of random values differ from
  round-to-nearest-even, which every GPU does;
* arithmetic and ``tl.dot`` on bfloat16 work on the raw 16-bit patterns, so that
  1.0 + 1.0 is 1.7e38;
* ``@triton.autotune`` asks for a GPU driver and raises.

:func:`enable` repairs the first and the third.  Of the second it repairs ``tl.dot``,
which has float32 accumulation; elementwise bfloat16 arithmetic raises, because a
kernel of this house casts up right after the load and down right before the store.

What no interpreter can show: races (programs run one after another), TF32 (float32
``tl.dot`` is exact here), out-of-bounds reads (hence guarded buffers in the tests),
and speed.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from handbook_src.errors import KernelUnavailable

_enabled = False


def enable() -> None:
    """Switch this process to the interpreter; call before a kernel module is imported.

    Raises:
        KernelUnavailable: a kernel module was imported before, so its kernels are
            already bound to the compiler.
    """
    global _enabled
    if _enabled:
        return
    early = sorted(m for m in sys.modules if m.startswith("handbook_src.kernels."))
    if early and os.environ.get("TRITON_INTERPRET") != "1":
        raise KernelUnavailable(
            "interpreter",
            got=f"{early[0]} imported already",
            want="enable() before the first kernel import",
            remedy="Call it at the top of the test or notebook, or set TRITON_INTERPRET=1 for the process.",
        )
    os.environ["TRITON_INTERPRET"] = "1"
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    _see_through_wrappers(interpreter)
    _repair_casts(interpreter, tl)
    _repair_dot(interpreter, tl)
    _refuse_bfloat16_arithmetic(interpreter, tl)
    triton.autotune = _first_config
    _enabled = True


def widen(bits: np.ndarray) -> np.ndarray:
    """Return the float32 values of bfloat16 bit patterns held in uint16."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """Return the bfloat16 bit patterns nearest to float32 ``values``, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    # Half of the last kept place, less one, plus that place's own bit: a tie
    # carries only out of an odd pattern.  NaN must not carry into infinity.
    nearest = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest)


def _see_through_wrappers(interpreter: Any) -> None:
    # The shape checker of the test suite wraps every function of the package, and a wrapper's globals are not the
    # kernel's: helpers would not be found.
    function = interpreter.InterpretedFunction
    stock = function.__init__

    def init(self: Any, fn: Any, **kwargs: Any) -> None:
        stock(self, inspect.unwrap(fn), **kwargs)

    function.__init__ = init


def _repair_casts(interpreter: Any, tl: Any) -> None:
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    stock_cast, stock_fp = builder.cast_impl, builder.create_fp_to_fp

    def cast(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == target or tl.bfloat16 not in (source, target):
            return stock_cast(self, src, dst_type)
        if source == tl.bfloat16:
            wide = handle(widen(src.data), tl.float32)
            return wide if target == tl.float32 else stock_cast(self, wide, dst_type)
        return handle(narrow(src.data.astype(np.float32)), tl.bfloat16)

    def fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            return cast(self, src, dst_type)
        return stock_fp(self, src, dst_type, rounding_mode)

    builder.cast_impl, builder.create_fp_to_fp = cast, fp_to_fp


def _repair_dot(interpreter: Any, tl: Any) -> None:
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    stock = builder.create_dot

    def wide(h: Any) -> Any:
        return handle(widen(h.data), tl.float32) if h.dtype.scalar == tl.bfloat16 else h

    def dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return stock(self, wide(a), wide(b), d, *rest)

    builder.create_dot = dot


def _refuse_bfloat16_arithmetic(interpreter: Any, tl: Any) -> None:
    builder = interpreter.InterpreterBuilder

    def guard(stock: Callable[..., Any]) -> Callable[..., Any]:
        def op(self: Any, *args: Any) -> Any:
            if any(getattr(getattr(a, "dtype", None), "scalar", None) == tl.bfloat16 for a in args):
                raise KernelUnavailable(
                    "interpreter",
                    got="arithmetic on a bfloat16 block",
                    want="float32 between load and store",
                    remedy="Write tl.load(...).to(tl.float32), and cast down in the store.",
                )
            return stock(self, *args)

        return op

    builder.binary_op, builder.unary_op = guard(builder.binary_op), guard(builder.unary_op)


class _FirstConfig:
    """Stands in for an autotuned kernel: takes the first configuration, times nothing."""

    def __init__(self, fn: Any, config: Any) -> None:
        self.fn, self.config = fn, config

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*args: Any, **kwargs: Any) -> Any:
            return self.fn[grid](*args, **{**self.config.kwargs, **kwargs})

        return launch


def _first_config(configs: list[Any], key: Any = None, **_: Any) -> Callable[[Any], _FirstConfig]:
    return lambda fn: _FirstConfig(fn, configs[0])
