"""Byte-pair encoding, byte-level as in GPT-2: learn the merges, apply them, undo them.

Three steps. A pattern cuts the text into words, each with the space before it; a word becomes
its UTF-8 bytes; the merges, in the order in which they were learned, join bytes to longer and
longer tokens. The trainer is plain Python with the bookkeeping that makes it fast (pair counts
are updated, never taken again); it learns what Hugging Face's ``tokenizers`` learns, merge for
merge, in two to four times its time.
"""

from __future__ import annotations

import functools
import importlib
import operator
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from heapq import heapify, heappop, heappush
from itertools import groupby, pairwise
from typing import Any, final

from handbook_src.check import check_size
from handbook_src.errors import ConfigError, DataError

Pair = tuple[int, int]
#: GPT-2 writes each byte as a visible character: these as themselves, the others from 256 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
#: The 256 bytes in the order of their ids, which is the order of those characters.
ALPHABET = PRINTABLE + sorted(set(range(256)) - set(PRINTABLE))
#: White space as Unicode defines it; Python's ``\s`` would add four control characters.
SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"


@functools.cache
def word_pattern() -> re.Pattern[str]:
    r"""Return GPT-2's pattern, ``'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+``.

    Python's ``re`` knows no ``\p``: the classes are spelled out as ranges, once per process (0.3 s).
    """
    kinds = [unicodedata.category(chr(code))[0] for code in range(sys.maxunicode + 1)]
    ranges, at = {"L": "", "N": ""}, 0
    for kind, run in groupby(kinds):
        length = sum(1 for _ in run)
        if kind in ranges:
            ranges[kind] += f"\\U{at:08x}-\\U{at + length - 1:08x}"
        at += length
    letters, numbers = ranges["L"], ranges["N"]
    return re.compile(
        rf"'s|'t|'re|'ve|'m|'ll|'d| ?[{letters}]+| ?[{numbers}]+| ?[^{SPACE}{letters}{numbers}]+"
        rf"|[{SPACE}]+(?![^{SPACE}])|[{SPACE}]+"
    )


