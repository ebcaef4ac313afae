"""Cutting pages, dense search against faiss, BM25 against the formula written again."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import faiss
import pytest
import torch
from torch import Tensor

from handbook_src.errors import ConfigError, DataError, KernelUnavailable, ShapeError
from handbook_src.models.attention.retrieval import BM25, DenseRetriever, plain, sentences, split_markdown, words_of
from handbook_src.testing import refuses

ID = "rag"
TEXTS = ["the cat sat on the mat", "the dog ate", "a cat and a dog", "", "Cats, dogs; the CAT!"]
PAGE = """---
title: x
---

(ch-one)=
# One `page`

**What it is.** A {term}`softmax` of {ref}`scores <eq-1>`. See [here](http://x).

```{code-cell} ipython3
# Not a heading
print("not prose")
```

| a | table |
|---|---|

(second)=
## Second

First sentence. Second one, 1.5 times as long! (Third.)

Last paragraph.

### Inner

Belongs to second.
"""


def embed(texts: list[str]) -> Tensor:
    """Counts of letters, of length one: a vector that needs no network."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    counts = torch.tensor([[float(t.lower().count(c)) for c in letters] for t in texts]).view(-1, 26)
    return torch.nn.functional.normalize(counts, dim=-1)


@pytest.mark.parity(ID)
@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.75), (0.9, 0.0), (2.0, 1.0)])
def test_bm25_is_its_formula(k1: float, b: float) -> None:
    bags = [words_of(t) for t in TEXTS]
    mean = sum(map(len, bags)) / len(bags)
    question = "The cat, the dog?"
    want = []
    for bag in bags:
        score = 0.0
        for w in words_of(question):
            n = sum(w in other for other in bags)
            idf = math.log(1 + (len(bags) - n + 0.5) / (n + 0.5))
            f = bag.count(w)
            score += 0 if f == 0 else idf * f * (k1 + 1) / (f + k1 * (1 - b + b * len(bag) / mean))
        want.append(score)
    scores, rows = BM25(k1=k1, b=b).fit(TEXTS).search([question], 5)
    order = sorted(range(5), key=lambda i: -want[i])
    assert rows[0].tolist() == order
    torch.testing.assert_close(scores[0], torch.tensor([want[i] for i in order]))


@pytest.mark.parity(ID)
@pytest.mark.outside(ID)
def test_dense_search_is_faiss() -> None:
    questions = ["cat", "zebra", ""]
    exact = DenseRetriever(embed).fit(TEXTS).search(questions, 3)
    flat = faiss.IndexFlatIP(26)
    flat.add(embed(TEXTS).numpy())
    scores, _ = flat.search(embed(questions).numpy(), 3)
    torch.testing.assert_close(exact[0], torch.from_numpy(scores))
    ours = DenseRetriever(embed, index="Flat").fit(TEXTS).search(questions, 3)
    torch.testing.assert_close(ours[0], exact[0])
    for i, row in enumerate(ours[1].tolist()):
        torch.testing.assert_close(embed(TEXTS)[row] @ embed(questions)[i], exact[0][i])


@pytest.mark.law(ID)
@pytest.mark.parametrize("retriever", [BM25(), DenseRetriever(embed), DenseRetriever(embed, index="Flat")])
def test_a_text_finds_itself_and_k_may_exceed_the_collection(retriever: BM25 | DenseRetriever) -> None:
    texts = [t for t in TEXTS if t]
    scores, rows = retriever.fit(texts).search(texts, 9)
    assert rows[:, 0].tolist() == list(range(4))
    assert scores.shape == rows.shape == (4, 9)
    assert (rows[:, 4:] == -1).all()
    assert scores[:, 4:].isneginf().all()
    assert (scores[:, :4].diff(dim=-1) <= 0).all()


@pytest.mark.law(ID)
def test_words_of_every_script_are_found() -> None:
    texts = ["Die Größe der Lücke", "обратное распространение ошибки", "gap_size 3", "cafe\u0301 noir"]
    scores, rows = BM25().fit(texts).search(["lücke", "ошибки", "size", "CAFÉ"], 1)
    assert rows[:, 0].tolist() == [0, 1, 2, 3]
    assert bool((scores > 0).all())


