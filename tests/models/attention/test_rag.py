"""The whole system on three passages: marginals by hand, quotations, refusals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from handbook_src.errors import ConfigError, DataError, ShapeError
from handbook_src.models.attention.rag import RAG, CopyGenerator
from handbook_src.models.attention.retrieval import BM25, DenseRetriever, Passage
from handbook_src.testing import refuses

ID = "rag"
PASSAGES = [
    Passage("a.md", "a", "Cats", "The cat sits on the mat. It purrs at night."),
    Passage("b.md", "b", "Dogs", "The dog barks. It guards the house."),
    Passage("c.md", "c", "Both", "Cats fear dogs. The dog barks."),
]


def embed(texts: Sequence[str]) -> Tensor:
    counts = torch.tensor([[float(t.lower().count(c)) for c in "abcdefghijklmnopqrstuvwxyz"] for t in texts])
    return torch.nn.functional.normalize(counts.view(-1, 26), dim=-1)


def system(**options: object) -> RAG:
    retriever = DenseRetriever(embed).fit([p.text for p in PASSAGES])
    return RAG(PASSAGES, retriever, CopyGenerator(embed), **{"k": 3, **options})


@pytest.mark.parity(ID)
@pytest.mark.parametrize("kind", ["sequence", "token"])
@pytest.mark.parametrize("temperature", [1.0, 0.05])
def test_probabilities_are_the_sum_over_passages(kind: str, temperature: float) -> None:
    question, rag = "who barks", system(kind=kind, temperature=temperature)
    answers = ["The dog barks.", "It purrs at night.", "nobody says this"]
    q = embed([question])[0]
    p_z = torch.stack([embed([p.text])[0] @ q / temperature for p in PASSAGES]).softmax(0)
    want = torch.zeros(3)
    for share, passage in zip(p_z, PASSAGES, strict=True):
        held = [s.strip() + "." for s in passage.text.split(".") if s.strip()]
        p_y = (embed(held) @ q / 0.1).softmax(0)
        for i, answer in enumerate(answers):
            want[i] += share * sum(p for p, s in zip(p_y, held, strict=True) if s == answer)
    torch.testing.assert_close(rag.log_prob(question, answers).exp(), want)


@pytest.mark.law(ID)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_quotations_share_all_probability(k: int) -> None:
    rag = system(k=k)
    everything = [
        "The cat sits on the mat.",
        "It purrs at night.",
        "The dog barks.",
        "It guards the house.",
        "Cats fear dogs.",
    ]
    total = rag.log_prob("who barks", everything).exp().sum()
    torch.testing.assert_close(total, torch.ones(()))


@pytest.mark.law(ID)
@pytest.mark.parametrize("retriever", [BM25(), DenseRetriever(embed, index="Flat")])
def test_an_answer_is_a_quotation_with_its_source(retriever: BM25 | DenseRetriever) -> None:
    rag = RAG(PASSAGES, retriever.fit([p.text for p in PASSAGES]), CopyGenerator(embed), k=2)
    answer = rag.answer("The cat sits on the mat")
    assert answer.text == "The cat sits on the mat."
    assert answer.passage.source == "a.md"
    assert answer.text in answer.passage.text
    assert 0 < answer.probability <= 1
    torch.testing.assert_close(
        torch.tensor(answer.probability), rag.log_prob("The cat sits on the mat", [answer.text]).exp()[0]
    )


@pytest.mark.law(ID)
def test_two_tokens_one_from_each_passage() -> None:
    """A generator of two tokens; each passage knows one of them."""

    def halves(question: str, passage: Passage, answers: Sequence[str]) -> Tensor:
        knows = {"a.md": [0.9, 0.1], "b.md": [0.1, 0.9], "c.md": [0.1, 0.1]}[passage.source]
        return torch.tensor([knows]).log()

    retriever = DenseRetriever(lambda texts: torch.ones(len(texts), 1)).fit([p.text for p in PASSAGES])
    sequence, token = (
        RAG(PASSAGES, retriever, halves, k=3, kind=kind).log_prob("x", ["y"]).exp().item()
        for kind in ("sequence", "token")
    )
    assert sequence == pytest.approx((0.09 + 0.09 + 0.01) / 3)
    assert token == pytest.approx((1.1 / 3) ** 2)


@pytest.mark.refusal(ID)
def test_refusals() -> None:
    for name, wrong in (("k", 0), ("k", 1.5), ("temperature", 0.0), ("temperature", math.nan), ("kind", "word")):
        with refuses(ConfigError, f"RAG {name}", wrong):
            system(**{name: wrong})
    with refuses(DataError, "RAG passages"):
        RAG([], BM25(), CopyGenerator(embed))
    for question in ("", "  ", None):
        with refuses(ConfigError, "RAG question", repr(question)):
            system().answer(question)
    with refuses(ConfigError, "CopyGenerator temperature", -1.0):
        CopyGenerator(embed, temperature=-1.0)
    with refuses(ShapeError, "row 2", "1 passages"):
        RAG(PASSAGES[:1], BM25().fit([p.text for p in PASSAGES]), CopyGenerator(embed), k=3).answer("cats fear dogs")
    empty = [Passage("d.md", "d", "Nothing", "")]
    with refuses(DataError, "1 passages without a sentence"):
        RAG(empty, BM25().fit(["x"]), CopyGenerator(embed)).answer("x")
    with refuses(DataError, "no texts"):
        RAG(PASSAGES, BM25(), CopyGenerator(embed)).answer("x")


@pytest.mark.refusal(ID)
def test_nothing_found_and_what_is_no_list() -> None:
    class Blind:
        def search(self, questions: Sequence[str], k: int) -> tuple[Tensor, Tensor]:
            return torch.full((1, k), -math.inf), torch.full((1, k), -1)

    passages = [Passage("s", "l", "t", "A cat sat. It ran.")]
    generator = CopyGenerator(lambda texts: torch.ones(len(texts), 2))
    with refuses(DataError, "no passage", "a cat?"):
        RAG(passages, Blind(), generator).log_prob("a cat?", ["It ran."])
    with refuses(ConfigError, "one string"):
        RAG(passages, Blind(), generator).log_prob("a cat?", "It ran.")
    with refuses(ConfigError, "Passage"):
        RAG(["a string"], Blind(), generator)
