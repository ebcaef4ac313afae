r"""Back-propagation by hand: the chain rule of a multi-layer perceptron, one matrix product at a time.

Nothing here uses autograd: :func:`mlp_forward` keeps what the way back needs and
:func:`mlp_backward` spends it.  It is the page's own proof that there is no magic in
``loss.backward()``; in a model, call that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from handbook_src.check import check_features, check_floating, check_integers, check_one_dtype, check_rank
from handbook_src.errors import ConfigError, DataError, ShapeError

Activation = Literal["identity", "relu", "sigmoid", "tanh"]

#: Each activation, and its derivative written in terms of its output: the way back needs no pre-activation.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "identity": (lambda z: z, torch.ones_like),
    "relu": (torch.relu, lambda y: (y > 0).to(y.dtype)),
    "sigmoid": (torch.sigmoid, lambda y: y * (1 - y)),
    "tanh": (torch.tanh, lambda y: 1 - y * y),
}


class Trace(NamedTuple):
    """What the forward pass keeps: the input and the output of every layer, in order."""

    outputs: tuple[Tensor, ...]
    activation: Activation


class Gradients(NamedTuple):
    """What the backward pass returns."""

    x: Tensor
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]


def mlp_forward(
    x: Float[Tensor, "b d"],
    weights: Sequence[Float[Tensor, "_ _"]],
    biases: Sequence[Float[Tensor, " _"]],
    activation: Activation = "tanh",
) -> tuple[Float[Tensor, "b f"], Trace]:
    r"""Run a perceptron and keep every layer's output.

    .. math:: y^{(0)} = x, \qquad z^{(l)} = y^{(l-1)} W^{(l)\top} + b^{(l)}, \qquad y^{(l)} = \phi(z^{(l)})

    The last layer has no activation.

    Args:
        x: a batch of inputs.
        weights: one matrix ``out in`` for each layer.
        biases: one vector for each layer.
        activation: :math:`\phi`: ``identity``, ``relu``, ``sigmoid`` or ``tanh``.

    Raises:
        ConfigError: no layer, not one bias for each weight, or an unknown activation.
        ShapeError: sizes that do not follow one another, or dtypes that are not floating or differ.

    Source:
        Rumelhart, Hinton & Williams 1986, eq. 1 and 2, doi:10.1038/323533a0
    """
    phi, _ = _rule("mlp_forward", activation)
    _check_layers("mlp_forward", x, weights, biases)
    outputs = [x]
    for layer, (w, b) in enumerate(zip(weights, biases, strict=True), start=1):
        z = outputs[-1] @ w.T + b
        outputs.append(z if layer == len(weights) else phi(z))
    return outputs[-1], Trace(tuple(outputs), activation)


def mlp_backward(
    grad_output: Float[Tensor, "b f"],
    trace: Trace,
    weights: Sequence[Float[Tensor, "_ _"]],
) -> Gradients:
    r"""Carry the gradient of the loss from the output back to every parameter.

    .. math::
        \delta^{(L)} &= \frac{\partial \mathcal L}{\partial y^{(L)}}, \qquad
        \delta^{(l)} = \bigl(\delta^{(l+1)} W^{(l+1)}\bigr) \odot \phi'\bigl(z^{(l)}\bigr) \\
        \frac{\partial \mathcal L}{\partial W^{(l)}} &= \delta^{(l)\top} y^{(l-1)}, \qquad
        \frac{\partial \mathcal L}{\partial b^{(l)}} = \sum_b \delta^{(l)}_b, \qquad
        \frac{\partial \mathcal L}{\partial x} = \delta^{(1)} W^{(1)}

    :math:`\phi'` is read from the layer's output.  At zero the derivative of ReLU is zero, as in torch.

    Args:
        grad_output: the loss's gradient with respect to the network's output.
        trace: what :func:`mlp_forward` kept.
        weights: the same matrices that it was given.

    Raises:
        ConfigError: the trace belongs to another number of layers.
        ShapeError: ``grad_output`` has not the output's shape and dtype, or a weight not that of the forward pass.

    Source:
        Rumelhart, Hinton & Williams 1986, eq. 4 to 7, doi:10.1038/323533a0
    """
    _, slope = _rule("mlp_backward", trace.activation)
    outputs = trace.outputs
    if len(outputs) != len(weights) + 1:
        raise ConfigError(
            "mlp_backward trace",
            got=f"{len(outputs) - 1} layers",
            want=f"{len(weights)}, one for each weight",
            remedy="Pass the trace and the weights of the same forward pass.",
        )
    if grad_output.shape != outputs[-1].shape:
        raise ShapeError(
            "mlp_backward grad_output",
            got=tuple(grad_output.shape),
            want=f"{tuple(outputs[-1].shape)}, the output's shape",
            remedy="Differentiate the loss with respect to the output of mlp_forward.",
        )
    check_one_dtype("mlp_backward", outputs[-1], grad_output, *weights)
    for i, (w, y_in, y_out) in enumerate(zip(weights, outputs[:-1], outputs[1:], strict=True)):
        want = (y_out.shape[1], y_in.shape[1])
        if tuple(w.shape) != want:
            raise ShapeError(
                f"mlp_backward weight {i}",
                got=tuple(w.shape),
                want=f"{want}, as in the forward pass",
                remedy="Pass the weights that mlp_forward was given.",
            )
    delta = grad_output
    grad_weights, grad_biases = [], []
    for w, y_in in zip(reversed(weights), reversed(outputs[:-1]), strict=True):
        grad_weights.append(delta.T @ y_in)
        grad_biases.append(delta.sum(0))
        delta = delta @ w
        if y_in is not outputs[0]:  # an input has no activation to pass
            delta = delta * slope(y_in)
    return Gradients(delta, tuple(reversed(grad_weights)), tuple(reversed(grad_biases)))


def cross_entropy_backward(
    logits: Float[Tensor, "b v"], target: Integer[Tensor, " b"]
) -> tuple[Float[Tensor, ""], Float[Tensor, "b v"]]:
    r"""Return the mean cross-entropy and its gradient with respect to the logits.

    .. math::
        \mathcal L = -\frac1b \sum_b \log p_{b, t_b}, \qquad p = \mathrm{softmax}(z), \qquad
        \frac{\partial \mathcal L}{\partial z_{bv}} = \frac{p_{bv} - [v = t_b]}{b}

    Args:
        logits: unnormalised scores.
        target: the right class of each row.

    Raises:
        DataError: a target outside the classes; not looked for under ``torch.compile``.
        ShapeError: not one target for each row, an empty batch, targets that are not integers (booleans are not),
            or logits that are not floating.

    Source:
        Bridle 1990, doi:10.1007/978-3-642-76153-9_28
    """
    check_floating("cross_entropy_backward", logits)
    check_rank("cross_entropy_backward", logits, [2], "(batch, classes)")
    check_integers("cross_entropy_backward", "target", target, "Convert with .long().")
    target = target.long()  # smaller integers would be read as masks
    if target.shape != logits.shape[:1] or not len(logits):
        raise ShapeError(
            "cross_entropy_backward target",
            got=f"{tuple(target.shape)} for logits {tuple(logits.shape)}",
            want="one class for each row, of at least one row",
            remedy="A mean over no samples is not a number.",
        )
    seen = not (torch.compiler.is_compiling() or target.is_meta)  # a branch on values would break the graph
    if seen and (target.min() < 0 or target.max() >= logits.shape[1]):
        raise DataError(
            "cross_entropy_backward target",
            got=f"classes from {target.min()} to {target.max()}",
            want=f"0 to {logits.shape[1] - 1}",
            remedy="Give the last layer one output for each class.",
        )
    log_p = logits - logits.logsumexp(1, keepdim=True)
    rows = torch.arange(len(logits), device=logits.device)
    gradient = log_p.exp()
    gradient[rows, target] -= 1
    return -log_p[rows, target].mean(), gradient / len(logits)


def _rule(op: str, activation: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    if activation not in ACTIVATIONS:
        raise ConfigError(
            f"{op} activation",
            got=repr(activation),
            want=f"one of {list(ACTIVATIONS)}",
            remedy="These have derivatives that can be read from their outputs.",
        )
    return ACTIVATIONS[activation]


def _check_layers(op: str, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
    if not weights or len(weights) != len(biases):
        raise ConfigError(
            f"{op} layers",
            got=f"{len(weights)} weights and {len(biases)} biases",
            want="one bias for each weight, of at least one layer",
            remedy="Pass zeros for a layer without a bias.",
        )
    check_floating(op, x, *weights, *biases)
    check_one_dtype(op, x, *weights, *biases)
    check_rank(op, x, [2], "(batch, features)")
    features = x.shape[1]
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        check_rank(f"{op} weight {i}", w, [2], "(out, in)")
        check_features(op, w, features, name=f"weight {i}")
        features = w.shape[0]
        check_rank(f"{op} bias {i}", b, [1], "(out,)")
        check_features(op, b, features, name=f"bias {i}")
