"""The two tables are well formed, and people find what they look for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from handbook_src.catalogue import Claim, Component, claims, component, components
from handbook_src.catalogue.table import STATUSES, close_matches, fold, read_table, search
from handbook_src.errors import ConfigError, DataError
from handbook_src.testing.refusal import refuses

IDS = Path(__file__).with_name("ids.txt").read_text().split()
BIB = Path(__file__).parents[2] / "book" / "references.bib"
OURS = "from the source documents"
KINDS = {"cost", "quality", "formula", "attribution", "evidence"}
HEADER = "id\ttitle\tsynonyms\tpart\tobject\tchapter\toracle\tsource\tstatus"


def test_all_components_stand_in_order() -> None:
    assert [c.id for c in components()] == IDS
    assert len(IDS) == 360


def test_rows_are_filled() -> None:
    for c in components():
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", c.id), c.id
        assert c.title, c.id
        assert c.synonyms, c.id
        assert c.part, c.id
        assert c.status in STATUSES, c.id
        assert not c.chapter.endswith(".md"), c.id
        assert all(v == v.strip() for v in (c.title, c.object, c.chapter, c.oracle, c.source)), c.id
    assert len({c.part for c in components()}) == 30


def test_sources_have_one_form() -> None:
    for c in components():
        for paper in filter(None, c.source.split("; ")):
            assert re.search(r" \d{4}\b", paper) or paper == "no paper found", (c.id, paper)
            assert paper.count("arXiv:") == len(re.findall(r"arXiv:\d{4}\.\d{4,5}\b", paper)), (c.id, paper)


def test_all_claims_stand() -> None:
    known = set(IDS)
    assert len(claims()) == 175
    for c in claims():
        assert c.component in known, c.id
        assert re.fullmatch(rf"{re.escape(c.component)}-\d+", c.id)
        assert c.kind in KINDS, c.id
        assert c.claim, c.id
        assert c.how, c.id


def test_each_claim_says_where_it_stands() -> None:
    dated = r".*\b(19|20)\d\d\b.*|.*(documentation|course).*"
    for c in claims():
        named = c.source.removeprefix(OURS).removeprefix("; compare ")
        assert named or c.source == OURS, c.id
        assert bool(named) == bool(c.link), c.id
        assert not named or re.fullmatch(dated, named), (c.id, named)
        assert re.fullmatch(r"(https://\S+)?", c.link), (c.id, c.link)
        assert not c.quote or (named and 20 < len(c.quote) <= 150), c.id
        assert c.quote == c.quote.strip(' “”"'), c.id


def test_a_claim_and_the_bibliography_name_a_paper_alike() -> None:
    papers = {}
    for entry in BIB.read_text().split("\n@"):
        values = dict(re.findall(r"(\w+) = \{(.*?)\}(?=,|\n)", entry))
        papers[values.get("eprint", "")] = values.get("author", "").split(",")[0], values.get("year", "")
    shared = [c for c in claims() if c.link.removeprefix("https://arxiv.org/abs/") in papers and c.link]
    assert len(shared) > 40
    for c in shared:
        author, year = papers[c.link.removeprefix("https://arxiv.org/abs/")]
        named = c.source.removeprefix(OURS).removeprefix("; compare ")
        assert named.startswith(author), (c.id, named, author)
        assert year in named, (c.id, named, year)


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("SwiGLU", "glu"),
        ("swiglu", "glu"),
        ("GEGLU", "glu"),
        ("Swish", "silu"),
        ("deconvolution", "transposed-conv"),
        ("atrous", "dilated-conv"),
        ("Atrous convolution", "dilated-conv"),
        ("layer normalization", "layer-norm"),
        ("layer normalisation", "layer-norm"),
        ("MHA", "multi-head-attention"),
        ("SDPA", "scaled-dot-product-attention"),
        ("InfoNCE", "nt-xent"),
        ("DropPath", "stochastic-depth"),
        ("GPT-2", "gpt"),
        ("r²", "r2"),
        ("rms norm", "rms-norm"),
        ("mixture of experts", "moe"),
        ("diffusion model", "ddpm"),
    ],
)
def test_names_people_search_by(name: str, want: str) -> None:
    assert component(name).id == want


def test_every_name_leads_home() -> None:
    for c in components():
        assert component(c.id) is c
        for name in c.synonyms:
            found = search(name)
            assert c in found or fold(name) in IDS, (c.id, name)


def test_an_id_wins_over_a_synonym_of_another() -> None:
    assert component("adversarial").id == "adversarial"
    assert component("perplexity").id == "perplexity"


@pytest.mark.parametrize(("name", "ids"), [("NAS", "darts nas-rl"), ("LLM", "gpt llama"), ("PEFT", "lora adapter")])
def test_an_ambiguous_name_lists_the_candidates(name: str, ids: str) -> None:
    with refuses(ConfigError, repr(name), *ids.split()):
        component(name)


def test_an_unknown_name_suggests() -> None:
    with refuses(ConfigError, "'sofmax'", "Did you mean softmax"):
        component("sofmax")
    with refuses(ConfigError, "'zzqqzz'", "List all"):
        component("zzqqzz")
    assert "layer-norm" in close_matches("layernormm")[0]
    assert component("LayerNorm").id == "layer-norm"


def test_a_blank_name_is_nobody() -> None:
    with refuses(ConfigError, "'  '"):
        component("  ")


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("", ("an empty file",)),
        ("id\ttitle\n", (r"'id\ttitle'",)),
        (f"{HEADER}\na\tb\n", ("line 2", "2 columns", "want 9")),
        (f"{HEADER}\n" + 2 * ("a" + "\t" * 8 + "\n"), ("line 3", "got a", "each id once")),
    ],
)
def test_a_torn_table_is_refused(tmp_path: Path, text: str, values: tuple[str, ...]) -> None:
    path = tmp_path / "components.tsv"
    path.write_text(text)
    with refuses(DataError, "components.tsv", *values):
        read_table(path, Component)


def test_a_row_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "claims.tsv"
    head = "id\tcomponent\tclaim\tkind\tsource\tquote\tlink\thow"
    path.write_text(f"{head}\na-1\ta\tb\tcost\tA 2000\tso\thttps://a.org\tc\n")
    assert read_table(path, Claim) == [Claim("a-1", "a", "b", "cost", "A 2000", "so", "https://a.org", "c")]
