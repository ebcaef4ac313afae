"""Rollout and flow against loops over the paper's equations, a linear programme, and their laws."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.rollout import attention_flow, attention_rollout
from handbook_src.testing import assert_parity, refuses, unchecked

ID = "attention-rollout"
FUSIONS = ["mean", "max", "min"]


def maps(layers: int = 3, b: int = 2, h: int = 2, t: int = 5, causal: bool = False, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    scores = [torch.randn(b, h, t, t, generator=g, dtype=torch.float64) * 2 for _ in range(layers)]
    if causal:
        scores = [s.masked_fill(torch.ones(t, t).triu(1).bool(), -math.inf) for s in scores]
    return [s.softmax(-1) for s in scores]


def by_hand(weights: list[Tensor], residual: float, heads: str) -> Tensor:
    """The equations, one number at a time."""
    b, h, t, _ = weights[0].shape
    samples = []
    for n in range(b):
        rolled: list[list[Tensor]] = []
        for w in weights:
            a = []
            for i in range(t):
                row = []
                for j in range(t):
                    each = torch.stack([w[n, k, i, j] for k in range(h)])
                    fused = {"mean": each.sum() / h, "max": each.max(), "min": each.min()}[heads]
                    row.append((1 - residual) * fused + residual * (i == j))
                a.append([x / sum(row) for x in row])
            if rolled:
                a = [[sum(a[i][k] * rolled[k][j] for k in range(t)) for j in range(t)] for i in range(t)]
            rolled = a
        samples.append(torch.stack([torch.stack(row) for row in rolled]))
    return torch.stack(samples)


@pytest.mark.parity(ID)
@pytest.mark.parametrize("heads", FUSIONS)
@pytest.mark.parametrize("residual", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 2, 3, 4), (2, 1, 2, 5), (3, 2, 3, 3)])
def test_rollout_is_its_equations(heads: str, residual: float, sizes: tuple[int, int, int, int]) -> None:
    weights = maps(*sizes)
    assert_parity(
        lambda *w: attention_rollout(w, residual, heads=heads),
        lambda *w: by_hand(list(w), residual, heads),
        weights,
    )


@pytest.mark.parity(ID)
def test_the_papers_example_in_numbers() -> None:
    """Two tokens, two layers, worked out on paper."""
    first = torch.tensor([[0.2, 0.8], [0.6, 0.4]])[None, None]
    second = torch.tensor([[1.0, 0.0], [0.5, 0.5]])[None, None]
    # A1 = [[.6, .4], [.3, .7]], A2 = [[1, 0], [.25, .75]]
    want = torch.tensor([[0.6, 0.4], [0.375, 0.625]])
    torch.testing.assert_close(attention_rollout([first, second])[0], want)
    stacked = torch.stack([first, second])
    torch.testing.assert_close(attention_rollout(stacked)[0], want)
    flow = torch.tensor([[0.6, 0.4], [0.25 + 0.3, 0.25 + 0.7]])
    torch.testing.assert_close(attention_flow(stacked, normalize=False)[0], flow)
    torch.testing.assert_close(attention_flow(stacked)[0], flow / flow.sum(-1, keepdim=True))


def programme(weights: list[Tensor], i: int, j: int) -> float:
    """The maximum flow as a linear programme: flow in = flow out wherever it does not begin or end."""
    t, layers = weights[0].shape[-1], len(weights)
    steps = [0.5 * w[0].mean(0) + 0.5 * torch.eye(t) for w in weights]
    edges = [(layer, a, c, float(steps[layer][a, c])) for layer in range(layers) for a in range(t) for c in range(t)]
    gain = [-float((layer, a) == (layers - 1, i)) for layer, a, _, _ in edges]
    kept, none = [], []
    for layer in range(layers):
        for node in range(t):
            into = [float((at - 1, c) == (layer, node)) for at, _, c, _ in edges]
            out = [float((at, a) == (layer, node)) for at, a, _, _ in edges]
            if layer < layers - 1:
                kept.append([x - y for x, y in zip(into, out, strict=True)])
            elif node != i:
                none.append(out)
    none += [[float((at, c) == (0, node)) for at, _, c, _ in edges] for node in range(t) if node != j]
    rows = kept + none
    return -linprog(gain, A_eq=rows, b_eq=[0.0] * len(rows), bounds=[(0, c) for *_, c in edges]).fun


@pytest.mark.parity(ID)
@pytest.mark.outside(ID)
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_flow_is_the_linear_programmes(layers: int) -> None:
    weights = maps(layers, 1, 2, 4)
    got = attention_flow(weights, normalize=False)[0]
    want = torch.tensor([[programme(weights, i, j) for j in range(4)] for i in range(4)], dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)


@pytest.mark.parity(ID)
@pytest.mark.parametrize("heads", FUSIONS)
@pytest.mark.parametrize("residual", [0.0, 0.5, 1.0])
def test_flow_of_one_and_two_layers_in_closed_form(heads: str, residual: float) -> None:
    one, two = maps(2, 2, 3, 5)
    a1, a2 = (attention_rollout([w], residual, heads=heads) for w in (one, two))
    torch.testing.assert_close(attention_flow([one], residual, heads=heads, normalize=False), a1)
    want = torch.minimum(a2[..., None], a1[:, None]).sum(2)
    torch.testing.assert_close(attention_flow([one, two], residual, heads=heads, normalize=False), want)


@pytest.mark.law(ID)
@pytest.mark.parametrize("heads", FUSIONS)
@pytest.mark.parametrize("rolled", [attention_rollout, attention_flow])
def test_rows_sum_to_one_and_the_past_stays_the_past(heads: str, rolled) -> None:
    got = rolled(maps(3, 2, 2, 5, causal=True), heads=heads)
    torch.testing.assert_close(got.sum(-1), torch.ones(2, 5, dtype=torch.float64))
    assert (got >= 0).all()
    assert not got.triu(1).any()


@pytest.mark.law(ID)
@pytest.mark.parametrize("rolled", [attention_rollout, attention_flow])
def test_identity_gives_identity(rolled) -> None:
    own = torch.eye(4).expand(3, 2, 2, 4, 4)
    assert torch.equal(rolled(own), torch.eye(4).expand(2, 4, 4))
    assert torch.equal(rolled(maps(t=4), 1.0), torch.eye(4).double().expand(2, 4, 4))


@pytest.mark.law(ID)
def test_order_of_tokens_and_of_layers() -> None:
    weights = maps()
    order = torch.tensor([3, 0, 4, 1, 2])
    moved = [w[..., order, :][..., order] for w in weights]
    torch.testing.assert_close(attention_rollout(moved), attention_rollout(weights)[:, order][..., order])
    assert not torch.allclose(attention_rollout(weights[::-1]), attention_rollout(weights))
    a, b = attention_rollout(weights[:2]), attention_rollout(weights[2:])
    torch.testing.assert_close(attention_rollout(weights), b @ a)


@pytest.mark.law(ID)
def test_a_key_hidden_in_every_layer_reaches_only_itself() -> None:
    weights = []
    for w in maps(3, 1, 2, 5):
        hidden = w.clone()
        hidden[..., 4] = 0.0
        weights.append(hidden / hidden.sum(-1, keepdim=True))
    for got in (attention_rollout(weights), attention_flow(weights)):
        assert not got[:, :4, 4].any()


@pytest.mark.law(ID)
@pytest.mark.parametrize("residual", [0.0, 0.5])
def test_a_query_that_attends_to_nothing_keeps_itself(residual: float) -> None:
    weights = maps(2, 1, 1, 3)
    for w in weights:
        w[..., 1, :] = 0.0
    for got in (attention_rollout(weights, residual), attention_flow(weights, residual)):
        torch.testing.assert_close(got[0, 1], torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))


@pytest.mark.law(ID)
def test_nan_of_padding_stays_there_forward_and_backward() -> None:
    clean = []
    for w in maps(3, 1, 2, 5):
        w[..., 4] = 0.0
        clean.append(w / w.sum(-1, keepdim=True))
    dirty = [w.clone() for w in clean]
    for w in dirty:
        w[..., 4, :] = math.nan
        w.requires_grad_()
    got = attention_rollout(dirty)
    torch.testing.assert_close(got[:, :4], attention_rollout(clean)[:, :4])
    assert got[:, 4].isnan().all()
    got[:, :4].square().sum().backward()
    assert all(w.grad[..., :4, :].isfinite().all() for w in dirty)
    seen = [w.detach().clone() for w in maps(3, 1, 2, 5)]
    seen[0][..., 4, :] = math.nan
    assert attention_rollout(seen).isnan().all()  # everyone attends to it


@pytest.mark.law(ID)
@pytest.mark.parametrize("rolled", [attention_rollout, attention_flow])
@pytest.mark.parametrize("shape", [(0, 2, 3, 3), (2, 2, 0, 0)])
def test_nothing_in_gives_nothing_back(rolled, shape: tuple[int, ...]) -> None:
    assert rolled([torch.zeros(shape)] * 2).shape == (shape[0], *shape[2:])


@pytest.mark.registration(ID)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_multiplied_in_single_and_rounded_once(dtype: torch.dtype) -> None:
    weights = [w.to(dtype) for w in maps()]
    before = [w.clone() for w in weights]
    got = attention_rollout(weights)
    assert got.dtype == dtype
    assert torch.equal(got, attention_rollout([w.float() for w in weights]).to(dtype))
    assert attention_flow(weights).dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))


@pytest.mark.registration(ID)
def test_compiles_strides_devices_and_second_derivatives() -> None:
    weights = maps(2, 1, 2, 3)
    with unchecked():
        compiled = torch.compile(lambda a, b: attention_rollout([a, b]), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*weights), attention_rollout(weights))
    strided = [w.mT.contiguous().mT for w in weights]
    torch.testing.assert_close(attention_rollout(strided), attention_rollout(weights))
    for rolled in (attention_rollout, attention_flow):
        shapes = rolled([w.to("meta") for w in weights])
        assert (shapes.device.type, shapes.shape, shapes.dtype) == ("meta", (1, 3, 3), torch.float64)
    assert torch.autograd.gradgradcheck(lambda a, b: attention_rollout([a, b]), [w.requires_grad_() for w in weights])


@pytest.mark.refusal(ID)
@pytest.mark.parametrize("rolled", [attention_rollout, attention_flow])
def test_refuses_what_cannot_be_rolled(rolled) -> None:
    one = torch.ones(1, 2, 3, 3) / 3
    for residual in (-0.1, 1.5, math.nan, True, "half"):
        with refuses(ConfigError, "residual", residual):
            rolled([one], residual)
    with refuses(ConfigError, "'median'", "'mean'"):
        rolled([one], heads="median")
    with refuses(ConfigError, "no layer"):
        rolled([])
    for wrong in (torch.ones(1, 2, 3, 4), torch.ones(2, 3, 3), torch.ones(1, 0, 3, 3)):
        with refuses(ShapeError, tuple(wrong.shape)):
            rolled([wrong])
    for other in (torch.ones(2, 2, 3, 3), torch.ones(1, 2, 4, 4), torch.ones(1, 2, 2, 2), torch.ones(0, 2, 3, 3)):
        with refuses(ShapeError, tuple(other.shape), tuple(one.shape)):
            rolled([one, other])
    with refuses(ShapeError, "torch.float64", "torch.float32"):
        rolled([one, one.double()])
    with refuses(ShapeError, "meta", "cpu"):
        rolled([one, one.to("meta")])
    with refuses(ShapeError, "torch.int64"):
        rolled([one.long()])


@pytest.mark.refusal(ID)
def test_flow_refuses_scores() -> None:
    for bad in (-1.0, math.nan):
        with refuses(ShapeError, "NaN or a negative", "softmax"):
            attention_flow([torch.full((1, 1, 2, 2), bad)])


@pytest.mark.refusal(ID)
def test_what_is_no_map_is_refused() -> None:
    for rolled in (attention_rollout, attention_flow):
        for bad in (None, []):
            with refuses(ConfigError, "no layer"):
                rolled(bad)
        with refuses(ConfigError, "NoneType"):
            rolled([None])
