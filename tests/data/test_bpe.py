"""The trainer and the encoder against the paper's loop and the tokenizers library; round trips; refusals."""

from __future__ import annotations

import copy
import functools
import math
import pickle
import random
import sys
import tracemalloc
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handbook_src.data.bpe import ALPHABET, BPE, count_words, learn_merges, word_pattern
from handbook_src.data.text import documentation_text
from handbook_src.errors import ConfigError, DataError
from handbook_src.testing import oracle, refuses

END = "<|endoftext|>"
#: Letters, marks, numbers and spaces of many kinds; the last line has four separators that only Python calls space.
HARD = [
    "",
    " ",
    "\n\n  \t x",
    "I'll say it's we've don't'S",
    "naïve Ünï漢字 ½ ² Ⅷ ٣ 42nd",
    "🐍👩‍👩‍👧 e\u0301",
    "a\u00a0b\u2003c\u3000d\u200be\ufefff",
    "x\x1cy\x1d z\x1e\x1f\x85\x0b\x0c.",
    "---- ====== aaaaaaaaaaaaaaa",
    f"one{END}two {END}{END}",
]
ALPHABETS = ["a", "ab", "abc", "a b", "-=\n", "é漢a ", "a'² 1x", "\x1c a\x85b"]


def library(texts: list[str], vocab_size: int, min_frequency: int = 0, special: tuple[str, ...] = ()) -> Any:
    """What the library trains by itself."""
    t = oracle.load("tokenizers")
    bytelevel = t.pre_tokenizers.ByteLevel
    tokenizer = t.Tokenizer(t.models.BPE())
    tokenizer.pre_tokenizer = bytelevel(add_prefix_space=False)
    tokenizer.decoder = t.decoders.ByteLevel()
    trainer = t.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(special),
        initial_alphabet=sorted(bytelevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def paper(text: str, merges: int) -> list[tuple[bytes, bytes]]:
    """Sennrich's loop: count all pairs anew, join the most frequent everywhere; ties to the older tokens."""
    words = {tuple(bytes([b]) for b in w.encode()): n for w, n in Counter(word_pattern().findall(text)).items()}
    order = {bytes([b]): i for i, b in enumerate(ALPHABET)}
    learned: list[tuple[bytes, bytes]] = []
    while len(order) < 256 + merges:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, n in words.items():
            for pair in pairwise(word):
                pairs[pair] += n
        if not pairs:
            break
        a, b = min(pairs, key=lambda p: (-pairs[p], order[p[0]], order[p[1]]))
        order.setdefault(a + b, len(order))
        learned.append((a, b))
        joined = {}
        for word, n in words.items():
            out: list[bytes] = []
            for piece in word:
                if out and out[-1] == a and piece == b and not (len(out) > 1 and out[-1] == a + b):
                    out[-1] = a + b
                else:
                    out.append(piece)
            joined[tuple(out)] = joined.get(tuple(out), 0) + n
        words = joined
    return learned


@pytest.fixture(scope="module")
def trained() -> BPE:
    return BPE.train(documentation_text()[:60_000], 600, special_tokens=[END])


# ---------------------------------------------------------------- parity
@pytest.mark.parity("bpe")
@pytest.mark.parametrize("merges", [0, 1, 7, 150])
def test_the_merges_are_those_of_the_papers_loop(merges: int) -> None:
    text = documentation_text()[:20_000]
    assert learn_merges(count_words([text]), merges) == paper(text, merges)


@pytest.mark.parity("bpe")
@pytest.mark.parametrize("seed", range(60))
def test_encoding_is_the_lowest_rank_leftmost_first_one_merge_at_a_time(seed: int) -> None:
    r = random.Random(seed)
    letters = r.choice(["ab", "aab ", "abc"])
    bpe = BPE.train("".join(r.choice(letters) for _ in range(200)), 256 + r.randint(1, 30))
    ranks = {pair: rank for rank, pair in enumerate(bpe.merges)}
    text = "".join(r.choice(letters) for _ in range(60))
    want: list[bytes] = []
    for word in word_pattern().findall(text):
        pieces = [bytes([b]) for b in word.encode()]
        while len(pieces) > 1:
            rank, i = min((ranks.get(pair, math.inf), i) for i, pair in enumerate(pairwise(pieces)))
            if rank == math.inf:
                break
            pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
        want += pieces
    assert bpe.tokens(text) == want


# ---------------------------------------------------------------- outside
@pytest.mark.outside("bpe")
@pytest.mark.parametrize(("vocab_size", "min_frequency", "special"), [
    (256, 0, ()), (257, 2, (END,)), (300, 0, ("[PAD]", END)), (1024, 0, (END,)), (3000, 5, ()), (100_000, 40, ()),
])  # fmt: skip
def test_training_and_encoding_are_the_librarys(vocab_size: int, min_frequency: int, special: tuple[str, ...]) -> None:
    text = documentation_text()
    train = [text[:50_000], text[50_000:90_000]]
    mine = BPE.train(train, vocab_size, min_frequency=min_frequency, special_tokens=special)
    theirs = library(train, vocab_size, min_frequency, special)
    assert mine.to_tokenizers().to_str() == theirs.to_str()
    assert mine.vocab_size == theirs.get_vocab_size()
    for sample in [*HARD, text[90_000:120_000]]:
        ids = theirs.encode(sample).ids
        assert mine.encode(sample) == ids, sample
        assert mine.decode(ids) == theirs.decode(ids, skip_special_tokens=False) == sample


@pytest.mark.outside("bpe")
@pytest.mark.parametrize("letters", ALPHABETS)
def test_repetitive_text_is_the_librarys_too(letters: str) -> None:
    """Where a pair's count grows again, because another merge makes the same token."""
    for seed in range(30):
        r = random.Random(seed)
        texts = ["".join(r.choice(letters) for _ in range(r.randint(0, 60))) for _ in range(3)]
        size, least = 257 + r.randint(0, 40), r.randint(0, 3)
        mine, theirs = BPE.train(texts, size, min_frequency=least, special_tokens=["<|e|>"]), library(
            texts, size, least, ("<|e|>",)
        )  # fmt: skip
        assert mine.to_tokenizers().to_str() == theirs.to_str(), seed
        sample = "".join(r.choice(letters) for _ in range(90))
        assert mine.encode(sample) == theirs.encode(sample).ids, seed


@pytest.mark.outside("bpe")
def test_half_a_character_decodes_as_the_library_does(trained: BPE) -> None:
    theirs = trained.to_tokenizers()
    ids = trained.encode("漢🐍é")
    for start in range(len(ids)):
        for end in range(start, len(ids)):
            assert trained.decode(ids[start:end]) == theirs.decode(ids[start:end])


# ---------------------------------------------------------------- laws
@pytest.mark.law("bpe")
@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_comes_back(text: str) -> None:
    bpe = _small()
    assert bpe.decode(bpe.encode(text)) == text
    assert b"".join(bpe.tokens(text)) == text.encode()
    assert bpe.to_tokenizers().encode(text).ids == bpe.encode(text)


@pytest.mark.law("bpe")
@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.binary(max_size=60))
def test_any_bytes_come_back(data: bytes) -> None:
    bpe = _small()
    assert bpe.decode_bytes(bpe.encode(data)) == data


