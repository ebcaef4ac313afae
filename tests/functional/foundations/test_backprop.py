"""The chain rule written out against autograd, finite differences, and itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handbook_src.errors import ConfigError, DataError, ShapeError
from handbook_src.functional.foundations.backprop import ACTIVATIONS, cross_entropy_backward, mlp_backward, mlp_forward
from handbook_src.testing import refuses, unchecked

SIZES = [(3,), (5, 1), (1, 1, 1), (4, 7, 3), (6, 5, 5, 2)]


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def network(d: int, widths: tuple[int, ...], dtype: torch.dtype = torch.float64):
    sizes = (d, *widths)
    weights = [draw(o, i, dtype=dtype) for i, o in zip(sizes, widths, strict=False)]
    return weights, [draw(o, dtype=dtype) for o in widths]


def by_autograd(x, weights, biases, activation, grad_output):
    inputs = [t.detach().requires_grad_() for t in (x, *weights, *biases)]
    n = len(weights)
    y = inputs[0]
    module = {"identity": nn.Identity(), "relu": nn.ReLU(), "sigmoid": nn.Sigmoid(), "tanh": nn.Tanh()}[activation]
    for i in range(n):
        y = F.linear(y, inputs[1 + i], inputs[1 + n + i])
        y = y if i == n - 1 else module(y)
    return y.detach(), torch.autograd.grad(y, inputs, grad_output)


# ---------------------------------------------------------------- parity
@pytest.mark.parity("backprop")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("widths", SIZES)
@pytest.mark.parametrize("batch", [1, 9, 0])
def test_backward_is_autograds(activation, widths, batch):
    x = draw(batch, 4)
    weights, biases = network(4, widths)
    g = draw(batch, widths[-1])
    y, trace = mlp_forward(x, weights, biases, activation)
    found = mlp_backward(g, trace, weights)
    want_y, want = by_autograd(x, weights, biases, activation, g)
    torch.testing.assert_close(y, want_y, rtol=1e-12, atol=1e-12)
    for mine, torchs in zip((found.x, *found.weights, *found.biases), want, strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-10, atol=1e-12)


@pytest.mark.parity("backprop")
def test_relu_at_zero_passes_nothing_as_in_torch():
    x, weights, biases = draw(3, 2), [torch.zeros(4, 2).double(), draw(1, 4)], [torch.zeros(4).double(), draw(1)]
    _, trace = mlp_forward(x, weights, biases, "relu")
    g = draw(3, 1)
    found, (_, want) = mlp_backward(g, trace, weights), by_autograd(x, weights, biases, "relu", g)
    torch.testing.assert_close(found.x, want[0])
    assert (found.weights[0] == 0).all()


@pytest.mark.parity("backprop")
@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (1, 3), (7, 5)])
def test_cross_entropy_is_torchs(rows, classes):
    logits, target = draw(rows, classes).requires_grad_(), torch.randint(classes, (rows,))
    loss = F.cross_entropy(logits, target)
    mine, gradient = cross_entropy_backward(logits.detach(), target)
    torch.testing.assert_close(mine, loss.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, torch.autograd.grad(loss, logits)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parity("backprop")
def test_cross_entropy_stands_logits_that_overflow_exp():
    loss, gradient = cross_entropy_backward(torch.tensor([[1e4, 0.0], [0.0, 1e4]]), torch.tensor([0, 0]))
    assert loss == 5e3
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 0.0], [-0.5, 0.5]]))


# ---------------------------------------------------------------- law
@pytest.mark.law("backprop")
@pytest.mark.parametrize("activation", ["identity", "sigmoid", "tanh"])
def test_a_small_step_changes_the_loss_by_gradient_times_step(activation):
    x, (weights, biases), g = draw(5, 3), network(3, (4, 2)), draw(5, 2)
    _, trace = mlp_forward(x, weights, biases, activation)
    found = mlp_backward(g, trace, weights)
    step, size = [draw(*w.shape) for w in weights], 1e-6

    def loss(sign: float) -> Tensor:
        moved = [w + sign * size * s for w, s in zip(weights, step, strict=True)]
        return (mlp_forward(x, moved, biases, activation)[0] * g).sum()

    slope = (loss(1) - loss(-1)) / (2 * size)
    want = sum((a * b).sum() for a, b in zip(found.weights, step, strict=True))
    torch.testing.assert_close(slope, want, rtol=1e-7, atol=1e-7)


@pytest.mark.law("backprop")
def test_the_way_back_is_linear_in_the_gradient_and_a_sum_over_samples():
    x, (weights, biases) = draw(6, 3), network(3, (4, 2))
    g, k = draw(6, 2), draw(6, 2)

    def back(rows: slice, grad: Tensor) -> Tensor:
        _, trace = mlp_forward(x[rows], weights, biases)
        return mlp_backward(grad, trace, weights).weights[0]

    whole = slice(None)
    torch.testing.assert_close(back(whole, 2 * g - k), 2 * back(whole, g) - back(whole, k))
    torch.testing.assert_close(back(whole, g), back(slice(0, 2), g[:2]) + back(slice(2, 6), g[2:]))


@pytest.mark.law("backprop")
def test_logits_gradients_sum_to_zero_over_the_classes():
    _, gradient = cross_entropy_backward(draw(6, 4), torch.randint(4, (6,)))
    assert gradient.sum(1).abs().max() < 1e-15


# ---------------------------------------------------------------- registration
@pytest.mark.registration("backprop")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_are_kept_and_inputs_left_alone(dtype):
    x, (weights, biases) = draw(3, 4, dtype=dtype).T.contiguous().T, network(4, (5, 2), dtype)
    kept = [t.clone() for t in (x, *weights, *biases)]
    y, trace = mlp_forward(x, weights, biases, "relu")
    found = mlp_backward(torch.ones_like(y), trace, weights)
    assert {t.dtype for t in (y, found.x, *found.weights, *found.biases)} == {dtype}
    for before, after in zip(kept, (x, *weights, *biases), strict=True):
        assert torch.equal(before, after)


@pytest.mark.registration("backprop")
def test_it_compiles_without_a_graph_break():
    def step(x, w1, w2, b1, b2):
        y, trace = mlp_forward(x, [w1, w2], [b1, b2])
        return mlp_backward(y, trace, [w1, w2]).weights[0]

    (w1, w2), (b1, b2) = network(4, (5, 2))
    x = draw(3, 4)
    with unchecked():
        torch.testing.assert_close(
            torch.compile(step, fullgraph=True, backend="eager")(x, w1, w2, b1, b2), step(x, w1, w2, b1, b2)
        )


@pytest.mark.registration("backprop")
@pytest.mark.parametrize("integer", [torch.uint8, torch.int16, torch.int32])
def test_small_integers_are_classes_not_masks(integer):
    logits, target = draw(3, 4), torch.tensor([1, 0, 1])
    want = cross_entropy_backward(logits, target)
    torch.testing.assert_close(cross_entropy_backward(logits, target.to(integer)), want)
    with unchecked():
        compiled = torch.compile(cross_entropy_backward, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(logits, target), want)
        assert cross_entropy_backward(logits.to("meta"), target.to("meta"))[1].shape == (3, 4)


# ---------------------------------------------------------------- refusal
@pytest.mark.refusal("backprop")
def test_layers_that_do_not_fit_are_named():
    weights, biases = network(4, (5, 2))
    with refuses(ShapeError, "weight 0", "(5, 4)", 3):
        mlp_forward(draw(2, 3), weights, biases)
    with refuses(ShapeError, "weight 1", "(2, 5)", "4 features"):
        mlp_forward(draw(2, 4), [weights[0][:4], weights[1]], [biases[0][:4], biases[1]])
    with refuses(ShapeError, "bias 1", "(3,)"):
        mlp_forward(draw(2, 4), weights, [biases[0], draw(3)])
    with refuses(ShapeError, "(2, 4, 1)"):
        mlp_forward(draw(2, 4, 1), weights, biases)
    with refuses(ShapeError, torch.int64):
        mlp_forward(torch.ones(2, 4, dtype=torch.int64), weights, biases)
    with refuses(ConfigError, "0 weights"):
        mlp_forward(draw(2, 4), [], [])
    with refuses(ConfigError, "2 weights", "1 biases"):
        mlp_forward(draw(2, 4), weights, biases[:1])
    with refuses(ConfigError, "'gelu'", "tanh"):
        mlp_forward(draw(2, 4), weights, biases, "gelu")


@pytest.mark.refusal("backprop")
def test_a_gradient_of_another_pass_is_refused():
    weights, biases = network(4, (5, 2))
    _, trace = mlp_forward(draw(3, 4), weights, biases)
    with refuses(ShapeError, "(3, 1)", "(3, 2)"):
        mlp_backward(draw(3, 1), trace, weights)
    with refuses(ConfigError, "2 layers", "1"):
        mlp_backward(draw(3, 2), trace, weights[:1])
    with refuses(ShapeError, "weight 0", "(5, 7)", "(5, 4)"):
        mlp_backward(draw(3, 2), trace, [draw(5, 7), weights[1]])
    with refuses(ShapeError, "torch.float32", "torch.float64"):
        mlp_backward(draw(3, 2).float(), trace, weights)


@pytest.mark.refusal("backprop")
def test_mixed_dtypes_are_refused():
    weights, biases = network(4, (5, 2))
    for call in (
        lambda: mlp_forward(draw(3, 4).float(), weights, biases),
        lambda: mlp_forward(draw(3, 4), weights, [biases[0], biases[1].float()]),
    ):
        with refuses(ShapeError, "torch.float32", "torch.float64"):
            call()


@pytest.mark.refusal("backprop")
def test_targets_outside_the_classes_are_refused():
    for target in ([0, 3], [-1, 0]):
        with refuses(DataError, "0 to 2", min(target), max(target)):
            cross_entropy_backward(draw(2, 3), torch.tensor(target))
    with refuses(ShapeError, "(3,)", "(2, 3)"):
        cross_entropy_backward(draw(2, 3), torch.tensor([0, 1, 2]))
    with refuses(ShapeError, "(0,)"):
        cross_entropy_backward(draw(0, 3), torch.empty(0, dtype=torch.int64))
    for dtype in (torch.bool, torch.float32):
        with refuses(ShapeError, "target", dtype):
            cross_entropy_backward(draw(2, 3), torch.tensor([0, 1]).to(dtype))
    with refuses(ShapeError, "3 axes"):
        cross_entropy_backward(draw(2, 3, 1), torch.tensor([0, 1]))
    with refuses(ShapeError, torch.int64):
        cross_entropy_backward(torch.ones(2, 3, dtype=torch.int64), torch.tensor([0, 1]))
