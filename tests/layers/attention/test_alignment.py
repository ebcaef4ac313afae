"""Bahdanau's and Luong's layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from handbook_src.errors import ConfigError
from handbook_src.functional.attention.mask import padding
from handbook_src.layers.attention.alignment import BahdanauAttention, LuongAttention
from handbook_src.testing import assert_parity, refuses

BOTH = ("bahdanau-attention", "luong-attention")
LENGTHS = torch.tensor([3, 1])


@pytest.mark.parity("bahdanau-attention")
@pytest.mark.parametrize("masked", [False, True])
def test_bahdanau_is_his_equations(masked: bool) -> None:
    layer = BahdanauAttention(3, 5, 4).double()

    def oracle(s: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        w, u, v = layer.query_proj.weight, layer.key_proj.weight, layer.vector
        e = torch.stack([torch.tanh(s @ w.T + (h[:, j] @ u.T)[:, None]) @ v for j in range(h.shape[1])], -1)
        if masked:
            e = e.masked_fill(~padding(LENGTHS).dense(2, 4)[:, 0], -torch.inf)
        alpha = e.softmax(-1)
        return (alpha[..., None] * h[:, None]).sum(2), alpha

    mask = padding(LENGTHS) if masked else None
    assert_parity(lambda s, h: layer(s, h, mask), oracle, [torch.randn(2, 2, 3), torch.randn(2, 4, 5)])


@pytest.mark.parity("luong-attention")
@pytest.mark.outside("luong-attention")
@pytest.mark.parametrize("score", ["dot", "general", "concat"])
def test_luong_is_his_equations(score: str) -> None:
    d1, d2 = 4, 4 if score == "dot" else 3
    layer = LuongAttention(d1, d2, score=score, hidden_dim=5).double()
    bilinear = nn.Bilinear(d1, d2, 1, bias=False).double()  # torch's own h^T W s
    if score == "general":
        bilinear.weight.data[0] = layer.weight.data

    def oracle(h: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
        a = h[:, :, None].expand(-1, -1, source.shape[1], -1)
        b = source[:, None].expand(-1, h.shape[1], -1, -1)
        if score == "dot":
            e = (a * b).sum(-1)
        elif score == "general":
            e = bilinear(a.contiguous(), b.contiguous())[..., 0]
        else:
            e = torch.tanh(torch.cat([a, b], -1) @ layer.weight.T) @ layer.vector
        return e.softmax(-1) @ source, e.softmax(-1)

    assert_parity(layer, oracle, [torch.randn(2, 3, d1), torch.randn(2, 6, d2)])
    if score == "general":
        torch.testing.assert_close(layer.weight.grad, bilinear.weight.grad[0])


@pytest.mark.law("bahdanau-attention")
def test_the_vector_is_drawn_so_that_scores_do_not_grow_with_its_length() -> None:
    for n in (400, 10_000):
        vector = BahdanauAttention(1, 1, n).vector
        assert vector.square().sum().item() == pytest.approx(1, rel=0.4)  # 400: over five deviations


@pytest.mark.law("bahdanau-attention")
def test_keys_may_be_projected_once() -> None:
    layer, s, h = BahdanauAttention(3, 5, 4), torch.randn(2, 6, 3), torch.randn(2, 4, 5)
    keys = layer.keys(h)
    for step, both in zip(s.split(1, 1), layer(s, h)[0].split(1, 1), strict=True):
        torch.testing.assert_close(layer(step, h, keys=keys)[0], both)


@pytest.mark.law(*BOTH)
def test_weights_are_distributions_and_contexts_are_means() -> None:
    memory = torch.randn(2, 5, 4)
    layers = [BahdanauAttention(4, 4, 3), *(LuongAttention(4, score=s) for s in ("dot", "general", "concat"))]
    for layer in layers:
        context, weights = layer(torch.randn(2, 3, 4), memory, padding(LENGTHS))
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3))
        assert (weights[1, :, 1:] == 0).all()
        torch.testing.assert_close(context[1], memory[1, :1].expand(3, 4))
        permuted, _ = layer(torch.zeros(2, 1, 4), memory.flip(1))
        torch.testing.assert_close(permuted, layer(torch.zeros(2, 1, 4), memory)[0])


@pytest.mark.law("luong-attention")
def test_dot_has_no_parameters_and_general_is_dot_when_it_is_the_identity() -> None:
    dot, general = LuongAttention(4, score="dot"), LuongAttention(4)
    assert list(dot.parameters()) == []
    with torch.no_grad():
        general.weight.copy_(torch.eye(4))
    query, memory = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    torch.testing.assert_close(dot(query, memory), general(query, memory))


@pytest.mark.registration(*BOTH)
@pytest.mark.usefixtures("unchecked")
def test_state_dict_bf16_and_compile() -> None:
    query, memory = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    for make in (
        lambda: BahdanauAttention(4, 4, 3),
        lambda: LuongAttention(4),
        lambda: LuongAttention(4, score="concat"),
    ):
        layer, other = make(), make()
        other.load_state_dict(layer.state_dict())
        want = layer(query, memory)
        torch.testing.assert_close(other(query, memory), want, rtol=0, atol=0)
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(query, memory), want)
        low, _ = other.bfloat16()(query.bfloat16(), memory.bfloat16())
        assert low.dtype == torch.bfloat16
        torch.testing.assert_close(low.float(), want[0], rtol=0.05, atol=0.05)


@pytest.mark.refusal(*BOTH)
def test_refusals() -> None:
    for sizes in ((0, 1, 1), (1, 0, 1), (1, 1, -2)):
        with refuses(ConfigError, "attention sizes", "at least 1"):
            BahdanauAttention(*sizes)
    with refuses(ConfigError, "attention sizes", "'query_dim': 0"):
        LuongAttention(0)
    with refuses(ConfigError, "Luong score", "'additive'"):
        LuongAttention(4, score="additive")  # type: ignore[arg-type]
    with refuses(ConfigError, "query_dim 4, key_dim 5", "general"):
        LuongAttention(4, 5, score="dot")
