"""The layer of Performer's attention: a softmax layer's weights, and directions that can be redrawn."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.mask import padding, window
from handbook_src.functional.attention.performer import softmax_features
from handbook_src.layers.attention.attention import MultiHeadAttention
from handbook_src.layers.attention.performer import PerformerAttention
from handbook_src.testing import assert_causal, assert_parity, refuses

PERFORMER = "performer"
LENGTHS = torch.tensor([3, 1])


@pytest.mark.parity(PERFORMER)
@pytest.mark.parametrize("kind", ["positive", "hyperbolic", "trigonometric"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_the_equation_head_by_head(kind: str, causal: bool, bias: bool) -> None:
    layer = PerformerAttention(12, 3, 9, kind=kind, bias=bias).double()

    def by_hand(x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (3, 4)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        phi_q, phi_k = (softmax_features(y / 4**0.25, layer.projection, kind) for y in (q, k))
        weights = phi_q @ phi_k.mT
        weights = weights.tril() if causal else weights
        return layer.out_proj((weights / weights.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2))

    assert_parity(lambda x: layer(x, causal=causal), by_hand, [torch.randn(2, 5, 12)], rtol=1e-8)


@pytest.mark.law(PERFORMER)
@pytest.mark.parametrize("causal", [False, True])
def test_a_softmax_layers_weights_give_nearly_its_output(causal: bool) -> None:
    softmax, x = MultiHeadAttention(12, 3), torch.randn(2, 7, 12)
    errors = []
    for m in (8, 20000):
        layer = PerformerAttention(12, 3, m)
        missing = layer.load_state_dict(softmax.state_dict(), strict=False)
        assert missing.missing_keys == ["projection"]
        errors.append((layer(x, causal=causal) - softmax(x, causal=causal)).norm().item())
    assert errors[1] < 0.4 * errors[0]


@pytest.mark.law(PERFORMER)
def test_redrawing_changes_the_directions_and_nothing_else() -> None:
    layer, x = PerformerAttention(8, 2, 16), torch.randn(2, 5, 8)
    before, weights = layer.projection.clone(), [p.clone() for p in layer.parameters()]
    again = copy.deepcopy(layer)
    torch.testing.assert_close(layer(x), again(x), rtol=0, atol=0)
    for each in (layer, again):
        each.redraw(torch.Generator().manual_seed(5))
    assert not torch.equal(layer.projection, before)
    torch.testing.assert_close(layer(x), again(x), rtol=0, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(weights, layer.parameters(), strict=True))
    assert "projection" in layer.state_dict()
    assert "projection" not in dict(layer.named_parameters())


@pytest.mark.law(PERFORMER)
def test_causal_padding_and_weights() -> None:
    layer, x = PerformerAttention(8, 2).double(), torch.randn(2, 5, 8).double()
    assert layer.features == 5, "4 ln 4, rounded down"
    assert_causal(lambda x: layer(x, causal=True), x)
    torch.testing.assert_close(layer(x, mask=padding(LENGTHS))[1:], layer(x[1:], x[1:, :1]))
    w = layer.weights(x, mask=padding(LENGTHS))
    out = torch.einsum("bhts,bshe->bthe", w, layer.v_proj(x).unflatten(-1, (2, 4))).flatten(2)
    torch.testing.assert_close(layer.out_proj(out), layer(x, mask=padding(LENGTHS)))


@pytest.mark.registration(PERFORMER)
def test_state_dict_keeps_the_directions() -> None:
    layer, other, x = PerformerAttention(8, 2, 16), PerformerAttention(8, 2, 16), torch.randn(2, 5, 8)
    assert not torch.equal(layer.projection, other.projection)
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)
    for dtype in (torch.bfloat16, torch.float16):
        assert copy.deepcopy(layer).to(dtype)(x.to(dtype), causal=True).dtype == dtype
    assert "features=16" in repr(layer)
    memory = PerformerAttention(8, 2, 16, kv_dim=3, head_dim=5, orthogonal=False)
    assert memory(x, torch.randn(2, 7, 3)).shape == x.shape
    layer.prune_heads([1])
    assert layer(x).shape == x.shape


@pytest.mark.refusal(PERFORMER)
def test_refuses_bad_settings_and_inputs() -> None:
    for size in (0, -1, 2.5, True):
        with refuses(ConfigError, "heads", size):
            PerformerAttention(8, size)  # type: ignore[arg-type]
        with refuses(ConfigError, "features", size):
            PerformerAttention(8, 2, size)  # type: ignore[arg-type]
    with refuses(ConfigError, "'softmax'"):
        PerformerAttention(8, 2, kind="softmax")  # type: ignore[arg-type]
    with refuses(ConfigError, "3 for dim 8"):
        PerformerAttention(8, 3)
    layer = PerformerAttention(8, 2)
    with refuses(ShapeError, (2, 5, 7)):
        layer(torch.randn(2, 5, 7))
    with refuses(ShapeError, "window(2)"):
        layer(torch.randn(2, 5, 8), mask=window(2))


@pytest.mark.registration("performer")
def test_a_layer_made_without_memory_is_drawn_whole() -> None:
    with torch.device("meta"):
        layer = PerformerAttention(8, 2)
    layer.to_empty(device="cpu").projection.fill_(torch.nan)
    layer.reset_parameters()
    assert layer(torch.randn(1, 3, 8)).isfinite().all()
