"""Reversible blocks against the plain stack: the same gradients, and memory that does not grow."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.reversible import Block, forward, inverse, reversible
from handbook_src.testing import assert_parity, refuses, unchecked

REFORMER = "reformer"


def branch(w: Tensor, dropout: float = 0.0) -> Callable[[Tensor], Tensor]:
    return lambda x: F.dropout(torch.tanh(x @ w), dropout)


def blocks(weights: list[Tensor], dropout: float = 0.0) -> list[Block]:
    pairs = zip(weights[::2], weights[1::2], strict=True)
    return [(branch(f, dropout), branch(g, dropout), [f, g]) for f, g in pairs]


def weights(depth: int, d: int = 4) -> list[Tensor]:
    return [0.5 * torch.randn(d, d).double() for _ in range(2 * depth)]


def plain(x1: Tensor, x2: Tensor, *w: Tensor) -> tuple[Tensor, Tensor]:
    """The equations, with ordinary autograd."""
    for f, g in zip(w[::2], w[1::2], strict=True):
        x1 = x1 + torch.tanh(x2 @ f)
        x2 = x2 + torch.tanh(x1 @ g)
    return x1, x2


@pytest.mark.parity(REFORMER)
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("depth", [0, 1, 2, 7])
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 5, 4), (0, 4)])
def test_gradients_are_those_of_the_plain_stack(depth: int, shape: tuple[int, ...], recompute: bool) -> None:
    assert_parity(
        lambda x1, x2, *w: reversible(x1, x2, blocks(list(w)), recompute=recompute),
        plain,
        [torch.randn(shape), torch.randn(shape), *weights(depth)],
    )


@pytest.mark.parity(REFORMER)
def test_shared_frozen_and_unused_weights() -> None:
    w, frozen = torch.randn(4, 4).double(), torch.randn(4, 4).double()
    x = [torch.randn(3, 4).double() for _ in range(2)]

    def ours(x1: Tensor, x2: Tensor, w: Tensor, unused: Tensor) -> tuple[Tensor, Tensor]:
        block = (branch(w), branch(frozen), [w, frozen, unused])
        y1, y2 = reversible(x1, x2, [block, block])
        return y1, y2 + 0 * unused.sum()

    def oracle(x1: Tensor, x2: Tensor, w: Tensor, unused: Tensor) -> tuple[Tensor, Tensor]:
        y1, y2 = plain(x1, x2, w, frozen, w, frozen)
        return y1, y2 + 0 * unused.sum()

    assert_parity(ours, oracle, [*x, w, torch.randn(2).double()])
    constant = lambda x: torch.ones_like(x)  # noqa: E731
    assert_parity(lambda x1, x2: reversible(x1, x2, [(constant, constant, [])]), lambda x1, x2: (x1 + 1, x2 + 1), x)


@pytest.mark.parity(REFORMER)
def test_one_output_alone_and_strided_streams() -> None:
    w = weights(3)
    x = torch.randn(5, 8).double()[:, ::2]
    assert_parity(
        lambda a, b, *w: reversible(a[:, ::2], b.T, blocks(list(w)))[0],
        lambda a, b, *w: plain(a[:, ::2], b.T, *w)[0],
        [torch.randn(5, 8), x.T, *w],
    )


@pytest.mark.law(REFORMER)
def test_the_inverse_gives_the_inputs_back() -> None:
    x1, x2 = torch.randn(3, 4).double(), torch.randn(3, 4).double()
    f, g, _ = blocks(weights(1))[0]
    for got, want in zip(inverse(*forward(x1, x2, f, g), f, g), (x1, x2), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


def kept(depth: int, recompute: bool) -> int:
    """Bytes of distinct tensors that autograd keeps, weights apart."""
    w = [x.requires_grad_() for x in weights(depth)]
    x1, x2 = (torch.randn(64, 4).double().requires_grad_() for _ in range(2))
    own = {x.untyped_storage().data_ptr() for x in w}
    found: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in own:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        outs = reversible(x1, x2, blocks(w), recompute=recompute)
    assert outs[0].requires_grad
    return sum(found.values())


@pytest.mark.law(REFORMER)
def test_what_is_kept_does_not_grow_with_depth() -> None:
    assert [kept(depth, True) for depth in (1, 4, 16)] == [2 * 64 * 4 * 8] * 3, "the two outputs, and nothing else"
    one, four, many = (kept(depth, False) for depth in (1, 4, 16))
    assert many - four == 4 * (four - one) > 0


@pytest.mark.law(REFORMER)
def test_random_numbers_are_replayed_and_the_stream_goes_on_undisturbed() -> None:
    w = weights(4)
    x = [torch.randn(6, 4).double() for _ in range(2)]
    results = []
    for recompute in (True, False):
        leaves = [v.clone().requires_grad_() for v in (*x, *w)]
        torch.manual_seed(3)
        y1, y2 = reversible(*leaves[:2], blocks(leaves[2:], dropout=0.5), recompute=recompute)
        drawn = torch.rand(1)  # the optimiser's, the next batch's ...
        grads = torch.autograd.grad((y1 * y2).sum(), leaves)
        results.append([y1, y2, drawn, torch.rand(1), *grads])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.law(REFORMER)
def test_the_graph_can_be_walked_twice_and_gradients_accumulate() -> None:
    w = [x.requires_grad_() for x in weights(2)]
    x1, x2 = torch.randn(3, 4).double(), torch.randn(3, 4).double()
    loss = sum(y.square().sum() for y in reversible(x1, x2, blocks(w)))
    loss.backward(retain_graph=True)
    once = [x.grad.clone() for x in w]
    loss.backward()
    for x, g in zip(w, once, strict=True):
        torch.testing.assert_close(x.grad, 2 * g)
    with torch.no_grad():
        assert not reversible(x1, x2, blocks(w))[0].requires_grad


@pytest.mark.law(REFORMER)
def test_float32_drifts_a_little_more_with_every_block() -> None:
    torch.manual_seed(0)
    drift = []
    for depth in (4, 64):
        w = [0.5 * torch.randn(4, 4) for _ in range(2 * depth)]
        x1, x2 = torch.randn(100, 4), torch.randn(100, 4)
        y1, y2 = x1, x2
        for f, g, _ in blocks(w):
            y1, y2 = forward(y1, y2, f, g)
        for f, g, _ in reversed(blocks(w)):
            y1, y2 = inverse(y1, y2, f, g)
        drift.append((y1 - x1).abs().max().item())
    assert 0 < drift[0] < 1e-5
    assert drift[1] > drift[0]


@pytest.mark.registration(REFORMER)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_and_autocast(dtype: torch.dtype) -> None:
    w = [x.to(dtype).requires_grad_() for x in weights(3)]
    x1, x2 = (torch.randn(5, 4).to(dtype) for _ in range(2))
    y1, y2 = reversible(x1, x2, blocks(w))
    grads = torch.autograd.grad((y1 * y2).sum(), w)
    wide = [x.detach().double().requires_grad_() for x in w]
    z1, z2 = plain(x1.double(), x2.double(), *wide)
    for got, want in zip(grads, torch.autograd.grad((z1 * z2).sum(), wide), strict=True):
        assert got.dtype == dtype
        assert (got.double() - want).norm() < 0.05 * want.norm()
    seen = []

    def spy(x: Tensor) -> Tensor:
        made = x @ w[0]
        seen.append(made.dtype)
        return made.to(x.dtype)

    if dtype == torch.float32:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y1, _ = reversible(x1, x2, [(spy, spy, [w[0]])])
        y1.sum().backward()
        assert seen == [torch.bfloat16] * 4, "the backward pass runs as the forward pass did"


@pytest.mark.refusal(REFORMER)
def test_refusals() -> None:
    x, w = torch.randn(3, 4), torch.randn(4, 4, requires_grad=True)
    with refuses(ShapeError, "reversible streams", (3, 4), (3, 2)):
        reversible(x, x[:, :2], [])
    with refuses(ShapeError, "reversible streams", "torch.float64"):
        reversible(x, x.double(), [])
    with refuses(ShapeError, "dtype", "torch.int64"):
        reversible(x.long(), x.long(), [])
    narrow = lambda x: x[:, :1]  # noqa: E731
    for name, pair in (("F", (narrow, torch.tanh)), ("G", (torch.tanh, narrow))):
        for recompute in (True, False):
            with refuses(ShapeError, f"branch {name}", (3, 1), (3, 4)):
                reversible(x.requires_grad_(), x, [(*pair, [])], recompute=recompute)
    forgotten = reversible(x, x, [(branch(w), torch.tanh, [])])[0]
    assert not forgotten.requires_grad or x.requires_grad
    with refuses(ConfigError, "reversible weights", (4, 4), "not named"):
        reversible(x.requires_grad_(), x, [(branch(w), torch.tanh, [])])[0].sum().backward()


@pytest.mark.refusal(REFORMER)
def test_weights_that_changed_before_the_backward_pass_are_refused() -> None:
    w = torch.randn(4, 4, requires_grad=True)
    y1, _ = reversible(torch.randn(3, 4), torch.randn(3, 4), [(branch(w), branch(w), [w])])
    with torch.no_grad():
        w.mul_(2)
    with refuses(ConfigError, "weights changed", "optimiser"):
        y1.sum().backward()


def test_a_weight_that_is_named_twice_gets_its_gradient_once() -> None:
    w, x1, x2 = (torch.randn(3, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def branch(x: Tensor) -> Tensor:
        return torch.tanh(x @ w)

    def gradient(weights: list[Tensor], recompute: bool) -> Tensor:
        y1, y2 = reversible(x1, x2, [(branch, branch, weights)], recompute=recompute)
        return torch.autograd.grad((y1.square() + y2).sum(), w)[0]

    torch.testing.assert_close(gradient([w, w], True), gradient([w], False))
    with unchecked():  # a generator is no sequence, but its blocks must not be lost either
        once = reversible(x1, x2, ((branch, branch, [w]) for _ in range(2)))  # type: ignore[arg-type]
    torch.testing.assert_close(once, reversible(x1, x2, [(branch, branch, [w])] * 2))


def test_branches_that_cannot_be_run_again_alike_are_refused() -> None:
    x1, x2 = (torch.randn(4, 3, requires_grad=True) for _ in range(2))
    kept = x2.detach().clone()
    with refuses(ConfigError, "in place", "inplace=False"):
        reversible(x1, x2, [(lambda x: x, lambda x: x.mul_(2.0), [])])
    torch.testing.assert_close(x2, kept)
    noisy = torch.nn.Dropout(0.5)
    for before, after in ((True, False), (False, True)):
        y1, y2 = reversible(x1, x2, [(noisy.train(before), lambda x: x, [])])
        noisy.train(after)
        state = torch.get_rng_state()
        with refuses(ConfigError, "random numbers", "eval()"):
            (y1 + y2).sum().backward()
        assert torch.equal(torch.get_rng_state(), state)
    with refuses(ConfigError, "(F, G, weights)"):
        reversible(x1, x2, [(noisy, noisy)])  # type: ignore[list-item]
    with refuses(ShapeError, "meta", "cpu"):
        reversible(x1, x2.detach().to("meta"), [])
