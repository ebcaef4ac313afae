"""Generation against transformers, with and without a cache, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.transformers.sampling import greedy, sample
from handbook_src.layers.attention.kv_cache import AppendCache, KVCache, QuantizedCache, SinkCache, StaticCache
from handbook_src.layers.attention.paged_kv_cache import PagedCache, PagePool
from handbook_src.models.transformers.generation import generate
from handbook_src.models.transformers.gpt2 import GPT2, GPT2Config
from handbook_src.testing import oracle, refuses, unchecked

CONFIG = GPT2Config(vocab_size=31, context=24, dim=12, heads=2, depth=2, dropout=0.1)
CACHES: dict[str, Callable[[], KVCache] | None] = {
    "none": None,
    "append": AppendCache,
    "static": lambda: StaticCache(24),
    "paged": lambda: PagedCache(PagePool(16, 4)),
    "streaming": lambda: SinkCache(4, 20),
}


def lively() -> GPT2:
    """A random model whose greedy text does not repeat one token."""
    torch.manual_seed(3)
    model = GPT2(CONFIG).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.5)
    return model.eval()


def prompt(b: int, t: int) -> Tensor:
    return torch.randint(31, (b, t), generator=torch.Generator().manual_seed(7))


def in_transformers(model: GPT2, folder: Path) -> Any:
    model.save_pretrained(folder)
    transformers = oracle.load("transformers")
    return transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float64).eval()


@pytest.mark.outside("gpt", "kv-cache")
@pytest.mark.parity("gpt")
@pytest.mark.parametrize("t", [1, 6])
def test_greedy_equals_transformers(t: int, tmp_path: Path) -> None:
    model, ids = lively(), prompt(3, t)
    theirs = in_transformers(model, tmp_path)
    got = generate(model, ids, 18)
    want = theirs.generate(ids, max_new_tokens=18, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(ids))
    assert torch.equal(got, want)
    assert len(set(got[0, t:].tolist())) > 3  # the text moves


@pytest.mark.outside("gpt")
def test_left_padded_greedy_equals_transformers(tmp_path: Path) -> None:
    model, ids = lively(), prompt(3, 6)
    theirs = in_transformers(model, tmp_path)
    mask = torch.tensor([[1] * 6, [0] * 4 + [1] * 2, [0] * 5 + [1]])
    got = generate(model, ids, 10, attention_mask=mask)
    want = theirs.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False, pad_token_id=0)
    assert torch.equal(got, want)
    assert torch.equal(got, generate(model, ids, 10, attention_mask=mask, cache=None))
    assert torch.equal(got[2:, 5:], generate(model, ids[2:, 5:], 10))


@pytest.mark.outside("gpt")
def test_end_of_text_equals_transformers(tmp_path: Path) -> None:
    model, ids = lively(), prompt(4, 2)
    free = generate(model, ids, 20)
    end = int(free[0, 6])
    theirs = in_transformers(model, tmp_path)
    got = generate(model, ids, 20, eos=end)
    want = theirs.generate(
        ids, max_new_tokens=20, do_sample=False, eos_token_id=end, pad_token_id=end, attention_mask=torch.ones_like(ids)
    )
    assert torch.equal(got, want)
    first = generate(model, ids[:1], 20, eos=end)
    assert first[0, -1] == end
    assert first.shape[1] <= 7  # stops early


@pytest.mark.law("gpt", "kv-cache")
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("pick", ["greedy", "sample"])
def test_same_text_with_every_cache_and_without(kind: str, pick: str) -> None:
    model, ids = lively(), prompt(2, 5)

    def picker() -> Callable[[Tensor], Tensor]:
        if pick == "greedy":
            return greedy
        return partial(sample, temperature=0.8, top_k=20, top_p=0.95, generator=torch.Generator().manual_seed(0))

    want = generate(model, ids, 19, pick=picker(), cache=None)
    assert torch.equal(generate(model, ids, 19, pick=picker(), cache=CACHES[kind]), want)
    assert torch.equal(want[:, :5], ids)


@pytest.mark.law("gpt", "kv-cache")
def test_a_cache_that_drops_keys_takes_a_mask_of_ones_and_padded_prompts() -> None:
    model, ids, short = lively(), prompt(2, 9), lambda: SinkCache(0, 5)
    want = generate(model, ids, 9, cache=short)
    assert torch.equal(generate(model, ids, 9, cache=short, attention_mask=torch.ones_like(ids)), want)
    padded = torch.tensor([[1] * 9, [0] * 3 + [1] * 6])
    got = generate(model, ids, 9, cache=short, attention_mask=padded)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1, 3:], generate(model, ids[1:, 3:], 9, cache=short)[0])  # a window knows no padding


@pytest.mark.law("gpt")
def test_sampled_texts_follow_the_generator() -> None:
    model, ids = lively(), prompt(1, 3)

    def write(seed: int) -> Tensor:
        return generate(model, ids, 12, pick=partial(sample, generator=torch.Generator().manual_seed(seed)))

    assert torch.equal(write(0), write(0))
    assert not torch.equal(write(0), write(1))
    cold = generate(model, ids, 12, pick=partial(sample, temperature=1e-4))
    assert torch.equal(cold, generate(model, ids, 12))
    assert torch.equal(generate(model, ids, 12, pick=partial(sample, top_k=1)), cold)
    assert torch.equal(generate(model, ids, 12, pick=partial(sample, top_p=1e-9)), cold)


@pytest.mark.law("gpt")
def test_the_models_mode_is_kept_and_dropout_is_off() -> None:
    model, ids = lively(), prompt(1, 3)
    want = generate(model, ids, 8)
    model.train()
    assert torch.equal(generate(model, ids, 8), want)
    assert model.training


@pytest.mark.law("gpt")
def test_a_part_frozen_in_evaluation_mode_stays_there() -> None:
    model = lively().train()
    frozen = next(part for part in model.modules() if not list(part.children()))
    frozen.eval()
    generate(model, prompt(1, 3), 2)
    assert model.training
    assert not frozen.training


@pytest.mark.registration("kv-cache")
def test_quantised_caches_write_text() -> None:
    model, ids = lively(), prompt(2, 3)
    for dtype in (torch.int8, torch.float8_e4m3fn):
        text = generate(model, ids, 9, cache=partial(QuantizedCache, dtype))
        assert text.shape == (2, 12)


@pytest.mark.refusal("gpt")
def test_refuses_what_cannot_be_written() -> None:
    model = lively()
    for wrong in (0, 2.5, True, "3"):
        with refuses(ConfigError, "new_tokens", repr(wrong)):
            generate(model, prompt(1, 3), wrong)  # type: ignore[arg-type]
    for wrong in ([1, 2], 2.5, True, -1):
        with refuses(ConfigError, "eos", repr(wrong)):
            generate(model, prompt(1, 3), 2, eos=wrong)  # type: ignore[arg-type]
    with unchecked(), refuses(ConfigError, "list"):
        generate(model, [[1, 2]], 2)  # type: ignore[arg-type]
    with unchecked(), refuses(ShapeError, "torch.float32"):
        generate(model, prompt(1, 3).float(), 2)
    with refuses(ShapeError, "20 + 5 tokens", 24):
        generate(model, prompt(1, 20), 5)
    with refuses(ShapeError, "(1, 0)"):
        generate(model, prompt(1, 0), 5)
    with refuses(ShapeError, "on the left"):
        generate(model, prompt(2, 3), 5, attention_mask=torch.tensor([[1, 1, 1], [1, 1, 0]]))
    with refuses(ShapeError, "(2, 3)", "(2, 4)"):
        generate(model, prompt(2, 3), 5, attention_mask=torch.ones(2, 4, dtype=torch.long))
    with refuses(ShapeError, "StaticCache", "at most 6"):
        generate(model, prompt(1, 3), 8, cache=lambda: StaticCache(6))
