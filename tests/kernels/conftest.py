"""Kernels run in Triton's interpreter here; it must be on before a kernel module is imported."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from handbook_src.testing.guard import Guards, guarded_outputs
from handbook_src.testing.interpreter import enable

enable()


@pytest.fixture
def guards() -> Iterator[Guards]:
    """Put every buffer that a launcher allocates between guards; none may be broken at the end."""
    with guarded_outputs() as guards:
        yield guards
