"""The package's errors: each says what, got, want and remedy."""

from __future__ import annotations

from typing import Any


class HandbookError(Exception):
    """Base of every error this package raises on purpose.

    Args:
        what: the thing that is wrong, for instance ``"RMSNorm eps"``.
        got: the value that arrived.
        want: what would have been accepted.
        remedy: the next thing to try.
    """

    def __init__(self, what: str, *, got: Any, want: str, remedy: str) -> None:
        self.what, self.got, self.want, self.remedy = what, got, want, remedy
        super().__init__(f"{what}: got {got}, want {want}. {remedy}")

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.what, self.got, self.want, self.remedy)


def _rebuild(kind: type[HandbookError], what: str, got: Any, want: str, remedy: str) -> HandbookError:
    return kind(what, got=got, want=want, remedy=remedy)


class ConfigError(HandbookError, ValueError):
    """A setting that cannot work, whatever the data."""


class ShapeError(HandbookError, ValueError):
    """A tensor whose shape, dtype or device does not fit."""


class DataError(HandbookError, ValueError):
    """A file or a data set that is missing, torn or not what it claims."""


class KernelUnavailable(HandbookError, RuntimeError):
    """A named backend that cannot run here."""


class Diverged(HandbookError, ArithmeticError):
    """A computation that left the finite numbers."""