def test_more_probes_find_more() -> None:
    vectors = torch.nn.functional.normalize(torch.randn(600, 16), dim=-1)
    asked = torch.nn.functional.normalize(torch.randn(40, 16), dim=-1)

    def found(**options: object) -> Tensor:
        r = DenseRetriever(lambda texts: asked, **options)
        return r.fit(vectors).search(["x"] * 40, 5)[1]

    exact = found()
    share = [
        (exact[:, :, None] == found(index="IVF12,Flat", probes=p)[:, None]).any(-1).double().mean().item()
        for p in (1, 12)
    ]
    assert share[0] < share[1] == 1.0


@pytest.mark.law(ID)
def test_pages_are_cut_into_prose() -> None:
    cut = split_markdown(PAGE, "page.md")
    assert [(p.label, p.title) for p in cut] == [("ch-one", "One page"), ("second", "Second"), ("second", "Inner")]
    assert cut[0].text == "What it is. A softmax of scores. See here."
    assert cut[1].text == "First sentence. Second one, 1.5 times as long! (Third.) Last paragraph."
    assert {p.source for p in cut} == {"page.md"}
    assert sentences(cut[1].text) == [
        "First sentence.",
        "Second one, 1.5 times as long!",
        "(Third.)",
        "Last paragraph.",
    ]
    short = split_markdown(PAGE, "page.md", words=3)
    assert all(len(p.text.split()) <= 3 for p in short)
    assert " ".join(p.text for p in short if p.title == "Second") == cut[1].text
    assert len(split_markdown(PAGE, "page.md", words=3, per_section=1)) == 3
    assert split_markdown("no heading", "x") == split_markdown("", "x") == []
    assert plain("**a** `b` {ref}`c <d>` {math}`e`") == "a b c e"


@pytest.mark.refusal(ID)
def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    for k1 in (0.0, -1.0, math.nan):
        with refuses(ConfigError, "BM25 k1", k1):
            BM25(k1=k1)
    for b in (-0.1, 1.1, math.nan):
        with refuses(ConfigError, "BM25 b", b):
            BM25(b=b)
    for words in (0, 1.5, True):
        with refuses(ConfigError, "split_markdown words", words):
            split_markdown(PAGE, "x", words=words)
    with refuses(ConfigError, "int", "a string"):
        split_markdown(3, "x")  # type: ignore[arg-type]
    with refuses(ConfigError, "list of strings"):
        BM25().fit(3)  # type: ignore[arg-type]
    with refuses(ConfigError, "per_section", 0):
        split_markdown(PAGE, "x", per_section=0)
    for retriever in (BM25(), DenseRetriever(embed)):
        with refuses(DataError, "no texts"):
            retriever.search(["a"], 1)
        retriever.fit(TEXTS)
        for k in (0, -1, 1.5):
            with refuses(ConfigError, "search k", k):
                retriever.search(["a"], k)
        with refuses(ConfigError, "one string"):
            retriever.search("a question", 1)
        with refuses(ConfigError, "no string"):
            retriever.search([3], 1)
    for wrong in (torch.zeros(3), torch.zeros(3, 2, dtype=torch.long)):
        with refuses(ShapeError, tuple(wrong.shape)):
            DenseRetriever(embed).fit(wrong)
    with refuses(ConfigError, "Nonsense"):
        DenseRetriever(embed, index="Nonsense").fit(TEXTS)
    with refuses(ConfigError, "probes", 0):
        DenseRetriever(embed, probes=0)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with refuses(KernelUnavailable, "pip install faiss-cpu"):
        DenseRetriever(embed, index="Flat").fit(TEXTS)


@pytest.mark.refusal(ID)
def test_vectors_that_do_not_fit() -> None:
    def embed(texts: Sequence[str]) -> Tensor:
        return torch.ones(len(texts), 3)

    for index in (None, "Flat"):
        wide = DenseRetriever(embed, index=index).fit(torch.randn(4, 5))
        with refuses(ShapeError, "(1, 3)", "(1, 5)"):
            wide.search(["a"], 2)
        with refuses(ShapeError, "not finite"):
            DenseRetriever(embed, index=index).fit(torch.full((2, 3), math.nan))
    with refuses(ConfigError, "one string"):
        DenseRetriever(embed).fit("one string")
    with refuses(ShapeError, "(1, 3)", "(2, d)"):
        DenseRetriever(lambda texts: torch.ones(1, 3)).fit(["a", "b"])


@pytest.mark.law(ID)
def test_ready_made_vectors_are_copied() -> None:
    vectors = torch.randn(3, 2)
    found, kept = DenseRetriever(lambda texts: torch.ones(len(texts), 2)).fit(vectors), vectors.clone()
    vectors.zero_()
    torch.testing.assert_close(found.vectors, kept)
