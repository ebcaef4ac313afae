"""Shared key heads against transformers' Llama; multi-head and multi-query attention as the two ends."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.mask import left_padding, padding, window
from handbook_src.functional.positions.rope import rope_cos_sin, rope_frequencies
from handbook_src.layers.attention.attention import CausalAttention, MultiHeadAttention
from handbook_src.layers.attention.grouped_query import GroupedQueryAttention, MultiQueryAttention, share_key_heads
from handbook_src.layers.attention.kv_cache import AppendCache, QuantizedCache, StaticCache
from handbook_src.layers.positions.rope import RotaryEmbedding
from handbook_src.testing import assert_batch_independent, assert_causal, assert_parity, refuses

BOTH = ("gqa", "mqa")


def random_(layer: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for p in layer.double().parameters():
            p.uniform_(-0.5, 0.5)
    return layer


@pytest.mark.parity(*BOTH)
@pytest.mark.outside(*BOTH)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 4), (6, 1, 2), (3, 3, 6), (4, 2, 8)])
@pytest.mark.parametrize("t", [1, 5])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_llamas(heads: int, kv_heads: int, head_dim: int, t: int, bias: bool) -> None:
    config = LlamaConfig(
        hidden_size=24, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
        attention_bias=bias, attn_implementation="sdpa",
    )  # fmt: skip
    theirs = random_(LlamaAttention(config, 0))
    rope = RotaryEmbedding(head_dim, dtype=torch.float64)
    ours = GroupedQueryAttention(24, heads, kv_heads, head_dim=head_dim, bias=bias, rope=rope).double()
    ours.load_state_dict({k.replace("o_proj", "out_proj"): v for k, v in theirs.state_dict().items()})
    cos, sin = rope_cos_sin(torch.arange(t), rope_frequencies(head_dim, dtype=torch.float64))
    turn = tuple(torch.cat((x, x), -1)[None] for x in (cos, sin))
    hidden = torch.full((t, t), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    pairs = list(zip(ours.parameters(), theirs.parameters(), strict=True))
    assert_parity(
        lambda x: ours(x, causal=True), lambda x: theirs(x, turn, hidden)[0], [torch.randn(2, t, 24)],
        parameters=pairs,
    )  # fmt: skip


@pytest.mark.parity(*BOTH)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("kind", ["plain", "causal", "padding", "memory"])
def test_is_multi_head_attention_with_repeated_heads(kv_heads: int, kind: str) -> None:
    ours = GroupedQueryAttention(12, 4, kv_heads, bias=True).double()
    whole = MultiHeadAttention(12, 4).double()
    state = ours.state_dict()
    for key in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"):
        state[key] = state[key].unflatten(0, (kv_heads, 3)).repeat_interleave(4 // kv_heads, 0).flatten(0, 1)
    whole.load_state_dict(state)
    mask = padding(torch.tensor([3, 1])) if kind == "padding" else None
    inputs = [torch.randn(2, 5, 12)] + ([torch.randn(2, 7, 12)] if kind == "memory" else [])

    def run(layer: MultiHeadAttention, x: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return layer(x, memory, mask, kind == "causal"), layer.weights(x, memory, mask, kind == "causal")

    same = [(getattr(ours, n).weight, getattr(whole, n).weight) for n in ("q_proj", "out_proj")]
    assert_parity(lambda *x: run(ours, *x), lambda *x: run(whole, *x), inputs, parameters=same)


@pytest.mark.law(*BOTH)
def test_the_two_ends_are_multi_head_and_multi_query_attention() -> None:
    x = torch.randn(2, 5, 12).double()
    whole, full = MultiHeadAttention(12, 4).double(), GroupedQueryAttention(12, 4, 4, bias=True).double()
    full.load_state_dict(whole.state_dict())
    torch.testing.assert_close(full(x, causal=True), whole(x, causal=True), rtol=0, atol=0)
    one, single = GroupedQueryAttention(12, 4, 1).double(), MultiQueryAttention(12, 4).double()
    single.load_state_dict(one.state_dict())
    torch.testing.assert_close(single(x), one(x), rtol=0, atol=0)
    assert single.kv_heads == 1
    assert single.k_proj.weight.shape == (3, 12)


@pytest.mark.law(*BOTH)
@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_a_cache_holds_exactly_their_share_of_the_bytes(kv_heads: int) -> None:
    held = []
    for layer in (MultiHeadAttention(32, 8), GroupedQueryAttention(32, 8, kv_heads)):
        cache = AppendCache()
        layer(torch.randn(2, 6, 32), causal=True, cache=cache)
        held.append(cache.bytes)
    assert held[1] * 8 == held[0] * kv_heads
    assert held[1] == 2 * 2 * 6 * kv_heads * 4 * 4


@pytest.mark.law(*BOTH)
@pytest.mark.parametrize("steps", [[6], [1] * 6, [3, 2, 1]])
@pytest.mark.parametrize("rope", [None, 2, 4])
@pytest.mark.parametrize("extra", [None, window(3), left_padding(torch.tensor([0, 2]))], ids=str)
def test_cached_equals_uncached(steps: list[int], rope: int | None, extra: object) -> None:
    turn = None if rope is None else RotaryEmbedding(rope, dtype=torch.float64)
    layer, x = GroupedQueryAttention(16, 4, 2, rope=turn).double(), torch.randn(2, 6, 16).double()
    want = layer(x, mask=extra, causal=True)
    cache = AppendCache()
    got = torch.cat([layer(part, mask=extra, causal=True, cache=cache) for part in x.split(steps, 1)], 1)
    torch.testing.assert_close(got, want)
    if extra is None:
        assert_causal(lambda x: layer(x, causal=True), x)
        assert_batch_independent(lambda x: layer(x, causal=True), x)


@pytest.mark.law("gqa")
def test_other_caches_serve() -> None:
    layer, x = MultiQueryAttention(16, 4, rope=RotaryEmbedding(4)), torch.randn(2, 6, 16)
    with torch.no_grad():
        want = layer(x, causal=True)
        for cache, near in ((StaticCache(6), 1e-6), (QuantizedCache(), 0.02)):
            got = torch.cat([layer(part, causal=True, cache=cache) for part in x.split([4, 1, 1], 1)], 1)
            torch.testing.assert_close(got, want, rtol=near, atol=near)
        full = StaticCache(5)
        with refuses(ShapeError, "6 tokens on top of 0", 5):
            layer(x, causal=True, cache=full)
        with refuses(ShapeError, "meta"):
            cache = StaticCache(8)
            layer(x, causal=True, cache=cache)
            copy.deepcopy(layer).to("meta")(x.to("meta"), causal=True, cache=cache)


@pytest.mark.law("gqa")
@pytest.mark.parametrize("gone", [[0, 1], [0, 2, 4], [1, 3, 5], [0, 1, 3, 5]])
@pytest.mark.parametrize("bias", [True, False])
def test_pruned_heads_equal_zeroed_heads(gone: list[int], bias: bool) -> None:
    layer = GroupedQueryAttention(12, 6, 3, head_dim=3, bias=bias).double()
    x, zeroed, pruned = torch.randn(2, 5, 12).double(), copy.deepcopy(layer), copy.deepcopy(layer)
    with torch.no_grad():
        for head in gone:
            zeroed.out_proj.weight[:, 3 * head : 3 * head + 3] = 0
    pruned.prune_heads(gone)
    kept = [h for h in range(6) if h not in gone]
    assert_parity(lambda x: pruned(x, causal=True), lambda x: zeroed(x, causal=True), [x])
    torch.testing.assert_close(pruned.weights(x), layer.weights(x)[:, kept])
    assert pruned.kv_heads == len({h // 2 for h in kept})
    assert pruned.k_proj.out_features == 3 * pruned.kv_heads == pruned.v_proj.weight.shape[0]
    pruned.prune_heads([kept[-1]] if len(kept) == pruned.kv_heads else kept[-2:])  # and again, by original numbers
    assert pruned(x).isfinite().all()


@pytest.mark.law(*BOTH)
def test_sharing_keys_of_a_trained_layer_pools_them_and_copies_the_rest() -> None:
    for layer in (CausalAttention(12, 4), MultiHeadAttention(12, 4, bias=False, head_dim=5, dropout=0.25).eval()):
        before = copy.deepcopy(layer.state_dict())
        shared = share_key_heads(layer, 2)
        e = layer.head_dim
        for kind in ("weight", "bias") if layer.q_proj.bias is not None else ("weight",):
            old, new = getattr(layer.k_proj, kind), getattr(shared.k_proj, kind)
            torch.testing.assert_close(new[:e], (old[:e] + old[e : 2 * e]) / 2)
            torch.testing.assert_close(getattr(shared.out_proj, kind), getattr(layer.out_proj, kind), rtol=0, atol=0)
        assert (shared.kv_heads, shared.dropout, shared.training) == (2, layer.dropout, layer.training)
        x = torch.randn(2, 4, 12)
        layer.eval()
        full = share_key_heads(layer, 4)
        torch.testing.assert_close(full(x), MultiHeadAttention.forward(layer, x))
        MultiQueryAttention(12, 4, head_dim=e, bias=layer.q_proj.bias is not None).load_state_dict(
            share_key_heads(shared, 1).state_dict()
        )
        assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


@pytest.mark.law(*BOTH)
def test_empty_inputs_and_hidden_nan_are_finite() -> None:
    layer = GroupedQueryAttention(8, 4, 2, rope=RotaryEmbedding(2))
    for b, t in ((0, 5), (2, 0), (2, 1)):
        assert layer(torch.randn(b, t, 8), causal=True).shape == (b, t, 8)
    x = torch.randn(2, 5, 8)
    x[1, 3:] = math.nan
    out = layer(x, mask=padding(torch.tensor([5, 3])), causal=True)
    assert out[0].isfinite().all()
    assert out[1, :3].isfinite().all()


@pytest.mark.registration(*BOTH)
@pytest.mark.parametrize(
    "make",
    [
        lambda **k: GroupedQueryAttention(8, 4, 2, rope=RotaryEmbedding(2), **k),
        lambda **k: MultiQueryAttention(8, 4, **k),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_state_dict_copies_precision_compilation_and_devices(make: type[GroupedQueryAttention]) -> None:
    layer, other, x = make(), make(), torch.randn(2, 5, 8)
    other.load_state_dict(layer.state_dict())
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    for again in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(again(turned), layer(x))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, causal=True), layer(x, causal=True))
    want = layer(x)
    for dtype in (torch.bfloat16, torch.float16):
        low = copy.deepcopy(layer).to(dtype)(x.to(dtype))
        assert low.dtype == dtype
        torch.testing.assert_close(low.float(), want, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x).float(), want, rtol=0.05, atol=0.05)
    assert make(device="meta").q_proj.weight.is_meta
    assert make(dtype=torch.float64)(x.double()).dtype == torch.float64
    small = x[:1, :2].double().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):  # torch's tiled kernel has no second derivative
        assert torch.autograd.gradgradcheck(make(dtype=torch.float64), (small,))


@pytest.mark.refusal(*BOTH)
def test_refusals() -> None:
    with refuses(ConfigError, "3 for 8 heads", "divisor"):
        GroupedQueryAttention(16, 8, 3)
    with refuses(ConfigError, "16 for 8 heads"):
        GroupedQueryAttention(16, 8, 16)
    with refuses(ConfigError, "5 for dim 16"):
        MultiQueryAttention(16, 5)
    for bad in (0, -1, 1.5, True, math.nan):
        with refuses(ConfigError, "kv_heads", bad):
            GroupedQueryAttention(16, 4, bad)
        with refuses(ConfigError, "heads", bad):
            MultiQueryAttention(16, bad)
        with refuses(ConfigError, "head_dim", bad):
            MultiQueryAttention(16, 4, head_dim=bad)
    with refuses(ConfigError, "dropout", 1.0):
        GroupedQueryAttention(16, 4, 2, dropout=1.0)
    with refuses(ConfigError, "torch.int64"):
        GroupedQueryAttention(16, 4, 2, dtype=torch.int64)
    with refuses(ConfigError, "rope", "8 features for heads of 4"):
        GroupedQueryAttention(16, 4, 2, rope=RotaryEmbedding(8))
    with refuses(ConfigError, "rope", 4):
        GroupedQueryAttention(16, 4, 2, rope=4)  # type: ignore[arg-type]


@pytest.mark.refusal(*BOTH)
def test_refusals_of_inputs_and_conversions() -> None:
    layer, x = GroupedQueryAttention(16, 4, 2, rope=RotaryEmbedding(4)), torch.randn(2, 3, 16)
    with refuses(ConfigError, "a memory"):
        layer(x, torch.randn(2, 5, 16))
    with refuses(ConfigError, "object"):
        layer(x, cache=object())  # type: ignore[arg-type]
    for bad in (torch.randn(2, 3, 15), torch.randn(3, 16)):
        with refuses(ShapeError, tuple(bad.shape), 16):
            layer(bad)
    with refuses(ShapeError, "attention mask", (3, 4)):
        layer(x, mask=torch.ones(3, 4, dtype=torch.bool))
    with refuses(ConfigError, "groups of [1, 2]", "one size"):
        layer.prune_heads([0])
    with refuses(ConfigError, "share_key_heads layer", "MultiHeadAttention"):
        share_key_heads(MultiHeadAttention(16, 4, kv_dim=5), 2)
    with refuses(ConfigError, "3 for 4 heads"):
        share_key_heads(MultiHeadAttention(16, 4), 3)
    pruned = MultiHeadAttention(16, 4)
    pruned.prune_heads([1])
    with refuses(ConfigError, "kept_heads=[0, 2, 3]"):
        share_key_heads(pruned, 1)


@pytest.mark.refusal("gqa", "mqa")
def test_what_is_no_layer_is_not_converted() -> None:
    with refuses(ConfigError, "int"):
        share_key_heads(5, 2)  # type: ignore[arg-type]
    with refuses(ConfigError, "kv_heads", "None"):
        GroupedQueryAttention(8, 2, None)  # type: ignore[arg-type]
