"""Oscillating attention: its schedule, and that it sees the future."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.mask import Mask, anticausal, causal, full
from handbook_src.models.attention.oscillating import MaskedEncoder, oscillating
from handbook_src.testing import assert_parity, refuses

ID = "oscillating-attention"


def reach(model: MaskedEncoder, t: int = 6) -> Tensor:
    """Which input each output depends on, read off the gradient: ``t s``, boolean."""
    x = model.tokens(torch.randint(5, (1, t))).detach().requires_grad_()
    y = x + model.positions.weight[:t]
    for block in model.blocks:
        y = block(y)
    rows = [torch.autograd.grad(y[0, i].square().sum(), x, retain_graph=True)[0][0].abs().sum(-1) for i in range(t)]
    return torch.stack(rows) > 0


def encoder(rules: list[Mask]) -> MaskedEncoder:
    return MaskedEncoder(5, 8, 8, 2, rules).double()


@pytest.mark.parity(ID)
def test_each_layer_has_the_mask_of_its_direction() -> None:
    rules = oscillating(7)
    n = 5
    ones = torch.ones(n, n, dtype=torch.bool)
    for i, rule in enumerate(rules):
        want = [ones, ones.tril(), ones.triu()][i % 3]
        torch.testing.assert_close(rule.dense(n), want)
    assert oscillating(3, ["forward"]) == [causal] * 3
    assert oscillating(4, ["forward", "backward"]) == [causal, anticausal, causal, anticausal]
    assert [b.attention.rule for b in encoder(oscillating(3)).blocks] == [full, causal, anticausal]


@pytest.mark.parity(ID)
@pytest.mark.outside(ID)
def test_a_stack_equals_torchs_encoder_layers_with_these_masks() -> None:
    rules = oscillating(3)
    ours = encoder(rules)
    theirs = nn.ModuleList(
        nn.TransformerEncoderLayer(8, 2, 32, 0.0, "gelu", batch_first=True, norm_first=True).double() for _ in rules
    )
    with torch.no_grad():
        for a, b in zip(ours.blocks, theirs, strict=True):
            for p in (a.attention.q_proj, a.attention.k_proj, a.attention.v_proj):
                p.bias.normal_()
            projections = [a.attention.q_proj, a.attention.k_proj, a.attention.v_proj]
            b.self_attn.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
            b.self_attn.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
            b.self_attn.out_proj.load_state_dict(a.attention.out_proj.state_dict())
            b.linear1.load_state_dict(a.mlp[0].state_dict())
            b.linear2.load_state_dict(a.mlp[2].state_dict())

    def run(x: Tensor) -> Tensor:
        for block in ours.blocks:
            x = block(x)
        return x

    def oracle(x: Tensor) -> Tensor:
        for layer, rule in zip(theirs, rules, strict=True):
            x = layer(x, src_mask=~rule.dense(x.shape[1]))
        return x

    assert_parity(run, oracle, [torch.randn(2, 5, 8)])


@pytest.mark.law(ID)
def test_it_leaks_the_future() -> None:
    assert reach(encoder(oscillating(3))).all(), "every output depends on every input"
    torch.testing.assert_close(reach(encoder([causal] * 3)), causal.dense(6))
    torch.testing.assert_close(reach(encoder([anticausal] * 2)), anticausal.dense(6))
    assert reach(encoder(oscillating(2, ["forward", "backward"]))).all(), "two directions are enough"


@pytest.mark.law(ID)
def test_directions_cost_no_parameters() -> None:
    sizes = {sum(p.numel() for p in encoder(r).parameters()) for r in ([full] * 3, oscillating(3), [causal] * 3)}
    assert len(sizes) == 1


@pytest.mark.registration(ID)
def test_state_dict_and_bf16() -> None:
    model, other = encoder(oscillating(3)), encoder(oscillating(3))
    other.load_state_dict(model.state_dict())
    tokens = torch.randint(5, (2, 7))
    torch.testing.assert_close(other(tokens), model(tokens), rtol=0, atol=0)
    assert model(tokens[:, :1]).shape == (2, 1, 5)
    assert model.bfloat16()(tokens).dtype == torch.bfloat16


@pytest.mark.refusal(ID)
def test_refusals() -> None:
    with refuses(ConfigError, "depth", 0):
        oscillating(0)
    with refuses(ConfigError, "directions", "none"):
        oscillating(2, [])
    with refuses(ConfigError, "directions", "sideways"):
        oscillating(2, ["sideways"])  # type: ignore[list-item]
    with refuses(ConfigError, "mask rules", "none"):
        encoder([])
    with refuses(ShapeError, "9 tokens", "at most 8"):
        encoder([full])(torch.zeros(1, 9, dtype=torch.int64))
