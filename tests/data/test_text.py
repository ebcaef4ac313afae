"""The text, its split, its tokens and its entropies."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from handbook_src.data.text import (
    PIECE,
    Corpus,
    bigram_entropy,
    bits_per_byte,
    digest,
    documentation,
    documentation_text,
    split_text,
    train_bpe,
    unigram_entropy,
)
from handbook_src.errors import ConfigError, DataError, ShapeError
from handbook_src.testing import refuses


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return documentation(512)


def test_the_text_is_there_and_no_paragraph_twice() -> None:
    text, raw = documentation_text(), documentation_text(unique=False)
    assert 300_000 < len(text) < len(raw) < 900_000
    keys = [" ".join(p.split()) for p in text.split("\n\n")]
    assert len(keys) == len(set(keys))
    assert text == documentation_text()


def test_the_split_shares_no_paragraph_and_loses_none() -> None:
    text = documentation_text()
    train, held_out = split_text(text, every=10)
    paragraphs = [set(filter(None, part.split("\n\n"))) for part in (train, held_out)]
    assert not paragraphs[0] & paragraphs[1]
    assert paragraphs[0] | paragraphs[1] == set(filter(None, text.split("\n\n")))
    assert 0.05 < len(held_out) / len(text) < 0.15
    assert split_text("a\n\n" * 5000, 3)[1].startswith("a")


def test_bpe_gives_back_any_text(corpus: Corpus) -> None:
    for text in ("", " a  b\n\tc", "naïve 漢字 🐍", documentation_text()[:5000]):
        assert corpus.tokenizer.decode(corpus.tokenizer.encode(text).ids) == text
    assert corpus.vocab_size == 512
    assert int(corpus.train.max()) < 512
    assert corpus.tokenizer.token_to_id("<|endoftext|>") is not None


def test_bpe_is_the_same_in_another_process_and_from_its_cache(corpus: Corpus, tmp_path: Path) -> None:
    code = "from handbook_src.data.text import *; print(digest(documentation(512).tokenizer.to_str()))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert other == digest(corpus.tokenizer.to_str())
    text = documentation_text()[:50_000]
    first = train_bpe(text, 300, cache=tmp_path / "bpe")
    assert [p.name for p in (tmp_path / "bpe").iterdir()] == [f"bpe-300-{digest(text)}.json"]
    again = train_bpe(text, 300, cache=tmp_path / "bpe")
    assert first.to_str() == again.to_str()


def test_the_merges_come_from_the_training_part(corpus: Corpus) -> None:
    train, held_out = split_text(documentation_text())
    assert train_bpe(train, 512).to_str() == corpus.tokenizer.to_str()
    assert corpus.digest == digest(train + held_out)
    assert math.isclose(corpus.bytes_per_token * len(corpus.held_out), len(held_out.encode()))


def test_windows_are_pieces_of_the_text(corpus: Corpus, generator: torch.Generator) -> None:
    rows = corpus.windows(4, 9, generator)
    assert rows.shape == (4, 9)
    every = corpus.train.unfold(0, 9, 1)
    assert all((every == row).all(-1).any() for row in rows)
    again = corpus.windows(4, 9, torch.Generator().manual_seed(0))
    assert torch.equal(again, rows)
    assert torch.equal(corpus.windows(2, len(corpus.train), generator)[0], corpus.train)


def test_held_out_windows_predict_each_token_once(corpus: Corpus) -> None:
    rows = corpus.held_out_windows(65)
    predicted = rows[:, 1:].flatten()
    assert torch.equal(predicted, corpus.held_out[1 : 1 + len(predicted)])
    assert len(corpus.held_out) - 1 - len(predicted) < 64


def loop_entropies(train: Tensor, held_out: Tensor, v: int) -> tuple[float, float]:
    """The two formulas with dictionaries."""
    w = train.tolist()
    seen = set(w)
    one = {x: (w.count(x) + len(seen) / v) / (len(w) + len(seen)) for x in range(v)}
    pairs = list(pairwise(w))

    def two(u: int, x: int) -> float:
        followers = [b for a, b in pairs if a == u]
        kinds = len(set(followers))
        return (followers.count(x) + kinds * one[x]) / (len(followers) + kinds) if followers else one[x]

    h = held_out.tolist()
    h1 = -sum(math.log(one[x]) for x in h) / len(h)
    return h1, -sum(math.log(two(u, x)) for u, x in pairwise(h)) / (len(h) - 1)


@pytest.mark.parametrize("v", [5, 9])
def test_entropies_equal_their_formulas(v: int, generator: torch.Generator) -> None:
    train, held_out = torch.randint(5, (40,), generator=generator), torch.randint(5, (23,), generator=generator)
    train[train == 3] = 2  # 3 is held out only: an unseen token and an unseen context
    h1, h2 = loop_entropies(train, held_out, v)
    assert math.isclose(unigram_entropy(train, held_out, v), h1, rel_tol=1e-12)
    assert math.isclose(bigram_entropy(train, held_out, v), h2, rel_tol=1e-12)


def test_the_smoothed_models_are_distributions() -> None:
    train, v = torch.tensor([0, 1, 1, 2, 0, 1]), 4
    total = sum(math.exp(-unigram_entropy(train, torch.tensor([x]), v)) for x in range(v))
    assert math.isclose(total, 1.0, rel_tol=1e-12)
    for u in range(v):
        total = sum(math.exp(-bigram_entropy(train, torch.tensor([u, x]), v)) for x in range(v))
        assert math.isclose(total, 1.0, rel_tol=1e-12)


def test_context_helps_on_real_text(corpus: Corpus) -> None:
    one = unigram_entropy(corpus.train, corpus.held_out, 512)
    two = bigram_entropy(corpus.train, corpus.held_out, 512)
    assert two < one < math.log(512)
    assert math.isclose(bits_per_byte(math.log(2.0), 1.0), 1.0)


def test_refusals(corpus: Corpus, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    with refuses(ConfigError, "every", 1):
        split_text("a", 1)
    with refuses(ConfigError, "1 characters", 10 * PIECE):
        split_text("a")
    with refuses(ConfigError, "vocab_size", 256, 257):
        train_bpe("a", 256)
    with refuses(ConfigError, "length", len(corpus.train) + 1):
        corpus.windows(1, len(corpus.train) + 1, generator)
    with refuses(ConfigError, "length", 1):
        corpus.held_out_windows(1)
    with refuses(ConfigError, "held_out tokens", "up to 7", "0 to 4"):
        unigram_entropy(torch.tensor([0]), torch.tensor([7]), 5)
    with refuses(ConfigError, "train tokens", "0 tokens"):
        bigram_entropy(torch.tensor([], dtype=torch.long), torch.tensor([1]), 5)
    with refuses(ConfigError, "bigram", 1):
        bigram_entropy(torch.tensor([1]), torch.tensor([1]), 5)
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with refuses(DataError, "pydoc_data"):
        documentation_text()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with refuses(DataError, "pip install tokenizers"):
        train_bpe("a")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_entropies_do_not_depend_on_the_integer(dtype: torch.dtype, generator: torch.Generator) -> None:
    vocab = {torch.uint8: 256}.get(dtype, 300)
    train = torch.randint(vocab, (5000,), generator=generator)
    for entropy in (unigram_entropy, bigram_entropy):
        for held_out in (train[:vocab], train[: vocab + 1]):  # as long as a mask over the vocabulary would be
            assert entropy(train.to(dtype), held_out.to(dtype), vocab) == entropy(train, held_out, vocab)


def test_what_is_no_text_no_size_and_no_tokens_is_refused(corpus: Corpus, generator: torch.Generator) -> None:
    for bad in (2.5, math.nan, None, "3", True):
        for call in (
            lambda bad: split_text("a", bad),
            lambda bad: train_bpe("a", bad),
            lambda bad: corpus.windows(bad, 2, generator),
            lambda bad: corpus.windows(1, bad, generator),
            corpus.held_out_windows,
            lambda bad: unigram_entropy(torch.tensor([0]), torch.tensor([0]), bad),
        ):
            with refuses(ConfigError, repr(bad)):
                call(bad)
    for bad in (0, -2.0, math.nan, None, "2"):
        with refuses(ConfigError, "bytes_per_token", repr(bad)):
            bits_per_byte(1.0, bad)  # type: ignore[arg-type]
    for call in (split_text, train_bpe):
        with refuses(DataError, "text"):
            call(["a"])
    good = torch.tensor([0, 1])
    for wrong in (good.float(), good.bool(), good[None]):
        with refuses(ShapeError, "held_out", wrong.dtype):
            bigram_entropy(good, wrong, 5)
    with refuses(ShapeError, "train", "list"):
        unigram_entropy([1, 2], good, 5)  # type: ignore[arg-type]


def test_a_torn_cache_file_is_made_again_and_saving_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "the cat sat on the mat " * 20
    whole = train_bpe(text, 260, cache=tmp_path).to_str()
    (path,) = tmp_path.iterdir()
    path.write_text(whole[:50])
    replaced: list[Path] = []

    def replace(a: Path, b: Path) -> None:
        replaced.append(b)
        a.rename(b)

    monkeypatch.setattr("os.replace", replace)
    assert train_bpe(text, 260, cache=tmp_path).to_str() == whole
    assert replaced == [path] == list(tmp_path.iterdir())
