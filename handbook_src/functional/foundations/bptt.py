r"""Back-propagation through time: the same chain rule along a sequence, and what it does to the signal.

The recurrent network is Elman's, with torch's names.  :func:`rnn_backward` is the
derivative written out; :func:`jacobian_norms` measures why long memories are hard to learn.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from handbook_src.check import check_features, check_floating, check_one_dtype, check_rank, check_size
from handbook_src.errors import ConfigError, ShapeError
from handbook_src.precision import at_least_float32

Nonlinearity = Literal["tanh", "relu"]


class Recurrence(NamedTuple):
    """The parameters of an Elman cell, under the names of ``torch.nn.RNN``."""

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor
    bias_hh: Tensor


class RecurrenceGradients(NamedTuple):
    """What the way back returns: for the inputs, the first state and each parameter."""

    x: Tensor
    h0: Tensor
    parameters: Recurrence


def rnn_forward(
    x: Float[Tensor, "b t d"],
    h0: Float[Tensor, "b n"],
    parameters: Recurrence,
    nonlinearity: Nonlinearity = "tanh",
) -> Float[Tensor, "b t n"]:
    r"""Run an Elman network and return every state.

    .. math:: z_t = x_t W_{ih}^\top + b_{ih} + h_{t-1} W_{hh}^\top + b_{hh}, \qquad h_t = \phi(z_t)

    Args:
        x: a batch of sequences, which may have no steps.
        h0: the state before the first step.
        parameters: ``weight_ih`` (``n d``), ``weight_hh`` (``n n``) and two biases (``n``).
        nonlinearity: :math:`\phi`, ``tanh`` or ``relu``.

    Raises:
        ConfigError: an unknown ``nonlinearity``.
        ShapeError: sizes that do not fit, or dtypes that are not floating or differ.

    Source:
        Elman 1990, doi:10.1207/s15516709cog1402_1; Pascanu et al. 2012, eq. 1 and 2, arXiv:1211.5063
    """
    _check("rnn_forward", x, h0, parameters, nonlinearity)
    phi = torch.tanh if nonlinearity == "tanh" else torch.relu
    driven = x @ parameters.weight_ih.T + parameters.bias_ih + parameters.bias_hh
    h, states = h0, []
    for step in driven.unbind(1):
        h = phi(step + h @ parameters.weight_hh.T)
        states.append(h)
    return torch.stack(states, 1) if states else driven


def rnn_backward(
    grad_states: Float[Tensor, "b t n"],
    x: Float[Tensor, "b t d"],
    h0: Float[Tensor, "b n"],
    states: Float[Tensor, "b t n"],
    parameters: Recurrence,
    nonlinearity: Nonlinearity = "tanh",
    *,
    truncate: int | None = None,
) -> RecurrenceGradients:
    r"""Carry the gradient of the loss back through time.

    .. math::
        \delta_t &= \Bigl(\frac{\partial \mathcal L_t}{\partial h_t} + \delta_{t+1} W_{hh}\Bigr) \odot \phi'(z_t) \\
        \frac{\partial \mathcal L}{\partial W_{hh}} &= \sum_t \delta_t^\top h_{t-1}, \qquad
        \frac{\partial \mathcal L}{\partial W_{ih}} = \sum_t \delta_t^\top x_t, \qquad
        \frac{\partial \mathcal L}{\partial x_t} = \delta_t W_{ih}

    with :math:`z_t` as in :func:`rnn_forward`.  One weight serves every step, so its gradient is
    a sum over steps.  With ``truncate`` = k the
    gradient does not cross from a block of k steps into the one before, as if the state had been
    detached there.

    Args:
        grad_states: the loss's direct gradient with respect to each state.
        x: the inputs of :func:`rnn_forward`.
        h0: its first state.
        states: what it returned.
        parameters: its parameters.
        nonlinearity: its :math:`\phi`; the derivative is read from the state.
        truncate: length of a block in steps; the whole sequence if not given.

    Raises:
        ConfigError: an unknown ``nonlinearity``, or ``truncate`` below 1.
        ShapeError: sizes that do not fit, or dtypes that are not floating or differ.

    Source:
        Werbos 1990, doi:10.1109/5.58337; Pascanu et al. 2012, eq. 3 to 5, arXiv:1211.5063
    """
    _check("rnn_backward", x, h0, parameters, nonlinearity)
    _check_states("rnn_backward", x, h0, states, grad_states)
    if truncate is not None:
        check_size("rnn_backward", "truncate", truncate)
    steps = x.shape[1]
    carried = torch.zeros_like(h0)
    deltas = torch.empty_like(states)
    for t in reversed(range(steps)):
        deltas[:, t] = (grad_states[:, t] + carried) * slope(states[:, t], nonlinearity)
        carried = deltas[:, t] @ parameters.weight_hh
        if truncate and t % truncate == 0 and t > 0:
            carried = torch.zeros_like(carried)
    before = torch.cat([h0[:, None], states[:, :-1]], 1) if steps else states
    bias = deltas.sum((0, 1))
    gradients = Recurrence(
        weight_ih=deltas.flatten(0, 1).T @ x.flatten(0, 1),
        weight_hh=deltas.flatten(0, 1).T @ before.flatten(0, 1),
        bias_ih=bias,
        bias_hh=bias.clone(),
    )
    return RecurrenceGradients(deltas @ parameters.weight_ih, carried, gradients)


def jacobian_norms(
    states: Float[Tensor, "b t n"], weight_hh: Float[Tensor, "n n"], nonlinearity: Nonlinearity = "tanh"
) -> Float[Tensor, "b t"]:
    r"""Measure how much of the last state's gradient reaches each state before it.

    .. math::
        \Bigl\lVert \frac{\partial h_T}{\partial h_k} \Bigr\rVert_2 =
        \Bigl\lVert \prod_{t=k+1}^{T} \mathrm{diag}\bigl(\phi'(z_t)\bigr) W_{hh} \Bigr\rVert_2
        \le \bigl(\gamma\, \lVert W_{hh} \rVert_2\bigr)^{T-k}

    with :math:`z_t` as in :func:`rnn_forward` and :math:`\gamma = \max \phi'` (1 for tanh and ReLU).
    Below one the product vanishes, above one it may explode.  Half precision is computed in
    float32 and rounded once.

    Args:
        states: what :func:`rnn_forward` returned.
        weight_hh: its recurrent matrix.
        nonlinearity: its :math:`\phi`.

    Returns:
        The spectral norm for each lag ``T - k`` from 0 (which is 1, a step to itself) to ``t - 1``.

    Raises:
        ConfigError: an unknown ``nonlinearity``.
        ShapeError: sizes that do not fit, or dtypes that are not floating or differ.

    Source:
        Pascanu et al. 2012, eq. 5 to 7, arXiv:1211.5063
    """
    _check_nonlinearity("jacobian_norms", nonlinearity)
    check_floating("jacobian_norms", states, weight_hh)
    check_one_dtype("jacobian_norms", states, weight_hh)
    check_rank("jacobian_norms", states, [3], "(batch, time, state)")
    size = states.shape[-1]
    check_rank("jacobian_norms weight_hh", weight_hh, [2], "(state, state)")
    check_features("jacobian_norms", weight_hh, size, name="weight_hh")
    check_features("jacobian_norms", weight_hh, size, name="weight_hh", axis=0)
    wide, w = at_least_float32(states), at_least_float32(weight_hh)
    product = torch.eye(size, dtype=wide.dtype, device=states.device).expand(len(states), size, size)
    norms = []
    for h in reversed(wide.unbind(1)):
        norms.append(torch.linalg.matrix_norm(product, 2) if size else h.new_zeros(len(h)))
        product = product @ (slope(h, nonlinearity)[:, :, None] * w)
    return torch.stack(norms, 1).to(states.dtype) if norms else states.new_zeros(states.shape[:2])


def slope(h: Float[Tensor, "*shape"], nonlinearity: Nonlinearity) -> Float[Tensor, "*shape"]:
    r"""Return the derivative of the activation, read from its output.

    .. math:: \tanh'(z) = 1 - h^2, \qquad \mathrm{relu}'(z) = [h > 0]

    Args:
        h: the activation's output.
        nonlinearity: ``tanh`` or ``relu``.

    Source:
        Pascanu et al. 2012, section 2, arXiv:1211.5063
    """
    return 1 - h * h if nonlinearity == "tanh" else (h > 0).to(h.dtype)


def _check_nonlinearity(op: str, nonlinearity: str) -> None:
    if nonlinearity not in ("tanh", "relu"):
        raise ConfigError(
            f"{op} nonlinearity", got=repr(nonlinearity), want="'tanh' or 'relu'", remedy="torch.nn.RNN has the same."
        )


def _check(op: str, x: Tensor, h0: Tensor, parameters: Recurrence, nonlinearity: str) -> None:
    _check_nonlinearity(op, nonlinearity)
    check_floating(op, x, h0, *parameters)
    check_one_dtype(op, x, h0, *parameters)
    check_rank(op, x, [3], "(batch, time, features)")
    check_rank(f"{op} h0", h0, [2], "(batch, state)")
    size = h0.shape[1]
    if len(h0) != len(x):
        raise ShapeError(
            f"{op} h0", got=f"batch {len(h0)}", want=f"batch {len(x)}, as the inputs", remedy="One state a sequence."
        )
    wants = {"weight_ih": (size, x.shape[2]), "weight_hh": (size, size), "bias_ih": (size,), "bias_hh": (size,)}
    for name, want in wants.items():
        got = tuple(getattr(parameters, name).shape)
        if got != want:
            raise ShapeError(
                f"{op} {name}",
                got=got,
                want=f"{want}, for states of size {size} and inputs of size {x.shape[2]}",
                remedy="Take the names and shapes of torch.nn.RNN.",
            )


def _check_states(op: str, x: Tensor, h0: Tensor, *states: Tensor) -> None:
    check_one_dtype(op, x, *states)
    want = (*x.shape[:2], h0.shape[1])
    for s in states:
        if tuple(s.shape) != want:
            raise ShapeError(
                f"{op} states", got=tuple(s.shape), want=f"{want}, a state a step", remedy="Pass rnn_forward's states."
            )
