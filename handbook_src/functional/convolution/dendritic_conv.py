r"""Dendritic hypergraph convolution: 4-d branches summed by a soma, then messages along sets of positions.

No paper stands behind it. It is put together as its description has it: dilated 4-d convolutions whose
outputs are weighted and summed, and a hypergraph whose edges pool the positions that belong to them,
transform what they pooled and hand it back.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from handbook_src.check import as_tuple, check_floating, check_rank, check_size
from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.convolution.conv import conv4d
from handbook_src.functional.convolution.conv_input import check_alike
from handbook_src.precision import at_least_float32


class Incidence(NamedTuple):
    """Which positions belong to which hyperedges: the ones of the incidence matrix, pair by pair.

    A matrix of all positions times all edges grows with the square of the positions where every position
    has an edge; its ones grow with the positions.
    """

    #: position and edge of each membership, both ``members``.
    position: Tensor
    edge: Tensor
    positions: int
    edges: int

    @classmethod
    def of(cls, matrix: Tensor) -> Incidence:
        """Read a matrix, ``positions edges``, of zeros and ones.

        Raises:
            ShapeError: it is no matrix, or holds something else.
        """
        if not isinstance(matrix, Tensor):
            matrix = torch.as_tensor(matrix)
        if matrix.is_meta:
            raise ShapeError("Incidence matrix", got="a matrix on meta", want="numbers", remedy="Build it on the CPU.")
        if matrix.ndim != 2 or not bool(((matrix == 0) | (matrix == 1)).all()):
            raise ShapeError(
                "Incidence matrix",
                got=f"shape {tuple(matrix.shape)}",
                want="two axes, (positions, edges), of zeros and ones",
                remedy="Weigh the messages in the transform, not in the incidence.",
            )
        position, edge = matrix.nonzero(as_tuple=True)
        return cls(position, edge, *matrix.shape)


def dendritic_conv4d(
    input: Float[Tensor, "b channels t depth height width"],
    weight: Float[Tensor, "branches out channels kt kd kh kw"],
    soma: Float[Tensor, "branches out"],
    branch_bias: Float[Tensor, "branches out"] | None = None,
    bias: Float[Tensor, " out"] | None = None,
    dilations: Sequence[int] = (1, 2),
    activation: Callable[[Tensor], Tensor] = torch.relu,
) -> Float[Tensor, "b out t depth height width"]:
    r"""Sum the activated outputs of several dilated 4-d convolutions, each by a learned weight.

    .. math:: y_o = b_o + \sum_{i} s_{i,o}\; \varphi\bigl(\operatorname{conv4d}_{d_i}(x;\, W_i)_o + c_{i,o}\bigr)

    The kernel is padded so that the size stays, in each of the four axes.

    Args:
        input: channels, then time, depth, height and width.
        weight: one kernel for each branch, odd along every axis.
        soma: the weight of each branch in each output channel.
        branch_bias: a shift inside each branch.
        bias: a shift of the sum.
        dilations: one for each branch.
        activation: what a branch does to its sum.

    Raises:
        ConfigError: a kernel that is even, dilations that are not one size for each branch, or an
            ``activation`` that cannot be called.
        ShapeError: rank, channels or dtypes that do not fit.

    Source:
        an overview that the handbook began with, without a reference; a sum over branches behind
        a nonlinearity each is the two-layer neuron of Poirazi, Brannon & Mel 2003,
        doi:10.1016/S0896-6273(03)00149-1
    """
    op = "dendritic_conv4d"
    check_rank(op, input, (6,), "(batch, channels, t, depth, height, width)")
    check_rank(f"{op} weight,", weight, (7,), "(branches, out, channels, kt, kd, kh, kw)")
    check_floating(op, input, weight, soma, branch_bias, bias)
    check_alike(op, input, weight, soma, branch_bias, bias)
    if not callable(activation):
        raise ConfigError(f"{op} activation", got=repr(activation), want="a function", remedy="Pass torch.relu.")
    for size in weight.shape[3:]:
        check_odd(op, size)
    if not isinstance(dilations, Sequence) or not len(dilations) == len(weight) > 0:
        want = f"one for each of {len(weight)} branches, at least one"
        raise ConfigError(f"{op} dilations", got=repr(dilations), want=want, remedy="Pass (1, 2) for two branches.")
    steps = as_tuple(op, "dilations", dilations, len(weight))
    _check_shape(op, "soma", soma, weight.shape[:2])
    _check_shape(op, "branch_bias", branch_bias, weight.shape[:2])
    _check_shape(op, "bias", bias, weight.shape[1:2])
    total = None
    for i, dilation in enumerate(steps):
        shift = None if branch_bias is None else branch_bias[i]
        branch = activation(conv4d(input, weight[i], shift, padding="same", dilation=dilation))
        branch = branch * soma[i].view(-1, 1, 1, 1, 1)
        total = branch if total is None else total + branch
    assert total is not None  # there is a branch
    return total if bias is None else total + bias.view(-1, 1, 1, 1, 1)


def hyperedge_messages(
    x: Float[Tensor, "b channels *spatial"],
    incidence: Incidence,
    weight: Float[Tensor, "channels channels"],
    bias: Float[Tensor, " channels"] | None = None,
    step: Float[Tensor, ""] | float = 1.0,
) -> Float[Tensor, "b channels *spatial"]:
    r"""Let every hyperedge pool its members, transform the pool, and hand the result back to them.

    .. math::
        e = D_e^{-1} H^\top x, \qquad m = \operatorname{relu}(e\,\Psi^\top + c), \qquad y = x + \alpha\, D_v^{-1} H m

    with :math:`H` the incidence matrix, and :math:`D_e, D_v` the number of members of each edge and of
    edges at each position. An edge without members and a position without edges take no part. The cost
    grows with the memberships, not with the square of the positions.

    Args:
        x: features at positions; the spatial axes are counted row by row.
        incidence: who belongs where.
        weight: the transform of the pooled features, :math:`\Psi`.
        bias: its shift.
        step: how much of the message is added, :math:`\alpha`.

    Raises:
        ConfigError: a ``step`` that is no number.
        ShapeError: rank, positions, channels, dtypes or memberships that do not fit.

    Source:
        an overview that the handbook began with, without a reference; after Feng et al. 2019, eq. 11,
        arXiv:1809.09401, which has no residual and splits the positions' degrees over both sides
    """
    op = "hyperedge_messages"
    check_floating(op, x, weight, bias)
    check_alike(op, x, weight, bias)
    _check_incidence(op, incidence, x.device)
    positions = math.prod(x.shape[2:])
    if x.ndim < 3 or positions != incidence.positions:
        raise ShapeError(
            f"{op} input",
            got=f"{positions} positions in {tuple(x.shape)}",
            want=f"(batch, channels, *spatial) with {incidence.positions} positions",
            remedy="Build the hyperedges for this size, for instance by grid_hyperedges(x.shape[2:]).",
        )
    _check_shape(op, "weight", weight, (x.shape[1],) * 2)
    _check_shape(op, "bias", bias, (x.shape[1],))
    if isinstance(step, Tensor):
        check_floating(f"{op} step", step)
        _check_shape(op, "step", step, ())
    elif not isinstance(step, Real) or not math.isfinite(step):
        raise ConfigError(f"{op} step", got=repr(step), want="a finite number", remedy="Pass 1.0.")
    rows = x.flatten(2).movedim(2, 0)  # positions b channels
    pooled = _mean(rows, incidence.position, incidence.edge, incidence.edges)
    message = torch.nn.functional.linear(pooled, weight, bias).relu()
    back = _mean(message, incidence.edge, incidence.position, positions)
    return x + step * back.to(x.dtype).movedim(0, 2).view_as(x)


def grid_hyperedges(
    size: Sequence[int], window: int | None = 2, tubes: bool = True, device: torch.device | str | None = None
) -> Incidence:
    r"""Sets of positions on a grid of time and space: blocks of neighbours, and each place through all time.

    .. math:: \{(t, p) : \lfloor (t, p) / w \rfloor = \text{const}\}, \qquad \{(t, p) : p = \text{const}\}

    Every position is in one block and in one tube, so there are at most two memberships a position.

    Args:
        size: of the grid, time first.
        window: side of the blocks along every axis, cut off at the border; ``None`` for no blocks.
        tubes: one edge for each place in space.
        device: of the indices.

    Raises:
        ConfigError: a size or a window that is none.

    Source:
        "temporal groups" of the same overview; the choice of sets is ours
    """
    if not isinstance(size, Sequence) or len(size) < 2:
        raise ConfigError("grid_hyperedges size", got=repr(size), want="time and space", remedy="Pass x.shape[2:].")
    for n in size:
        check_size("grid_hyperedges", "size", n)
    axes = torch.meshgrid(*(torch.arange(n, device=device) for n in size), indexing="ij")
    edges, count = [], 0
    if window is not None:
        check_size("grid_hyperedges", "window", window)
        block, blocks = torch.zeros_like(axes[0]), [-(-n // window) for n in size]
        for axis, n in zip(axes, blocks, strict=True):
            block = block * n + axis // window
        edges.append(block.flatten())
        count = math.prod(blocks)
    if tubes:
        places = math.prod(size[1:])
        edges.append(torch.arange(places, device=device).repeat(size[0]) + count)
        count += places
    positions = math.prod(size)
    all_of_them = torch.arange(positions, device=device)
    nothing = all_of_them[:0]
    return Incidence(
        torch.cat([nothing, *itertools.repeat(all_of_them, len(edges))]),
        torch.cat([nothing, *edges]),
        positions,
        count,
    )


def check_odd(op: str, kernel_size: int) -> None:
    """Refuse a kernel without a middle.

    Raises:
        ConfigError: it is even, or no size.
    """
    check_size(op, "kernel_size", kernel_size)
    if kernel_size % 2 == 0:
        raise ConfigError(
            f"{op} kernel_size",
            got=kernel_size,
            want="an odd number, so that branches of every dilation share one centre",
            remedy=f"Pass {kernel_size + 1}.",
        )


def _check_shape(op: str, name: str, x: Tensor | None, shape: Sequence[int]) -> None:
    if x is not None and tuple(x.shape) != tuple(shape):
        remedy = "Sizes follow from the branches, output channels or features."
        raise ShapeError(f"{op} {name}", got=tuple(x.shape), want=f"{tuple(shape)}", remedy=remedy)


def _check_incidence(op: str, incidence: Incidence, device: torch.device) -> None:
    """Refuse what is no :class:`Incidence`, and memberships outside it; under torch.compile nothing is looked at."""
    if not isinstance(incidence, Incidence):
        got, remedy = type(incidence).__name__, "Read a matrix by Incidence.of(matrix)."
        raise ShapeError(f"{op} incidence", got=got, want="an Incidence", remedy=remedy)
    for name, at, count in (
        ("position", incidence.position, incidence.positions),
        ("edge", incidence.edge, incidence.edges),
    ):
        got = f"{tuple(at.shape)} of {at.dtype} on {at.device}"
        fits = at.dtype == torch.int64 and at.device == device and at.shape == (len(incidence.edge),)
        if fits and at.numel() and not at.is_meta and not torch.compiler.is_compiling():
            low, high = (int(t) for t in at.aminmax())
            got, fits = f"indices from {low} to {high}", 0 <= low <= high < count
        if not fits:
            want = f"as many indices of {torch.int64} as memberships, from 0 to {count - 1}, on {device}"
            raise ShapeError(f"{op} incidence.{name}", got=got, want=want, remedy="Build it by Incidence.of.")


def _mean(x: Tensor, source: Tensor, target: Tensor, targets: int) -> Tensor:
    """Mean over the rows of ``x`` that go to each target, zero where none does; at least in float32."""
    wide = at_least_float32(x)
    total = wide.new_zeros(targets, *x.shape[1:]).index_add(0, target, wide.index_select(0, source))
    count = wide.new_zeros(targets).index_add(0, target, torch.ones_like(target, dtype=wide.dtype))
    return (total / count.clamp_min(1).view(-1, *[1] * (x.ndim - 1))).to(x.dtype)
