"""Multi-head latent attention against transformers' DeepSeek-V2 and V3, and its cache."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from handbook_src.errors import ConfigError, HandbookError, ShapeError
from handbook_src.functional.attention.mask import padding, window
from handbook_src.functional.positions.rope import rope_cos_sin, rope_frequencies
from handbook_src.layers.attention.kv_cache import AppendCache, QuantizedCache, StaticCache
from handbook_src.layers.attention.mla import LatentCache, MultiHeadLatentAttention
from handbook_src.layers.positions.rope import RotaryEmbedding
from handbook_src.testing import assert_batch_independent, assert_causal, assert_parity, refuses


def small(**changes: object) -> MultiHeadLatentAttention:
    settings = {"latent_dim": 6, "head_dim": 4, "rope": 2, "value_dim": 3}
    return MultiHeadLatentAttention(16, 4, **{**settings, **changes})


def double(layer: nn.Module) -> nn.Module:
    layer.double()
    with torch.no_grad():
        for p in layer.parameters():
            p.uniform_(-0.5, 0.5)
    return layer


def twins(q_rank: int | None, interleaved: bool, heads: int, c: int, e: int, r: int, w: int) -> tuple[nn.Module, ...]:
    config = DeepseekV3Config(
        hidden_size=12, num_attention_heads=heads, num_key_value_heads=heads, q_lora_rank=q_rank, kv_lora_rank=c,
        qk_nope_head_dim=e, qk_rope_head_dim=r, v_head_dim=w, rope_interleave=interleaved, attn_implementation="sdpa",
    )  # fmt: skip
    theirs = double(DeepseekV3Attention(config, 0))
    rope = RotaryEmbedding(r, interleaved=interleaved, dtype=torch.float64)
    ours = MultiHeadLatentAttention(
        12, heads, latent_dim=c, query_latent_dim=q_rank, head_dim=e, value_dim=w, rope=rope
    ).double()
    ours.load_state_dict(theirs.state_dict())  # the keys are the released models'
    return ours, theirs


@pytest.mark.parity("mla")
@pytest.mark.outside("mla")
@pytest.mark.parametrize("form", ["decompressed", "absorbed"])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("q_rank", "heads", "c", "e", "r", "w"), [(5, 3, 6, 4, 2, 4), (None, 2, 7, 3, 4, 5)])
@pytest.mark.parametrize("t", [1, 6])
def test_equals_deepseek_v3(
    form: str, interleaved: bool, q_rank: int | None, heads: int, c: int, e: int, r: int, w: int, t: int
) -> None:
    ours, theirs = twins(q_rank, interleaved, heads, c, e, r, w)
    cos, sin = rope_cos_sin(torch.arange(t), rope_frequencies(r, dtype=torch.float64))
    turn = tuple(torch.cat((x, x), -1)[None] for x in (cos, sin))
    hidden = torch.full((t, t), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    pairs = [(p, dict(theirs.named_parameters())[name]) for name, p in ours.named_parameters()]
    # transformers norms the latents in float32
    assert_parity(
        lambda x: ours(x, causal=True, form=form), lambda x: theirs(x, turn, hidden)[0], [torch.randn(2, t, 12)],
        parameters=pairs, rtol=1e-4, atol=1e-5,
    )  # fmt: skip


@pytest.mark.outside("mla")
def test_equals_deepseek_v2_whose_rotation_is_complex() -> None:
    config = DeepseekV2Config(
        hidden_size=12, num_attention_heads=3, num_key_value_heads=3, q_lora_rank=5, kv_lora_rank=6,
        qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=3, attn_implementation="sdpa",
    )  # fmt: skip
    theirs = DeepseekV2Attention(config, 0)
    ours = MultiHeadLatentAttention(12, 3, latent_dim=6, query_latent_dim=5, head_dim=4, value_dim=3, rope=4)
    ours.load_state_dict(theirs.state_dict())
    angles = torch.arange(6)[:, None] * rope_frequencies(4)
    hidden = torch.full((6, 6), -torch.inf).triu(1)[None, None]
    x = torch.randn(2, 6, 12)
    want = theirs(x, hidden, None, torch.polar(torch.ones_like(angles), angles)[None])[0]
    torch.testing.assert_close(ours(x, causal=True), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parity("mla")
@pytest.mark.parametrize("q_rank", [None, 5])
def test_the_equations_line_by_line(q_rank: int | None) -> None:
    layer = double(small(query_latent_dim=q_rank, rope=RotaryEmbedding(2, interleaved=True, dtype=torch.float64)))
    p = dict(layer.named_parameters())

    def norm(x: Tensor, gain: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain

    def turn(x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[1], dtype=torch.float64).view(1, -1, *[1] * (x.ndim - 3))
        a, b = x[..., 0], x[..., 1]
        return torch.stack((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1)

    def by_hand(x: Tensor) -> Tensor:
        down = x @ p["kv_a_proj_with_mqa.weight"].T
        latent, key = norm(down[..., :6], p["kv_a_layernorm.weight"]), turn(down[..., 6:])
        if q_rank is None:
            q = x @ p["q_proj.weight"].T
        else:
            q = norm(x @ p["q_a_proj.weight"].T, p["q_a_layernorm.weight"]) @ p["q_b_proj.weight"].T
        q, up = q.unflatten(-1, (4, 6)), (latent @ p["kv_b_proj.weight"].T).unflatten(-1, (4, 7))
        q = torch.cat((q[..., :4], turn(q[..., 4:])), -1)
        k = torch.cat((up[..., :4], key[:, :, None].expand(-1, -1, 4, -1)), -1)
        a = torch.einsum("bthe,bshe->bhts", q, k) / 6**0.5
        a = a.masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), -math.inf).softmax(-1)
        return torch.einsum("bhts,bshw->bthw", a, up[..., 4:]).flatten(2) @ p["o_proj.weight"].T

    assert_parity(lambda x: layer(x, causal=True), by_hand, [torch.randn(2, 5, 16)])


@pytest.mark.law("mla")
@pytest.mark.parametrize("form", ["auto", "decompressed", "absorbed"])
@pytest.mark.parametrize("steps", [[6], [1] * 6, [3, 2, 1]])
@pytest.mark.parametrize("make", [LatentCache, lambda: LatentCache(8), AppendCache, lambda: StaticCache(6)])
def test_cached_equals_uncached_in_both_forms(form: str, steps: list[int], make: type[LatentCache]) -> None:
    layer, x = small(rope=RotaryEmbedding(2, interleaved=True)).double(), torch.randn(2, 6, 16).double()
    with torch.no_grad():
        for mask in (None, window(3)):
            cache = make()
            got = [layer(part, mask, causal=True, cache=cache, form=form) for part in x.split(steps, 1)]
            torch.testing.assert_close(torch.cat(got, 1), layer(x, mask, causal=True))


@pytest.mark.law("mla")
def test_a_cache_holds_the_latent_and_one_rotary_key_and_nothing_else() -> None:
    for heads in (2, 8):
        layer, x = MultiHeadLatentAttention(16, heads, latent_dim=6, head_dim=4, rope=2), torch.randn(3, 5, 16)
        cache, block = LatentCache(), LatentCache(9)
        with torch.no_grad():
            layer(x, causal=True, cache=cache), layer(x, causal=True, cache=block)
        assert cache.bytes == 3 * 5 * (6 + 2) * 4  # whatever the number of heads
        assert block.bytes == 3 * 9 * (6 + 2) * 4
        assert (cache.length, cache.seen) == (5, 5)
        cache.reset()
        assert (cache.length, cache.bytes) == (0, 0)
        torch.testing.assert_close(layer(x[:1], causal=True, cache=cache), layer(x[:1], causal=True))


@pytest.mark.law("mla")
def test_gradients_flow_through_a_growing_cache_and_int8_is_near() -> None:
    layer, x = small(), torch.randn(2, 4, 16)
    cache, grads = LatentCache(), []
    layer(x, causal=True).square().sum().backward()
    for p in layer.parameters():
        grads.append(p.grad.clone())
        p.grad = None
    out = torch.cat([layer(part, causal=True, cache=cache) for part in x.split([2, 1, 1], 1)], 1)
    out.square().sum().backward()
    for p, want in zip(layer.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, want, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, causal=True, cache=QuantizedCache()), out, rtol=0.05, atol=0.02)


@pytest.mark.law("mla")
@pytest.mark.parametrize("form", ["decompressed", "absorbed"])
def test_causal_batch_independent_relative_and_finite(form: str) -> None:
    layer, x = small(query_latent_dim=5, rope=RotaryEmbedding(2, dtype=torch.float64)).double(), torch.randn(2, 5, 16)
    x = x.double()
    assert_causal(lambda x: layer(x, causal=True, form=form), x)
    assert_batch_independent(lambda x: layer(x, causal=True, form=form), x)
    late = LatentCache()  # only differences of positions matter: the same tokens after ten hidden ones
    layer(torch.randn(2, 10, 16).double(), causal=True, cache=late)
    shown = torch.arange(15).expand(5, 15) >= 10
    torch.testing.assert_close(layer(x, shown, causal=True, cache=late, form=form), layer(x, causal=True))
    for b, t in ((0, 5), (2, 0), (2, 1)):
        assert layer(torch.randn(b, t, 16).double(), causal=True, form=form).shape == (b, t, 16)
    x[1, 3:] = math.nan
    out = layer(x, padding(torch.tensor([5, 3])), causal=True, form=form)
    assert out[0].isfinite().all()
    assert out[1, :3].isfinite().all()


@pytest.mark.registration("mla")
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("q_rank", [None, 5])
def test_state_dict_copies_precision_compilation_and_devices(q_rank: int | None) -> None:
    layer, other, x = small(query_latent_dim=q_rank), small(query_latent_dim=q_rank), torch.randn(2, 5, 16)
    other.load_state_dict(layer.state_dict())
    want = layer(x, causal=True)
    for again in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(again(x.mT.contiguous().mT, causal=True), want)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, causal=True), want)
    for form in ("decompressed", "absorbed"):
        for dtype in (torch.bfloat16, torch.float16):
            low = copy.deepcopy(layer).to(dtype)(x.to(dtype), causal=True, form=form)
            assert low.dtype == dtype
            torch.testing.assert_close(low.float(), want, rtol=0.05, atol=0.05)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(layer(x, causal=True, form=form).float(), want, rtol=0.05, atol=0.05)
    meta = small(device="meta", query_latent_dim=q_rank)
    assert all(p.is_meta for p in meta.parameters())
    assert meta(x.to("meta"), causal=True).shape == x.shape
    assert small(dtype=torch.float64)(x.double()).dtype == torch.float64
    torch.manual_seed(1)
    before = layer.kv_b_proj.weight.clone()
    layer.reset_parameters()
    assert not torch.equal(before, layer.kv_b_proj.weight)
    assert (layer.kv_a_layernorm.weight == 1).all()


@pytest.mark.refusal("mla")
def test_refusals() -> None:
    for bad in (0, -1, 1.5, True, math.nan):
        for name in ("latent_dim", "head_dim", "value_dim", "query_latent_dim", "rope"):
            with refuses(ConfigError, name, bad):
                small(**{name: bad})
        with refuses(ConfigError, "heads", bad):
            MultiHeadLatentAttention(16, bad, latent_dim=4)
        with refuses(ConfigError, "capacity", bad):
            LatentCache(bad)
    with refuses(ConfigError, "rope", 1, "at least 2"):
        small(rope=1)
    with refuses(ConfigError, "rotary dim", 3):
        small(rope=3)
    with refuses(ConfigError, "torch.int32"):
        small(dtype=torch.int32)
    layer, x = small(), torch.randn(2, 3, 16)
    for shape in ((2, 3, 15), (3, 16), (1, 2, 3, 16)):
        with refuses(ShapeError, "MultiHeadLatentAttention", shape):
            layer(torch.randn(shape))
    with refuses(ConfigError, "cache", "a LatentCache or a KVCache"):
        layer(x, cache={})  # type: ignore[arg-type]
    with refuses(ShapeError, "attention mask", (3, 4)):
        layer(x, torch.ones(3, 4, dtype=torch.bool))
    with refuses(ConfigError, "form", "fast"):
        layer(x, form="fast")  # type: ignore[arg-type]


@pytest.mark.refusal("mla")
@pytest.mark.law("mla")
@pytest.mark.parametrize("capacity", [None, 9])
def test_a_copied_cache_goes_on_by_itself_and_serves_outside_inference_mode(capacity: int | None) -> None:
    first, tokens = LatentCache(capacity), torch.randn(4, 1, 3)
    with torch.inference_mode():
        first.update(tokens[None, 0])
    with torch.no_grad():
        second = copy.copy(first)
        one, other = first.update(tokens[None, 1]), second.update(tokens[None, 2])
    assert torch.equal(one, tokens[[0, 1], 0][None])
    assert torch.equal(other, tokens[[0, 2], 0][None])


def test_refusals_of_the_cache() -> None:
    cache, kv = LatentCache(4), torch.randn(2, 3, 8)
    cache.update(kv)
    with refuses(ShapeError, "2 tokens on top of 3", 4):
        cache.update(kv[:, :2])
    for other in (kv[:1], kv[..., :6], kv.double(), kv.to("meta")):
        with refuses(ShapeError, "as in the first update"):
            cache.update(other[:, :1])
    with refuses(ShapeError, "requires grad", "no_grad"):
        cache.update(kv[:, :1].requires_grad_())
    with refuses(ShapeError, (3, 8)):
        LatentCache().update(kv[0])
    torch.testing.assert_close(cache.update(kv[:, :1]), torch.cat((kv, kv[:, :1]), 1), rtol=0, atol=0)


@pytest.mark.refusal("mla")
def test_inputs_of_the_wrong_kind_are_refused() -> None:
    layer, x = MultiHeadLatentAttention(8, 2, latent_dim=4, head_dim=4, rope=2), torch.randn(2, 3, 8)
    for wrong, value in ((x.long(), "int64"), (x.double(), "float64"), (None, "NoneType")):
        with refuses(HandbookError, value):
            layer(wrong)