def count_words(texts: Iterable[str]) -> Counter[bytes]:
    """Return how often each word occurs, its leading space included, as UTF-8.

    Raises:
        DataError: an item is no string, or holds half a surrogate pair.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        check_text("BPE text", text)
        counts.update(word_pattern().findall(text))
    return Counter({word.encode(): n for word, n in counts.items()})


def learn_merges(counts: Counter[bytes], tokens: int, *, min_frequency: int = 0) -> list[tuple[bytes, bytes]]:
    r"""Join the most frequent pair of neighbours, again and again.

    .. math:: (a, b) = \arg\max_{(a, b)} \sum_{w} n_w\, \#\{ i : w_i = a,\ w_{i+1} = b \}

    A tie goes to the pair with the smaller ids, the older tokens. Words are counted once, with
    their frequency :math:`n_w`; a merge visits only the words that hold its pair and corrects the
    counts of the neighbours there. A heap keeps the pairs; an entry whose count has gone stale is put back
    with the right one. A pair that a later merge makes anew (``aa`` + ``a``, then ``a`` + ``aa``) gets a
    second entry and can be learned twice, as in the library.

    Args:
        counts: words and their frequencies, from :func:`count_words`.
        tokens: how many to learn beyond the 256 bytes.
        min_frequency: stop at pairs that are rarer; a pair must occur once in any case.

    Source:
        Sennrich, Haddow & Birch 2015, algorithm 1, arXiv:1508.07909
    """
    names = [bytes([b]) for b in ALPHABET]
    ids = {name: i for i, name in enumerate(names)}
    words, weights = [[ids[bytes([b])] for b in word] for word in counts], list(counts.values())
    pairs, queue = _pairs(words, weights)
    merges: list[tuple[bytes, bytes]] = []
    while len(names) < 256 + tokens and queue:
        n, pair, where = heappop(queue)
        if -n != pairs[pair]:
            heappush(queue, (-pairs[pair], pair, where))
            continue
        if -n < max(1, min_frequency):
            break
        left, right = names[pair[0]], names[pair[1]]
        merges.append((left, right))
        new = ids.setdefault(left + right, len(names))
        if new == len(names):
            names.append(left + right)
        changed: dict[Pair, set[int]] = defaultdict(set)
        for w in where:
            for neighbours, by in _merge(words[w], pair, new):
                pairs[neighbours] += by * weights[w]
                if by > 0:
                    changed[neighbours].add(w)
        for neighbours, found in changed.items():
            heappush(queue, (-pairs[neighbours], neighbours, found))
    return merges


def _pairs(
    words: Sequence[Sequence[int]], weights: Sequence[int]
) -> tuple[Counter[Pair], list[tuple[int, Pair, set[int]]]]:
    """Count the pairs; return the counts and a heap of (minus the count, pair, words that hold it)."""
    pairs: Counter[Pair] = Counter()
    where: dict[Pair, set[int]] = defaultdict(set)
    for w, (word, weight) in enumerate(zip(words, weights, strict=True)):
        for pair in pairwise(word):
            pairs[pair] += weight
            where[pair].add(w)
    queue = [(-pairs[pair], pair, found) for pair, found in where.items()]
    heapify(queue)
    return pairs, queue


def _merge(word: list[int], pair: Pair, new: int) -> Iterator[tuple[Pair, int]]:
    """Replace ``pair`` by ``new`` in ``word``, left to right; yield each neighbouring pair that goes or comes."""
    done: list[int] = []
    i = 0
    while i < len(word):
        if (word[i], *word[i + 1 : i + 2]) != pair:
            done.append(word[i])
            i += 1
            continue
        if done:
            yield (done[-1], pair[0]), -1
            yield (done[-1], new), 1
        done.append(new)
        i += 2
        if i < len(word):
            yield (pair[1], word[i]), -1
            yield (new, word[i]), 1
    word[:] = done


@final
class BPE:
    r"""A byte-level tokeniser: text to ids and back, with no unknown token.

    The ids are the special tokens, the 256 bytes, then what the merges make. A word is
    encoded by the merge of the lowest rank that applies, leftmost first, until none does:

    .. math:: (i, i + 1) = \arg\min_i \operatorname{rank}(w_i, w_{i+1})

    Args:
        merges: pairs of byte strings, in the order learned; from :meth:`train`.
        special_tokens: strings that become one token each, wherever they stand.

    Typical values:
        ``vocab_size`` 50257 (GPT-2), 32000 (Llama 2), 128256 (Llama 3).

    Raises:
        ConfigError: a merge of tokens that don't exist yet; a special token that is empty,
            given twice, or an ordinary word.

    Source:
        Sennrich, Haddow & Birch 2015, section 3.2, arXiv:1508.07909; bytes and pattern
        Radford et al. 2019, section 2.2, and its released encoder.py
    """

    def __init__(self, merges: Iterable[tuple[bytes, bytes]], special_tokens: Sequence[str] = ()) -> None:
        self.special_tokens = _checked_special(special_tokens)
        self.merges = _checked_merges(merges)
        first = len(self.special_tokens)
        self._ids = {bytes([b]): first + i for i, b in enumerate(ALPHABET)}
        self._ranks: dict[tuple[int, ...], tuple[int, int]] = {}
        for rank, (left, right) in enumerate(self.merges):
            if left not in self._ids or right not in self._ids:
                raise ConfigError(
                    f"BPE merge {rank}",
                    got=repr((left, right)),
                    want="two tokens that are bytes or made by an earlier merge",
                    remedy="Keep the merges in the order in which they were learned.",
                )
            new = self._ids.setdefault(left + right, first + len(self._ids))
            self._ranks[self._ids[left], self._ids[right]] = rank, new
        self._names = {i: name for name, i in self._ids.items()}
        self._names |= {i: token.encode() for i, token in enumerate(self.special_tokens)}
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        self._word_ids = functools.lru_cache(maxsize=2**16)(self._encode_word)

    @classmethod
    def train(
        cls,
        texts: str | Iterable[str],
        vocab_size: int,
        *,
        min_frequency: int = 0,
        special_tokens: Sequence[str] = (),
    ) -> BPE:
        """Learn the merges on ``texts``.

        Args:
            texts: one text, or several.
            vocab_size: special tokens, 256 bytes and merges together; fewer where the text has no more pairs.
            min_frequency: do not merge pairs that are rarer.
            special_tokens: strings that become one token each.

        Raises:
            ConfigError: ``vocab_size`` has no room for bytes and special tokens; a bad special token or count.
            DataError: a text is no string, or holds half a surrogate pair.
        """
        least = 256 + len(_checked_special(special_tokens))
        check_size("BPE", "vocab_size", vocab_size, least=least)
        check_size("BPE", "min_frequency", min_frequency, least=0)
        counts = count_words([texts] if isinstance(texts, str | bytes) or not isinstance(texts, Iterable) else texts)
        return cls(learn_merges(counts, vocab_size - least, min_frequency=min_frequency), special_tokens)

    @property
    def vocab_size(self) -> int:
        """How many ids there are."""
        return len(self._names)

    def encode(self, text: str | bytes) -> list[int]:
        """Return the ids of ``text``; bytes need not be UTF-8.

        Raises:
            DataError: neither a string nor bytes, or half a surrogate pair.
        """
        if isinstance(text, bytes):
            text = text.decode("utf8", "surrogateescape")  # a byte that is no UTF-8 becomes a mark of its own
        else:
            check_text("BPE.encode text", text)
        if self._special is None:
            return self._encode_plain(text)
        ids: list[int] = []
        end = 0
        for found in self._special.finditer(text):
            ids += self._encode_plain(text[end : found.start()])
            ids.append(self.special_tokens.index(found[0]))
            end = found.end()
        return ids + self._encode_plain(text[end:])

    def _encode_plain(self, text: str) -> list[int]:
        # a long word seldom comes again, and 2**16 words of 32 letters are kept in less than 100 MB
        words = word_pattern().findall(text)
        return [i for w in words for i in (self._word_ids(w) if len(w) <= 32 else self._encode_word(w))]

    def _encode_word(self, word: str) -> tuple[int, ...]:
        ids = [self._ids[bytes([b])] for b in word.encode("utf8", "surrogateescape")]
        while able := [self._ranks[pair] for pair in pairwise(ids) if pair in self._ranks]:
            ids = self._sweep(ids, *min(able))
        return tuple(ids)

    def _sweep(self, ids: list[int], rank: int, new: int) -> list[int]:
        """Merge the pairs of ``rank``, left to right, until a merge makes a pair that comes before them."""
        done: list[int] = []
        i = 0
        while i < len(ids):
            if self._rank(ids[i : i + 2]) != rank:
                done.append(ids[i])
                i += 1
                continue
            done.append(new)
            i += 2
            if min(self._rank(done[-2:]), self._rank([new, *ids[i : i + 1]])) < rank:
                break
        return done + ids[i:]

    def _rank(self, pair: Sequence[int]) -> int:
        return self._ranks.get(tuple(pair), (sys.maxsize, 0))[0]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes behind ``ids``; special tokens as they are written.

        Raises:
            DataError: an id outside the vocabulary.
        """
        pieces = []
        for i in ids if isinstance(ids, Iterable) else [[ids]]:  # one number is no list: refused below
            try:
                pieces.append(self._names[operator.index(i)])
            except (TypeError, KeyError) as e:
                raise DataError(
                    "BPE.decode id",
                    got=repr(i),
                    want=f"a whole number from 0 to {self.vocab_size - 1}",
                    remedy="Decode with the tokeniser that encoded.",
                ) from e
        return b"".join(pieces)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text behind ``ids``; bytes that are no UTF-8, such as half a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf8", "replace")

    def tokens(self, text: str | bytes) -> list[bytes]:
        """Return the pieces that ``text`` is cut into."""
        return [self._names[i] for i in self.encode(text)]

    def to_tokenizers(self) -> Any:
        """Return the same tokeniser as a ``tokenizers.Tokenizer``, with its file format and its threads.

        Raises:
            DataError: the library is not installed.
        """
        library = tokenizers_library("BPE.to_tokenizers")
        shown = {
            bytes([b]): c for b, c in zip(ALPHABET, sorted(library.pre_tokenizers.ByteLevel.alphabet()), strict=True)
        }

        def name(token: bytes) -> str:
            return "".join(shown[bytes([b])] for b in token)

        vocab = {token: i for i, token in enumerate(self.special_tokens)}
        vocab |= {name(token): i for token, i in self._ids.items()}
        last = {pair: rank for rank, pair in enumerate(self.merges)}
        merges = [(name(left), name(right)) for left, right in sorted(last, key=last.__getitem__)]
        tokenizer = library.Tokenizer(library.models.BPE(vocab=vocab, merges=merges))
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = library.decoders.ByteLevel()
        tokenizer.add_special_tokens(self.special_tokens)
        return tokenizer

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.merges, self.special_tokens)

    def __repr__(self) -> str:
        return f"BPE(vocab_size={self.vocab_size}, special_tokens={self.special_tokens})"


