"""Which proof marks were collected, for the walk over the catalogue.

A run over all tests has them at hand; a run over part of them asks a second
pytest to collect the rest.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("parity", "law", "outside", "refusal", "registration")
COLLECTED = pytest.StashKey[list[list[str]]]()
DUMP = "HANDBOOK_DUMP_MARKS"

Marks = list[list[str]]


def marks_of(items: Iterable[pytest.Item]) -> Marks:
    """Rows of kind, component id and test, without the tests that are skipped outright."""
    return [
        [mark.name, str(component), item.nodeid]
        for item in items
        if item.get_closest_marker("skip") is None
        for mark in item.iter_markers()
        if mark.name in KINDS
        for component in mark.args
    ]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Note the marks before -k and -m leave tests out."""
    found = marks_of(items)
    if os.environ.get(DUMP):
        Path(os.environ[DUMP]).write_text(json.dumps(found))
    options = config.option
    narrowed = options.ignore or options.ignore_glob or options.deselect or getattr(options, "lf", False)
    paths = {(config.invocation_params.dir / a).resolve() for a in config.args if "::" not in a}
    if not narrowed and {ROOT, ROOT / "tests"} & paths:
        config.stash[COLLECTED] = found


def collect_all(report: Path) -> Marks:
    """Have another pytest collect all tests, and read what it found."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests"]
    # one process, and none of the settings of the run that asks
    settings = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    settings |= {DUMP: str(report), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode != 0 or not report.exists():
        pytest.fail(f"collection failed:\n{done.stdout[-3000:]}\n{done.stderr[-2000:]}")
    found: Marks = json.loads(report.read_text())
    return found


@pytest.fixture(scope="session")
def collected(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Marks:
    """Kind, component id and test of every proof mark in ``tests``."""
    known = request.config.stash.get(COLLECTED, None)
    if known is not None:
        return known
    return collect_all(tmp_path_factory.mktemp("marks") / "marks.json")
