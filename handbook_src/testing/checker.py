"""The shape checker that runs under pytest, switched off where it would be in the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def unchecked() -> Iterator[None]:
    """Run the block without jaxtyping's checks of shapes and types.

    For tests of ``torch.compile``, which cannot trace the checker, and of refusals,
    where the error that a user would see must not be hidden by the checker's.
    A function compiled inside the block must also be called inside it.
    """
    import jaxtyping

    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)
