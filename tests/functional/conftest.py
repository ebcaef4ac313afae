from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Switch the shape checker off: dynamo can't trace it."""
    import jaxtyping

    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
