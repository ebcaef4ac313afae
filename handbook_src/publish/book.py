"""Where everything lies: one value that all parts of the press take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Book:
    """A repository with a book in it.

    Everything that is made goes under ``_build``:

    - ``cache`` executed notebooks by content key; safe to keep, safe to delete,
    - ``failed`` the notebooks of chapters that failed, with their traceback,
    - ``stage`` what Sphinx renders and what nbval executes again,
    - ``html`` the site.
    """

    root: Path

    @property
    def text(self) -> Path:
        return self.root / "book"

    @property
    def toc(self) -> Path:
        return self.root / "_toc.yml"

    @property
    def skips(self) -> Path:
        return self.text / "skip.yml"

    @property
    def build(self) -> Path:
        return self.root / "_build"

    @property
    def cache(self) -> Path:
        return self.build / "cache"

    @property
    def failed(self) -> Path:
        return self.build / "failed"

    @property
    def stage(self) -> Path:
        return self.build / "stage"

    @property
    def html(self) -> Path:
        return self.build / "html"

    @property
    def times(self) -> Path:
        return self.build / "times.json"

    @property
    def finished(self) -> Path:
        return self.build / "finished.txt"

    @property
    def log(self) -> Path:
        return self.build / "press.log"

    @property
    def site_log(self) -> Path:
        return self.build / "site.log"

    def staged(self, page: str, suffix: str = ".ipynb") -> Path:
        return self.stage / (page + suffix)


def write(path: Path, data: bytes) -> bool:
    """Write in one step, and only what differs, so that Sphinx renders only that again."""
    if path.exists() and path.read_bytes() == data:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    part.replace(path)
    return True
