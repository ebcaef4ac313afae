"""Perceiver attention against transformers' and the written equations; what the input's size does not change."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.mask import padding
from handbook_src.layers.attention.perceiver_attention import (
    LatentCrossAttention,
    LatentSelfAttention,
    PerceiverAttention,
)
from handbook_src.testing import assert_batch_independent, assert_parity, refuses

ID = "perceiver-attention"
LENGTHS = torch.tensor([7, 3])


def copied(ours: LatentCrossAttention | LatentSelfAttention, theirs: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Copy our weights into a PerceiverLayer; return the pairs."""
    inner, attention = theirs.attention.self, ours.attention
    cross = isinstance(ours, LatentCrossAttention)
    parts = [(ours.norm_q if cross else ours.norm, inner.layernorm1)]
    parts += [(ours.norm_kv, inner.layernorm2)] if cross else []
    parts += [(attention.q_proj, inner.query), (attention.k_proj, inner.key), (attention.v_proj, inner.value)]
    parts += [(attention.out_proj, theirs.attention.output.dense), (ours.norm_mlp, theirs.layernorm)]
    parts += [(ours.mlp.layers[0], theirs.mlp.dense1), (ours.mlp.layers[1], theirs.mlp.dense2)]
    pairs = [(getattr(a, n), getattr(b, n)) for a, b in parts for n in ("weight", "bias")]
    # a bias on all keys moves no softmax: rounding is all its gradient holds
    with torch.no_grad():
        for a, b in pairs:
            a.normal_()
            b.copy_(a)
    return [(a, b) for a, b in pairs if b is not inner.key.bias]


def their_layer(cross: bool, heads: int, widening: int, residual: bool = True) -> nn.Module:
    from transformers import PerceiverConfig
    from transformers.models.perceiver.modeling_perceiver import PerceiverLayer

    config = PerceiverConfig(attention_probs_dropout_prob=0.0, cross_attention_shape_for_attention="q")
    return PerceiverLayer(
        config, is_cross_attention=cross, num_heads=heads, q_dim=8, kv_dim=5 if cross else 8,
        widening_factor=widening, use_query_residual=residual,
    ).double()  # fmt: skip


