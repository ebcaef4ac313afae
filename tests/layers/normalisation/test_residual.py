"""Pre-norm and post-norm: torch's encoder layer both ways, and what each order promises."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.layers.normalisation.norm import LayerNorm, RMSNorm
from handbook_src.layers.normalisation.residual import PostNorm, PreNorm
from handbook_src.testing import assert_parity, refuses

ORDERS = pytest.mark.parametrize("order", [PreNorm, PostNorm])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def feed_forward(d: int, f: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d, f), nn.ReLU(), nn.Linear(f, d))


class Attention(nn.Module):
    def __init__(self, inner: nn.MultiheadAttention) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.inner(x, x, x, attn_mask=mask, need_weights=False)[0]


@pytest.mark.parity("pre-post-norm")
@ORDERS
@pytest.mark.parametrize("norm", [LayerNorm, RMSNorm])
def test_the_order_is_the_formula(order, norm):
    n, f = norm(6).double(), feed_forward(6, 9).double()
    want = (lambda x: x + f(n(x))) if order is PreNorm else (lambda x: n(x + f(x)))
    assert_parity(order(n, f), want, [draw(2, 5, 6)])


@pytest.mark.outside("pre-post-norm")
@pytest.mark.parity("pre-post-norm")
@pytest.mark.parametrize("masked", [True, False])
@ORDERS
def test_two_blocks_are_torchs_encoder_layer(order, masked):
    oracle = nn.TransformerEncoderLayer(6, 2, 9, dropout=0.0, batch_first=True, norm_first=order is PreNorm).double()
    for i, p in enumerate(oracle.parameters()):
        p.data = draw(*p.shape, seed=i) / 3
    norms = [LayerNorm(6).double() for _ in range(2)]
    for mine, theirs in zip(norms, (oracle.norm1, oracle.norm2), strict=True):
        mine.load_state_dict(theirs.state_dict())
    feed = nn.Sequential(copy.deepcopy(oracle.linear1), nn.ReLU(), copy.deepcopy(oracle.linear2))
    first, second = order(norms[0], Attention(copy.deepcopy(oracle.self_attn))), order(norms[1], feed)
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1) if masked else None
    assert_parity(
        lambda x: second(first(x, mask)),
        lambda x: oracle(x, src_mask=mask),
        [draw(2, 5, 6)],
        parameters=[
            (norms[0].weight, oracle.norm1.weight),
            (norms[1].bias, oracle.norm2.bias),
            (feed[0].weight, oracle.linear1.weight),
            (first.sublayer.inner.in_proj_weight, oracle.self_attn.in_proj_weight),
        ],
    )


@pytest.mark.law("pre-post-norm")
def test_pre_norm_with_a_silent_branch_is_the_identity_at_any_depth():
    silent = feed_forward(6, 9).double()
    for p in silent[-1].parameters():
        nn.init.zeros_(p)
    x = draw(3, 6).requires_grad_()
    stack = nn.Sequential(*[PreNorm(LayerNorm(6).double(), silent) for _ in range(50)])
    y = stack(x)
    assert torch.equal(y, x)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(grad, torch.ones_like(x))


@pytest.mark.law("pre-post-norm")
def test_post_norm_rescales_the_stream_in_every_block():
    stack = nn.Sequential(*[PostNorm(LayerNorm(6).double(), feed_forward(6, 9).double()) for _ in range(3)])
    for scale in (1.0, 100.0):
        y = stack(draw(4, 6) * scale)
        torch.testing.assert_close(y.mean(-1), torch.zeros(4, dtype=y.dtype), rtol=0, atol=1e-9)
        torch.testing.assert_close(y.var(-1, correction=0), torch.ones(4, dtype=y.dtype), rtol=1e-3, atol=0)


@pytest.mark.law("pre-post-norm")
def test_pre_norm_keeps_the_scale_of_its_input():
    block = PreNorm(LayerNorm(6).double(), feed_forward(6, 9).double())
    x = draw(4, 6)
    torch.testing.assert_close(block(100 * x) - 100 * x, block(x) - x, rtol=1e-3, atol=1e-4)


@pytest.mark.law("pre-post-norm")
@ORDERS
def test_dropout_in_training_only(order):
    block = order(nn.Identity(), nn.Identity(), dropout=0.5)
    x = torch.ones(100, 100)
    assert sorted(block(x).unique().tolist()) == [1.0, 3.0]
    assert torch.equal(block.eval()(x), 2 * x)
    assert "dropout=0.5" in repr(block)


@pytest.mark.registration("pre-post-norm")
@ORDERS
def test_state_compile_and_bfloat16(order, unchecked):
    block = order(LayerNorm(6), feed_forward(6, 9))
    again = order(LayerNorm(6), feed_forward(6, 9))
    again.load_state_dict(block.state_dict())
    x = draw(2, 6).float()
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(again, fullgraph=True, backend="aot_eager")(x), block(x))
    assert block.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.refusal("pre-post-norm")
@ORDERS
def test_refuses_by_value(order):
    for p in (-0.5, 1.0):
        with refuses(ConfigError, "dropout", p):
            order(nn.Identity(), nn.Identity(), dropout=p)
    with refuses(ShapeError, (2, 1), (2, 6)):
        order(LayerNorm(6), nn.Linear(6, 1))(torch.ones(2, 6))
    with pytest.raises(TypeError, match="maske"):
        order(LayerNorm(6), nn.Linear(6, 6))(torch.ones(2, 6), maske=None)
