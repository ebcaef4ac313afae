"""Reference libraries, imported so that one broken neighbour can't break the rest."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import os
import sys
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

#: Wheels that need ``cuda_stub`` on a torch without CUDA.
CUDA_BUILT = ("torchvision", "torchaudio")


def load(name: str) -> ModuleType:
    """Import the reference library ``name`` and return it.

    Use this in proof cells and tests in place of a plain ``import transformers``:
    on a torch without CUDA an installed torchvision breaks every transformers
    model until its extension can load, and this takes care of it first.  Warnings
    that the library raises while it is imported are its own affair and are
    dropped; it is told to stay off the network.

    Args:
        name: import name, dotted names included (``transformers.models.gpt2``).

    Raises:
        ModuleNotFoundError: not installed; the note says which extra has it.

    Example:
        >>> from handbook_src.testing import oracle
        >>> transformers = oracle.load("transformers")  # doctest: +SKIP
        >>> theirs = transformers.GPT2LMHeadModel(config)  # doctest: +SKIP
    """
    prepare()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            module = importlib.import_module(name)
            if name.partition(".")[0] == "transformers":
                _load_parts(sys.modules["transformers"])
        except ModuleNotFoundError as e:
            e.add_note("Oracles are an extra: pip install 'handbook-src[reference]'")
            raise
    return module


def _load_parts(transformers: ModuleType) -> None:
    """Fetch what transformers would import at the first touch of a model, warnings included."""
    transformers.PreTrainedModel  # noqa: B018


def prepare() -> None:
    """Make torchvision and torchaudio importable from now on, if anything asks for them.

    Nothing is compiled or loaded before something does.  ``tests/conftest.py`` calls
    this once, so tests may also use a plain ``pytest.importorskip``.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not any(isinstance(finder, _StubFirst) for finder in sys.meta_path):
        sys.meta_path.insert(0, _StubFirst())


class _StubFirst(importlib.abc.MetaPathFinder):
    """Loads the stubs when a CUDA-built package is first looked for, then lets the search go on."""

    def __init__(self) -> None:
        self.done: set[str] = set()

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname in CUDA_BUILT and fullname not in self.done:
            self.done.add(fullname)  # before the work, which itself looks for the package
            if importlib.util.find_spec(fullname) is not None:
                _make_loadable(fullname)
        return None


def _make_loadable(package: str) -> None:
    from handbook_src.testing import cuda_stub

    if not cuda_stub.load(package) and package == "torchvision":
        _declare_operators()


def _declare_operators() -> None:
    """Without a compiler: name the two operators that torchvision's import looks up.

    Models, transforms and losses then work; ``nms`` and ``deform_conv2d`` raise.
    """
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _alive.append(library)


_alive: list[object] = []  # the operators live as long as their library
