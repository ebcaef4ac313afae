"""A real text that every Python carries, its split, its BPE, and its n-gram entropies.

The text is the language's own documentation (``pydoc_data.topics``, what ``help()``
prints).  It changes a little with Python's patch releases, so a :class:`Corpus`
carries the digest of the text it was made from.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int, Integer
from torch import Tensor

from handbook_src.check import check_positive, check_size
from handbook_src.data.bpe import BPE, check_text, tokenizers_library
from handbook_src.errors import ConfigError, DataError, ShapeError

END_OF_TEXT = "<|endoftext|>"
#: About four paragraphs; the split deals pieces of this many characters.
PIECE = 2000
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def documentation_text(*, unique: bool = True) -> str:
    """Return Python's documentation topics as one text, about 374 000 characters.

    Args:
        unique: keep only the first copy of a paragraph. Topics quote each other: of
            Python 3.11's 466 000 characters 91 000 are second copies, and a split of
            the raw text would ask for paragraphs that training has seen.

    Raises:
        DataError: this Python was built without its ``pydoc_data``.
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as e:
        raise DataError(
            "documentation_text",
            got=f"no pydoc_data ({e})",
            want="the documentation topics of the standard library",
            remedy="On Debian: apt install libpython3-stdlib; some minimal images leave them out.",
        ) from e
    text = "\n\n".join(topics[name].strip("\n") for name in sorted(topics))
    return "\n\n".join(_first_copies(text.split("\n\n"))) if unique else text


def _first_copies(paragraphs: list[str]) -> Iterator[str]:
    seen = set()
    for paragraph in paragraphs:
        key = " ".join(paragraph.split())
        if key and key not in seen:
            seen.add(key)
            yield paragraph.strip("\n")


