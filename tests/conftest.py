"""What every test starts from: one thread, one seed, silent bars, oracles that import.

``addopts`` in pyproject.toml turns on the shape checker (jaxtyping with beartype)
before this file is read, because it can only instrument what isn't imported yet.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

# before torch and tqdm are imported: both read these once
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import numpy as np
import pytest
import torch

from handbook_src.testing import oracle

torch.set_num_threads(1)
oracle.prepare()


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Give every test the same noise, whatever ran before it, and the defaults back after it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    yield
    torch.set_default_dtype(dtype)
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded stream of its own, for tests that draw their inputs from one."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Switch the shape checker off, which dynamo can't trace, and forget what was compiled.

    The checker's wrapper is one code object for every function: after eight compilations in
    one process dynamo would refuse the ninth, whichever test it belongs to.
    """
    import jaxtyping

    torch.compiler.reset()

    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
