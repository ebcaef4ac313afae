"""Differential attention against transformers' DiffLlama, and its cache."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from einops import rearrange
from torch import Tensor
from transformers import DiffLlamaConfig
from transformers.models.diffllama.modeling_diffllama import DiffLlamaAttention

from handbook_src.errors import ConfigError, HandbookError, ShapeError
from handbook_src.functional.attention.mask import Mask, left_padding, padding, window
from handbook_src.functional.positions.rope import rope_cos_sin, rope_frequencies
from handbook_src.layers.attention.differential_attention import DifferentialAttention
from handbook_src.layers.attention.kv_cache import AppendCache, StaticCache
from handbook_src.layers.positions.rope import RotaryEmbedding
from handbook_src.testing import assert_batch_independent, assert_causal, assert_parity, refuses

ID = "differential-attention"


def loaded(ours: DifferentialAttention, theirs: DiffLlamaAttention) -> DifferentialAttention:
    """DiffLlama's maps of a head stand half a layer apart, ours side by side; its norm has no gain."""
    state = {}
    for name, value in theirs.state_dict().items():
        if name.startswith(("q_proj", "k_proj", "v_proj")):
            value = rearrange(value, "(two h e) ... -> (h two e) ...", two=2, e=ours.head_dim)
        state[name.replace("o_proj", "out_proj")] = value
    state["norm.weight"] = torch.ones(2 * ours.head_dim, dtype=torch.float64)
    ours.load_state_dict(state)
    return ours


