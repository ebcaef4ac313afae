"""Training and evaluation mode, kept part by part."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from torch import nn


@runtime_checkable
class Parts(Protocol):
    """A module, or what answers like one."""

    def modules(self) -> Iterator[nn.Module]: ...


@contextmanager
def modes_kept(model: Parts) -> Iterator[None]:
    """Leave each part of ``model`` in training or evaluation mode as it came, whatever is raised.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(2).eval(), nn.Dropout())
        >>> with modes_kept(model):
        ...     _ = model.eval()
        >>> [part.training for part in model]
        [False, True]
    """
    modes = [(part, part.training) for part in model.modules()]
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
