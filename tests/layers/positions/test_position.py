"""Position codes as layers: their functions, published weights, cached decoding, casts; their refusals."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.positions.position import alibi_bias, alibi_slopes, sinusoidal_positions, t5_relative_bias
from handbook_src.layers.attention.attention import MultiHeadAttention
from handbook_src.layers.positions.position import (
    ALiBi,
    LearnedPositionalEmbedding,
    SinusoidalPositionalEncoding,
    T5RelativePositionBias,
)
from handbook_src.testing import assert_causal, assert_parity, refuses
from handbook_src.testing.checker import unchecked
from handbook_src.testing.oracle import load

F64 = torch.float64
ADDED = {
    "sinusoidal-position": lambda **k: SinusoidalPositionalEncoding(6, **k),
    "learned-position": lambda **k: LearnedPositionalEmbedding(32, 6, **k),
}
BIASES = {
    "alibi": lambda **k: ALiBi(3, **k),
    "t5-relative-bias": lambda **k: T5RelativePositionBias(3, **k),
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# ---------------------------------------------------------------- parity
@pytest.mark.parity("sinusoidal-position")
@pytest.mark.parametrize("dim", [1, 5, 8])
@pytest.mark.parametrize("max_positions", [0, 4, 100])
def test_sinusoidal_layer_adds_its_function(dim, max_positions):
    layer = SinusoidalPositionalEncoding(dim, base=50.0, max_positions=max_positions, dtype=F64)
    assert_parity(
        lambda x: layer(x, 3),
        lambda x: x + sinusoidal_positions(7, dim, offset=3, base=50.0, dtype=F64),
        [draw(2, 7, dim)],
    )


@pytest.mark.parity("learned-position")
@pytest.mark.parametrize(("t", "offset"), [(1, 0), (9, 0), (4, 5), (1, 8)])
def test_learned_layer_is_an_embedding_of_counted_positions(t, offset):
    layer, theirs = LearnedPositionalEmbedding(9, 5, dtype=F64), nn.Embedding(9, 5, dtype=F64)
    theirs.load_state_dict(layer.state_dict())  # the same key
    assert_parity(
        lambda x: layer(x, offset),
        lambda x: x + theirs(torch.arange(offset, offset + t)),
        [draw(2, t, 5)],
        parameters=[(layer.weight, theirs.weight)],
    )


@pytest.mark.outside("learned-position")
def test_learned_layer_is_gpt2s():
    gpt2 = load("transformers.models.gpt2.modeling_gpt2")
    theirs = gpt2.GPT2Model(gpt2.GPT2Config(vocab_size=7, n_positions=16, n_embd=8, n_head=2, n_layer=0)).eval()
    layer = LearnedPositionalEmbedding(16, 8)
    layer.load_state_dict(theirs.wpe.state_dict())
    ids = torch.arange(14).view(2, 7) % 7
    want = theirs(ids).last_hidden_state
    torch.testing.assert_close(theirs.ln_f(layer(theirs.wte(ids))), want)


@pytest.mark.parity("alibi")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [1, 6, 8])
def test_alibi_layer_is_its_function(heads, causal):
    layer = ALiBi(heads, causal=causal, dtype=F64)
    for t, s, offset in ((4, None, None), (1, 6, None), (2, 6, 1)):
        want = alibi_bias(alibi_slopes(heads, dtype=F64), t, s, offset=offset, causal=causal)
        assert torch.equal(layer(t, s, offset=offset), want)


@pytest.mark.outside("alibi")
def test_attention_with_alibi_is_blooms():
    bloom = load("transformers.models.bloom.modeling_bloom")
    config = bloom.BloomConfig(hidden_size=12, n_head=3, n_layer=1, attention_dropout=0.0, hidden_dropout=0.0)
    config._attn_implementation = "eager"
    theirs = bloom.BloomAttention(config, layer_idx=0).to(F64).eval()
    ours = MultiHeadAttention(12, 3).to(F64)
    fused = theirs.query_key_value  # rows stand as (heads, qkv, features)
    for i, proj in enumerate((ours.q_proj, ours.k_proj, ours.v_proj)):
        proj.weight.data = fused.weight.data.view(3, 3, 4, 12)[:, i].reshape(12, 12).clone()
        proj.bias.data = fused.bias.data.view(3, 3, 4)[:, i].reshape(12).clone()
    ours.out_proj.load_state_dict(theirs.dense.state_dict())
    t, hidden = 5, torch.ones(5, 5, dtype=torch.bool).triu(1)
    alibi = bloom.build_alibi_tensor(torch.ones(2, t, dtype=torch.long), 3, F64)
    mask = torch.zeros(2, 1, t, t, dtype=F64).masked_fill(hidden, torch.finfo(F64).min)
    layer = ALiBi(3, dtype=F64)
    assert_parity(
        lambda x: ours(x, mask=layer(t)),
        lambda x: theirs(x, torch.zeros_like(x), alibi=alibi, attention_mask=mask)[0],
        [draw(2, t, 12)],
        rtol=1e-6,  # BLOOM's slopes are float32
        atol=1e-7,
    )


@pytest.mark.outside("t5-relative-bias")
@pytest.mark.parity("t5-relative-bias")
@pytest.mark.parametrize("decoder", [False, True])
def test_t5_layer_loads_t5s_weights(decoder):
    t5 = load("transformers.models.t5.modeling_t5")
    config = t5.T5Config(d_model=6, d_kv=2, num_heads=3, is_decoder=decoder)
    theirs = t5.T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    layer = T5RelativePositionBias(3, bidirectional=not decoder)
    layer.load_state_dict(theirs.relative_attention_bias.state_dict())
    assert torch.equal(layer(150), theirs.compute_bias(150, 150))
    assert torch.equal(layer(2, 150), theirs.compute_bias(2, 150, past_seen_tokens=148))
    got = layer(4, 9).square().sum()
    assert_parity(lambda w: t5_relative_bias(w, 4, 9, bidirectional=not decoder).square().sum(), lambda w: (
        w[t5.T5Attention._relative_position_bucket(torch.arange(9) - torch.arange(5, 9)[:, None], not decoder)]
    ).square().sum(), [layer.weight])  # fmt: skip
    assert got.requires_grad


# ---------------------------------------------------------------- laws
@pytest.mark.law("sinusoidal-position", "learned-position")
@pytest.mark.parametrize("make", ADDED.values(), ids=ADDED.keys())
def test_decoding_one_token_at_a_time_adds_the_same(make):
    layer, x = make(dtype=F64), draw(2, 9, 6)
    whole = layer(x)
    torch.testing.assert_close(torch.cat([layer(x[:, i : i + 1], i) for i in range(9)], 1), whole)
    assert layer(x[:, :0]).shape == (2, 0, 6)
    assert layer(x[:0]).shape == (0, 9, 6)
    same = layer(torch.zeros(1, 9, 6, dtype=F64))  # equal tokens become different vectors
    assert torch.pdist(same[0]).min() > 0


@pytest.mark.law("alibi")
def test_alibi_is_causal():
    attention, layer = MultiHeadAttention(6, 3).to(F64), ALiBi(3, dtype=F64)
    assert_causal(lambda x: attention(x, mask=layer(x.shape[1])), draw(2, 6, 6))


# ---------------------------------------------------------------- registration
@pytest.mark.registration("sinusoidal-position", "alibi")
@pytest.mark.parametrize("make", [ADDED["sinusoidal-position"], BIASES["alibi"]])
def test_fixed_tables_are_not_saved_and_survive_casts(make):
    layer = make()
    (exact,) = [b.clone() for b in layer.buffers()]
    assert layer.state_dict() == {}
    layer.bfloat16()
    (rounded,) = layer.buffers()
    assert rounded.dtype == torch.bfloat16
    layer.float()
    (back,) = layer.buffers()
    assert torch.equal(back, exact)
    (born,) = make(device="meta").to_empty(device="cpu").buffers()
    assert torch.equal(born, exact)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(next(twin.buffers()), exact)


@pytest.mark.registration("learned-position", "t5-relative-bias")
@pytest.mark.parametrize("make", [ADDED["learned-position"], BIASES["t5-relative-bias"]])
def test_trained_tables_go_round(make):
    layer, other = make(), make()
    nn.init.normal_(layer.weight)
    other.load_state_dict(layer.state_dict())
    assert list(layer.state_dict()) == ["weight"]
    assert torch.equal(other.weight, layer.weight)
    assert make(device="meta").weight.is_meta
    assert torch.equal(copy.deepcopy(layer).weight, layer.weight)
    layer.reset_parameters()
    assert layer.weight.std() < 0.1


@pytest.mark.registration("sinusoidal-position", "learned-position")
@pytest.mark.parametrize("make", ADDED.values(), ids=ADDED.keys())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_output_has_the_inputs_dtype(make, dtype):
    x = draw(2, 5, 6).to(dtype)
    assert make()(x).dtype == dtype  # also where the table is float32
    kept = x.clone()
    make().to(dtype)(x, 2)
    assert torch.equal(x, kept)


@pytest.mark.registration("sinusoidal-position", "learned-position", "alibi", "t5-relative-bias")
def test_the_layers_compile_without_a_break():
    x = draw(2, 5, 6).float()
    with unchecked():
        for make in ADDED.values():
            layer = make()
            compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(x, 3), layer(x, 3))
        for make in BIASES.values():
            layer = make()
            compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(3, 7), layer(3, 7))


@pytest.mark.registration("sinusoidal-position", "learned-position", "alibi", "t5-relative-bias")
def test_they_say_what_they_are():
    assert "6, base=10000.0" in repr(ADDED["sinusoidal-position"]())
    assert "32, 6" in repr(ADDED["learned-position"]())
    assert "3, causal=True" in repr(BIASES["alibi"]())
    assert "num_buckets=32" in repr(BIASES["t5-relative-bias"]())


# ---------------------------------------------------------------- refusals
@pytest.mark.refusal("sinusoidal-position", "learned-position")
@pytest.mark.parametrize("make", ADDED.values(), ids=ADDED.keys())
def test_added_codes_refuse_inputs(make):
    layer = make()
    with refuses(ShapeError, "2 axes"):
        layer(draw(5, 6).float())
    with refuses(ShapeError, "(2, 5, 7)", "6 features"):
        layer(draw(2, 5, 7).float())
    with refuses(ShapeError, "torch.int64"):
        layer(torch.ones(2, 5, 6, dtype=torch.long))
    for offset in (-1, 1.5):
        with refuses(ConfigError, "offset", offset):
            layer(draw(2, 5, 6).float(), offset)


@pytest.mark.refusal("sinusoidal-position")
def test_sinusoidal_layer_refuses():
    for dim in (0, -1, 2.5, True):
        with refuses(ConfigError, "dim", dim):
            SinusoidalPositionalEncoding(dim)
    for base in (0.0, math.nan):
        with refuses(ConfigError, "base", base):
            SinusoidalPositionalEncoding(4, base=base)
    with refuses(ConfigError, "max_positions", -5):
        SinusoidalPositionalEncoding(4, max_positions=-5)


@pytest.mark.refusal("learned-position")
def test_learned_layer_refuses():
    for sizes in ((0, 4), (4, 0), (-1, 4), (2.5, 4), (True, 4)):
        with refuses(ConfigError, "LearnedPositionalEmbedding"):
            LearnedPositionalEmbedding(*sizes)
    layer = LearnedPositionalEmbedding(8, 6)
    for t, offset in ((9, 0), (1, 8), (4, 6)):
        with refuses(ShapeError, f"{t} positions from {offset} on", "at most 8"):
            layer(draw(1, t, 6).float(), offset)


@pytest.mark.refusal("alibi", "t5-relative-bias")
@pytest.mark.parametrize("kind", [ALiBi, T5RelativePositionBias])
def test_biases_refuse(kind):
    for heads in (0, -3, 1.5, True):
        with refuses(ConfigError, "heads", heads):
            kind(heads)
    with refuses(ShapeError, "5 queries, 4 keys"):
        kind(2)(5, 4)
    with refuses(ConfigError, "offset", -1):
        kind(2)(1, 4, offset=-1)


@pytest.mark.refusal("t5-relative-bias")
def test_t5_layer_refuses():
    for options, value in (
        ({"num_buckets": 7}, 7),
        ({"num_buckets": 0}, 0),
        ({"max_distance": 8}, 8),
        ({"max_distance": 16, "bidirectional": False}, 16),
        ({"num_buckets": 32.0}, 32.0),
    ):
        with refuses(ConfigError, value):
            T5RelativePositionBias(2, **options)


@pytest.mark.law("alibi")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [8, 12])
def test_alibi_in_half_precision_is_the_exact_bias_rounded(dtype, heads):
    exact = ALiBi(heads).double()(1, 1000).to(dtype)
    got = ALiBi(heads).to(dtype)(1, 1000)
    assert got.dtype == dtype
    assert (got != exact).double().mean() < 1e-3  # ties aside
