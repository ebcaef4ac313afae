"""The built site, read as files: it is whole, loads nothing from elsewhere, and says what the catalogue says."""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from handbook_src.catalogue import claims, components
from handbook_src.catalogue.ledger import ledger
from handbook_src.publish import site

pytestmark = pytest.mark.site
Pages = dict[Path, Any]


def test_nothing_is_loaded_from_elsewhere(book_pages: Pages) -> None:
    assert not [(p.name, u) for p, page in book_pages.items() for u in page.loads if urlsplit(u).netloc]


def test_style_sheets_name_no_other_host(html: Path) -> None:
    loads = re.compile(r"(?:@import|url\()\s*[\"']?(?:https?:)?//")
    assert not [p.name for p in html.rglob("*.css") if loads.search(p.read_text("utf8"))]


def test_every_picture_has_a_text_alternative(book_pages: Pages) -> None:
    assert not [(p.name, s) for p, page in book_pages.items() for s in page.nameless]


def test_local_links_and_anchors_exist(book_pages: Pages) -> None:
    bad = []
    for path, page in book_pages.items():
        for url in page.links + page.loads:
            u = urlsplit(url)
            if u.scheme or u.netloc or url == "#":
                continue
            target = (path.parent / unquote(u.path)).resolve() if u.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                bad.append((path.name, url, "no such file"))
            elif u.fragment and target in book_pages and unquote(u.fragment) not in book_pages[target].ids:
                bad.append((path.name, url, "no such anchor"))
    assert not bad


def test_the_index_has_every_component(book_pages: Pages, html: Path) -> None:
    page = book_pages[html / "book/components.html"]
    assert page.rows == [f"component-{c.id}" for c in components()]
    assert len(page.rows) == 360
    text = unescape(page.text).translate({ord("’"): "'", ord("–"): "-"})
    for c in components():
        assert all(synonym in text for synonym in c.synonyms), c.id


def test_published_components_link_to_their_section(book_pages: Pages, html: Path) -> None:
    links = set(book_pages[html / "book/components.html"].links)
    want = {f"{c.chapter.removeprefix('book/')}.html#{c.id}" for c in components() if c.status == "published"}
    assert want <= links, sorted(want - links)


def test_the_ledger_has_every_claim_with_its_verdict(book_pages: Pages, html: Path, stage: Path) -> None:
    page = book_pages[html / "book/claims.html"]
    assert sorted(page.rows) == sorted(f"claim-{c.id}" for c in claims())
    want = Counter(e.verdict.replace(" ", "-") for e in ledger(stage))
    assert Counter(re.findall(r'<tr[^>]* id="claim-.*?verdict-([\w-]+)"', page.text, re.S)) == want


def test_the_front_page_counts_what_the_catalogue_counts(book_pages: Pages, html: Path, stage: Path) -> None:
    text = book_pages[html / "book/index.html"].text
    found = [int(n) for n in re.findall(r'<li><a href="c[^"]*\?[^"]*"><strong>(\d+)</strong>', text)]
    published = sum(c.status == "published" for c in components())
    still_open = sum(e.verdict == "open" for e in ledger(stage))
    assert found == [published, 360 - published, 175 - still_open, still_open]


@pytest.mark.parametrize("word", ["swiglu", "swish", "deconvolut", "atrous"])
def test_the_search_index_knows_the_synonyms(html: Path, word: str) -> None:
    text = (html / "searchindex.js").read_text("utf8")
    index = json.loads(text[text.index("{") : text.rindex("}") + 1])
    names = " ".join([*index["terms"], *index["indexentries"]]).lower()
    assert word in names


def test_published_components_are_index_entries_of_their_chapter(html: Path) -> None:
    text = (html / "searchindex.js").read_text("utf8")
    index = json.loads(text[text.index("{") : text.rindex("}") + 1])
    for c in components():
        if c.status == "published":
            page = index["docnames"].index(c.chapter)
            entry = index["indexentries"].get(c.title.replace(";", ",").lower())
            assert entry, c.title
            assert [page, c.id] in [e[:2] for e in entry]


def test_chapters_carry_the_stamp_of_their_run(book_pages: Pages, html: Path, chapter_names: list[str]) -> None:
    for name in chapter_names:
        text = book_pages[html / f"{name}.html"].text
        line = re.search(r'<p class="handbook-stamp">(.*?)</p>', text, re.S)
        assert line, name
        assert re.search(r"Last verified \d+ \w+ \d{4}</strong> on .*torch \d", line[1]), line[1]


def test_colab_and_edit_buttons_lead_to_files_that_exist(
    book_pages: Pages, html: Path, chapter_names: list[str]
) -> None:
    path = urlsplit(site.repository()).path
    for name in chapter_names:
        links = book_pages[html / f"{name}.html"].links
        assert f"https://colab.research.google.com/github{path}/blob/gh-pages/{name}.ipynb" in links
        assert (html / f"{name}.ipynb").exists(), "what the deployed branch must hold for Colab"
        assert name.rpartition("/")[2] + ".ipynb" in links, "the download button"
        assert f"{site.repository()}/edit/main/{name}.md" in links


def test_first_uses_of_terms_are_linked_and_only_those(book_pages: Pages, html: Path, chapter_names: list[str]) -> None:
    for name in chapter_names:
        terms = book_pages[html / f"{name}.html"].terms
        assert len(terms) >= 3, f"{name}: {terms}"
        assert len({url for url, _ in terms}) == len(terms), "a term is linked once"
        assert not [t for t in terms if t[1]], "headings, code and captions stay as they are"


def test_the_glossary_defines_its_terms_once(book_pages: Pages, html: Path) -> None:
    ids = [i for i in book_pages[html / "book/glossary.html"].ids if i.startswith("term-")]
    assert len(ids) >= 45


def test_the_address_of_the_repository_stands_in_one_place() -> None:
    run = subprocess.run(
        ["git", "grep", "-l", "-F", urlsplit(site.repository()).path], cwd=site.ROOT, capture_output=True, text=True
    )
    if run.returncode > 1:
        pytest.skip(f"not a git checkout: {run.stderr.strip()}")
    assert run.stdout.split() == ["_config.yml"]
