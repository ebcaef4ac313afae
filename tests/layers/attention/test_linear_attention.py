"""The layer of linear attention: the function between projections, and a step that decodes."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.mask import padding, window
from handbook_src.layers.attention.attention import MultiHeadAttention
from handbook_src.layers.attention.linear_attention import LinearAttention
from handbook_src.testing import assert_causal, assert_parity, refuses

LINEAR = "linear-attention"
LENGTHS = torch.tensor([3, 1])


@pytest.mark.parity(LINEAR)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dim", "heads", "kv_dim"), [(12, 3, None), (12, 4, 5), (1, 1, None), (7, 1, 3)])
@pytest.mark.parametrize("causal", [False, True])
def test_the_equation_head_by_head(bias: bool, dim: int, heads: int, kv_dim: int | None, causal: bool) -> None:
    layer = LinearAttention(dim, heads, kv_dim=kv_dim, bias=bias, chunk=2).double()

    def by_hand(x: Tensor, memory: Tensor | None = None) -> Tensor:
        y = x if memory is None else memory
        q, k, v = layer.q_proj(x), layer.k_proj(y), layer.v_proj(y)
        heads_, e = [], dim // heads
        for i in range(heads):
            part = slice(i * e, (i + 1) * e)
            weights = (F.elu(q[..., part]) + 1) @ (F.elu(k[..., part]) + 1).mT
            weights = weights.tril(k.shape[1] - q.shape[1]) if causal else weights
            heads_.append(weights / weights.sum(-1, keepdim=True) @ v[..., part])
        return layer.out_proj(torch.cat(heads_, -1))

    inputs = [torch.randn(2, 5, dim)] + ([] if kv_dim is None else [torch.randn(2, 7, kv_dim)])
    assert_parity(lambda *x: layer(*x, causal=causal), by_hand, inputs)


@pytest.mark.law(LINEAR)
def test_decoding_goes_on_from_a_prompt() -> None:
    layer, x = LinearAttention(8, 2).double(), torch.randn(2, 9, 8).double()
    want = layer(x, causal=True)
    state = layer.summed(x[:, :4])
    torch.testing.assert_close(layer(x[:, 4:], causal=True, state=state), want[:, 4:])
    for i in range(4, 9):
        y, state = layer.step(x[:, i], state)
        torch.testing.assert_close(y, want[:, i])
    y, _ = layer.step(x[:, 0])
    torch.testing.assert_close(y, want[:, 0])
    padded = layer.summed(torch.cat([x, x * torch.nan], 1), padding(torch.tensor([9, 9])))
    torch.testing.assert_close(padded, layer.summed(x))


@pytest.mark.law(LINEAR)
def test_causal_padding_and_weights() -> None:
    layer, x = LinearAttention(8, 2, chunk=3).double(), torch.randn(2, 5, 8).double()
    assert_causal(lambda x: layer(x, causal=True), x)
    torch.testing.assert_close(layer(x, mask=padding(LENGTHS))[1:], layer(x[1:], x[1:, :1]))
    for causal in (False, True):
        w = layer.weights(x, mask=padding(LENGTHS), causal=causal)
        assert w.shape == (2, 2, 5, 5)
        torch.testing.assert_close(w.sum(-1), torch.ones(2, 2, 5).double())
        v = layer.v_proj(x).unflatten(-1, (2, 4))
        out = layer.out_proj(torch.einsum("bhts,bshe->bthe", w, v).flatten(2))
        torch.testing.assert_close(out, layer(x, mask=padding(LENGTHS), causal=causal))


@pytest.mark.registration(LINEAR)
def test_state_dict_is_multi_head_attentions_and_copies_work() -> None:
    layer, other, x = LinearAttention(8, 2), MultiHeadAttention(8, 2), torch.randn(2, 5, 8)
    layer.load_state_dict(other.state_dict())
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    again = LinearAttention(8, 2)
    again.load_state_dict(torch.load(file))
    torch.testing.assert_close(again(x), layer(x), rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(layer)(x), layer(x), rtol=0, atol=0)
    assert "feature_map=elu" in repr(layer)
    for dtype in (torch.bfloat16, torch.float16):
        assert copy.deepcopy(layer).to(dtype)(x.to(dtype), causal=True).dtype == dtype
    layer.prune_heads([0])
    assert layer(x).shape == x.shape


@pytest.mark.refusal(LINEAR)
def test_refuses_bad_settings_and_inputs() -> None:
    for size in (0, -1, 2.5, True):
        with refuses(ConfigError, "heads", size):
            LinearAttention(8, size)  # type: ignore[arg-type]
        with refuses(ConfigError, "chunk", size):
            LinearAttention(8, 2, chunk=size)  # type: ignore[arg-type]
    with refuses(ConfigError, "3 for dim 8"):
        LinearAttention(8, 3)
    with refuses(ConfigError, "'softmax'"):
        LinearAttention(8, 2, feature_map="softmax")  # type: ignore[arg-type]
    layer = LinearAttention(8, 2)
    with refuses(ShapeError, (2, 5, 7)):
        layer(torch.randn(2, 5, 7))
    with refuses(ShapeError, "window(2)"):
        layer(torch.randn(2, 5, 8), mask=window(2))
    with refuses(ShapeError, "decoding step", (2, 1, 8)):
        layer.step(torch.randn(2, 1, 8))
    with refuses(ShapeError, "state"):
        layer.step(torch.randn(3, 8), layer.summed(torch.randn(2, 5, 8)))
