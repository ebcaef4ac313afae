"""Refusals: bad input raises the right error, and the message holds the value."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from handbook_src.errors import HandbookError
from handbook_src.testing.checker import unchecked


@contextmanager
def refuses(error: type[HandbookError], *values: object) -> Iterator[None]:
    """Assert that the block raises ``error`` with every one of ``values`` in its message.

    The shape checker that runs under pytest is switched off inside the block, so
    that the error a user would see is the one that is tested.

    Example:
        >>> with refuses(ConfigError, "eps", -1.0):  # doctest: +SKIP
        ...     rms_norm(x, weight, eps=-1.0)
    """
    try:
        with unchecked():
            yield
    except error as e:
        message = str(e)
        missing = [v for v in values if str(v) not in message]
        if missing:
            raise AssertionError(f"{error.__name__} does not name {missing}: {message}") from e
        if not isinstance(e, HandbookError) or not e.remedy:
            raise AssertionError(f"{error.__name__} offers no remedy: {message}") from e
    else:
        raise AssertionError(f"nothing was raised; want {error.__name__} naming {list(values)}")
