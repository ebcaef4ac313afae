"""Which pages the book has, which of them are executed, and for how long."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from handbook_src.errors import ConfigError
from handbook_src.publish.book import Book

DEFAULT_BUDGET = 20.0


@dataclass(frozen=True)
class Chapter:
    """A page that is executed: its name in ``_toc.yml``, its text, its seconds."""

    page: str
    source: Path
    budget: float = DEFAULT_BUDGET

    @property
    def name(self) -> str:
        """How people and reports call it: the page without the leading folder."""
        return self.page.removeprefix("book/")

    def answers_to(self, name: str) -> bool:
        return name.removesuffix(".md") in (self.page, self.name, self.source.stem)


@dataclass(frozen=True)
class Skip:
    """A page that isn't executed for now: why, and the day on which that ends."""

    page: str
    reason: str
    until: datetime.date


def names(book: Book) -> list[str]:
    """The pages that ``_toc.yml`` names, in reading order."""
    found: list[str] = []

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            found.extend(node[k] for k in ("root", "file") if k in node)
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(yaml.safe_load(book.toc.read_text("utf8")))
    return found


def source(book: Book, page: str) -> Path:
    """The text of a page."""
    path = book.root / (page + ".md")
    if path.exists():
        return path
    raise ConfigError(
        f"_toc.yml: {page}", got="no such file", want=f"{page}.md", remedy="Write it, or take it off the list."
    )


def header(path: Path) -> dict[str, Any]:
    """The YAML block at the top of a page."""
    lines = path.read_text("utf8").splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    for end, line in enumerate(lines[1:], 1):
        if line.strip() == "---":
            try:
                found = yaml.safe_load("\n".join(lines[1:end]))
            except yaml.YAMLError as error:
                raise ConfigError(
                    f"{path.name}: header", got=str(error), want="YAML", remedy="Mend the block between the two ---."
                ) from error
            return found if isinstance(found, dict) else {}
    return {}


def chapters(book: Book) -> list[Chapter]:
    """The pages to execute: those whose header names a kernel."""
    found = []
    for page in names(book):
        path = source(book, page)
        head = header(path)
        if "kernelspec" in head:
            found.append(Chapter(page, path, _budget(path, head)))
        elif any(line.startswith(("```{code-cell}", "~~~{code-cell}")) for line in path.read_text("utf8").splitlines()):
            raise ConfigError(
                f"{page}.md", got="code cells and no kernelspec", want="a header that names a kernel",
                remedy="Copy the header of another chapter, or its cells are never executed.",
            )  # fmt: skip
    return found


def _budget(path: Path, head: dict[str, Any]) -> float:
    budget = (head.get("handbook") or {}).get("budget", DEFAULT_BUDGET)
    if isinstance(budget, bool) or not isinstance(budget, int | float) or budget <= 0:
        raise ConfigError(
            f"{path.name}: handbook.budget",
            got=repr(budget),
            want="seconds, more than 0",
            remedy="Write for instance 'handbook: {budget: 20}' into the header.",
        )
    return float(budget)


def choose(all_chapters: list[Chapter], only: list[str]) -> list[Chapter]:
    """Those that were asked for; every name must be somebody's."""
    if not only:
        return all_chapters
    for name in only:
        if not any(c.answers_to(name) for c in all_chapters):
            known = ", ".join(c.name for c in all_chapters)
            raise ConfigError("--only", got=repr(name), want=f"a chapter: {known}", remedy="Check the spelling.")
    return [c for c in all_chapters if any(c.answers_to(name) for name in only)]


def skips(book: Book, today: datetime.date | None = None) -> dict[str, Skip]:
    """The pages that are left out for now, from ``book/skip.yml``.

    Raises:
        ConfigError: an entry without reason or date, for an unknown page, or
            whose date has passed.
    """
    if not book.skips.exists():
        return {}
    today = today or datetime.date.today()
    rows = yaml.safe_load(book.skips.read_text("utf8")) or []
    pages = names(book)
    return {skip.page: skip for skip in (_checked(row, pages, today) for row in rows)}


def _checked(row: Any, pages: list[str], today: datetime.date) -> Skip:
    where = "book/skip.yml"
    if not isinstance(row, dict) or set(row) != {"page", "reason", "until"} or not row["reason"]:
        raise ConfigError(where, got=repr(row), want="page, reason and until", remedy="Give all three.")
    if row["page"] not in pages:
        raise ConfigError(where, got=repr(row["page"]), want="a page of _toc.yml", remedy="Check the spelling.")
    if not isinstance(row["until"], datetime.date):
        raise ConfigError(where, got=repr(row["until"]), want="a date such as 2027-01-31", remedy="Write it so.")
    if row["until"] < today:
        raise ConfigError(
            f"{where}: {row['page']}",
            got=f"an end date that has passed, {row['until']}",
            want="a date to come, or no entry",
            remedy=f"It was skipped because: {row['reason']}. Mend the page, or decide anew.",
        )
    return Skip(**row)


def is_current(notebook: Path) -> bool:
    """Whether a staged notebook's outputs still belong to the code as it stands now."""
    return bool(current([notebook]))


def current(notebooks: Iterable[Path]) -> set[Path]:
    """Those of the staged notebooks whose outputs still belong to the code as it stands now."""
    from handbook_src.publish.execute import read
    from handbook_src.publish.fingerprint import Fingerprints

    prints: dict[Path, Fingerprints] = {}
    found = set()
    for notebook in notebooks:
        root = next((p.parent for p in notebook.resolve().parents if p.name == "_build"), None)
        if root is None or not notebook.exists():
            continue
        book = Book(root)
        facts = json.loads(notebook.read_text("utf8"))["metadata"].get("handbook", {})
        page = notebook.resolve().relative_to(book.stage).with_suffix("").as_posix()
        text = book.root / f"{page}.md"
        if "key" in facts and text.exists():
            key = prints.setdefault(root, Fingerprints(book)).key(read(text), page, facts["verified"]["parameters"])
            found |= {notebook} if key == facts["key"] else set()
    return found
