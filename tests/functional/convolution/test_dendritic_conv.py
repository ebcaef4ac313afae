"""Branches, soma and hyperedges against loops over every tap and every membership."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.convolution.conv import conv4d
from handbook_src.functional.convolution.dendritic_conv import (
    Incidence,
    dendritic_conv4d,
    grid_hyperedges,
    hyperedge_messages,
)
from handbook_src.testing import assert_batch_independent, assert_parity, refuses


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(b=2, c=2, out=3, size=(3, 1, 3, 2), kernel=(3, 1, 3, 1), branches=2) -> list[Tensor]:
    weight = draw(branches, out, c, *kernel, seed=1)
    return [draw(b, c, *size), weight, *(draw(branches, out, seed=s) for s in (2, 3)), draw(out, seed=4)]


def literal(x, weight, soma, branch_bias, bias, dilations, activation):
    """The sum over taps, branch by branch, position by position."""
    b, c, *size = x.shape
    y = torch.zeros(b, weight.shape[1], *size, dtype=x.dtype)
    for n, o, *at in itertools.product(*map(range, y.shape)):
        total = bias[o]
        for i, dilation in enumerate(dilations):
            z = branch_bias[i, o]
            for channel, *tap in itertools.product(range(c), *map(range, weight.shape[3:])):
                read = [a + dilation * (m - k // 2) for a, m, k in zip(at, tap, weight.shape[3:], strict=True)]
                if all(0 <= r < n_ for r, n_ in zip(read, size, strict=True)):
                    z = z + weight[i, o, channel, *tap] * x[n, channel, *read]
            total = total + soma[i, o] * activation(z)
        y[n, o, *at] = total
    return y


def literal_messages(x, matrix, weight, bias, step):
    """Every edge in turn: mean of its members, transform, and back to each of them."""
    rows = x.flatten(2)
    y = rows.clone()
    degree = matrix.sum(1)
    for e in range(matrix.shape[1]):
        members = [p for p in range(matrix.shape[0]) if matrix[p, e]]
        if members:
            pooled = sum(rows[:, :, p] for p in members) / len(members)
            message = (pooled @ weight.T + bias).relu()
            for p in members:
                y = y + step * message[:, :, None] / degree[p] * torch.eye(len(matrix), dtype=x.dtype)[p]
    return y.view_as(x)


# ---------------------------------------------------------------- parity
@pytest.mark.parity("dendritic-hypergraph-conv")
@pytest.mark.parametrize("activation", [torch.relu, torch.tanh, lambda x: x], ids=["relu", "tanh", "identity"])
@pytest.mark.parametrize(
    ("options", "dilations"),
    [
        ({"b": 1, "out": 2}, (1, 2)),
        ({"branches": 1, "out": 1}, (1,)),
        ({"b": 1, "c": 1, "out": 1, "size": (1, 1, 1, 1), "branches": 3}, (1, 2, 4)),
        ({"b": 1, "out": 1, "kernel": (1, 3, 1, 5), "size": (1, 4, 1, 5)}, (2, 3)),
    ],
)
def test_branches_and_soma_are_the_definition(options, dilations, activation):
    assert_parity(
        lambda *a: dendritic_conv4d(*a, dilations, activation),
        lambda *a: literal(*a, dilations, activation),
        case(**options),
    )


@pytest.mark.parity("dendritic-hypergraph-conv")
@pytest.mark.parametrize("shape", [(2, 3, 7), (1, 1, 1), (2, 3, 2, 1, 3, 2)])
@pytest.mark.parametrize("edges", [0, 1, 5])
def test_messages_are_the_definition(shape, edges):
    positions = draw(*shape)[0, 0].numel()
    matrix = (draw(positions, edges, seed=1) > 0).double()
    matrix[:, -1:] *= edges == 1  # the last of several edges is empty
    matrix[:1] = 0  # and so is the first position
    incidence = Incidence.of(matrix)
    assert_parity(
        lambda x, w, b, s: hyperedge_messages(x, incidence, w, b, s),
        lambda x, w, b, s: literal_messages(x, matrix, w, b, s),
        [draw(*shape), draw(shape[1], shape[1], seed=2), draw(shape[1], seed=3), torch.tensor(0.7)],
    )


@pytest.mark.parity("dendritic-hypergraph-conv")
def test_messages_are_the_matrix_product():
    matrix = (draw(12, 5, seed=1) > -0.5).double()
    x, w = draw(2, 3, 12), draw(3, 3, seed=2)
    pooled = x @ (matrix / matrix.sum(0).clamp_min(1))
    message = torch.einsum("oc,bce->boe", w, pooled).relu()
    want = x + 0.5 * message @ (matrix / matrix.sum(1, keepdim=True).clamp_min(1)).T
    torch.testing.assert_close(hyperedge_messages(x, Incidence.of(matrix), w, None, 0.5), want)


@pytest.mark.parity("dendritic-hypergraph-conv")
def test_grid_hyperedges_are_blocks_and_tubes():
    size, window = (3, 2, 3, 1), 2
    matrix = torch.zeros(18, 2 * 1 * 2 * 1 + 6)
    for p, at in enumerate(itertools.product(*map(range, size))):
        t, d, h, w = (a // window for a in at)
        matrix[p, ((t * 1 + d) * 2 + h) * 1 + w] = 1
        matrix[p, 4 + (at[1] * 3 + at[2]) * 1 + at[3]] = 1
    got, want = grid_hyperedges(size, window), Incidence.of(matrix)
    assert got[2:] == want[2:]
    assert sorted(zip(*(t.tolist() for t in got[:2]), strict=True)) == sorted(
        zip(*(t.tolist() for t in want[:2]), strict=True)
    )


@pytest.mark.parity("dendritic-hypergraph-conv")
def test_it_is_twice_differentiable_and_strides_do_not_matter():
    x, weight, soma, branch_bias, bias = case(1, 1, 1, (2, 1, 2, 2), (1, 1, 3, 3))
    incidence, w = grid_hyperedges((2, 1, 2, 2)), draw(1, 1, seed=5)

    def run(x, weight, soma):
        y = dendritic_conv4d(x, weight, soma, branch_bias, bias, activation=torch.tanh)
        return hyperedge_messages(y, incidence, w, None, 0.5)

    torch.autograd.gradgradcheck(run, [t.requires_grad_() for t in (x, weight, soma)])
    dense = draw(2, 1, 2, 1, 2, 2)
    view = dense.movedim(1, -1).contiguous().movedim(-1, 1)
    torch.testing.assert_close(run(view.flip(0), weight, soma), run(dense, weight, soma).flip(0))


# ---------------------------------------------------------------- laws
@pytest.mark.law("dendritic-hypergraph-conv")
@pytest.mark.parametrize("dilation", [1, 2])
def test_one_silent_branch_is_a_4d_convolution(dilation):
    x, weight, _, branch_bias, _ = case(branches=1, kernel=(3, 3, 3, 3))
    got = dendritic_conv4d(x, weight, torch.ones(1, 3).double(), branch_bias, None, (dilation,), lambda z: z)
    want = conv4d(x, weight[0], branch_bias[0], padding=dilation, dilation=dilation)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    nobody = grid_hyperedges(x.shape[2:], window=None, tubes=False)
    assert nobody.edges == 0
    assert torch.equal(hyperedge_messages(got, nobody, draw(3, 3)), got)


@pytest.mark.law("dendritic-hypergraph-conv")
def test_an_empty_edge_changes_nothing_and_a_step_of_zero_is_the_identity():
    matrix = (draw(12, 4, seed=1) > 0).double()
    with_empty = torch.cat([matrix, torch.zeros(12, 2).double()], 1)
    x, w, b = draw(2, 3, 12).requires_grad_(), draw(3, 3, seed=2), draw(3, seed=3)
    y = hyperedge_messages(x, Incidence.of(with_empty), w, b)
    torch.testing.assert_close(y, hyperedge_messages(x, Incidence.of(matrix), w, b), rtol=0, atol=0)
    y.sum().backward()
    assert x.grad.isfinite().all()
    assert torch.equal(hyperedge_messages(x, Incidence.of(matrix), w, b, 0.0), x)


@pytest.mark.law("dendritic-hypergraph-conv")
def test_the_order_of_edges_and_members_does_not_matter():
    matrix = (draw(12, 6, seed=1) > 0).double()
    x, w = draw(2, 3, 12), draw(3, 3, seed=2)
    want = hyperedge_messages(x, Incidence.of(matrix), w)
    torch.testing.assert_close(hyperedge_messages(x, Incidence.of(matrix[:, torch.randperm(6)]), w), want)
    places = torch.randperm(12)  # relabel the positions: the output follows
    torch.testing.assert_close(hyperedge_messages(x[..., places], Incidence.of(matrix[places]), w), want[..., places])


@pytest.mark.law("dendritic-hypergraph-conv")
def test_memberships_grow_with_the_positions_not_with_their_square():
    for size in ((2, 2, 2, 2), (4, 4, 4, 4), (5, 3, 7, 6)):
        incidence = grid_hyperedges(size, 2)
        assert len(incidence.position) == 2 * incidence.positions
        assert torch.bincount(incidence.position).eq(2).all()


@pytest.mark.law("dendritic-hypergraph-conv")
def test_a_sample_does_not_see_its_batch_and_an_empty_batch_stays_empty():
    x, *rest = case(b=3)
    incidence, w = grid_hyperedges(x.shape[2:]), draw(3, 3, seed=5)

    def run(x):
        return hyperedge_messages(dendritic_conv4d(x, *rest), incidence, w)

    assert_batch_independent(run, x)
    assert run(x[:0]).shape == (0, 3, *x.shape[2:])


@pytest.mark.law("dendritic-hypergraph-conv")
def test_inputs_are_left_as_they_were():
    arguments = case()
    before = [t.clone() for t in arguments]
    y = dendritic_conv4d(*arguments, activation=lambda z: z)
    kept = y.clone()
    hyperedge_messages(y, grid_hyperedges(y.shape[2:]), draw(3, 3))
    assert torch.equal(y, kept)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


# ---------------------------------------------------------------- registration
@pytest.mark.registration("dendritic-hypergraph-conv")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_pools_in_float32(dtype):
    x = torch.full((1, 1, 4096), 3.0).to(dtype)  # their plain sum in bfloat16 stops at 512
    everyone = Incidence.of(torch.ones(4096, 1))
    y = hyperedge_messages(x, everyone, torch.ones(1, 1).to(dtype))
    assert y.dtype == dtype
    assert (y == 6).all()
    assert dendritic_conv4d(*(t.to(dtype) for t in case())).dtype == dtype


# ---------------------------------------------------------------- refusals
@pytest.mark.refusal("dendritic-hypergraph-conv")
def test_refuses_branches_that_do_not_fit():
    x, weight, soma, branch_bias, bias = case()
    for arguments, said in (
        ([x[0], weight, soma], "5 axes"),
        ([x[:, :1], weight, soma], "1 channels"),
        ([x, weight[0], soma], "6 axes"),
        ([x, weight, soma[:1]], "soma"),
        ([x, weight, soma, branch_bias[:, :2]], (2, 2)),
        ([x, weight, soma, branch_bias, bias[:2]], "bias"),
        ([x.long(), weight, soma], "torch.int64"),
        ([x.float(), weight, soma], "torch.float32"),
        ([x, weight, soma.float()], "torch.float32"),
        ([x, weight, soma, branch_bias.float()], "torch.float32"),
        ([x, weight, soma, None, bias.float()], "torch.float32"),
        ([x, weight, soma, None, draw(3, 2)], (3, 2)),
    ):
        with refuses(ShapeError, said):
            dendritic_conv4d(*arguments)
    with refuses(ConfigError, "kernel_size", 2, "Pass 3"):
        dendritic_conv4d(x, weight[..., :2, :], soma)
    with refuses(ConfigError, "kernel_size", 0):
        dendritic_conv4d(x, weight[..., :0, :], soma)
    for activation in ("relu", None):
        with refuses(ConfigError, "activation", repr(activation)):
            dendritic_conv4d(x, weight, soma, activation=activation)
    for dilations in ((1, 2, 3), (0, 1), (1, 1.5), (True, 1), 2, (1,), None):
        with refuses(ConfigError, "dilations"):
            dendritic_conv4d(x, weight, soma, dilations=dilations)
    with refuses(ConfigError, "branches", 0):
        dendritic_conv4d(x, weight[:0], soma[:0], dilations=())


@pytest.mark.refusal("dendritic-hypergraph-conv")
def test_refuses_hyperedges_that_do_not_fit():
    incidence, x, w = Incidence.of(torch.ones(12, 2)), draw(2, 3, 12), draw(3, 3)
    for arguments, said in (
        ([x[..., :11], incidence, w], "11 positions"),
        ([x[0, 0], incidence, w], "12 positions"),
        ([x, incidence, w[:, :2]], (3, 2)),
        ([x, incidence, w[:2]], (2, 3)),
        ([x.long(), incidence, w], "torch.int64"),
        ([x, incidence, w.float()], "torch.float32"),
        ([x, incidence, w, draw(3).float()], "torch.float32"),
        ([x, incidence, w, draw(1)], "bias"),
        ([x, incidence._replace(edge=incidence.edge + 1), w], "indices from 1 to 2"),
        ([x, incidence._replace(edge=incidence.edge + 9), w], "indices from 9 to 10"),
        ([x, incidence._replace(position=incidence.position - 1), w], "indices from -1 to 10"),
        ([x, incidence, w, None, draw(4)], "step"),
        ([x, incidence, w, None, torch.tensor(1)], "step"),
        ([x, torch.ones(12, 2), w], "Incidence.of"),
        (
            [x, incidence._replace(position=incidence.position + 1), w],
            "1 to 12, want as many indices of torch.int64 as memberships, from 0 to 11",
        ),
        ([x, incidence._replace(edge=incidence.edge - 1), w], "-1 to 0"),
        ([x, incidence._replace(edge=incidence.edge[:3]), w], "incidence.position"),
        ([x, incidence._replace(edge=incidence.edge.int()), w], "torch.int32"),
    ):
        with refuses(ShapeError, said):
            hyperedge_messages(*arguments)
    for step in (float("nan"), "1", None):
        with refuses(ConfigError, "step", repr(step)):
            hyperedge_messages(x, incidence, w, step=step)
    with refuses(ShapeError, "Incidence", "meta"):
        Incidence.of(torch.ones(3, 3, device="meta"))
    for matrix in (torch.full((3, 2), 0.5), torch.ones(3), torch.tensor([[float("nan")]])):
        with refuses(ShapeError, "Incidence", tuple(matrix.shape)):
            Incidence.of(matrix)


@pytest.mark.refusal("dendritic-hypergraph-conv")
def test_refuses_grids_without_hyperedges():
    with refuses(ConfigError, "grid_hyperedges", 4):
        grid_hyperedges(4)  # type: ignore[arg-type]
    for size, options in (
        ((3,), {}),
        ((3, 0), {}),
        ((3, 1.5), {}),
        ((3, 2), {"window": 0}),
        ((3, 2), {"window": True}),
    ):
        with refuses(ConfigError, "grid_hyperedges"):
            grid_hyperedges(size, **options)
