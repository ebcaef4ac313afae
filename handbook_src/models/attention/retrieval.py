"""Passages of text and two ways to find the right one: by vectors, and by counted words."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from handbook_src.check import check_positive, check_probability, check_size
from handbook_src.errors import ConfigError, DataError, ShapeError
from handbook_src.functional.attention.knn_memory import faiss_index, train_and_add, visit_cells

#: Texts to unit vectors, one row each.
Embed = Callable[[Sequence[str]], Tensor]
_WORD = re.compile(r"[^\W_]+")
_FENCE = re.compile(r"^(`{3,}|~{3,}).*?^\1`*\s*$", re.MULTILINE | re.DOTALL)
_FRONT = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
_HEADING = re.compile(r"^(?:\(([\w-]+)\)=\s*\n+)?(#{1,6}) +(.+)$", re.MULTILINE)
_ROLE = re.compile(r"\{[\w:]+\}`([^`<]*?)(?: ?<[^`>]*>)?`")


@dataclass(frozen=True)
class Passage:
    """A piece of a page: where it stands, the label and title of its section, what it says."""

    source: str
    label: str
    title: str
    text: str


def split_markdown(text: str, source: str, *, words: int = 120, per_section: int | None = None) -> list[Passage]:
    """Cut a page of MyST Markdown into passages: prose only, never across a heading.

    Front matter, fenced blocks (code, equations, figures) and tables are left out; roles become
    their text.  A section without a label belongs to the label above it.

    Args:
        text: the page.
        source: its name, which each passage carries.
        words: the most words in a passage, whole paragraphs as far as they fit.
        per_section: keep this many passages of each section; all unless given.

    Raises:
        ConfigError: a count below one.
    """
    if not isinstance(text, str):
        raise ConfigError(
            "split_markdown text", got=type(text).__name__, want="a string", remedy="Read the file first."
        )
    check_size("split_markdown", "words", words)
    if per_section is not None:
        check_size("split_markdown", "per_section", per_section)
    text = _FENCE.sub("", _FRONT.sub("", text))
    heads = list(_HEADING.finditer(text))
    passages, label = [], ""
    for i, head in enumerate(heads):
        label = head[1] or label
        end = heads[i + 1].start() if i + 1 < len(heads) else len(text)
        pieces = list(_pieces(_prose(text[head.end() : end]), words))
        passages += [Passage(source, label, plain(head[3]), piece) for piece in pieces[:per_section]]
    return passages


def plain(text: str) -> str:
    """Take MyST's and Markdown's marks out of a line."""
    text = _ROLE.sub(r"\1", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"[*`]+", "", text).strip()


def sentences(text: str) -> list[str]:
    """Cut prose at full stops, question and exclamation marks that end a sentence."""
    ends = r"(?:(?<=[.!?])|(?<=[.!?][)\"']))\s+(?=[A-Z\d(\"'])"
    return [s.strip() for s in re.split(ends, text) if s.strip()]


def _prose(text: str) -> list[str]:
    paragraphs = (re.sub(r"\s+", " ", plain(p)) for p in text.split("\n\n"))
    return [p for p in paragraphs if p and not p.startswith(("|", "(", ":", "+++", "%", "<"))]


def _pieces(paragraphs: list[str], words: int) -> Iterator[str]:
    piece: list[str] = []
    for word in (w for p in paragraphs for w in _ended(p)):
        piece.append(word.rstrip("\n"))
        if len(piece) >= words or (word.endswith("\n") and len(piece) >= words * 2 // 3):
            yield " ".join(piece)
            piece = []
    if piece:
        yield " ".join(piece)


def _ended(paragraph: str) -> list[str]:
    *head, last = paragraph.split()
    return [*head, last + "\n"]


@runtime_checkable
class Retriever(Protocol):
    """What finds rows of a collection for a question."""

    def search(self, questions: Sequence[str], k: int) -> tuple[Tensor, Tensor]: ...


@final
class DenseRetriever:
    r"""Find the texts whose vectors have the largest inner product with the question's.

    .. math:: \operatorname{top-}k_z\; \mathbf d(z)^\top \mathbf q(x)

    Exact in torch, or a faiss index over inner products.

    Args:
        embed: texts to vectors; the same for texts and questions unless ``embed_question`` is given.
        index: a faiss factory string; exact unless given.
        probes: cells that an ``IVF`` index visits.
        embed_question: questions to vectors.

    Shape:
        ``search``: ``m`` questions to ``m k`` scores and ``m k`` rows, best first; -1 where there is none.

    Typical values:
        384 to 768 features; passages of 100 words; k 5 to 100.

    Raises:
        ConfigError: an index that faiss does not know, ``probes`` below one.
        KernelUnavailable: an index is asked for and faiss is not installed.

    Source:
        Karpukhin et al. 2020, section 3, arXiv:2004.04906; Lewis et al. 2020, section 2.2, arXiv:2005.11401
    """

    def __init__(
        self, embed: Embed, *, index: str | None = None, probes: int = 8, embed_question: Embed | None = None
    ) -> None:
        check_size("DenseRetriever", "probes", probes)
        self.embed, self.index, self.probes = embed, index, probes
        self.embed_question = embed if embed_question is None else embed_question
        self.vectors: Tensor | None = None
        self._built: Any = None

    def fit(self, texts: Sequence[str] | Float[Tensor, "n d"]) -> DenseRetriever:
        """Embed the collection (or copy its vectors ready-made) and build the index; returns itself.

        Raises:
            ShapeError: vectors that are not ``n d``, floating and finite, or not one for each text.
            ConfigError: one string in the place of a list, or too few texts to train an ``IVF`` index.
        """
        count = len(texts) if isinstance(texts, Tensor) and texts.ndim else -1
        if not isinstance(texts, Tensor):
            texts = listed(texts)
            count = len(texts)
        vectors = _vectors(texts if isinstance(texts, Tensor) else self.embed(texts), count)
        self.vectors = vectors.clone()
        if self.index is not None:
            self._built = faiss_index("DenseRetriever", self.index, vectors.shape[1], "ip")
            train_and_add("DenseRetriever", self._built, self.vectors.numpy())
            visit_cells("DenseRetriever", self._built, self.probes)
        return self

    def search(self, questions: Sequence[str], k: int) -> tuple[Float[Tensor, "m k"], Int[Tensor, "m k"]]:
        """Return scores and rows of the ``k`` best texts for each question.

        Raises:
            DataError: nothing was fitted.
            ConfigError: ``k`` below one, or one string in the place of a list.
            ShapeError: the questions' vectors are of another width than the texts'.
        """
        check_size("DenseRetriever.search", "k", k)
        if self.vectors is None or len(self.vectors) == 0:
            raise DataError("DenseRetriever", got="no texts", want="a collection", remedy="Call fit first.")
        questions = listed(questions)
        queries = _vectors(self.embed_question(questions), len(questions), self.vectors.shape[1])
        if self._built is not None:
            scores, rows = (torch.from_numpy(x) for x in self._built.search(queries.numpy(), k))
            return scores.masked_fill(rows < 0, -math.inf), rows
        return _best(queries @ self.vectors.T, k)


@final
class BM25:
    r"""Find the texts that share rare words with the question; the baseline that dense search must beat.

    .. math::
        s(x, z) = \sum_{w \in x} \log\!\Big(1 + \frac{N - n_w + \frac12}{n_w + \frac12}\Big)
        \frac{f_{w,z}\,(k_1 + 1)}{f_{w,z} + k_1 \big(1 - b + b\, \frac{|z|}{\overline{|z|}}\big)}

    Words are runs of letters and digits of any script, in lower case; no stemming, no stop words.

    Args:
        k1: how fast repetitions of a word saturate.
        b: how much long texts are marked down.

    Shape:
        ``search``: as for :class:`DenseRetriever`; a text without a common word scores 0.

    Typical values:
        k1 1.2 to 2.0, b 0.75.

    Raises:
        ConfigError: ``k1`` not positive, ``b`` outside [0, 1].

    Source:
        Robertson & Zaragoza 2009, section 3.4, doi:10.1561/1500000019; the idf inside 1 + is Lucene's
    """

    def __init__(self, *, k1: float = 1.5, b: float = 0.75) -> None:
        check_positive("BM25", "k1", k1)
        check_probability("BM25", "b", b, below_one=False)
        self.k1, self.b = k1, b
        self._weights: dict[str, dict[int, float]] = {}
        self._count = 0

    def fit(self, texts: Sequence[str]) -> BM25:
        """Count the words of the collection; returns itself."""
        counts = [Counter(words_of(text)) for text in listed(texts)]
        lengths = [sum(c.values()) for c in counts]
        mean = sum(lengths) / max(1, len(lengths)) or 1.0
        holds = Counter(w for c in counts for w in c)
        self._count, self._weights = len(counts), {w: {} for w in holds}
        for row, (count, length) in enumerate(zip(counts, lengths, strict=True)):
            damp = self.k1 * (1 - self.b + self.b * length / mean)
            for w, f in count.items():
                idf = math.log(1 + (len(counts) - holds[w] + 0.5) / (holds[w] + 0.5))
                self._weights[w][row] = idf * f * (self.k1 + 1) / (f + damp)
        return self

    def search(self, questions: Sequence[str], k: int) -> tuple[Float[Tensor, "m k"], Int[Tensor, "m k"]]:
        """Return scores and rows of the ``k`` best texts for each question.

        Raises:
            DataError: nothing was fitted.
            ConfigError: ``k`` below one.
        """
        check_size("BM25.search", "k", k)
        if self._count == 0:
            raise DataError("BM25", got="no texts", want="a collection", remedy="Call fit first.")
        questions = listed(questions)
        scores = torch.zeros(len(questions), self._count, dtype=torch.float64)
        for i, question in enumerate(questions):
            for w in words_of(question):
                for row, weight in self._weights.get(w, {}).items():
                    scores[i, row] += weight
        return _best(scores.float(), k)


def words_of(text: str) -> list[str]:
    """Return the runs of letters and digits of any script, in lower case."""
    return _WORD.findall(unicodedata.normalize("NFC", text).lower())


def _vectors(x: Tensor, count: int, features: int | None = None) -> Tensor:
    """Check an encoder's vectors and bring them to float32 on the CPU."""
    fits = x.ndim == 2 and len(x) == count and x.is_floating_point() and features in (None, x.shape[1])
    if not fits or not bool(x.isfinite().all()):
        raise ShapeError(
            "DenseRetriever vectors",
            got=f"{tuple(x.shape)} of {x.dtype}" + (", not finite" if fits else ""),
            want=f"({count}, {features or 'd'}), floating and finite",
            remedy="One vector for each text, questions as wide as texts.",
        )
    return x.detach().float().cpu().contiguous()


def _best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Sort stably: of equal scores the earlier row comes first, on every machine."""
    best, rows = scores.sort(dim=-1, descending=True, stable=True)
    missing = max(0, k - scores.shape[1])
    best, rows = best[:, :k], rows[:, :k]
    pad = torch.nn.functional.pad
    return pad(best, (0, missing), value=-math.inf), pad(rows, (0, missing), value=-1)


def listed(texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str) or not isinstance(texts, Iterable) or not all(isinstance(t, str) for t in texts):
        got = "one string" if isinstance(texts, str) else "something that is no string"
        raise ConfigError("texts to search", got=got, want="a list of strings", remedy="Wrap it: [question].")
    return list(texts)
