"""The layer of Linformer's attention: the package's, its sharing modes, and full attention in the limit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.mask import causal, padding
from handbook_src.layers.attention.attention import MultiHeadAttention
from handbook_src.layers.attention.linformer import LinformerAttention
from handbook_src.testing import assert_parity, oracle, refuses

LINFORMER = "linformer"
SHARING = pytest.mark.parametrize("share", ["none", "headwise", "key-value"])


@pytest.mark.parity(LINFORMER)
@SHARING
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n", [9, 5, 1])
def test_the_equation_head_by_head(share: str, bias: bool, n: int) -> None:
    layer = LinformerAttention(12, 3, 9, 4, share=share, bias=bias).double()
    for name, p in layer.named_parameters():
        if name.endswith("bias"):
            p.data.normal_()
    e = layer.key_projection
    f = e if layer.value_projection is None else layer.value_projection

    def by_hand(x: Tensor) -> Tensor:
        heads = []
        for i in range(3):
            q, k, v = (p(x)[..., 4 * i : 4 * i + 4] for p in (layer.q_proj, layer.k_proj, layer.v_proj))
            ei, fi = ((y[i] if share == "none" else y)[:, :n] for y in (e, f))
            heads.append(torch.softmax(q @ (ei @ k).mT / 2, -1) @ (fi @ v))
        return layer.out_proj(torch.cat(heads, -1))

    assert_parity(layer, by_hand, [torch.randn(2, n, 12)])
    torch.testing.assert_close(layer.weights(torch.randn(2, n, 12).double()).sum(-1), torch.ones(2, 3, n).double())


@pytest.mark.outside(LINFORMER)
@pytest.mark.parametrize("share", ["headwise", "key-value"])
@pytest.mark.parametrize("n", [9, 5])
def test_against_the_package(share: str, n: int) -> None:
    theirs = oracle.load("linformer").LinformerSelfAttention(12, 9, k=4, heads=3).double()
    layer = LinformerAttention(12, 3, 9, 4, share=share, bias=False).double()
    with torch.no_grad():
        layer.q_proj.weight.copy_(theirs.to_q.weight)
        layer.k_proj.weight.copy_(theirs.to_k.weight)
        layer.v_proj.weight.copy_(theirs.to_v.weight)
        layer.out_proj.weight.copy_(theirs.to_out.weight)
        theirs.to_out.bias.zero_()
        layer.key_projection.copy_(theirs.proj_k.T)
        if layer.value_projection is None:
            theirs.proj_v = theirs.proj_k
        else:
            layer.value_projection.copy_(theirs.proj_v.T)
    pairs = [(layer.q_proj.weight, theirs.to_q.weight), (layer.v_proj.weight, theirs.to_v.weight)]
    assert_parity(layer, theirs, [torch.randn(2, n, 12)], parameters=pairs)
    torch.testing.assert_close(layer.key_projection.grad, theirs.proj_k.grad.T)


@pytest.mark.law(LINFORMER)
@SHARING
def test_identities_make_it_multi_head_attention(share: str) -> None:
    full, layer = MultiHeadAttention(12, 3).double(), LinformerAttention(12, 3, 7, 7, share=share).double()
    layer.load_state_dict(full.state_dict(), strict=False)
    with torch.no_grad():
        for p in (layer.key_projection, layer.value_projection):
            if p is not None:
                p.copy_(torch.eye(7).expand_as(p))
    x = torch.randn(2, 7, 12).double()
    torch.testing.assert_close(layer(x), full(x))
    lengths = torch.tensor([7, 3])
    torch.testing.assert_close(layer(x, mask=padding(lengths))[1:], layer(x[1:], x[1:, :3]))


@pytest.mark.law(LINFORMER)
def test_layers_can_share_their_projections() -> None:
    a, b = LinformerAttention(8, 2, 9, 3, share="key-value"), LinformerAttention(8, 2, 9, 3, share="key-value")
    b.key_projection = a.key_projection
    x = torch.randn(1, 9, 8)
    b(a(x)).sum().backward()
    stack = torch.nn.ModuleList([a, b])
    assert sum(p.numel() for p in stack.parameters()) == 2 * 4 * (64 + 8) + 3 * 9
    counts = {s: sum(p.numel() for p in LinformerAttention(8, 2, 9, 3, share=s).parameters()) - 288 for s in (
        "none", "headwise", "key-value")}  # fmt: skip
    assert counts == {"none": 4 * 27, "headwise": 2 * 27, "key-value": 27}


@pytest.mark.registration(LINFORMER)
@SHARING
def test_state_dict_copies_halves_and_pruning(share: str) -> None:
    layer, other = (LinformerAttention(8, 2, 9, 3, share=share) for _ in range(2))
    x = torch.randn(2, 5, 8)
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(layer)(x), layer(x), rtol=0, atol=0)
    for dtype in (torch.bfloat16, torch.float16):
        assert copy.deepcopy(layer).to(dtype)(x.to(dtype)).dtype == dtype
    assert f"share={share}" in repr(layer)
    with torch.no_grad():
        layer.out_proj.weight[:, :4] = 0
    want = layer(x)
    layer.requires_grad_(False).prune_heads([0])
    torch.testing.assert_close(layer(x), want)
    assert not any(p.requires_grad for p in layer.parameters())  # a frozen layer stays frozen
    dropping = LinformerAttention(8, 2, 9, 3, share=share, dropout=0.5)
    assert not torch.equal(dropping(x), dropping(x))
    dropping.eval()
    assert torch.equal(dropping(x), dropping(x))


@pytest.mark.refusal(LINFORMER)
def test_refuses_bad_settings_and_inputs() -> None:
    for size in (0, -1, 2.5, True):
        for name, args in (("heads", (8, size, 9, 3)), ("length", (8, 2, size, 3)), ("rank", (8, 2, 9, size))):
            with refuses(ConfigError, name, size):
                LinformerAttention(*args)  # type: ignore[arg-type]
    with refuses(ConfigError, "'layerwise'"):
        LinformerAttention(8, 2, 9, 3, share="layerwise")  # type: ignore[arg-type]
    with refuses(ConfigError, "dropout", 1.0):
        LinformerAttention(8, 2, 9, 3, dropout=1.0)
    layer = LinformerAttention(8, 2, 9, 3)
    with refuses(ShapeError, "got 10", "at most 9"):
        layer(torch.randn(2, 10, 8))
    with refuses(ShapeError, (2, 5, 7)):
        layer(torch.randn(2, 5, 7))
    for call in (layer, layer.weights):
        with refuses(ConfigError, "causal", "the future"):
            call(torch.randn(2, 5, 8), causal=True)
    with refuses(ConfigError, "causal"):
        layer(torch.randn(2, 5, 8), mask=causal)