@functools.cache
def _small() -> BPE:
    return BPE.train(documentation_text()[:20_000] + "漢字é" * 9, 400, special_tokens=[END])


@pytest.mark.law("bpe")
def test_every_byte_has_a_token_and_more_merges_never_make_more_tokens(trained: BPE) -> None:
    assert len(trained.encode(bytes(range(256)))) <= 256
    assert BPE([]).encode(bytes(range(33, 40))) == list(range(7))
    text = documentation_text()[60_000:70_000]
    lengths = [len(BPE(trained.merges[:k]).encode(text)) for k in range(0, len(trained.merges), 40)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == len(text.encode())


@pytest.mark.law("bpe")
def test_the_words_join_to_the_text_and_no_token_crosses_them(trained: BPE) -> None:
    for text in [*HARD, documentation_text()[:5000]]:
        assert "".join(word_pattern().findall(text)) == text
    for left, right in trained.merges:
        assert len(word_pattern().findall((left + right).decode("utf8", "surrogateescape"))) == 1


@pytest.mark.law("bpe")
def test_training_does_not_depend_on_the_order_or_the_division_of_the_texts() -> None:
    paragraphs = documentation_text()[:20_000].split("\n")
    whole = BPE.train(paragraphs, 320).merges
    assert BPE.train(paragraphs[::-1], 320).merges == whole
    assert BPE.train((p for p in paragraphs), 320).merges == whole


# ---------------------------------------------------------------- refusals
@pytest.mark.refusal("bpe")
@pytest.mark.parametrize("size", [255, 0, -3, True, 300.0, math.nan, None])
def test_a_vocabulary_without_room_for_the_bytes_is_refused(size: Any) -> None:
    with refuses(ConfigError, "vocab_size", repr(size), 256):
        BPE.train("a", size)


@pytest.mark.refusal("bpe")
def test_bad_settings_are_refused(trained: BPE, monkeypatch: pytest.MonkeyPatch) -> None:
    with refuses(ConfigError, "vocab_size", 257, 258):
        BPE.train("a", 257, special_tokens=["[A]", "[B]"])
    for bad in (-1, 1.5, True):
        with refuses(ConfigError, "min_frequency", bad):
            BPE.train("a", 300, min_frequency=bad)  # type: ignore[arg-type]
    for tokens in (["[A]", "[A]"], [""], ["the"], [" "], ["a"]):
        with refuses(ConfigError, "special token", repr(tokens[0]), "<|end|>"):
            BPE([], tokens)
    with refuses(ConfigError, "merge 1", b"ab", b"x y"):
        BPE([(b"a", b"b"), (b"ab", b"x y")])
    with refuses(DataError, "special token", "int"):
        BPE([], [3])  # type: ignore[list-item]
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with refuses(DataError, "to_tokenizers", "pip install tokenizers"):
        trained.to_tokenizers()


@pytest.mark.refusal("bpe")
def test_what_is_no_text_is_refused(trained: BPE) -> None:
    for bad in (None, 3, ["a"], 1.5):
        with refuses(DataError, "BPE.encode", type(bad).__name__):
            trained.encode(bad)  # type: ignore[arg-type]
        with refuses(DataError, "BPE text", type(bad).__name__):
            BPE.train([bad], 300)  # type: ignore[list-item]
    with refuses(DataError, "BPE text", "bytes"):
        BPE.train(b"abc", 300)  # type: ignore[arg-type]
    with refuses(DataError, r"\ud800", "surrogate"):
        trained.encode("a\ud800")
    for wrong in (-1, trained.vocab_size, 1.0, "a", None):
        with refuses(DataError, "BPE.decode", repr(wrong), trained.vocab_size - 1):
            trained.decode([wrong])  # type: ignore[list-item]


@pytest.mark.refusal("bpe")
def test_nothing_is_no_mistake() -> None:
    empty = BPE.train([], 400)
    assert (empty.merges, empty.vocab_size) == ([], 256)
    assert empty.encode("") == empty.encode(b"") == []
    assert empty.decode([]) == ""
    assert empty.decode(empty.encode("é")) == "é"


# ---------------------------------------------------------------- registration
@pytest.mark.registration("bpe")
def test_it_copies_and_pickles(trained: BPE) -> None:
    text = documentation_text()[60_000:62_000]
    for other in (copy.deepcopy(trained), pickle.loads(pickle.dumps(trained)), BPE(trained.merges, [END])):
        assert other.encode(text) == trained.encode(text)
        assert other.vocab_size == trained.vocab_size == 600
    assert repr(trained) == "BPE(vocab_size=600, special_tokens=['<|endoftext|>'])"


@pytest.mark.refusal("bpe")
def test_what_is_no_list_of_pairs_or_of_ids_is_refused(trained: BPE) -> None:
    for bad in ([("a", "b")], ["l o"], [(b"a",)], [5], None):
        with refuses(ConfigError, "BPE merge 0", repr(bad[0] if bad else bad)):
            BPE(bad)  # type: ignore[arg-type]
    with refuses(ConfigError, "special_tokens", None):
        BPE([], None)  # type: ignore[arg-type]
    for wrong in (None, 5):
        with refuses(DataError, "BPE text", type(wrong).__name__):
            BPE.train(wrong, 300)  # type: ignore[arg-type]
        with refuses(DataError, "BPE.decode", repr(wrong)):
            trained.decode(wrong)  # type: ignore[arg-type]


@pytest.mark.law("bpe")
def test_words_are_kept_within_bounds_of_bytes() -> None:
    bpe = BPE([(b"a", b"b")])
    assert bpe.encode("ab" * 40) == [256] * 40  # too long to be kept, and merged all the same
    tracemalloc.start()
    try:
        for n in range(2000, 2100):
            bpe.encode("x" * n)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 100_000  # of 1.8 MB that a hundred such words take with their ids
