"""What every test starts from: one thread, one seed, silent bars, oracles that import.

``addopts`` in pyproject.toml turns on the shape checker (jaxtyping with beartype)
before this file is read, because it can only instrument what isn't imported yet.
"""

from __future__ import annotations

import os
import random
from collections import Counter
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the files that hold a slow or a browser's test first: the last to start sets the end."""
    long = {item.path for item in items if any(item.iter_markers("slow")) or any(item.iter_markers("browser"))}
    items.sort(key=lambda item: item.path not in long)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the seconds of each file, slowest first: setup, call and teardown of all its tests."""
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid.partition("::")[0]] += report.duration
    terminalreporter.section("seconds of a file, slowest first")
    for file, taken in seconds.most_common(40):
        terminalreporter.write_line(f"{taken:8.1f}  {file}")


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
