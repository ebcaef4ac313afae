"""Which implementation runs: decided per call, from the tensors, with no state.

Every operation that has more than one implementation takes ``backend``:

* ``reference``: the readable maths, plain torch, any device;
* ``torch``: torch's own fused operation, where it computes the same thing;
* ``triton``: the handbook's kernel;
* ``auto``: the first of the operation's candidates that can run here.  Candidates
  stand fastest first, as measured in the workshop ``kernels/``; where nobody has
  measured, torch's own operation stands first, so ``auto`` is never slower.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from handbook_src.errors import ConfigError, KernelUnavailable

Backend = Literal["auto", "reference", "torch", "triton"]
Resolved = Literal["reference", "torch", "triton"]

# Looked up once, at import (0.1 ms): torch.compile can trace a constant, but neither find_spec nor a cache.
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def resolve(op: str, backend: Backend, candidates: Mapping[Resolved, str | None]) -> Resolved:
    """Return the backend that runs ``op``.

    Args:
        op: the operation's name, for the error message.
        backend: what the caller asked for.
        candidates: fastest first; the value is ``None`` where that backend can
            run, else the reason why it can't.

    Raises:
        ConfigError: ``backend`` is not one of this operation's candidates.
        KernelUnavailable: the named backend can't run; the message says why.
    """
    if backend == "auto":
        for name, reason in candidates.items():
            if reason is None:
                return name
        raise KernelUnavailable(
            f"{op} backend", got="auto", want=f"one of {list(candidates)} able to run", remedy=f"Reasons: {candidates}."
        )
    if backend not in candidates:
        raise ConfigError(
            f"{op} backend",
            got=repr(backend),
            want=f"one of {['auto', *candidates]}",
            remedy="Use backend='auto' to take the fastest that can run.",
        )
    reason = candidates[backend]
    if reason is not None:
        raise KernelUnavailable(
            f"{op} backend", got=repr(backend), want=reason, remedy="Use backend='auto' to fall back."
        )
    return backend


def has_triton() -> bool:
    """Whether Triton is installed (it is not imported to find out)."""
    return _HAS_TRITON


def needs_for_triton(*tensors: Tensor | None) -> str | None:
    """What is missing for a Triton kernel over ``tensors``; ``None`` where it can run.

    Kernels run on CUDA and ROCm tensors, and on CPU tensors under Triton's
    interpreter (``TRITON_INTERPRET=1``, set before the kernel module is imported).
    """
    if not has_triton():
        return "the triton package (pip install triton; Linux only)"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if any(t is not None and not t.is_cuda for t in tensors):
        return "tensors on a CUDA or ROCm device, or TRITON_INTERPRET=1"
    return None