def tokenizers_library(op: str) -> Any:
    """Import Hugging Face's ``tokenizers``.

    Raises:
        DataError: it is not installed.
    """
    try:
        return importlib.import_module("tokenizers")
    except ImportError as e:
        raise DataError(
            op,
            got=f"no tokenizers library ({e})",
            want="Hugging Face's tokenizers",
            remedy="pip install tokenizers, or pip install 'handbook-src[book]'.",
        ) from e


def _checked_merges(merges: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    pairs = list(merges) if isinstance(merges, Iterable) else [merges]
    for rank, pair in enumerate(pairs):
        if not isinstance(pair, Sequence) or len(pair) != 2 or not all(isinstance(part, bytes) for part in pair):
            want = "pairs of bytes, such as (b'l', b'o')"
            raise ConfigError(f"BPE merge {rank}", got=repr(pair), want=want, remedy="Encode strings with .encode().")
    return [(left, right) for left, right in pairs]


def _checked_special(special_tokens: Sequence[str]) -> list[str]:
    if not isinstance(special_tokens, Iterable):
        want = "a list of strings"
        raise ConfigError("BPE special_tokens", got=repr(special_tokens), want=want, remedy="Pass () for none.")
    tokens = list(special_tokens) if not isinstance(special_tokens, str | bytes) else [special_tokens]
    for token in tokens:
        check_text("BPE special token", token)
        if len(word_pattern().findall(token)) < 2 or tokens.count(token) > 1:
            raise ConfigError(
                "BPE special token",
                got=f"{token!r} in {tokens}",
                want="each once, and a string that is no word of ordinary text",
                remedy="Bracket it: <|end|>, [PAD].",
            )
    return tokens


def check_text(what: str, text: object) -> None:
    if not isinstance(text, str):
        raise DataError(what, got=f"{type(text).__name__} {text!r:.40}", want="a string", remedy="Decode bytes first.")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise DataError(
            what,
            got=f"{text[e.start]!r} at {e.start}",
            want="text that UTF-8 can hold",
            remedy="It is half a surrogate pair; encode the bytes themselves, or text.encode('utf8', 'replace').",
        ) from e
