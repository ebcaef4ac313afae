"""The built site, parsed once; absent it is a skip here and a failure in CI."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import NoReturn

import pytest

from handbook_src.publish import site
from handbook_src.publish.book import Book
from handbook_src.publish.chapters import names

#: ``HANDBOOK_BUILD`` names another build folder than ``_build``.
BOOK = Book(Path(os.environ.get("HANDBOOK_BUILD", site.BOOK.build)).parent)
#: Where nothing may be skipped: a missing site or browser fails there.
STRICT = os.environ.get("CI", "").lower() == "true" or os.environ.get("HANDBOOK_REQUIRE_BROWSER") == "1"
LOADS = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "link": "href",
    "video": "src",
    "embed": "src",
}
#: Links of a page's head that name an address and load nothing.
NAMED_ONLY = {"canonical", "next", "prev", "alternate", "index", "search", "author"}
PROSE_FREE = {"h1", "h2", "h3", "h4", "pre", "code", "figcaption"}


def absent(what: str) -> NoReturn:
    """Skip with the reason, or fail where skipping isn't allowed."""
    if STRICT:
        pytest.fail(what)
    pytest.skip(what)


@pytest.fixture(scope="session")
def without() -> Callable[[str], NoReturn]:
    """What to call when something that the tests need is missing."""
    return absent


@dataclass
class Page(HTMLParser):
    """What the tests ask of a page: anchors, links, loads, pictures, glossary links."""

    path: Path
    ids: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    nameless: list[str] = field(default_factory=list)
    terms: list[tuple[str, set[str]]] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.text = self.path.read_text("utf8")
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        a = {k: v or "" for k, v in attrs}
        self.ids |= {a["id"]} if a.get("id") else set()
        if tag == "a" and a.get("href"):
            self.links.append(a["href"])
            if "handbook-term" in a.get("class", ""):
                self.terms.append((a["href"], PROSE_FREE & set(self.stack)))
        if tag in LOADS and a.get(LOADS[tag]) and a.get("rel", "") not in NAMED_ONLY:
            self.loads.append(a[LOADS[tag]])
        beside_its_name = "logo__image" in a.get("class", "")  # decorative: the name stands next to it
        if tag == "img" and not a.get("alt") and not beside_its_name:
            self.nameless.append(a.get("src", tag))
        if tag == "svg" and a.get("role") == "img" and not a.get("aria-label"):
            self.nameless.append(tag)
        if tag == "tr" and a.get("id"):
            self.rows.append(a["id"])
        if tag not in ("img", "br", "hr", "meta", "link", "input", "source", "wbr", "col"):
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.stack:
            while self.stack.pop() != tag:
                pass


@pytest.fixture(scope="session")
def html() -> Path:
    if not (BOOK.html / "index.html").exists():
        absent(f"the site is not built: {BOOK.html} (python3 -m handbook_src book)")
    return BOOK.html


@pytest.fixture(scope="session")
def stage(html: Path) -> Path:
    """The executed notebooks that the site was made from."""
    return BOOK.stage


@pytest.fixture(scope="session")
def book_pages(html: Path) -> dict[Path, Page]:
    """Every page of the site, Sphinx's own included."""
    return {p: Page(p) for p in sorted(html.rglob("*.html")) if "_static" not in p.parts}


@pytest.fixture(scope="session")
def chapter_names(stage: Path) -> list[str]:
    """The chapters that this build executed."""
    found = [n for n in names(site.BOOK) if (stage / f"{n}.ipynb").exists()]
    if not found:
        absent("no chapter is staged")
    return found
