"""Attention along one axis of a grid: rows, columns, time."""

from __future__ import annotations

from typing import NoReturn

import torch
from jaxtyping import Float
from torch import Tensor

from handbook_src.check import check_tensors
from handbook_src.dispatch import Backend, resolve
from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.attention import check_alike, check_numbers, check_qkv, under_rule
from handbook_src.functional.attention.mask import causal as causal_rule
from handbook_src.functional.attention.mask import full


def axial_attention(
    q: Float[Tensor, "b *axes h e"],
    k: Float[Tensor, "b *axes g e"],
    v: Float[Tensor, "b *axes g c"],
    axis: int,
    *,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: Backend = "auto",
) -> Float[Tensor, "b *axes h c"]:
    r"""Attend along one axis of a grid; positions that differ elsewhere never meet.

    .. math:: y_{i j} = \sum_{j'} \operatorname{softmax}_{j'}\!\Big(\frac{q_{ij} \cdot k_{ij'}}{\sqrt e}\Big)\, v_{ij'}
        \qquad \text{(rows: the last axis)}

    The other axes join the batch, so :math:`HW` queries compare with :math:`W` keys each instead of
    :math:`HW`; rows and columns together cost :math:`HW(H + W)` products of vectors.

    A NaN or infinite key or value reaches no query that it is hidden from, forward or backward: where one is found,
    the lines are attended by the reference.  ``torch.compile`` can't look; there a NaN stays on its line.

    Args:
        q: queries on a grid of one or more axes.
        k: keys on the same grid; fewer heads are shared by groups of consecutive query heads.
        v: values.
        axis: of the grid, from 0 (the first after the batch) or from -1 (the last).
        causal: a position sees itself and what stands before it on its line.
        scale: factor on the scores; :math:`1/\sqrt e` unless given.
        dropout: share of the weights that are dropped; pass 0 outside training.
        backend: of the attention on each line.

    Raises:
        ShapeError: grids that differ, no grid, heads that don't divide, dtypes that don't fit.
        ConfigError: an axis that is not there, ``dropout`` or ``scale`` out of range.

    Source:
        Ho et al. 2019, section 3, arXiv:1912.12180
    """
    axis = _grid_axis(q, k, v, axis)
    chosen = resolve("axial_attention", backend, {"torch": None, "reference": None})
    q, k, v = (x.movedim(axis + 1, -3) for x in (q, k, v))
    rows, keys, values = (x.flatten(0, -4) for x in (q, k, v))
    check_qkv(rows, keys, values)
    check_numbers(scale, dropout)
    out = under_rule(causal_rule if causal else full, chosen, rows, keys, values, scale, dropout)
    return out.reshape(*q.shape[:-1], v.shape[-1]).movedim(-3, axis + 1)


def shift(x: Float[Tensor, "b *axes d"], axis: int) -> Float[Tensor, "b *axes d"]:
    r"""Move everything one step along an axis of a grid; zeros enter, the last line leaves.

    .. math:: y_i = x_{i-1}, \quad y_0 = 0

    What was seen "up to here" becomes what was seen "strictly before here".

    Args:
        x: vectors on a grid.
        axis: of the grid, from 0 (the first after the batch) or from -1 (the last).

    Raises:
        ShapeError: ``x`` has no grid.
        ConfigError: an axis that is not there.

    Source:
        Ho et al. 2019, section 3.2 (ShiftDown, ShiftRight), arXiv:1912.12180
    """
    check_tensors("shift", x)
    if x.ndim < 3:
        _no_grid("shift input", x, "b *axes d")
    axis = axis_of(x.ndim - 2, axis) + 1
    if x.shape[axis] == 0:
        return x
    first = torch.zeros_like(x.narrow(axis, 0, 1))
    return torch.cat([first, x.narrow(axis, 0, x.shape[axis] - 1)], axis)


def _grid_axis(q: Tensor, k: Tensor, v: Tensor, axis: int) -> int:
    """Check the three and return the axis counted from 0."""
    check_alike(q, k, v)
    for x in (q, k, v):
        if x.ndim < 4:
            _no_grid("axial attention input", x, "(b, *axes, heads, features)")
    if not q.shape[:-2] == k.shape[:-2] == v.shape[:-2]:
        raise ShapeError(
            "axial attention grids",
            got=f"q {tuple(q.shape[1:-2])}, k {tuple(k.shape[1:-2])}, v {tuple(v.shape[1:-2])}, batch {len(q)}",
            want="one batch and one grid for all three",
            remedy="It is self-attention: make queries, keys and values from the same grid.",
        )
    return axis_of(q.ndim - 3, axis)


def axis_of(axes: int, axis: int) -> int:
    """Count an axis of a grid from 0; refuses one that is not there."""
    if not isinstance(axis, int) or isinstance(axis, bool) or not -axes <= axis < axes:
        raise ConfigError(
            "grid axis", got=repr(axis), want=f"an integer from {-axes} to {axes - 1}", remedy="0 is the first axis."
        )
    return axis % axes


def _no_grid(what: str, x: Tensor, axes: str) -> NoReturn:
    raise ShapeError(
        what, got=tuple(x.shape), want=f"at least one axis of a grid: {axes}", remedy="Unflatten it first."
    )
