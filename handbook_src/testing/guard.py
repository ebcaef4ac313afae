"""Guarded buffers: a kernel that writes one element too far, or one too few, is caught."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

GUARD = 64  # elements on either side
UNTOUCHED = 7.0


class Guards:
    """Output buffers between two guards: NaN inside until written, a known value outside."""

    def __init__(self) -> None:
        self.held: list[tuple[Tensor, Tensor]] = []

    def new_empty(self, like: Tensor, size: int | Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """Return what ``like.new_empty(size, dtype=dtype)`` would, poisoned and watched."""
        shape = (size,) if isinstance(size, int) else tuple(size)
        count = math.prod(shape)
        buffer = torch.full((count + 2 * GUARD,), UNTOUCHED, dtype=dtype or like.dtype)
        inside = buffer[GUARD : GUARD + count]
        inside.fill_(torch.nan)
        self.held.append((buffer, inside))
        return inside.view(shape)

    def broken(self) -> list[str]:
        """Return what went wrong: a guard overwritten, or an element never written."""
        found = []
        for i, (buffer, inside) in enumerate(self.held):
            outside = torch.cat([buffer[:GUARD], buffer[GUARD + inside.numel() :]])
            if not bool((outside == UNTOUCHED).all()):
                found.append(f"buffer {i}: written outside")
            if bool(inside.isnan().any()):
                found.append(f"buffer {i}: not written everywhere")
        return found


@contextmanager
def guarded_outputs() -> Iterator[Guards]:
    """Put every floating buffer that a launcher takes from ``Tensor.new_empty`` between guards.

    Raises:
        AssertionError: at the end, if a guard is broken or nothing was allocated.
    """
    guards, stock = Guards(), torch.Tensor.new_empty

    def new_empty(like: Tensor, size: Any, **options: Any) -> Tensor:
        if "device" in options:  # the interpreter's own
            return stock(like, size, **options)
        return guards.new_empty(like, size, **options)

    with patch.object(torch.Tensor, "new_empty", new_empty):
        yield guards
    if not guards.held:
        raise AssertionError("nothing was allocated through new_empty")
    if broken := guards.broken():
        raise AssertionError("; ".join(broken))