@pytest.mark.parity(ID)
@pytest.mark.outside(ID)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("layer", [1, 5])
@pytest.mark.parametrize("t", [1, 6])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_diffllama(heads: int, kv_heads: int, layer: int, t: int, bias: bool) -> None:
    config = DiffLlamaConfig(
        hidden_size=48, num_attention_heads=2 * heads, num_key_value_heads=2 * kv_heads, attention_bias=bias,
        rms_norm_eps=1e-5, attn_implementation="sdpa",
    )  # fmt: skip
    theirs, e = DiffLlamaAttention(config, layer - 1).double(), 24 // heads
    rope = RotaryEmbedding(e, dtype=torch.float64)
    ours = DifferentialAttention(48, heads, kv_heads=kv_heads, layer=layer, bias=bias, rope=rope).double()
    loaded(ours, theirs)
    cos, sin = rope_cos_sin(torch.arange(t), rope_frequencies(e, dtype=torch.float64))
    turn = tuple(torch.cat((x, x), -1)[None] for x in (cos, sin))
    hidden = torch.full((t, t), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    same = [(ours.out_proj.weight, theirs.o_proj.weight), (ours.lambda_q1, theirs.lambda_q1)]
    # transformers forms lambda in float32
    assert_parity(
        lambda x: ours(x, causal=True), lambda x: theirs(x, turn, hidden)[0], [torch.randn(2, t, 48)],
        parameters=same, rtol=1e-5, atol=1e-6,
    )  # fmt: skip


@pytest.mark.parity(ID)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(2, 2, 4), (4, 2, 3), (1, 1, 1)])
def test_the_equations_head_by_head(heads: int, kv_heads: int, head_dim: int) -> None:
    layer = DifferentialAttention(16, heads, kv_heads=kv_heads, layer=3, head_dim=head_dim).double()
    with torch.no_grad():
        layer.norm.weight.uniform_(0.5, 1.5)
    start = 0.8 - 0.6 * math.exp(-0.6)

    def by_hand(x: Tensor) -> Tensor:
        p = dict(layer.named_parameters())
        lam = (p["lambda_q1"] @ p["lambda_k1"]).exp() - (p["lambda_q2"] @ p["lambda_k2"]).exp() + start
        q, k = (
            (x @ p[f"{n}_proj.weight"].T).unflatten(-1, (-1, 2, head_dim)) for n in ("q", "k")
        )  # head, map, feature
        v = (x @ p["v_proj.weight"].T).unflatten(-1, (-1, 2 * head_dim))
        rows = []
        for i in range(heads):
            j = i * kv_heads // heads
            a = [torch.softmax(q[:, :, i, m] @ k[:, :, j, m].mT / head_dim**0.5, -1) for m in (0, 1)]
            head = (a[0] - lam * a[1]) @ v[:, :, j]
            head = head / (head.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p["norm.weight"]
            rows.append((1 - start) * head)
        return torch.cat(rows, -1) @ p["out_proj.weight"].T

    assert_parity(layer, by_hand, [torch.randn(2, 5, 16)])


@pytest.mark.law(ID)
@pytest.mark.parametrize("steps", [[6], [1] * 6, [3, 2, 1]])
@pytest.mark.parametrize("extra", [None, window(3), left_padding(torch.tensor([0, 2]))], ids=str)
def test_cached_equals_uncached(steps: list[int], extra: Mask | None) -> None:
    rope = RotaryEmbedding(4, dtype=torch.float64)
    layer, x = DifferentialAttention(16, 2, kv_heads=1, rope=rope).double(), torch.randn(2, 6, 16).double()
    with torch.no_grad():
        want = layer(x, extra, causal=True)
        for cache in (AppendCache(), StaticCache(6)):
            got = [layer(part, extra, causal=True, cache=cache) for part in x.split(steps, 1)]
            torch.testing.assert_close(torch.cat(got, 1), want)
            assert cache.bytes == 2 * 2 * 6 * (2 * 1) * 4 * 8
        with refuses(ShapeError, "6 tokens on top of 0", 5):
            layer(x, causal=True, cache=StaticCache(5))


@pytest.mark.law(ID)
def test_causal_batch_independent_and_finite() -> None:
    layer, x = DifferentialAttention(16, 2, rope=RotaryEmbedding(4)).double(), torch.randn(2, 5, 16).double()
    assert_causal(lambda x: layer(x, causal=True), x)
    assert_batch_independent(lambda x: layer(x, causal=True), x)
    for b, t in ((0, 5), (2, 0), (2, 1)):
        assert layer(torch.randn(b, t, 16).double(), causal=True).shape == (b, t, 16)
    x[1, 3:] = math.nan
    out = layer(x, padding(torch.tensor([5, 3])), causal=True)
    assert out[0].isfinite().all()
    assert out[1, :3].isfinite().all()


@pytest.mark.law(ID)
def test_weights_sum_to_one_minus_lambda_and_lambda_starts_by_depth() -> None:
    for number in (1, 4, 12):
        layer = DifferentialAttention(16, 2, layer=number).double()
        weights = layer.weights(torch.randn(2, 5, 16).double(), causal=True)
        torch.testing.assert_close(weights.sum(-1), (1 - layer.lam()).expand(2, 2, 5))
        assert (weights.triu(1) == 0).all()
        with torch.no_grad():
            layer.lambda_q1.zero_(), layer.lambda_q2.zero_()
        assert layer.lam().item() == pytest.approx(layer.lambda_init)
        assert 0.2 <= layer.lambda_init < 0.8


@pytest.mark.law(ID)
def test_lambdas_vectors_are_drawn_with_a_deviation_of_a_tenth() -> None:
    layer = DifferentialAttention(2, 1, head_dim=20_000)
    for _ in range(2):
        for vector in (layer.lambda_q1, layer.lambda_k1, layer.lambda_q2, layer.lambda_k2):
            assert vector.std().item() == pytest.approx(0.1, rel=0.03)  # six deviations of the estimate
            vector.data.zero_()
        layer.reset_parameters()


@pytest.mark.law(ID)
def test_each_head_is_normalised_alone_and_half_the_heads_cost_the_same() -> None:
    layer, x = DifferentialAttention(16, 2).double(), torch.randn(2, 5, 16).double()
    with torch.no_grad():
        layer.out_proj.weight.copy_(torch.eye(16))
        out = layer(x).unflatten(-1, (2, 8))
        size = out.square().mean(-1).sqrt() / (1 - layer.lambda_init)
        torch.testing.assert_close(size, torch.ones_like(size), rtol=0.05, atol=0)  # eps takes a little
        layer.v_proj.weight[8:].mul_(100.0)  # the second head's values
        torch.testing.assert_close(layer(x).unflatten(-1, (2, 8))[:, :, 0], out[:, :, 0])
    assert sum(p.numel() for p in layer.parameters()) == 4 * 16**2 + 4 * 4 + 8


@pytest.mark.registration(ID)
@pytest.mark.usefixtures("unchecked")
def test_state_dict_copies_precision_compilation_and_devices() -> None:
    layer, other = (DifferentialAttention(16, 2, rope=RotaryEmbedding(4)) for _ in range(2))
    x = torch.randn(2, 5, 16)
    other.load_state_dict(layer.state_dict())
    want = layer(x, causal=True)
    for again in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(again(x.mT.contiguous().mT, causal=True), want)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, causal=True), want)
    for dtype in (torch.bfloat16, torch.float16):
        low = copy.deepcopy(layer).to(dtype)(x.to(dtype), causal=True)
        assert low.dtype == dtype
        torch.testing.assert_close(low.float(), want, rtol=0.1, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x, causal=True).float(), want, rtol=0.1, atol=0.1)
    meta = DifferentialAttention(16, 2, device="meta")
    assert all(p.is_meta for p in meta.parameters())
    assert meta(x.to("meta")).shape == x.shape
    assert DifferentialAttention(16, 2, dtype=torch.float64)(x.double()).dtype == torch.float64
    torch.manual_seed(1)
    before = layer.lambda_q1.clone()
    layer.reset_parameters()
    assert not torch.equal(before, layer.lambda_q1)


