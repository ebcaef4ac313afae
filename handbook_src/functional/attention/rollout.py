"""Attention through all layers at once: rollout and flow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from handbook_src.check import check_floating, check_probability
from handbook_src.errors import ConfigError, ShapeError
from handbook_src.precision import at_least_float32

HeadFusion = Literal["mean", "max", "min"]


def attention_rollout(
    weights: Sequence[Float[Tensor, "b h t t"]] | Float[Tensor, "l b h t t"],
    residual: float = 0.5,
    *,
    heads: HeadFusion = "mean",
) -> Float[Tensor, "b t t"]:
    r"""Multiply the layers' attention: how much of each input reaches each output, were mixing all.

    .. math::
        A^l = \operatorname{norm}\big((1 - \alpha)\, W^l + \alpha I\big), \qquad
        \tilde A^1 = A^1, \quad \tilde A^l = A^l \tilde A^{l-1}

    :math:`W^l` are the weights of layer :math:`l`, its heads fused; :math:`\alpha` stands for the residual
    connection, and norm divides each row by its sum.  Every row of the result sums to one.  What the
    values, the norms and the MLPs do to a vector is left out.

    A query that attends to nothing keeps itself.  A NaN row (a padded query's) reaches no output that
    does not attend to it.  Half precision is multiplied in float32 and rounded once.

    Args:
        weights: attention weights (after the softmax) of each layer, the first layer first.
        residual: share :math:`\alpha` of the residual connection; 0 leaves it out.
        heads: how to fuse the heads; the paper takes the mean, ``max`` and ``min`` are re-normalised.

    Raises:
        ConfigError: no layer, ``residual`` outside [0, 1], or an unknown fusion.
        ShapeError: maps that are not square, differ in shape, dtype or device, or are no floats.

    Source:
        Abnar & Zuidema 2020, eq. 1 and section 3, arXiv:2005.00928
    """
    rolled: Tensor | None = None
    for step in mixing_matrices("attention_rollout", weights, residual, heads):
        rolled = step if rolled is None else _product(step, rolled)
    assert rolled is not None
    return rolled.to(weights[0].dtype)


def attention_flow(
    weights: Sequence[Float[Tensor, "b h t t"]] | Float[Tensor, "l b h t t"],
    residual: float = 0.5,
    *,
    heads: HeadFusion = "mean",
    normalize: bool = True,
) -> Float[Tensor, "b t t"]:
    r"""Read the layers as a network of pipes: the most that can flow from each input to each output.

    .. math:: F_{ij} = \operatorname{maxflow}\big((L, i) \to (0, j)\big), \qquad
        \operatorname{capacity}\big((l, i) \to (l-1, j)\big) = A^l_{ij}

    with :math:`A^l` as in :func:`attention_rollout`.  For one layer the flow is :math:`A^1`; for two it is
    :math:`\sum_k \min(A^2_{ik}, A^1_{kj})`, where rollout has the product.  Unlike rollout's, the values
    for one output don't share its unit of attention, so they sum to more than one before ``normalize``.

    One maximum flow a pair, on the CPU, in float64, without gradients: seconds for a sentence of 20 tokens.

    Args:
        weights: attention weights (after the softmax) of each layer, the first layer first.
        residual: share of the residual connection; 0 leaves it out.
        heads: how to fuse the heads.
        normalize: divide each row by its sum, as the released code does.

    Raises:
        ConfigError: no layer, ``residual`` outside [0, 1], or an unknown fusion.
        ShapeError: maps that don't fit each other, or hold a NaN or a negative number.

    Source:
        Abnar & Zuidema 2020, section 3 (attention flow), arXiv:2005.00928
    """
    with torch.no_grad():
        steps = mixing_matrices("attention_flow", weights, residual, heads)
    if steps[0].is_meta:  # shapes without values: nothing can flow
        return torch.empty_like(steps[0], dtype=weights[0].dtype)
    if not all(bool((w >= 0).all()) for w in weights):  # a NaN is not >= 0
        raise ShapeError(
            "attention_flow weights",
            got="a NaN or a negative number",
            want="capacities of at least 0",
            remedy="Pass weights after the softmax, not scores, and drop the padding.",
        )
    b, t = steps[0].shape[:2]
    flow = torch.zeros(b, t, t, dtype=torch.float64)
    for n in range(b):
        flow[n] = torch.tensor(_flows([a[n].double().tolist() for a in steps]), dtype=torch.float64).view(t, t)
    return _normalized(flow).to(weights[0]) if normalize else flow.to(weights[0])


def mixing_matrices(op: str, weights: Sequence[Tensor] | Tensor, residual: float, heads: str) -> list[Tensor]:
    """The matrices :math:`A^l`, ``b t t`` each, in float32 at least."""
    _check(op, weights, residual, heads)
    steps = []
    for w in weights:
        wide = at_least_float32(w)
        fused = wide.mean(1) if heads == "mean" else wide.amax(1) if heads == "max" else wide.amin(1)
        own = torch.eye(w.shape[-1], device=w.device, dtype=fused.dtype)
        empty = fused.sum(-1, keepdim=True) == 0  # attends to nothing: the residual is all it has
        share = torch.full_like(fused[..., :1], residual).masked_fill(empty, 1.0)
        steps.append(_normalized((1 - residual) * fused + share * own))
    return steps


def _product(step: Tensor, rolled: Tensor) -> Tensor:
    """``step @ rolled``, in which a NaN row (of padding, say) stays with those that attend to it."""
    bad, gone = (~x.isfinite().all(-1, keepdim=True) for x in (step, rolled))
    reached = bad | ((step != 0).to(step.dtype) @ gone.to(step.dtype) > 0)
    return (step.masked_fill(bad, 0.0) @ rolled.masked_fill(gone, 0.0)).masked_fill(reached, math.nan)


def _normalized(a: Tensor) -> Tensor:
    total = a.sum(-1, keepdim=True)
    return a / torch.where(total == 0, torch.ones_like(total), total)


def _flows(layers: list[list[list[float]]]) -> list[list[float]]:
    import networkx as nx  # comes with torch; 0.2 s to import

    graph, t = nx.DiGraph(), len(layers[0])
    graph.add_nodes_from((level, i) for level in range(len(layers) + 1) for i in range(t))
    for level, a in enumerate(layers):
        for i, row in enumerate(a):
            graph.add_edges_from(
                ((level + 1, i), (level, j), {"capacity": share}) for j, share in enumerate(row) if share > 0
            )
    flow = nx.algorithms.flow
    pipes = flow.build_residual_network(graph, "capacity")
    return [
        [
            flow.edmonds_karp(graph, (len(layers), i), (0, j), residual=pipes, value_only=True).graph["flow_value"]
            for j in range(t)
        ]
        for i in range(t)
    ]


def _check(op: str, weights: Sequence[Tensor] | Tensor, residual: float, heads: str) -> None:
    check_probability(op, "residual", residual, below_one=False)
    if heads not in ("mean", "max", "min"):
        raise ConfigError(
            f"{op} heads", got=repr(heads), want="'mean', 'max' or 'min'", remedy="The paper's is 'mean'."
        )
    if (
        not isinstance(weights, Sequence | Tensor)
        or (isinstance(weights, Tensor) and not weights.ndim)
        or not len(weights)
    ):
        raise ConfigError(f"{op} weights", got="no layer", want="one map a layer", remedy="See attention_maps().")
    first = weights[0]
    for w in weights:
        if not isinstance(w, Tensor):
            got, want = type(w).__name__, "tensors, one map a layer"
            raise ConfigError(f"{op} weights", got=got, want=want, remedy="See attention_maps().")
        if w.ndim != 4 or w.shape[2] != w.shape[3] or w.shape[1] == 0 or w.shape[::2] != first.shape[::2]:
            raise ShapeError(
                f"{op} weights",
                got=[tuple(w.shape) for w in weights],
                want="b h t t of one batch and length, a head at least",
                remedy="Pass a list, one map of self-attention a layer.",
            )
        if (w.dtype, w.device) != (first.dtype, first.device):
            raise ShapeError(
                f"{op} weights",
                got=f"{w.dtype} on {w.device} beside {first.dtype} on {first.device}",
                want="one dtype and device",
                remedy="Convert with .to().",
            )
        check_floating(op, w)
