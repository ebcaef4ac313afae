"""What every test starts from: one thread, one seed, silent bars, oracles that import.

``addopts`` in pyproject.toml turns on the shape checker (jaxtyping with beartype)
before this file is read, because it can only instrument what isn't imported yet.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path

# before torch and tqdm are imported: both read these once
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import einops
import numpy as np
import pytest
import torch

from handbook_src.testing import oracle

torch.set_num_threads(1)
oracle.prepare()

#: Seconds of one core that a component's tests may take together.
BUDGET = 4
SECONDS = Path(__file__).parent / "seconds.tsv"
KINDS = ("parity", "law", "outside", "refusal", "registration")
TAKEN = pytest.StashKey[float]()
#: What dynamo need not read.
EINOPS = (einops.rearrange, einops.reduce, einops.repeat, einops.einsum)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the files that hold a slow or a browser's test first: the last to start sets the end."""
    long = {item.path for item in items if any(item.iter_markers("slow")) or any(item.iter_markers("browser"))}
    items.sort(key=lambda item: item.path not in long)


def cpu() -> float:
    """Seconds of one core, of this process and of those that it has waited for."""
    t = os.times()
    return t.user + t.system + t.children_user + t.children_system


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record-seconds", action="store_true", help="keep the seconds of each component in tests/seconds.tsv"
    )


def pytest_collection_finish(session: pytest.Session) -> None:
    session.config.stash[TAKEN] = cpu()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note what was taken since the last report, and by whose contract."""
    report = yield
    taken, item.config.stash[TAKEN] = item.config.stash[TAKEN], cpu()
    report.cpu = item.config.stash[TAKEN] - taken
    report.components = sorted({str(id_) for mark in item.iter_markers() if mark.name in KINDS for id_ in mark.args})
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the seconds of each file and of one core for each component, slowest first."""
    files: Counter[str] = Counter()
    components: Counter[str] = Counter()
    for report in (r for reports in terminalreporter.stats.values() for r in reports):
        if isinstance(report, pytest.TestReport):
            files[report.nodeid.partition("::")[0]] += report.duration
            whose = getattr(report, "components", ())  # a notebook's cell, a crash: nobody's
            for component in whose:
                components[component] += report.cpu / len(whose)
    for title, seconds in (
        ("seconds of a file, slowest first", files),
        (f"seconds of one core of a component, at most {BUDGET}", components),
    ):
        terminalreporter.section(title)
        for name, taken in seconds.most_common(40):
            terminalreporter.write_line(f"{taken:8.1f}  {name}")
    if config.getoption("--record-seconds"):
        lines = [f"{name}\t{taken:.1f}\n" for name, taken in sorted(components.items())]
        SECONDS.write_text("component\tseconds\n" + "".join(lines), "utf8")


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

    einops goes into the graph unread: of the 6.0 s that dynamo took to trace strided
    attention, 5.6 went into einops' own parser. Under :func:`handbook_src.testing.unchecked`
    it is read, as in a reader's program.

    The checker's wrapper is one code object for every function: after eight compilations in
    one process dynamo would refuse the ninth, whichever test it belongs to.
    """
    import jaxtyping

    torch.compiler.reset()
    allowed = torch._dynamo.trace_rules._allowed_callable_ids  # there is no public way back
    for op in EINOPS:
        torch.compiler.allow_in_graph(op)

    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
    for op in EINOPS:
        allowed.remove(id(op))