@pytest.mark.refusal(ID)
def test_refusals() -> None:
    with refuses(ConfigError, "3 for dim 16", "dim / 2"):
        DifferentialAttention(16, 3)
    with refuses(ConfigError, "3 for 4 heads"):
        DifferentialAttention(16, 4, kv_heads=3)
    for bad in (0, -1, 1.5, True, math.nan):
        for name in ("kv_heads", "layer", "head_dim"):
            with refuses(ConfigError, name, bad):
                DifferentialAttention(16, 4, **{name: bad})
        with refuses(ConfigError, "heads", bad):
            DifferentialAttention(16, bad)
    with refuses(ConfigError, "rope", "at most 4"):
        DifferentialAttention(16, 2, rope=RotaryEmbedding(8))
    with refuses(ConfigError, "rope", "at most 4"):
        DifferentialAttention(16, 2, rope=4)  # type: ignore[arg-type]
    with refuses(ConfigError, "torch.int64"):
        DifferentialAttention(16, 2, dtype=torch.int64)
    layer, x = DifferentialAttention(16, 2), torch.randn(2, 3, 16)
    for shape in ((2, 3, 15), (3, 16), (1, 2, 3, 16)):
        with refuses(ShapeError, "DifferentialAttention", shape):
            layer(torch.randn(shape))
    with refuses(ConfigError, "cache", "{}"):
        layer(x, cache={})  # type: ignore[arg-type]
    with refuses(ShapeError, "attention mask", (3, 4)):
        layer(x, torch.ones(3, 4, dtype=torch.bool))


@pytest.mark.refusal("differential-attention")
def test_inputs_and_sizes_of_the_wrong_kind_are_refused() -> None:
    layer, x = DifferentialAttention(8, 2), torch.randn(2, 3, 8)
    for wrong, value in ((x.long(), "int64"), (x.double(), "float64"), (None, "NoneType")):
        with refuses(HandbookError, value):
            layer(wrong)
    for sizes in ((None, 2), (8, None)):
        with refuses(ConfigError, "None"):
            DifferentialAttention(*sizes)  # type: ignore[arg-type]
