"""Which pages are executed, which are left out and until when, and within which seconds."""

import datetime

import pytest

from handbook_src.errors import ConfigError
from handbook_src.publish import chapters
from handbook_src.testing import refuses

TODAY = datetime.date(2026, 11, 21)


def test_chapters_are_the_pages_with_a_kernel_in_reading_order(tiny):
    tiny.chapter("b", "1")
    tiny.page("plain", "# Plain\n")
    tiny.chapter("a", "1", budget=60)
    found = chapters.chapters(tiny.book)
    assert [(c.page, c.budget) for c in found] == [("book/b", 20), ("book/a", 60)]


def test_a_page_of_the_list_must_exist(tiny):
    tiny.page("gone", "").unlink()
    with refuses(ConfigError, "book/gone"):
        chapters.chapters(tiny.book)


def test_code_cells_without_a_kernel_are_refused(tiny):
    tiny.page("odd", "# Odd\n\n```{code-cell}\n1\n```\n")
    with refuses(ConfigError, "book/odd", "no kernelspec"):
        chapters.chapters(tiny.book)


@pytest.mark.parametrize("budget", [0, -3, "fast", True])
def test_a_budget_is_a_positive_number(tiny, budget):
    tiny.chapter("a", "1", budget=budget)
    with refuses(ConfigError, "handbook.budget"):
        chapters.chapters(tiny.book)


def test_chapters_are_chosen_by_stem_name_or_page(tiny):
    tiny.chapter("part/a", "1")
    tiny.chapter("b", "1")
    every = chapters.chapters(tiny.book)
    for name in ("a", "part/a", "book/part/a", "book/part/a.md"):
        assert [c.name for c in chapters.choose(every, [name])] == ["part/a"]
    with refuses(ConfigError, "nothing", "part/a"):
        chapters.choose(every, ["nothing"])


def skip(tiny, **row):
    tiny.chapter("a", "1")
    lines = "\n  ".join(f"{key}: {value}" for key, value in row.items())
    tiny.write("book/skip.yml", f"- {lines}\n")
    return chapters.skips(tiny.book, TODAY)


def test_a_page_is_skipped_with_a_reason_until_a_date(tiny):
    found = skip(tiny, page="book/a", reason="needs a GPU", until="2026-11-21")
    assert found["book/a"] == chapters.Skip("book/a", "needs a GPU", TODAY)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"page": "book/a", "reason": "waits", "until": "2026-11-20"}, ("2026-11-20", "has passed", "waits")),
        ({"page": "book/a", "until": "2027-01-01"}, ("page, reason and until",)),
        ({"page": "book/a", "reason": "", "until": "2027-01-01"}, ("page, reason and until",)),
        ({"page": "book/a", "reason": "waits"}, ("page, reason and until",)),
        ({"page": "book/a", "reason": "waits", "until": "soon"}, ("soon", "a date")),
        ({"page": "book/z", "reason": "waits", "until": "2027-01-01"}, ("book/z", "_toc.yml")),
    ],
)
def test_a_skip_that_is_over_or_incomplete_is_an_error(tiny, row, said):
    with refuses(ConfigError, *said):
        skip(tiny, **row)


def test_a_header_that_is_no_yaml_is_refused_by_name(tiny):
    tiny.page("odd", "---\nkernelspec: {\n---\n\n# Odd\n")
    with refuses(ConfigError, "odd.md", "line 1"):
        chapters.chapters(tiny.book)