@pytest.mark.parity(ID)
@pytest.mark.outside(ID)
@pytest.mark.parametrize("widening", [1, 3])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(("heads", "n"), [(1, 7), (4, 7), (2, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_cross_attention_equals_transformers(widening: int, residual: bool, heads: int, n: int, masked: bool) -> None:
    if masked and n == 1:
        return
    ours = LatentCrossAttention(8, 5, heads, widening=widening, residual=residual).double()
    theirs = their_layer(True, heads, widening, residual)
    pairs = copied(ours, theirs)
    mask = padding(LENGTHS) if masked else None
    added = torch.zeros(2, 1, 1, n).double()
    if masked:
        added = added.masked_fill(torch.arange(n) >= LENGTHS[:, None, None, None], -1e30)
    assert_parity(
        lambda z, x: ours(z, x, mask),
        lambda z, x: theirs(z, inputs=x, inputs_mask=added)[0],
        [torch.randn(2, 3, 8), torch.randn(2, n, 5)],
        parameters=pairs,
    )


@pytest.mark.parity(ID)
@pytest.mark.outside(ID)
@pytest.mark.parametrize("heads", [1, 4])
def test_self_attention_equals_transformers(heads: int) -> None:
    ours, theirs = LatentSelfAttention(8, heads, widening=2).double(), their_layer(False, heads, 2)
    pairs = copied(ours, theirs)
    assert_parity(ours, lambda z: theirs(z)[0], [torch.randn(2, 3, 8)], parameters=pairs)


@pytest.mark.parity(ID)
@pytest.mark.parametrize(("depth", "repeats"), [(0, 1), (2, 1), (1, 3), (0, 2)])
@pytest.mark.parametrize("shared", [True, False])
def test_the_whole_is_reading_and_thinking_in_turn(depth: int, repeats: int, shared: bool) -> None:
    layer = PerceiverAttention(3, 8, 5, 2, depth=depth, repeats=repeats, shared=shared).double()
    twin = copy.deepcopy(layer)

    def by_hand(x: Tensor) -> Tensor:
        z = twin.latents.expand(len(x), 3, 8)
        for i in range(repeats):
            read = twin.read[i] if not shared else twin.read[0 if i == 0 else 1]
            q, kv = read.norm_q(z), read.norm_kv(x)
            a = read.attention
            scores = (a.q_proj(q) @ a.k_proj(kv).mT) / math.sqrt(8)
            z = z + a.out_proj(scores.softmax(-1) @ a.v_proj(kv))
            z = z + read.mlp(read.norm_mlp(z))
            for block in twin.think[0 if shared else i]:
                z = block(z)
        return z

    assert len(layer.read) == (min(repeats, 2) if shared else repeats)
    pairs = list(zip(layer.parameters(), twin.parameters(), strict=True))
    assert_parity(layer, by_hand, [torch.randn(2, 7, 5)], parameters=pairs)


@pytest.mark.law(ID)
def test_the_output_has_the_latents_size_whatever_the_input() -> None:
    layer = PerceiverAttention(3, 8, 5, 2, depth=1)
    for b, n in ((2, 1), (2, 7), (1, 1000), (0, 4), (2, 0)):
        assert layer(torch.randn(b, n, 5)).shape == (b, 3, 8)
    assert layer(torch.randn(2, 0, 5)).isfinite().all(), "nothing to read: the latents go on alone"


@pytest.mark.law(ID)
def test_the_order_of_the_input_is_invisible() -> None:
    layer = PerceiverAttention(3, 8, 5, 2, depth=1, repeats=2).double()
    x = torch.randn(2, 7, 5).double()
    torch.testing.assert_close(layer(x[:, torch.randperm(7)]), layer(x), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(layer(torch.cat([x, x], 1)), layer(x), rtol=1e-10, atol=1e-12)
    assert_batch_independent(layer, x)


@pytest.mark.law(ID)
def test_padding_is_not_read_not_even_a_nan() -> None:
    layer = PerceiverAttention(3, 8, 5, 2, depth=1, repeats=2).double()
    x = torch.randn(2, 7, 5).double()
    x[1, 3:] = math.nan
    x.requires_grad_()
    out = layer(x, padding(LENGTHS))
    torch.testing.assert_close(out[1:], layer(x[1:, :3]))
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), [x, *layer.parameters()]))
    seen = padding(LENGTHS).dense(3, 7)
    for mask in (seen, torch.zeros(seen.shape).double().masked_fill(~seen, -math.inf), seen[1, 0].expand(3, 7)):
        torch.testing.assert_close(layer(x, mask)[1], out[1])


def flops(n: int, depth: int) -> int:
    layer, x = PerceiverAttention(4, 8, 5, 2, depth=depth), torch.randn(1, n, 5)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        layer(x)
    return counter.get_total_flops()


@pytest.mark.law(ID)
def test_the_cost_is_linear_in_the_input_and_the_latents_part_is_fixed() -> None:
    one, two, four = (flops(n, 1) for n in (64, 128, 256))
    assert four - two == 2 * (two - one)
    assert two - one == 64 * (2 * 2 * 5 * 8 + 2 * 2 * 4 * 8), "keys and values, then m n scores and m n products"
    assert flops(64, 3) - flops(64, 2) == flops(256, 3) - flops(256, 2), "thinking costs the same whatever was read"


@pytest.mark.registration(ID)
def test_state_dict_copies_precision_devices() -> None:
    layer, other = (PerceiverAttention(3, 8, 5, 2, depth=1, repeats=3) for _ in range(2))
    x = torch.randn(2, 7, 5)
    assert not torch.equal(layer(x), other(x))
    other.load_state_dict(layer.state_dict())
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
    for dtype in (torch.bfloat16, torch.float16):
        low = copy.deepcopy(layer).to(dtype)(x.to(dtype))
        assert low.dtype == dtype
        torch.testing.assert_close(low.float(), layer(x), rtol=0.1, atol=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).isfinite().all()
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(layer(turned), layer(x))
    meta = PerceiverAttention(3, 8, 5, 2, depth=1, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in meta.parameters())
    assert meta(torch.empty(2, 7, 5, device="meta", dtype=torch.bfloat16)).shape == (2, 3, 8)
    before = layer.state_dict()["latents"].clone()
    layer.reset_parameters()
    assert not torch.equal(layer.latents, before)
    assert layer.latents.abs().max() <= 2
    assert "repeats=3" in repr(layer)


@pytest.mark.registration(ID)
@pytest.mark.usefixtures("unchecked")
def test_compiles_without_a_graph_break() -> None:
    layer, x = PerceiverAttention(3, 8, 5, 2, depth=1), torch.randn(2, 7, 5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.refusal(ID)
@pytest.mark.parametrize("bad", [0, -1, 2.5, True, math.nan])
def test_refusals_of_sizes(bad: Any) -> None:
    sizes: dict[str, Any] = {"latents": 3, "dim": 8, "input_dim": 5, "heads": 2, "repeats": 1}
    for name in sizes:
        with refuses(ConfigError, name, repr(bad)):
            PerceiverAttention(**{**sizes, name: bad})
    if bad != 0:
        with refuses(ConfigError, "depth", repr(bad)):
            PerceiverAttention(**sizes, depth=bad)
    for name in ("dim", "kv_dim", "heads", "widening"):
        with refuses(ConfigError, name, repr(bad)):
            LatentCrossAttention(**{"dim": 8, "kv_dim": 5, name: bad})
    for name in ("dim", "heads", "widening"):
        with refuses(ConfigError, name, repr(bad)):
            LatentSelfAttention(**{"dim": 8, name: bad})


@pytest.mark.refusal(ID)
def test_refusals() -> None:
    with refuses(ConfigError, "3 for dim 8"):
        PerceiverAttention(3, 8, 5, 3)
    for layer in (LatentCrossAttention, LatentSelfAttention):
        sizes = (8, 5, 3) if layer is LatentCrossAttention else (8, 3)
        with refuses(ConfigError, "3 for dim 8"):
            layer(*sizes)
        for dropout in (-0.1, 1.0, math.nan):
            with refuses(ConfigError, "dropout", dropout):
                layer(8, 8, dropout=dropout)
    whole = PerceiverAttention(3, 8, 5, 2)
    with refuses(ShapeError, (7, 5), "(batch, positions, features)"):
        whole(torch.randn(7, 5))
    with refuses(ShapeError, (2, 7, 4), "5 features"):
        whole(torch.randn(2, 7, 4))
    with refuses(ShapeError, "dtype"):
        whole(torch.ones(2, 7, 5, dtype=torch.int64))
    for layer, shape in ((whole, (2, 7, 5)), (LatentSelfAttention(8), (2, 7, 8))):
        with refuses(ShapeError, "torch.float64 beside torch.float32"):
            layer(torch.randn(shape).double())
    with refuses(ShapeError, "attention mask", (7, 7)):
        whole(torch.randn(2, 7, 5), torch.ones(7, 7, dtype=torch.bool))
    cross = LatentCrossAttention(8, 5)
    with refuses(ShapeError, "queries", (2, 3, 7), "8 features"):
        cross(torch.randn(2, 3, 7), torch.randn(2, 7, 5))
    with refuses(ShapeError, "memory", (2, 7, 4), "5 features"):
        cross(torch.randn(2, 3, 8), torch.randn(2, 7, 4))
    with refuses(ShapeError, "(2, 3", "(1, 7"):
        cross(torch.randn(2, 3, 8), torch.randn(1, 7, 5))
    with refuses(ShapeError, (3, 8), "(batch, positions, features)"):
        LatentSelfAttention(8)(torch.randn(3, 8))


@pytest.mark.refusal(ID)
def test_dtypes_of_parameters() -> None:
    layers = ((PerceiverAttention, (3, 8, 8)), (LatentCrossAttention, (8, 8)), (LatentSelfAttention, (8,)))
    for dtype in (torch.int64, "float32"):
        for make, sizes in layers:
            with refuses(ConfigError, dtype):
                make(*sizes, dtype=dtype)
