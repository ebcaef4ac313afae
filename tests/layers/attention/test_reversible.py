"""Reversible layers: any two modules, gradients of the plain stack, memory that does not grow."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.layers.attention.reversible import ReversibleBlock, ReversibleStack
from handbook_src.testing import assert_parity, refuses

REFORMER = "reformer"


def block(d: int = 6, dropout: float = 0.0) -> ReversibleBlock:
    return ReversibleBlock(
        nn.Sequential(nn.LayerNorm(d), nn.Linear(d, d), nn.Tanh(), nn.Dropout(dropout)),
        nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d)),
    )


@pytest.mark.parity(REFORMER)
@pytest.mark.parametrize("depth", [1, 5])
def test_a_stack_is_its_blocks(depth: int) -> None:
    stack = ReversibleStack(block() for _ in range(depth)).double()
    twin = copy.deepcopy(stack)

    def plain(x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        for b in twin.blocks:
            y1 = x1 + b.f(x2)
            x1, x2 = y1, x2 + b.g(y1)
        return x1, x2

    pairs = list(zip(stack.parameters(), twin.parameters(), strict=True))
    assert_parity(stack, plain, [torch.randn(2, 3, 6), torch.randn(2, 3, 6)], parameters=pairs)


@pytest.mark.outside(REFORMER)
def test_equals_reformer_pytorch() -> None:
    module = pytest.importorskip("reformer_pytorch.reversible")
    stack = ReversibleStack(block() for _ in range(4)).double()
    twin = copy.deepcopy(stack)
    theirs = module.ReversibleSequence(nn.ModuleList(nn.ModuleList([b.f, b.g]) for b in twin.blocks), send_signal=False)
    theirs = theirs.double().train()

    def run(x1: Tensor, x2: Tensor) -> tuple[Tensor, ...]:
        return theirs(torch.cat([x1, x2], -1)).chunk(2, -1)

    pairs = list(zip(stack.parameters(), twin.parameters(), strict=True))
    assert_parity(stack, run, [torch.randn(2, 3, 6), torch.randn(2, 3, 6)], parameters=pairs)


@pytest.mark.law(REFORMER)
def test_inverse_dropout_and_further_arguments() -> None:
    stack = ReversibleStack(block(dropout=0.3) for _ in range(3)).double()
    x1, x2 = torch.randn(2, 3, 6).double(), torch.randn(2, 3, 6).double()
    plain = copy.deepcopy(stack)
    plain.recompute = False
    grads = []
    for layer in (stack, plain):
        torch.manual_seed(1)
        y1, y2 = layer(x1, x2)
        (y1 * y2).sum().backward()
        grads.append([y1, y2, *(p.grad for p in layer.parameters())])
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    for got, want in zip(stack.eval().inverse(*stack(x1, x2)), (x1, x2), strict=True):
        torch.testing.assert_close(got, want)

    class Scaled(nn.Module):
        def forward(self, x: Tensor, by: float) -> Tensor:
            return by * x

    y1, y2 = ReversibleStack([ReversibleBlock(Scaled(), nn.Tanh())])(x1, x2, 3.0)
    torch.testing.assert_close(y1, x1 + 3 * x2)
    assert ReversibleBlock(Scaled(), nn.Tanh()).inverse(y1, y2, 3.0)[0].allclose(x1)


@pytest.mark.registration(REFORMER)
def test_state_dict_copies_and_print() -> None:
    stack, other = (ReversibleStack(block() for _ in range(2)) for _ in range(2))
    other.load_state_dict(stack.state_dict())
    x = torch.randn(2, 3, 6)
    for twin in (other, copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))):
        for got, want in zip(twin(x, x), stack(x, x), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)
    stack.recompute = False
    assert "recompute=False" in repr(stack)
    assert "recompute" not in repr(other)
    low = other.bfloat16()(x.bfloat16(), x.bfloat16())[0]
    assert low.dtype == torch.bfloat16


@pytest.mark.registration(REFORMER)
@pytest.mark.usefixtures("unchecked")
def test_compiles_without_a_graph_break() -> None:
    stack, x = ReversibleStack(block() for _ in range(2)), torch.randn(2, 3, 6)
    compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, x), stack(x, x))


@pytest.mark.refusal(REFORMER)
def test_refusals() -> None:
    for f, g in ((torch.tanh, nn.Tanh()), (nn.Tanh(), None)):
        with refuses(ConfigError, "ReversibleBlock", "module"):
            ReversibleBlock(f, g)
    with refuses(ConfigError, "ReversibleStack blocks", "Tanh"):
        ReversibleStack([nn.Tanh()])
    with refuses(ShapeError, (2, 6), (2, 5)):
        ReversibleStack([block()])(torch.randn(2, 6), torch.randn(2, 5))
    with refuses(ShapeError, "branch F", (2, 3), (2, 6)):
        ReversibleStack([ReversibleBlock(nn.Linear(6, 3), nn.Tanh())])(torch.randn(2, 6), torch.randn(2, 6))
