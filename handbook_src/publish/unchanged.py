"""Whether anything has changed since the site was built: if not, ``book`` has nothing to do.

Sizes and times of change are compared, as ``make`` does, of all files in the repository
and of what was built from them. Any difference leads to the build proper, which compares
contents and finds out what it means.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from handbook_src.publish.book import Book, write


class Mark:
    """Taken before a build begins, so that an edit while it runs counts as a change."""

    def __init__(self, book: Book, asked: object) -> None:
        self.book = book
        installed = os.stat(sysconfig.get_path("purelib")).st_mtime_ns
        today = datetime.date.today()  # a page is skipped until a day
        self.before = digest([sys.version, installed, asked, today], book.root)

    @property
    def built(self) -> str:
        return digest([], self.book.cache, self.book.stage, self.book.html)

    def keep(self, said: str) -> None:
        """Remember that the build has succeeded, and what it said of its chapters."""
        write(self.book.finished, f"{self.before} {self.built}\n{said}".encode())

    def said(self) -> str | None:
        """What the last build said, if it succeeded and nothing has changed since."""
        if not (self.book.finished.exists() and (self.book.html / "index.html").exists()):
            return None
        then, _, words = self.book.finished.read_text("utf8").partition("\n")
        return words if then == f"{self.before} {self.built}" else None


def digest(facts: list[object], *folders: Path) -> str:
    found = hashlib.sha256(repr(facts).encode())
    for path, status in sorted(entry for folder in folders for entry in files(folder)):
        found.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
    return found.hexdigest()


def files(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """All files below a folder, apart from hidden ones, Python's caches and the build."""
    for here, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".") and f not in ("_build", "__pycache__")]
        for path in (os.path.join(here, name) for name in names):
            if os.path.exists(path):  # and is no link to nowhere
                yield path, os.stat(path)
