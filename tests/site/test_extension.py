"""The pieces of the Sphinx extension that need no site: terms, stamp, tables, the front page's figure."""

from __future__ import annotations

import re

import pytest
from docutils import nodes
from sphinx import addnodes
from sphinx.environment import BuildEnvironment

from handbook_src.publish import hero, pages
from handbook_src.publish.sphinx_ext import imported, stamp, titles
from handbook_src.publish.terms import Terms, is_open, pattern

TERMS = Terms({"token": "t-token", "residual stream": "t-stream", "GPT": "t-gpt", "batch": "t-batch"})


@pytest.mark.parametrize(
    ("text", "anchors"),
    [
        ("Tokens and a token", ["t-token", "t-token"]),
        ("the residual-stream of", ["t-stream"]),
        ("tokeniser, detoken", []),
        ("gpt is lower case, GPTs not", ["t-gpt"]),
        ("batches", ["t-batch"]),
        ("batch-norm", []),
    ],
)
def test_terms_are_found_as_words(text: str, anchors: list[str]) -> None:
    assert [a for a, _ in TERMS.in_text(text)] == anchors


def contents(title: str, *below: nodes.Node) -> nodes.bullet_list:
    return nodes.bullet_list("", nodes.list_item("", nodes.paragraph("", title), nodes.bullet_list("", *below)))


def test_the_navigation_keeps_titles_and_pages_and_no_headings() -> None:
    headings = [nodes.list_item("", nodes.paragraph("", "a heading")), addnodes.toctree(entries=[(None, "below")])]
    env = BuildEnvironment.__new__(BuildEnvironment)
    env.tocs = {"leaf": contents("Leaf", headings[0].deepcopy()), "branch": contents("Branch", *headings)}
    found = titles(env)
    assert found["leaf"].astext() == "Leaf"
    assert found["branch"].astext().strip() == "Branch"
    assert [t["entries"] for t in found["branch"].findall(addnodes.toctree)] == [[(None, "below")]]
    assert env.tocs["leaf"].astext().split() == ["Leaf", "a", "heading"]


def test_the_longer_term_wins() -> None:
    terms = Terms({"attention": "a", "attention head": "h"})
    assert [a for a, _ in terms.in_text("an attention head")] == ["h"]


def test_an_empty_glossary_finds_nothing() -> None:
    assert list(Terms({}).in_text("token")) == []


def test_abbreviations_match_exactly() -> None:
    assert re.fullmatch(pattern("GPT"), "GPT")
    assert not re.fullmatch(pattern("GPT"), "gpt")


@pytest.mark.parametrize("closed", [nodes.title, nodes.literal, nodes.reference, nodes.caption])
def test_terms_stay_unlinked_in_headings_code_links_and_captions(closed: type[nodes.TextElement]) -> None:
    text = nodes.Text("token")
    nodes.paragraph("", "", closed("", "", text))
    assert not is_open(text)


def test_terms_are_linked_in_paragraphs_only() -> None:
    inside, outside = nodes.Text("token"), nodes.Text("token")
    nodes.paragraph("", "", inside)
    nodes.inline("", "", outside)
    assert is_open(inside)
    assert not is_open(outside)


def test_the_stamp_says_when_and_on_what() -> None:
    facts = {"date": "2026-11-21", "device": "cpu", "torch": "2.13.0", "triton": "3.7.1", "seconds": 4.4}
    line = stamp({**facts, "parameters": {"quick": True}}).astext()
    assert line == "Last verified 21 November 2026 on cpu · torch 2.13.0 · triton 3.7.1 · 4 s · quick=True"


def test_the_stamp_leaves_out_what_was_not_there() -> None:
    assert (
        stamp({"date": "2026-11-21", "torch": "2.13.0"}).astext()
        == "Last verified 21 November 2026 on cpu · torch 2.13.0"
    )


def test_re_exports_lead_to_the_definition() -> None:
    found = imported("handbook_src.testing.refuses")
    assert found is not None
    assert found.__module__ == "handbook_src.testing.refusal"
    assert imported("handbook_src.nowhere.at_all") is None


def test_the_figure_of_the_front_page_shows_what_its_caption_says() -> None:
    bare, normed = hero.sizes(normalised=False), hero.sizes(normalised=True)
    assert hero.median(bare[0]) - hero.median(bare[-1]) > 6, "a shrinking of a million at least"
    assert abs(hero.median(normed[0]) - hero.median(normed[-1])) < 0.05
    svg = hero.svg()
    assert svg.count("<path") == 2 * hero.LAYERS
    assert "aria-label" in svg


def test_modules_of_the_reference_are_public_and_documented() -> None:
    found = pages.public_modules("handbook_src.functional")
    assert "handbook_src.functional.normalisation.norm" in found
    assert not [m for m in found if "._" in m]
