"""Maps read from models and put back: the same outputs, and the edits' own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.attention import attention_weights
from handbook_src.functional.attention.rollout import attention_rollout
from handbook_src.layers.attention.attention import CausalAttention, CrossAttention, MultiHeadAttention, SelfAttention
from handbook_src.layers.attention.grouped_query import GroupedQueryAttention
from handbook_src.layers.attention.kv_cache import AppendCache
from handbook_src.layers.attention.linear_attention import LinearAttention
from handbook_src.layers.attention.linformer import LinformerAttention
from handbook_src.layers.attention.performer import PerformerAttention
from handbook_src.layers.attention.rollout import attention_maps, edited_attention
from handbook_src.models.transformers.gpt2 import GPT2, GPT2Config
from handbook_src.testing import assert_parity, refuses

ID = "attention-rollout"


def gpt(depth: int = 3) -> GPT2:
    torch.manual_seed(0)
    return GPT2(GPT2Config(vocab_size=11, context=8, dim=8, heads=2, depth=depth, dropout=0.0, init_std=0.5)).double()


LAYERS = {
    "multi-head": (lambda: MultiHeadAttention(6, 2), lambda m, x: m(x)),
    "multi-head, causal by position": (lambda: MultiHeadAttention(6, 2), lambda m, x: m(x, None, None, True)),
    "multi-head with memory": (lambda: MultiHeadAttention(6, 2), lambda m, x: m(x, memory=x[:, :2])),
    "self, causal rule": (lambda: CausalAttention(6, 3), lambda m, x: m(x)),
    "self with mask": (lambda: SelfAttention(6, 3), lambda m, x: m(x, mask=torch.eye(5).bool())),
    "cross": (lambda: CrossAttention(6, 6, 2), lambda m, x: m(x, x[:, 1:])),
    "head_dim of its own": (lambda: MultiHeadAttention(6, 2, head_dim=5, bias=False), lambda m, x: m(x)),
}


@pytest.mark.parity(ID)
@pytest.mark.parametrize("kind", LAYERS)
def test_the_edit_that_changes_nothing_changes_nothing(kind: str) -> None:
    make, call = LAYERS[kind]
    layer = make().double()

    def edited(x: Tensor) -> Tensor:
        with edited_attention(layer, lambda name, w: w):
            return call(layer, x)

    assert_parity(edited, lambda x: call(layer, x), [torch.randn(2, 5, 6)])


@pytest.mark.parity(ID)
@pytest.mark.parametrize("kind", LAYERS)
def test_recording_gives_the_layers_weights_and_leaves_the_output(kind: str) -> None:
    make, call = LAYERS[kind]
    layer, x = make(), torch.randn(2, 5, 6)
    want = call(layer, x)
    with attention_maps(layer) as maps:
        got = call(layer, x)
    assert torch.equal(got, want)
    (weights,) = maps
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))
    assert torch.equal(call(layer, x), want)  # the hooks are gone
    assert len(maps) == 1


@pytest.mark.parity(ID)
def test_maps_of_a_stack_are_those_computed_layer_by_layer() -> None:
    model = gpt()
    ids = torch.randint(11, (2, 6))
    with attention_maps(model) as maps:
        model(ids)
    x = model.token_embedding(ids) + model.position_embedding.weight[:6]
    for block, got in zip(model.blocks, maps, strict=True):
        y = block.norm_1(x)
        q, k = (p(y).view(2, 6, 2, 4) for p in (block.attention.q_proj, block.attention.k_proj))
        torch.testing.assert_close(got, attention_weights(q, k, causal=True))
        x = block(x)
    assert not attention_rollout(maps).triu(1).any()


@pytest.mark.law(ID)
def test_uniform_maps_forget_the_queries_and_gradients_flow_through_edits() -> None:
    model, ids = gpt(1), torch.randint(11, (2, 6))
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    with edited_attention(model, lambda name, w: scale * torch.full_like(w, 1 / 6)):
        out = model(ids).logits
    (grad,) = torch.autograd.grad(out.square().sum(), scale)
    assert grad.abs() > 0
    model.zero_grad()
    with edited_attention(model, lambda name, w: torch.full_like(w, 1 / 6)):
        model(ids).logits.square().sum().backward()
    assert model.blocks[0].attention.q_proj.weight.grad is None
    assert model.blocks[0].attention.v_proj.weight.grad.any()


@pytest.mark.law(ID)
def test_where_chooses_layers_by_name() -> None:
    model, ids = gpt(3), torch.randint(11, (2, 6))
    with attention_maps(model, lambda name, layer: name.startswith("blocks.1")) as maps:
        model(ids)
    assert len(maps) == 1
    names: list[str] = []

    def note(name: str, w: Tensor) -> Tensor:
        names.append(name)
        return w

    with edited_attention(model, note):
        model(ids)
    assert names == ["blocks.0.attention", "blocks.1.attention", "blocks.2.attention"]
    with (
        edited_attention(model, lambda name, w: w.flip(-1), lambda name, layer: "blocks.2" in name),
        attention_maps(model, lambda name, layer: "blocks.2" not in name) as early,
    ):
        model(ids)
    with attention_maps(model) as plain:
        model(ids)
    assert all(torch.equal(a, b) for a, b in zip(early, plain, strict=False))


@pytest.mark.law(ID)
def test_an_error_inside_leaves_no_hook() -> None:
    model, ids = gpt(1), torch.randint(11, (1, 3))
    want = model(ids).logits
    with pytest.raises(KeyError), edited_attention(model, lambda name, w: w * 0):
        raise KeyError
    assert torch.equal(model(ids).logits, want)


@pytest.mark.registration(ID)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    layer, x = MultiHeadAttention(6, 2).to(dtype), torch.randn(2, 5, 6).to(dtype)
    with edited_attention(layer, lambda name, w: w):
        got = layer(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got, layer(x), rtol=0.05, atol=0.05)


@pytest.mark.refusal(ID)
def test_refuses_models_without_attention_caches_and_edits_of_another_shape() -> None:
    with refuses(ConfigError, "Linear", "MultiHeadAttention"), attention_maps(nn.Linear(2, 2)):
        pass
    model, ids = gpt(1), torch.randint(11, (1, 3))
    with refuses(ConfigError, "GPT2", "where"), edited_attention(model, lambda n, w: w, lambda n, m: False):
        pass
    with refuses(ConfigError, "cache"), attention_maps(model):
        model(ids, cache=[AppendCache()])
    with refuses(ShapeError, "(1, 2, 3)", "(1, 2, 3, 3)"), edited_attention(model, lambda n, w: w[..., 0]):
        model(ids)


@pytest.mark.law(ID)
def test_an_edit_that_changes_nothing_changes_nothing() -> None:
    x = torch.randn(2, 5, 8)
    for layer in (
        MultiHeadAttention(8, 4, kv_heads=2),
        GroupedQueryAttention(8, 4, 2),
        LinearAttention(8, 2),
        PerformerAttention(8, 2),
    ):
        with edited_attention(layer, lambda _, w: w):
            edited = layer(x)
        torch.testing.assert_close(edited, layer(x))


@pytest.mark.refusal(ID)
def test_mixtures_and_states_are_refused() -> None:
    x, mixing, linear = torch.randn(2, 5, 8), LinformerAttention(8, 2, 5, 5), LinearAttention(8, 2)
    with refuses(ConfigError, "mixtures", "where"), edited_attention(mixing, lambda _, w: w):
        mixing(x)
    with refuses(ConfigError, "a state"), attention_maps(linear):
        linear(x, state=linear.summed(x))
