"""Retrieval-augmented generation, whole and small: retrieve passages, answer from them, name the source."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, final

import torch
from torch import Tensor

from handbook_src.check import check_positive, check_size
from handbook_src.errors import ConfigError, DataError, ShapeError
from handbook_src.functional.attention.rag import rag_sequence, rag_token
from handbook_src.models.attention.retrieval import Embed, Passage, Retriever, listed, sentences

#: Question, passage and answers to one row of token log-probabilities an answer (``n t``).
Generator = Callable[[str, Passage, Sequence[str]], Tensor]
Kind = Literal["sequence", "token"]


class Answer(NamedTuple):
    """A quotation, where it stands, and the probability that the system gives it."""

    text: str
    passage: Passage
    probability: float


@final
class CopyGenerator:
    r"""A generator that can only quote: one sentence of the passage, the nearer to the question the likelier.

    .. math:: p(y \mid x, z) = \frac{\exp(\mathbf e(y)^\top \mathbf e(x) / \tau)}{\sum_{y' \in z} \exp(\mathbf e(y')^\top \mathbf e(x) / \tau)}

    An answer counts as one token; a sentence that the passage does not hold has probability zero.

    Args:
        embed: texts to unit vectors.
        temperature: :math:`\tau`.

    Raises:
        ConfigError: a temperature that is not positive.
    """  # noqa: E501

    def __init__(self, embed: Embed, *, temperature: float = 0.1) -> None:
        check_positive("CopyGenerator", "temperature", temperature)
        self.embed, self.temperature = embed, temperature

    def __call__(self, question: str, passage: Passage, answers: Sequence[str]) -> Tensor:
        held = sentences(passage.text)
        log_p = torch.full((len(answers), 1), -math.inf)
        if not held:
            return log_p
        vectors = self.embed([question, *held])
        found = (vectors[1:] @ vectors[0] / self.temperature).log_softmax(-1)
        for i, answer in enumerate(answers):
            same = [found[j] for j, sentence in enumerate(held) if sentence == answer]
            if same:
                log_p[i, 0] = torch.logsumexp(torch.stack(same), 0)
        return log_p


@final
class RAG:
    r"""Answer a question from the passages that a retriever finds, and say from which.

    .. math:: p(y \mid x) = \sum_{z \in \operatorname{top-}k(p(\cdot \mid x))} p(z \mid x)\, p(y \mid x, z)

    :math:`p(z \mid x)` is the softmax of the retriever's scores over the ``k`` found.  The
    marginalisation is :func:`handbook_src.functional.rag_sequence` or
    :func:`handbook_src.functional.rag_token`.

    Args:
        passages: the collection, in the order in which the retriever was fitted.
        retriever: finds rows of the collection.
        generator: scores answers under one passage; :class:`CopyGenerator` quotes.
        k: passages retrieved for a question.
        temperature: the retriever's scores are divided by it before the softmax.
        kind: ``sequence`` or ``token``.

    Shape:
        ``log_prob``: a question and ``n`` answers to ``n`` log-probabilities.

    Typical values:
        k 5 or 10 in training, up to 50 in use; passages of 100 words; 21 million of them (Wikipedia).

    Raises:
        ConfigError: ``k`` below one, a temperature that is not positive, another kind.
        DataError: no passages.

    Source:
        Lewis et al. 2020, section 2, arXiv:2005.11401
    """

    def __init__(
        self,
        passages: Sequence[Passage],
        retriever: Retriever,
        generator: Generator,
        *,
        k: int = 5,
        temperature: float = 1.0,
        kind: Kind = "sequence",
    ) -> None:
        check_size("RAG", "k", k)
        check_positive("RAG", "temperature", temperature)
        if kind not in ("sequence", "token"):
            raise ConfigError("RAG kind", got=repr(kind), want="'sequence' or 'token'", remedy="Start with 'sequence'.")
        if not all(isinstance(passage, Passage) for passage in passages):
            remedy = "Make them with split_markdown, or Passage(source, label, title, text)."
            raise ConfigError("RAG passages", got="something else", want="Passage objects", remedy=remedy)
        if not passages:
            raise DataError("RAG passages", got="none", want="at least one", remedy="Cut some pages into passages.")
        self.passages, self.retriever, self.generator = list(passages), retriever, generator
        self.k, self.temperature, self.kind = k, temperature, kind

    def retrieve(self, question: str) -> tuple[Tensor, list[Passage]]:
        """Return the scores and the passages found, best first.

        Raises:
            ConfigError: an empty question.
            ShapeError: the retriever was fitted to another collection.
        """
        if not isinstance(question, str) or not question.strip():
            raise ConfigError("RAG question", got=repr(question), want="some words", remedy="Ask something.")
        scores, rows = self.retriever.search([question], self.k)
        kept = rows[0] >= 0
        scores, rows = scores[0][kept], rows[0][kept]
        if len(rows) and int(rows.max()) >= len(self.passages):
            raise ShapeError(
                "RAG retriever",
                got=f"row {int(rows.max())}",
                want=f"rows of {len(self.passages)} passages",
                remedy="Fit the retriever to the same passages.",
            )
        return scores / self.temperature, [self.passages[i] for i in rows.tolist()]

    def log_prob(self, question: str, answers: Sequence[str]) -> Tensor:
        """Return the log-probability of each answer, marginalised over the passages found.

        Raises:
            DataError: no passage was found.
            ConfigError: one string in the place of a list.
        """
        answers = listed(answers)
        scores, found = self.retrieve(question)
        if not found:
            got = f"no passage for {question!r}"
            raise DataError(
                "RAG.log_prob", got=got, want="at least one", remedy="Ask the retriever for more, or answer without."
            )
        return self._marginal(scores, found, question, answers)

    def answer(self, question: str) -> Answer:
        """Quote the likeliest sentence of the passages found.

        The passage named is the one that gives the sentence most of its probability.

        Raises:
            DataError: the passages found hold no sentence.
        """
        scores, found = self.retrieve(question)
        candidates = list(dict.fromkeys(s for passage in found for s in sentences(passage.text)))
        if not candidates:
            got = f"{len(found)} passages without a sentence"
            raise DataError("RAG.answer", got=got, want="something to quote", remedy="Check how the pages were cut.")
        log_p = self._marginal(scores, found, question, candidates)
        best = int(log_p.argmax())
        shares = [
            float(score + self.generator(question, passage, candidates[best : best + 1]).sum())
            for score, passage in zip(scores, found, strict=True)
        ]
        source = found[max(range(len(found)), key=shares.__getitem__)]
        return Answer(candidates[best], source, math.exp(float(log_p[best])))

    def _marginal(self, scores: Tensor, found: Sequence[Passage], question: str, answers: Sequence[str]) -> Tensor:
        under_each = torch.stack([self.generator(question, passage, answers) for passage in found], 1)
        marginal = rag_sequence if self.kind == "sequence" else rag_token
        return marginal(scores.to(under_each.dtype).expand(len(answers), -1), under_each)
