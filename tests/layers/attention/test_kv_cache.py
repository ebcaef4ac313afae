"""The caches: what each gives back, what it holds, what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from handbook_src.errors import ConfigError, HandbookError, ShapeError
from handbook_src.functional.attention.attention import scaled_dot_product_attention
from handbook_src.functional.attention.mask import (
    block,
    causal,
    dilated,
    documents,
    fixed,
    global_tokens,
    left_padding,
    per_head,
    prefix,
    sinks,
    window,
)
from handbook_src.layers.attention.attention import CausalAttention, MultiHeadAttention, SelfAttention
from handbook_src.layers.attention.chunked_attention import ChunkedAttention
from handbook_src.layers.attention.differential_attention import DifferentialAttention
from handbook_src.layers.attention.grouped_query import GroupedQueryAttention
from handbook_src.layers.attention.kv_cache import AppendCache, KVCache, QuantizedCache, SinkCache, StaticCache
from handbook_src.layers.attention.mla import LatentCache, MultiHeadLatentAttention
from handbook_src.layers.attention.paged_kv_cache import PagedCache, PagePool
from handbook_src.layers.attention.sliding_window import SlidingWindowAttention
from handbook_src.layers.positions.rope import RotaryEmbedding
from handbook_src.testing import refuses, unchecked

EXACT: dict[str, Callable[[], KVCache]] = {
    "append": AppendCache,
    "static": lambda: StaticCache(13),
    "paged, page 1": lambda: PagedCache(PagePool(40, 1)),
    "paged, page 4": lambda: PagedCache(PagePool(12, 4)),
    "paged, page 16": lambda: PagedCache(PagePool(3, 16)),
    "streaming, never full": lambda: SinkCache(2, 11),
}
ALL = EXACT | {
    "int8": QuantizedCache,
    "fp8": lambda: QuantizedCache(torch.float8_e4m3fn),
    "streaming": lambda: SinkCache(2, 3),
}

LAYERS: list[Callable[[], torch.nn.Module]] = [
    lambda: MultiHeadAttention(8, 2),
    lambda: CausalAttention(8, 2),
    lambda: GroupedQueryAttention(8, 2, kv_heads=1, rope=RotaryEmbedding(4)),
    lambda: SlidingWindowAttention(8, 2, window=3, causal=True),
    lambda: ChunkedAttention(8, 2, chunk=3, causal=True),
    lambda: DifferentialAttention(8, 2),
    lambda: MultiHeadLatentAttention(8, 2, latent_dim=4, head_dim=4, rope=2),
]


def kv(
    b: int = 3, t: int = 13, h: int = 2, e: int = 5, dtype: torch.dtype = torch.float64, c: int | None = None
) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(t)
    return torch.randn(b, t, h, e, generator=g).to(dtype), torch.randn(b, t, h, c or e, generator=g).to(dtype)


@pytest.mark.parity("kv-cache")
@pytest.mark.law("kv-cache")
@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("chunks", [[13], [1] * 13, [5, 1, 7]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("c", [5, 3])
def test_gives_back_every_token_to_the_bit(kind: str, chunks: list[int], dtype: torch.dtype, c: int) -> None:
    k, v = kv(dtype=dtype, c=c)
    cache, at = EXACT[kind](), 0
    for part_k, part_v in zip(k.split(chunks, 1), v.split(chunks, 1), strict=True):
        at += part_k.shape[1]
        got_k, got_v = cache.update(part_k, part_v)
        assert torch.equal(got_k, k[:, :at])
        assert torch.equal(got_v, v[:, :at])
        assert (cache.length, cache.seen) == (at, at)


@pytest.mark.law("kv-cache")
@pytest.mark.parametrize("kind", ALL)
def test_reset_forgets_and_serves_another_batch(kind: str) -> None:
    cache = ALL[kind]()
    cache.update(*kv(3, 6))
    cache.reset()
    assert (cache.length, cache.seen) == (0, 0)
    k, v = kv(1, 4, 2, 5)
    fresh = ALL[kind]()
    assert all(torch.equal(a, b) for a, b in zip(cache.update(k, v), fresh.update(k, v), strict=True))


@pytest.mark.law("kv-cache")
@pytest.mark.parametrize("kind", ["static", "paged, page 4"])
def test_unwritten_storage_never_leaks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda self, shape: empty(self, shape).fill_(float("nan")))
    cache = EXACT[kind]()
    for part in zip(*(x.split(3, 1) for x in kv()), strict=True):
        assert all(x.isfinite().all() for x in cache.update(*part))


@pytest.mark.parity("kv-cache")
@pytest.mark.parametrize("kind", EXACT)
def test_attention_with_a_cache_equals_attention_without(kind: str) -> None:
    layer = MultiHeadAttention(10, 2).double()
    x = torch.randn(3, 13, 10, dtype=torch.float64)
    cache = EXACT[kind]()
    with torch.no_grad():
        got = torch.cat([layer(part, causal=True, cache=cache) for part in x.split([4, 1, 1, 7], 1)], 1)
        torch.testing.assert_close(got, layer(x, causal=True), rtol=1e-10, atol=1e-12)


@pytest.mark.parity("kv-cache")
@pytest.mark.parametrize(("n_sinks", "n_window"), [(0, 1), (0, 4), (2, 3), (4, 1), (20, 3)])
def test_streaming_equals_its_mask(n_sinks: int, n_window: int) -> None:
    layer = MultiHeadAttention(10, 2).double()
    x = torch.randn(2, 13, 10, dtype=torch.float64)
    cache = SinkCache(n_sinks, n_window)
    rule = causal & (window(n_window) | sinks(n_sinks)) if n_sinks else causal & window(n_window)
    with torch.no_grad():
        got = torch.cat([layer(part, causal=True, cache=cache) for part in x.split(1, 1)], 1)
        torch.testing.assert_close(got, layer(x, mask=rule), rtol=1e-10, atol=1e-12)
    assert cache.length == min(13, n_sinks + n_window)
    assert cache.seen == 13


@pytest.mark.law("kv-cache")
def test_streaming_keeps_the_first_and_the_last_whatever_the_chunks() -> None:
    k, v = kv()
    for chunks in ([13], [1] * 13, [5, 8], [2, 11]):
        cache = SinkCache(2, 3)
        for part in zip(k.split(chunks, 1), v.split(chunks, 1), strict=True):
            cache.update(*part)
        kept, _ = cache.update(k[:, :0], v[:, :0])
        want = torch.cat([k[:, :2], k[:, -3:]], 1)
        assert torch.equal(kept, want)


@pytest.mark.law("kv-cache")
def test_bytes_are_those_of_the_formula() -> None:
    one = 2 * 3 * 2 * 5  # keys and values, batch 3, 2 heads, 5 features
    append, static, int8, fp8 = AppendCache(), StaticCache(13), QuantizedCache(), QuantizedCache(torch.float8_e4m3fn)
    stream, pool = SinkCache(2, 3), PagePool(12, 4)
    paged = PagedCache(pool)
    for s in range(1, 14):
        k, v = kv(3, 1, dtype=torch.float32)
        for cache in (append, static, int8, fp8, stream, paged):
            cache.update(k, v)
        assert append.bytes == s * one * 4
        assert static.bytes == 13 * one * 4
        assert int8.bytes == fp8.bytes == s * (one + 2 * 3 * 2 * 4)  # a float32 scale a vector
        assert stream.bytes == min(s, 5) * one * 4
        assert paged.bytes == -(-s // 4) * 4 * one * 4
    paged.reset()
    assert (paged.bytes, pool.free) == (0, 12)


@pytest.mark.law("kv-cache")
@pytest.mark.parametrize(("dtype", "steps"), [(torch.int8, 127.0), (torch.float8_e4m3fn, 448.0)])
def test_rounding_error_is_bounded_and_happens_once(dtype: torch.dtype, steps: float) -> None:
    k, v = kv(2, 40, 3, 16, torch.float32)
    k[0, 0, 0] = 0.0
    k[0, 1, 0, 0] = 1e4  # an outlier costs its own vector only
    whole, stepwise = QuantizedCache(dtype), QuantizedCache(dtype)
    got_k, got_v = whole.update(k, v)
    for part in zip(k.split(1, 1), v.split(1, 1), strict=True):
        again_k, again_v = stepwise.update(*part)
    assert torch.equal(got_k, again_k)
    assert torch.equal(got_v, again_v)
    for x, y in ((k, got_k), (v, got_v)):
        scale = x.abs().amax(-1, keepdim=True) / steps
        bound = scale / 2 if dtype == torch.int8 else torch.maximum(x.abs() / 16, scale / 1024)
        assert ((x - y).abs() <= bound * (1 + 1e-5)).all()
    assert torch.equal(got_k[0, 0, 0], torch.zeros(16))


@pytest.mark.law("kv-cache")
def test_quantised_attention_stays_close() -> None:
    k, v = kv(2, 64, 2, 32, torch.float32)
    q = torch.randn(2, 64, 2, 32)
    want = scaled_dot_product_attention(q, k, v, causal=True)
    for dtype, bound in ((torch.int8, 0.01), (torch.float8_e4m3fn, 0.05)):
        got = scaled_dot_product_attention(q, *QuantizedCache(dtype).update(k, v), causal=True)
        assert (got - want).norm() / want.norm() < bound


@pytest.mark.law("kv-cache")
def test_pages_interleave_and_come_back() -> None:
    pool = PagePool(8, 2)
    a, b = PagedCache(pool), PagedCache(pool)
    k, v = kv(1, 8)
    for i in range(8):
        got_a = a.update(k[:, i : i + 1], v[:, i : i + 1])
        if i < 6:
            got_b = b.update(v[:, i : i + 1], k[:, i : i + 1])
    assert torch.equal(got_a[0], k)
    assert torch.equal(got_b[0], v[:, :6])
    assert not set(a.table[0]) & set(b.table[0])
    assert pool.free == 1
    b.reset()
    assert pool.free == 4
    assert torch.equal(a.update(k[:, :1], v[:, :1])[0][:, :8], k)


@pytest.mark.law("kv-cache")
def test_forks_share_a_prompt_until_they_write() -> None:
    pool = PagePool(10, 4)
    prompt = PagedCache(pool)
    k, v = kv(2, 6)
    prompt.update(k, v)
    fork = prompt.fork()
    assert pool.free == 6  # two rows of two pages, held once
    new_k, new_v = kv(2, 3)
    got, _ = fork.update(new_k, new_v)
    assert torch.equal(got, torch.cat([k, new_k], 1))
    assert [row[0] for row in fork.table] == [row[0] for row in prompt.table]
    assert all(a[1] != b[1] for a, b in zip(fork.table, prompt.table, strict=True))
    other, _ = prompt.update(new_v, new_k)
    assert torch.equal(other, torch.cat([k, new_v], 1))
    fork.reset()
    prompt.reset()
    assert pool.free == 10
    assert pool.users == [0] * 10


@pytest.mark.law("kv-cache")
def test_a_shallow_copy_of_pages_is_a_fork() -> None:
    pool = PagePool(pages=8, page_size=2)
    cache = PagedCache(pool)
    k = torch.randn(1, 3, 1, 4)
    cache.update(k, k)
    other = copy.copy(cache)
    more = torch.randn(2, 1, 1, 1, 4)
    got = [c.update(x, x)[0][:, 3:] for c, x in zip((cache, other), more, strict=True)]
    torch.testing.assert_close(got[0], more[0])
    torch.testing.assert_close(got[1], more[1])
    del other  # its pages go back, and none of the original's
    assert pool.free == 8 - len(cache.table[0])
    torch.testing.assert_close(cache.update(more[0], more[0])[0], torch.cat([k, more[0], more[0]], 1))


@pytest.mark.law("kv-cache")
@pytest.mark.law("kv-cache")
@pytest.mark.parametrize("kind", [kind for kind in ALL if "paged" not in kind])
def test_a_shallow_copy_goes_on_by_itself(kind: str) -> None:
    """Beam search copies a cache: what one of the two reads next must not reach the other."""
    text, one, another = kv(t=3), kv(t=1), [-x for x in kv(t=1)]
    first, alone = ALL[kind](), ALL[kind]()
    first.update(*text)
    second = copy.copy(first)
    found = [x.clone() for x in first.update(*one)]
    second.update(*another)
    alone.update(*text)
    for want, got, later in zip(alone.update(*one), found, first.update(*kv(t=2)), strict=True):
        assert torch.equal(want, got)
        assert kind == "streaming" or torch.equal(later[:, :4], got)


def test_fork_at_a_page_border_copies_nothing() -> None:
    pool = PagePool(3, 4)
    prompt = PagedCache(pool)
    k, v = kv(1, 4)
    prompt.update(k, v)
    fork = prompt.fork()
    assert torch.equal(fork.update(k[:, :2], v[:, :2])[0], torch.cat([k, k[:, :2]], 1))
    assert torch.equal(prompt.update(v[:, :1], v[:, :1])[0], torch.cat([k, v[:, :1]], 1))
    assert pool.free == 0


@pytest.mark.registration("kv-cache")
@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_goes_in_and_comes_out(kind: str, dtype: torch.dtype) -> None:
    got = ALL[kind]().update(*kv(dtype=dtype))
    assert [x.dtype for x in got] == [dtype, dtype]


@pytest.mark.refusal("kv-cache")
@pytest.mark.parametrize("kind", ALL)
def test_refuses_another_batch_dtype_or_layout(kind: str) -> None:
    cache = ALL[kind]()
    cache.update(*kv(2, 3))
    for wrong in (kv(1, 1), kv(2, 1, 3), kv(2, 1, 2, 4), kv(2, 1, dtype=torch.float32)):
        with refuses(ShapeError, "reset()", wrong[0].shape[0], wrong[0].dtype, f"{tuple(wrong[0].shape[2:])}"[1:-1]):
            cache.update(*wrong)
    with refuses(ShapeError, "device", "meta"):
        cache.update(*(x.to("meta") for x in kv(2, 1)))
    assert cache.seen == 3


@pytest.mark.refusal("kv-cache")
def test_refuses_what_is_not_keys_and_values() -> None:
    k, v = kv()
    with refuses(ShapeError, "(3, 13, 2, 5)", "(3, 12, 2, 5)"):
        AppendCache().update(k, v[:, 1:])
    with refuses(ShapeError, "(13, 2, 5)", "b t h e"):
        AppendCache().update(k[0], v[0])
    with refuses(ShapeError, "(3, 13, 2, 5)", "(3, 13, 1, 5)"):  # fewer heads: repeat neither, share keys and values
        AppendCache().update(k, v[:, :, :1])
    with refuses(ShapeError, "(3, 13, 0, 5)"):
        AppendCache().update(k[:, :, :0], v[:, :, :0])


@pytest.mark.refusal("kv-cache")
@pytest.mark.parametrize("kind", ALL)
def test_values_must_be_of_the_keys_dtype_and_device(kind: str) -> None:
    k, v = kv(2, 2)
    cache = ALL[kind]()
    with refuses(ShapeError, "torch.float64 on cpu", "torch.float32 on cpu"):
        cache.update(k, v.float())
    with refuses(ShapeError, "meta", "cpu"):
        cache.update(k, v.to("meta"))
    with refuses(ShapeError, "torch.int64", "floats"):
        cache.update(k.long(), v.long())
    with refuses(ShapeError, "(2, 2, 2, 0)"):
        cache.update(k[..., :0], v[..., :0])
    cache.update(k, v)
    with refuses(ShapeError, "(2, 2, 5, 4", "(2, 2, 5, 5"):
        cache.update(k, v[..., :4])
    assert cache.seen == 2


@pytest.mark.refusal("kv-cache")
def test_a_full_cache_says_so_and_stays_whole() -> None:
    k, v = kv()
    static = StaticCache(10)
    static.update(k[:, :9], v[:, :9])
    with refuses(ShapeError, "2 tokens on top of 9", 10):
        static.update(k[:, 9:11], v[:, 9:11])
    assert torch.equal(static.update(k[:, 9:10], v[:, 9:10])[0], k[:, :10])
    paged = PagedCache(PagePool(6, 2))  # batch 3: two pages, four tokens each
    paged.update(k[:, :4], v[:, :4])
    with refuses(ShapeError, "3 pages of 2", "0 free ones of 6"):
        paged.update(k[:, 4:5], v[:, 4:5])
    assert paged.length == 4


@pytest.mark.refusal("kv-cache")
@pytest.mark.parametrize("kind", [k for k in ALL if k != "append"])
def test_refuses_gradients_it_would_lose(kind: str) -> None:
    k, v = kv()
    with refuses(ShapeError, "require grad", "no_grad"):
        ALL[kind]().update(k.requires_grad_(), v)
    with torch.no_grad():
        ALL[kind]().update(k, v)


@pytest.mark.refusal("kv-cache")
def test_refuses_sizes_and_types_that_cannot_work() -> None:
    for wrong in (0, -1, 2.5, True, float("nan"), "8"):
        with refuses(ConfigError, "capacity", wrong):
            StaticCache(wrong)
        with refuses(ConfigError, "window", wrong):
            SinkCache(4, wrong)
        with refuses(ConfigError, "page_size", wrong):
            PagePool(4, wrong)
        with refuses(ConfigError, "pages", wrong):
            PagePool(wrong)
    for wrong in (-1, 1.5, False):
        with refuses(ConfigError, "sinks", wrong):
            SinkCache(wrong, 4)
    with refuses(ConfigError, "None", "PagePool"):
        PagedCache(None)
    with refuses(ConfigError, "torch.int16", "torch.int8"):
        QuantizedCache(torch.int16)


@pytest.mark.refusal("kv-cache")
def test_one_pool_serves_one_kind_of_layer() -> None:
    pool = PagePool(8, 2)
    PagedCache(pool).update(*kv(1, 2))
    with refuses(ShapeError, "(3, 5, 5", "(2, 5, 5"):
        PagedCache(pool).update(*kv(1, 2, 3))
    with refuses(ShapeError, "(2, 5, 4", "(2, 5, 5"):
        PagedCache(pool).update(*kv(1, 2, c=4))


@pytest.mark.law("kv-cache")
@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("shape", [(2, 0, 3, 5), (0, 2, 3, 5)])
def test_nothing_in_gives_nothing_back(kind: str, shape: tuple[int, ...]) -> None:
    k, v = EXACT[kind]().update(torch.zeros(shape), torch.zeros(shape))
    assert (tuple(k.shape), tuple(v.shape)) == (shape, shape)


@pytest.mark.refusal("kv-cache")
def test_a_refused_update_binds_nothing() -> None:
    for cache in (StaticCache(4), PagedCache(PagePool(2, 4))):
        with refuses(ShapeError):
            cache.update(torch.zeros(3, 9, 1, 2), torch.zeros(3, 9, 1, 2))
        k, _ = cache.update(torch.ones(1, 2, 1, 2), torch.ones(1, 2, 1, 2))
        assert (k.shape, cache.seen) == ((1, 2, 1, 2), 2)


@pytest.mark.law("kv-cache")
@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("chunks", [[13], [1] * 13, [5, 0, 1, 7], [2, 3, 8]])
def test_a_cache_knows_how_much_an_update_will_give_back(kind: str, chunks: list[int]) -> None:
    cache = ALL[kind]()
    for t in chunks:
        expected = cache.after(t)
        k, v = cache.update(*kv(t=t))
        assert k.shape[1] == v.shape[1] == expected


@pytest.mark.refusal("kv-cache")
@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("make", LAYERS)
@torch.no_grad()
def test_a_refused_mask_stores_nothing(kind: str, make: Callable[..., torch.nn.Module]) -> None:
    layer, x = make().double(), torch.randn(2, 6, 8).double()
    cache, other = ALL[kind](), ALL[kind]()
    layer(x[:, :4], cache=cache), layer(x[:, :4], cache=other)
    wrong: dict[str, object] = {"mask": torch.ones(2, 7) > 0}
    if isinstance(layer, ChunkedAttention):
        wrong = {"lengths": torch.tensor([4, 5, 6])}
    for bad in (wrong, dict.fromkeys(wrong, "causal")):
        with refuses(HandbookError):
            layer(x[:, 4:], cache=cache, **bad)
    assert (cache.seen, cache.length) == (other.seen, other.length)
    torch.testing.assert_close(layer(x[:, 4:], cache=cache), layer(x[:, 4:], cache=other), rtol=0, atol=0)


#: rules that count from the first key, which a cache that drops keys must not move
COUNTING = {
    "block": block(4),
    "fixed": fixed(3),
    "global": causal & global_tokens(1, 8),
    "prefix": prefix(3),
    "documents": documents(torch.tensor([[0] * 4 + [1] * 9, [0] * 9 + [1] * 4])),
    "left padding": left_padding(torch.tensor([0, 7])),
    "by head": per_head(block(5), dilated(2)),
}


@pytest.mark.law("kv-cache")
@pytest.mark.parametrize("rule", COUNTING)
@pytest.mark.parametrize(("n_sinks", "n_window"), [(0, 6), (2, 3)])
@torch.no_grad()
def test_rules_count_from_the_first_key_though_it_was_dropped(rule: str, n_sinks: int, n_window: int) -> None:
    layer, x, given = CausalAttention(8, 2).double(), torch.randn(2, 13, 8).double(), COUNTING[rule]
    want = layer(x, (window(n_window) | sinks(n_sinks)) & given)
    written = given.dense(13)
    by_rule, by_tensor = SinkCache(n_sinks, n_window), SinkCache(n_sinks, n_window)
    for t, token in enumerate(x.split(1, 1)):
        for out in (layer(token, given, by_rule), layer(token, written[..., t : t + 1, : t + 1], by_tensor)):
            torch.testing.assert_close(out, want[:, t : t + 1], rtol=1e-10, atol=1e-12)


@pytest.mark.law("kv-cache", "sliding-window-attention", "differential-attention", "mla")
@pytest.mark.parametrize("make", [make for make in LAYERS if not isinstance(make(), ChunkedAttention)])
@torch.no_grad()
def test_so_they_do_in_every_layer(make: Callable[..., torch.nn.Module]) -> None:
    layer, x, cache = make().double(), torch.randn(2, 13, 8).double(), SinkCache(2, 3)
    own = {} if isinstance(layer, SelfAttention) else {"causal": True}
    want = layer(x, mask=causal & (window(3) | sinks(2)) & block(4), **own)
    got = [layer(token, mask=block(4), cache=cache, **own) for token in x.split(1, 1)]
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-10, atol=1e-12)


@pytest.mark.law("kv-cache", "sliding-window-attention")
@torch.no_grad()
def test_a_layers_own_rule_counts_from_the_first_key_in_chunks_too() -> None:
    x = torch.randn(2, 13, 8).double()
    for layer, kept in (
        (SelfAttention(8, 2, rule=causal & block(3)), (0, 3)),
        (SlidingWindowAttention(8, 2, window=5, causal=True), (2, 4)),
    ):
        layer, cache = layer.double(), SinkCache(*kept)
        rule = causal & (window(kept[1]) | sinks(kept[0]))
        # a chunk is attended before it evicts: only the rule of the first layer hides what the chunk still holds
        chunks = [1] * 13 if kept[0] else [6, 1, 4, 2]
        got = torch.cat([layer(part, cache=cache) for part in x.split(chunks, 1)], 1)
        torch.testing.assert_close(got, layer(x, rule), rtol=1e-10, atol=1e-12)


@pytest.mark.refusal("kv-cache")
@torch.no_grad()
def test_a_mask_over_what_is_left_is_refused() -> None:
    layer, cache = CausalAttention(8, 2), SinkCache(0, 3)
    layer(torch.randn(2, 5, 8), cache=cache)
    with refuses(ShapeError, "attention mask", (1, 3), (1, 6)):
        layer(torch.randn(2, 1, 8), torch.ones(1, 3) > 0, cache)
    with refuses(ShapeError, "positions", 6, 5):
        layer(torch.randn(2, 1, 8), documents(torch.zeros(2, 5, dtype=torch.long)), cache)
    assert cache.seen == 5


@pytest.mark.refusal("mla")
@torch.no_grad()
def test_a_refused_call_leaves_a_latent_cache_as_it_was() -> None:
    layer, x, cache = (
        MultiHeadLatentAttention(8, 2, latent_dim=4, head_dim=4, rope=2),
        torch.randn(2, 6, 8),
        LatentCache(),
    )
    layer(x[:, :4], cache=cache)
    for bad in ({"mask": torch.ones(2, 7) > 0}, {"form": "neither"}):
        with refuses(HandbookError):
            layer(x[:, 4:], cache=cache, **bad)
    assert cache.seen == cache.length == 4
    torch.testing.assert_close(layer(x[:, 4:], causal=True, cache=cache), layer(x, causal=True)[:, 4:])


@pytest.mark.law("kv-cache")
def test_an_endless_stream_in_constant_memory() -> None:
    cache = SinkCache(4, 28)
    k, v = kv(2, 1, dtype=torch.float32)
    held = set()
    for at in range(3000):
        got, _ = cache.update(k + at, v)
        if at >= 32:
            held.add((cache.bytes, cache._kv[0].untyped_storage().nbytes(), got.shape))
    assert len(held) == 1
    assert (cache.seen, cache.length) == (3000, 32)
    assert torch.equal(got[:, :4], torch.cat([k + i for i in range(4)], 1))
    assert torch.equal(got[:, 4:], torch.cat([k + i for i in range(2972, 3000)], 1))


@pytest.mark.law("kv-cache")
@pytest.mark.parametrize("kind", ALL)
def test_inputs_are_never_written_to(kind: str) -> None:
    k, v = kv(2, 3)
    before, cache = (k.clone(), v.clone()), ALL[kind]()
    cache.update(k, v)
    cache.update(k[:, :1], v[:, :1])
    assert torch.equal(k, before[0])
    assert torch.equal(v, before[1])


@pytest.mark.law("kv-cache")
@pytest.mark.parametrize("kind", EXACT)
def test_takes_what_lies_strewn_in_memory(kind: str) -> None:
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in kv())
    assert all(torch.equal(a, b) for a, b in zip(EXACT[kind]().update(k, v), (k, v), strict=True))


@pytest.mark.law("kv-cache")
def test_the_one_kind_for_training_passes_gradients() -> None:
    layer = MultiHeadAttention(6, 2).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    cache = AppendCache()
    got = torch.cat([layer(part, causal=True, cache=cache) for part in x.split(2, 1)], 1)
    (mine,) = torch.autograd.grad(got.square().sum(), x)
    (want,) = torch.autograd.grad(layer(x, causal=True).square().sum(), x)
    torch.testing.assert_close(mine, want, rtol=1e-9, atol=1e-11)


@pytest.mark.registration("kv-cache")
@pytest.mark.parametrize("kind", ["static", "streaming"])
def test_compiled_steps_are_traced_whole_and_not_again_for_every_token(kind: str) -> None:
    make = {**ALL, "static": lambda: StaticCache(40)}[kind]
    layer, counter = MultiHeadAttention(8, 2).double().eval(), CompileCounter()
    x = torch.randn(2, 40, 8, dtype=torch.float64)
    cache, plain = make(), make()
    with unchecked(), torch.no_grad():
        step = torch.compile(lambda x, cache: layer(x, causal=True, cache=cache), backend=counter, fullgraph=True)
        layer(x[:, :7], causal=True, cache=cache)  # prefill
        layer(x[:, :7], causal=True, cache=plain)
        for t in range(7, 40):
            got, want = step(x[:, t : t + 1], cache), layer(x[:, t : t + 1], causal=True, cache=plain)
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert counter.frame_count <= 3  # as it came, with a length of any size, and once the stream is full


@pytest.mark.registration("kv-cache")
@pytest.mark.parametrize("kind", ALL)
def test_a_copy_goes_its_own_way(kind: str) -> None:
    k, v = kv(2, 4)
    cache = ALL[kind]()
    cache.update(k, v)
    other = copy.deepcopy(cache)
    one, two = cache.update(k[:, :1], v[:, :1]), other.update(k[:, :1], v[:, :1])
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert other.update(k[:, :1], v[:, :1])[0].shape[1] >= one[0].shape[1]
    assert cache.seen == 5


@pytest.mark.law("kv-cache")
@pytest.mark.parametrize(
    "make", [AppendCache, lambda: StaticCache(8), QuantizedCache, SinkCache, lambda: PagedCache(PagePool(4, 2))]
)
def test_a_cache_begun_in_inference_mode_goes_on_outside(make: Callable[[], KVCache]) -> None:
    k, v = torch.randn(2, 1, 4, 2, 3)
    cache, usual = make(), make()
    with torch.inference_mode():
        cache.update(k[:, :2], v[:, :2])
    with torch.no_grad():
        usual.update(k[:, :2], v[:, :2])
        torch.testing.assert_close(cache.update(k[:, 2:], v[:, 2:]), usual.update(k[:, 2:], v[:, 2:]))


@pytest.mark.law("kv-cache")
def test_a_dropped_cache_gives_its_pages_back() -> None:
    pool = PagePool(4, 2)
    x = torch.randn(1, 4, 1, 1)
    cache = PagedCache(pool)
    cache.update(x, x)
    other = cache.fork()
    del cache
    assert pool.free == 2  # the fork still reads them
    del other
    assert pool.free == 4
    with refuses(ConfigError, "[0]", "in use"):
        pool.release([0])
    assert pool.free == 4
