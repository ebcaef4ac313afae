"""Layers, kernels and models of the handbook of neural networks.

Submodules are loaded when they are first touched, so ``import handbook_src``
costs next to nothing and needs neither Triton nor a GPU.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_ROOMS = (
    "bench",
    "catalogue",
    "check",
    "data",
    "dispatch",
    "errors",
    "experiment",
    "functional",
    "judge",
    "kernels",
    "layers",
    "losses",
    "metrics",
    "mode",
    "models",
    "notebook",
    "operation",
    "optim",
    "precision",
    "publish",
    "shapes",
    "testing",
    "training",
)


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_ROOMS])
