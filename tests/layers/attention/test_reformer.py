"""The Reformer's layers against full shared attention, a published layer, and the plain stack."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.lsh_attention import lsh_attention, lsh_rotations, shared_qk_attention
from handbook_src.functional.attention.mask import padding, window
from handbook_src.layers.attention.reformer import LSHAttention, Reformer
from handbook_src.testing import assert_parity, refuses

REFORMER = "reformer"


@pytest.mark.parity(REFORMER)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dim", "heads", "t"), [(8, 2, 13), (6, 3, 1), (5, 1, 8)])
def test_the_layer_is_projections_around_the_function(dim: int, heads: int, t: int, causal: bool) -> None:
    layer = LSHAttention(dim, heads, chunk=4, rounds=3, causal=causal, seed=1).double()
    twin = copy.deepcopy(layer)
    drawn = lsh_rotations(
        3, heads, dim // heads, 2 * max(1, math.ceil(t / 4)), generator=torch.Generator().manual_seed(1)
    )

    def by_hand(x: Tensor) -> Tensor:
        qk, v = ((x @ w.weight.T).unflatten(-1, (heads, -1)) for w in (twin.qk_proj, twin.v_proj))
        out = lsh_attention(qk, v, drawn, chunk=4, causal=causal, backend="reference")
        return out.flatten(2) @ twin.out_proj.weight.T

    pairs = list(zip(layer.parameters(), twin.parameters(), strict=True))
    assert_parity(layer, by_hand, [torch.randn(2, t, dim)], parameters=pairs)


@pytest.mark.parity(REFORMER)
@pytest.mark.law(REFORMER)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_reversible_gradients_equal_the_plain_stacks(dropout: float) -> None:
    model = Reformer(8, 3, 2, chunk=4, rounds=2, causal=True, dropout=dropout).double()
    plain = copy.deepcopy(model)
    plain.stack.recompute = False
    x = torch.randn(2, 11, 8).double()
    results = []
    for m in (model, plain):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(2)  # the hashes too are drawn anew, and replayed
        out = m(leaf)
        out.square().mean(-1).sin().sum().backward()
        results.append([out, leaf.grad, *(p.grad for p in m.parameters())])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.law(REFORMER)
def test_chunks_of_64_and_four_rounds_unless_said_otherwise() -> None:
    (block,) = Reformer(8, 1, 2).stack.blocks
    for layer in (block.f.layer, LSHAttention(8, 2)):
        assert (layer.chunk, layer.rounds) == (64, 4)


@pytest.mark.parity(REFORMER)
def test_the_equations_of_a_block() -> None:
    model = Reformer(8, 1, 2, chunk=64, rounds=1).double()
    (block,) = model.stack.blocks
    x = torch.randn(2, 5, 8).double()
    torch.manual_seed(4)
    got = model(x)
    torch.manual_seed(4)
    y1 = x + block.f.layer(block.f.norm(x))
    y2 = x + block.g.layer(block.g.norm(y1))
    torch.testing.assert_close(got, model.norm((y1 + y2) / 2))


@pytest.mark.law(REFORMER)
def test_enough_hashes_make_the_layer_full_attention() -> None:
    layer = LSHAttention(8, 2, chunk=64, rounds=600, buckets=2, causal=True).double()
    x = torch.randn(1, 9, 8).double()
    qk, v = (proj(x).unflatten(-1, (2, 4)) for proj in (layer.qk_proj, layer.v_proj))
    want = layer.out_proj(shared_qk_attention(qk, v, causal=True).flatten(2))
    torch.testing.assert_close(layer(x), want, rtol=1e-10, atol=1e-11)


@pytest.mark.law(REFORMER)
def test_seeds_masks_and_any_length() -> None:
    x = torch.randn(2, 30, 8)
    layer = LSHAttention(8, 2, chunk=4, rounds=1)
    assert not torch.equal(layer(x), layer(x)), "new hashes at each call"
    fixed = LSHAttention(8, 2, chunk=4, rounds=1, seed=3)
    before = torch.get_rng_state()
    assert torch.equal(fixed(x), fixed(x))
    assert torch.equal(torch.get_rng_state(), before), "a seed leaves torch's own stream alone"
    given = fixed.rotations(30)
    assert torch.equal(fixed(x, rotations=given), fixed(x))
    rule = padding(torch.tensor([30, 12]))
    garbage = x.clone()
    garbage[1, 12:] = math.nan
    zeros = x.clone()
    zeros[1, 12:] = 0
    assert torch.equal(fixed(garbage, rule)[1, :12], fixed(zeros, rule)[1, :12])
    model = Reformer(8, 2, 2, chunk=4)
    for shape in ((0, 5, 8), (2, 0, 8), (2, 1, 8), (1, 33, 8)):
        assert model(torch.randn(shape)).shape == shape
    assert model(x, window(3)).shape == x.shape


@pytest.mark.registration(REFORMER)
def test_state_dict_copies_precision_devices() -> None:
    layer, other = (LSHAttention(8, 2, chunk=4, seed=0) for _ in range(2))
    other.load_state_dict(layer.state_dict())
    assert set(layer.state_dict()) == {"qk_proj.weight", "v_proj.weight", "out_proj.weight"}
    x = torch.randn(2, 9, 8)
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
    for dtype in (torch.bfloat16, torch.float16):
        low = copy.deepcopy(layer).to(dtype)(x.to(dtype))
        assert low.dtype == dtype
        assert low.isfinite().all()
    meta = Reformer(8, 2, 2, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in meta.parameters())
    assert meta(torch.empty(2, 9, 8, device="meta", dtype=torch.bfloat16)).shape == (2, 9, 8)
    before = layer.qk_proj.weight.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.qk_proj.weight, before)
    assert "rounds=4" in repr(layer)
    assert "buckets=[2, 4]" in repr(LSHAttention(8, 2, buckets=[2, 4]))


@pytest.mark.registration(REFORMER)
@pytest.mark.usefixtures("unchecked")
def test_compiles_without_a_graph_break() -> None:
    model, x = LSHAttention(8, 2, chunk=4, causal=True).eval(), torch.randn(2, 9, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    given = model.rotations(9)
    torch.testing.assert_close(compiled(x, None, given), model(x, None, given))
    assert compiled(x).shape == x.shape


@pytest.mark.refusal(REFORMER)
@pytest.mark.parametrize("bad", [0, -1, 2.5, True, math.nan])
def test_refusals_of_sizes(bad: Any) -> None:
    for name in ("dim", "heads", "chunk", "rounds"):
        sizes = {"dim": 8, "heads": 2, name: bad}
        with refuses(ConfigError, name, repr(bad)):
            LSHAttention(**sizes)
    for name in ("dim", "depth", "heads", "chunk", "rounds"):
        with refuses(ConfigError, name, repr(bad)):
            Reformer(**{"dim": 8, "depth": 1, "heads": 2, name: bad})
    with refuses(ConfigError, "buckets"):
        LSHAttention(8, 2, buckets=bad)


@pytest.mark.refusal(REFORMER)
def test_refusals() -> None:
    with refuses(ConfigError, "3 for dim 8", "divisor"):
        LSHAttention(8, 3)
    for seed in (-1, 0.5, True):
        with refuses(ConfigError, "seed", repr(seed)):
            LSHAttention(8, 2, seed=seed)
    for dropout in (-0.1, 1.0, math.nan):
        with refuses(ConfigError, "dropout", dropout):
            Reformer(8, 1, 2, dropout=dropout)
    for layer in (LSHAttention(8, 2), Reformer(8, 1, 2)):
        with refuses(ShapeError, (3, 8), "(b, t, dim)"):
            layer(torch.randn(3, 8))
        with refuses(ShapeError, (2, 3, 7), "8 features"):
            layer(torch.randn(2, 3, 7))
        with refuses(ConfigError, "lsh_attention mask", "Tensor (3, 3)"):
            layer(torch.randn(1, 3, 8), torch.ones(3, 3, dtype=torch.bool))
        with refuses(ShapeError, "dtype"):
            layer(torch.ones(1, 3, 8, dtype=torch.int64))


@pytest.mark.registration(REFORMER)
def test_weights_are_drawn_anew() -> None:
    model = Reformer(8, 2, 2, chunk=4)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(7.0)
    torch.manual_seed(0)
    model.reset_parameters()
    torch.manual_seed(0)
    fresh = Reformer(8, 2, 2, chunk=4)
    for (name, got), want in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert got.shape == want.shape
        assert not (got == 7.0).any(), name
        assert torch.equal(got == 0, want == 0), name  # biases and gains are what they were