def digest(text: str) -> str:
    """Return twelve hex digits that tell one text from another, for stamps."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def split_text(text: str, every: int = 10) -> tuple[str, str]:
    """Split into training and held-out text: each ``every``-th piece is held out.

    Pieces are whole paragraphs, about 2000 characters long. Dealing them like cards
    gives both parts the same mix of topics; cutting off the tail would measure the
    change of topic as well.

    Raises:
        ConfigError: ``every`` is no integer of at least 2, or the text is too short to hold out a piece.
        DataError: ``text`` is no string.
    """
    check_text("split_text text", text)
    check_size("split_text", "every", every, least=2)
    pieces: list[str] = [""]
    for paragraph in text.split("\n\n"):
        if len(pieces[-1]) >= PIECE:
            pieces.append("")
        pieces[-1] += paragraph + "\n\n"
    train = [p for i, p in enumerate(pieces) if i % every != every - 1]
    held_out = pieces[every - 1 :: every]
    if not held_out:
        raise ConfigError(
            "split_text text",
            got=f"{len(text)} characters",
            want=f"at least {every * PIECE}",
            remedy="Pass more text or a smaller `every`.",
        )
    return "".join(train), "".join(held_out)


def train_bpe(text: str, vocab_size: int = 1024, *, cache: str | Path | None = None) -> Any:
    """Train a byte-level BPE tokenizer (GPT-2's kind) on ``text``.

    Every byte is in the vocabulary, so nothing is unknown and decoding gives back the
    text exactly. Training is deterministic; a second for this book's text. The merges are
    learned by :class:`handbook_src.data.BPE`.

    Args:
        text: what the merges are counted on; never the held-out part.
        vocab_size: 256 bytes, one end-of-text token, the rest merges.
        cache: a folder that keeps the result, named by vocabulary and digest.

    Returns:
        A ``tokenizers.Tokenizer``: ``.encode(text).ids``, ``.decode(ids)``.

    Raises:
        ConfigError: ``vocab_size`` has no room for the 256 bytes and the end of text.
        DataError: ``text`` is no string, or the tokenizers library is not installed.

    Source:
        Radford et al. 2019, section 2.2 (byte-level BPE); Sennrich et al. 2016, arXiv:1508.07909
    """
    check_text("train_bpe text", text)
    check_size("train_bpe", "vocab_size", vocab_size, least=257)  # 256 bytes and one end of text
    library = tokenizers_library("train_bpe")
    path = Path(cache) / f"bpe-{vocab_size}-{digest(text)}.json" if cache is not None else None
    if path is not None and path.exists():
        with contextlib.suppress(Exception):  # the library raises no narrower kind; a torn file is made again
            return library.Tokenizer.from_file(str(path))
    tokenizer = BPE.train(text, vocab_size, special_tokens=[END_OF_TEXT]).to_tokenizers()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        tokenizer.save(str(beside))
        os.replace(beside, path)  # whole or not at all, also with two processes at it
    return tokenizer


@dataclass(frozen=True)
class Corpus:
    """A text as tokens: a training part, a held-out part, and how to get back to bytes.

    ``bytes_per_token`` is of the held-out part: it turns nats per token into bits
    per byte, the only loss that two tokenizers can be compared by.
    """

    train: Int[Tensor, " n"]
    held_out: Int[Tensor, " m"]
    tokenizer: Any
    vocab_size: int
    bytes_per_token: float
    digest: str

    def windows(self, batch: int, length: int, generator: torch.Generator) -> Int[Tensor, "b t"]:
        """Draw ``batch`` windows of ``length`` tokens from the training part, with replacement."""
        check_size("Corpus.windows", "batch", batch)
        check_size("Corpus.windows", "length", length)
        if length > len(self.train):
            raise ConfigError(
                "Corpus.windows length",
                got=length,
                want=f"between 1 and {len(self.train)}",
                remedy="Take a shorter window or a longer text.",
            )
        start = torch.randint(len(self.train) - length + 1, (batch, 1), generator=generator)
        return self.train[start + torch.arange(length)]

    def held_out_windows(self, length: int) -> Int[Tensor, "b t"]:
        """Cut the held-out part into windows that share one token with their neighbour.

        The last token of a window is the first of the next, so that each token but
        the very first is predicted once. A rest shorter than ``length`` is left out.
        """
        check_size("Corpus.held_out_windows", "length", length, least=2)
        if length > len(self.held_out):
            raise ConfigError(
                "Corpus.held_out_windows length",
                got=length,
                want=f"between 2 and {len(self.held_out)}",
                remedy="Take a shorter window or a longer text.",
            )
        return self.held_out.unfold(0, length, length - 1).contiguous()


def documentation(vocab_size: int = 1024, *, every: int = 10, cache: str | Path | None = None) -> Corpus:
    """Return the documentation as tokens; the BPE is trained on the training part alone."""
    train, held_out = split_text(documentation_text(), every)
    tokenizer = train_bpe(train, vocab_size, cache=cache)
    ids = [torch.tensor(tokenizer.encode(part).ids) for part in (train, held_out)]
    return Corpus(
        train=ids[0],
        held_out=ids[1],
        tokenizer=tokenizer,
        vocab_size=tokenizer.get_vocab_size(),
        bytes_per_token=len(held_out.encode()) / len(ids[1]),
        digest=digest(train + held_out),
    )


def unigram_entropy(train: Integer[Tensor, " n"], held_out: Integer[Tensor, " m"], vocab_size: int) -> float:
    r"""Return the nats per token that the training part's token frequencies cost on the held-out part.

    .. math:: H_1 = -\frac1m \sum_i \log \frac{c(w_i) + T / V}{n + T}

    A cross-entropy on text the counts have not seen, so it is a loss a model can be
    compared with; the plug-in entropy of the same text is lower and nobody reaches it.
    Witten-Bell smoothing (``T`` distinct tokens seen, ``V`` in the vocabulary) leaves no
    zero probability and has nothing to tune.

    Raises:
        ConfigError: a part is empty, or a token is outside the vocabulary.
        ShapeError: a part has other than one axis, or holds no integers.

    Source:
        Witten & Bell 1991, IEEE Trans. Inf. Theory 37(4), method C
    """
    train, held_out = _tokens(train, held_out, vocab_size)
    p = _unigram(train, vocab_size)
    return -p[held_out].log().mean().item()


def bigram_entropy(train: Integer[Tensor, " n"], held_out: Integer[Tensor, " m"], vocab_size: int) -> float:
    r"""Return the nats per token of a Witten-Bell bigram on the held-out part.

    .. math:: p(w \mid u) = \frac{c(u, w) + T(u)\, p(w)}{c(u) + T(u)},
        \qquad H_2 = -\frac{1}{m-1} \sum_{i>1} \log p(w_i \mid w_{i-1})

    ``T(u)`` is how many different tokens followed ``u``: the more a context varies,
    the more weight its unigram gets. An unseen context falls back to it altogether.

    Raises:
        ConfigError: a part has fewer than two tokens, or a token is outside the vocabulary.
        ShapeError: a part has other than one axis, or holds no integers.

    Source:
        Witten & Bell 1991, IEEE Trans. Inf. Theory 37(4), method C; Chen & Goodman 1999, section 2.5
    """
    train, held_out = _tokens(train, held_out, vocab_size)
    p = _unigram(train, vocab_size)
    if min(len(train), len(held_out)) < 2:
        raise ConfigError(
            "bigram_entropy", got=min(len(train), len(held_out)), want="two tokens or more", remedy="Pass more text."
        )
    pair = torch.bincount(train[:-1] * vocab_size + train[1:], minlength=vocab_size**2)
    pair = pair.view(vocab_size, vocab_size).double()
    count, followers = pair.sum(-1), (pair > 0).sum(-1).double()
    u, w = held_out[:-1], held_out[1:]
    seen = count[u] + followers[u]
    p_uw = (pair[u, w] + followers[u] * p[w]) / seen.clamp_min(1.0)
    return -torch.where(seen > 0, p_uw, p[w]).log().mean().item()


def _tokens(train: Tensor, held_out: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Both parts as int64: bytes (uint8) would select by mask where they should index, and wrap around in products."""
    check_size("n-gram entropy", "vocab_size", vocab_size)
    for name, part in (("train", train), ("held_out", held_out)):
        if not isinstance(part, Tensor) or part.ndim != 1 or part.dtype not in _INTEGERS:
            got = f"{tuple(part.shape)} of {part.dtype}" if isinstance(part, Tensor) else type(part).__name__
            raise ShapeError(
                f"n-gram entropy, {name} tokens",
                got=got,
                want="a tensor of one axis, of integers",
                remedy="Pass the tokens of one text, for instance torch.tensor(ids).",
            )
        if len(part) == 0 or not 0 <= int(part.min()) <= int(part.max()) < vocab_size:
            raise ConfigError(
                f"n-gram entropy, {name} tokens",
                got=f"{len(part)} tokens" + (f" up to {int(part.max())}" if len(part) else ""),
                want=f"at least one, each from 0 to {vocab_size - 1}",
                remedy="Pass the tokenizer's own vocab_size.",
            )
    return train.long(), held_out.long()


def _unigram(train: Tensor, vocab_size: int) -> Tensor:
    count = torch.bincount(train, minlength=vocab_size).double()
    distinct = float((count > 0).sum())
    return (count + distinct / vocab_size) / (len(train) + distinct)


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """Return a loss in bits per byte, which does not depend on the tokenizer.

    Raises:
        ConfigError: ``bytes_per_token`` is not positive.
    """
    check_positive("bits_per_byte", "bytes_per_token", bytes_per_token)
    return nats_per_token / (math.log(2.0) * bytes_per_token)
