"""The ``test`` command: build, then every test, and every notebook once more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from handbook_src.publish import build
from handbook_src.publish.book import Book
from handbook_src.publish.execute import kernel_environment

#: A cell that hangs must not hang CI: three times the longest budget, and something for a busy machine.
CELL_SECONDS = 300


def command(book: Book, jobs: int, rest: list[str]) -> list[str]:
    """The pytest call. A file stays on one worker, and starts in its turn: notebooks before the tests.

    Left to itself xdist starts the files with the most tests first, and those with the longest last.
    """
    chosen = [argument for argument in rest if names_tests(book.root, argument)]
    where = [] if chosen else [str((book.stage / "book").relative_to(book.root)), "tests"]
    return [
        *(sys.executable, "-m", "pytest", "-q", "--durations=10"),
        *("-n", str(jobs), "--dist", "loadfile", "--no-loadscope-reorder"),
        *("--nbval", "--nbval-current-env", "--nbval-sanitize-with", "tests/nbval_sanitize.cfg"),
        *("--nbval-cell-timeout", str(CELL_SECONDS)),
        *rest,
        *where,
    ]


def names_tests(root: Path, argument: str) -> bool:
    """Whether an argument is a path, so that the caller has chosen what to run (``-k kernels`` is none)."""
    path = argument.partition("::")[0]
    looks = "/" in path or path.endswith((".py", ".ipynb")) or path == "tests"
    return looks and not argument.startswith("-") and (root / path).exists()


def test(root: Path, options: build.Options, rest: list[str]) -> int:
    """Build and prove; pytest's exit status, or 1 where the build failed."""
    book = Book(root)
    built = build.book(root, options)
    if built == 130:
        return built
    jobs = options.jobs or build.cores()
    line = command(book, jobs, rest)
    print("\nThe tests, and every notebook executed again and compared:\n  " + " ".join(line[1:]) + "\n", flush=True)
    code = call(line, root, {**os.environ, **kernel_environment(book)})
    if built:
        print("\nThe build failed before the tests (see above), so this run counts as failed.")
    return built or code


def call(line: list[str], root: Path, settings: dict[str, str]) -> int:
    """Wait for pytest even on Ctrl-C, which reaches it too: it then says what has run so far."""
    process = subprocess.Popen(line, cwd=root, env=settings)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue
