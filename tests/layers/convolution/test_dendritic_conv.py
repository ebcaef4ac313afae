"""The layer is its two functions, and its limit is a plain 4-d convolution."""

from __future__ import annotations

import copy
import pickle

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
from handbook_src.layers.convolution.dendritic_conv import DendriticHypergraphConv4d
from handbook_src.testing import assert_parity, refuses


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parity("dendritic-hypergraph-conv")
@pytest.mark.parametrize("activation", ["relu", "tanh", "identity"])
@pytest.mark.parametrize("window", [2, 3, None])
@pytest.mark.parametrize("hyperedges", [True, False])
def test_the_layer_is_its_functions(hyperedges, window, activation):
    layer = DendriticHypergraphConv4d(
        2, 3, (1, 3, 1, 3), (1, 3), hyperedges=hyperedges, window=window, activation=activation
    ).double()
    twin = copy.deepcopy(layer)
    run = {"relu": torch.relu, "tanh": torch.tanh, "identity": lambda z: z}[activation]

    def functions(x):
        y = dendritic_conv4d(x, twin.weight, twin.soma, twin.branch_bias, twin.bias, (1, 3), run)
        if not hyperedges:
            return y
        edges = grid_hyperedges(x.shape[2:], window)
        return hyperedge_messages(y, edges, twin.edge_weight, twin.edge_bias, twin.step)

    pairs = list(zip(layer.parameters(), twin.parameters(), strict=True))
    assert_parity(layer, functions, [draw(2, 2, 3, 2, 3, 4)], parameters=pairs)


@pytest.mark.law("dendritic-hypergraph-conv")
def test_its_limit_is_a_4d_convolution():
    layer = DendriticHypergraphConv4d(2, 3, 3, (1,), hyperedges=False, activation="identity").double()
    x = draw(2, 2, 3, 2, 4, 3)
    torch.testing.assert_close(layer(x), conv4d(x, layer.weight[0], layer.branch_bias[0], padding=1))


@pytest.mark.law("dendritic-hypergraph-conv")
def test_hyperedges_of_ones_own_replace_the_grids():
    layer, x = DendriticHypergraphConv4d(2, 3, 1).double(), draw(1, 2, 2, 2, 2, 2)
    nobody = Incidence.of(torch.zeros(16, 3))
    branches = copy.deepcopy(layer)
    branches.step.data.zero_()
    torch.testing.assert_close(layer(x, nobody), branches(x))
    assert not torch.allclose(layer(x), branches(x))


@pytest.mark.law("dendritic-hypergraph-conv")
def test_every_parameter_learns_from_the_first_step():
    torch.manual_seed(0)
    layer = DendriticHypergraphConv4d(2, 3)
    layer(torch.randn(2, 2, 3, 3, 3, 3)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


@pytest.mark.registration("dendritic-hypergraph-conv")
def test_copies_pickles_compiles_and_halves(unchecked):
    layer, x = DendriticHypergraphConv4d(2, 3), draw(2, 2, 3, 2, 4, 3).float()
    y = layer(x)
    again = DendriticHypergraphConv4d(2, 3)
    again.load_state_dict(layer.state_dict())
    for twin in (again, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), y)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), y)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).isfinite().all()
    for dtype in (torch.bfloat16, torch.float16):
        half = copy.deepcopy(layer).to(dtype)(x.to(dtype))
        assert half.dtype == dtype
        torch.testing.assert_close(half.float(), y, rtol=0.05, atol=0.05)
    with torch.device("meta"):
        assert DendriticHypergraphConv4d(2, 3)(x.to("meta")).shape == y.shape
    assert "dilations=(1, 2)" in repr(layer)


@pytest.mark.refusal("dendritic-hypergraph-conv")
def test_refuses_settings_and_inputs():
    for options, named in (
        ({"in_channels": 0}, "in_channels"),
        ({"out_channels": 1.5}, 1.5),
        ({"kernel_size": 2}, "Pass 3"),
        ({"kernel_size": (3, 3, 3)}, "kernel_size"),
        ({"dilations": ()}, "dilations"),
        ({"dilations": (1, 0)}, "dilations"),
        ({"window": 0}, "window"),
        ({"window": True}, "window"),
        ({"activation": "swish"}, "swish"),
    ):
        with refuses(ConfigError, named):
            DendriticHypergraphConv4d(**{"in_channels": 2, "out_channels": 2, **options})
    layer = DendriticHypergraphConv4d(2, 3)
    for bad, said in ((torch.ones(2, 3, 3, 3, 3), "5 axes"), (torch.ones(1, 3, 2, 2, 2, 2), "3 channels")):
        with refuses(ShapeError, said):
            layer(bad)


@pytest.mark.refusal("dendritic-hypergraph-conv")
def test_refuses_dilations_and_activations_of_another_type():
    with refuses(ConfigError, "dilations", 2):
        DendriticHypergraphConv4d(2, 2, 3, 2)  # type: ignore[arg-type]
    with refuses(ConfigError, "activation", ["relu"]):
        DendriticHypergraphConv4d(2, 2, activation=["relu"])  # type: ignore[arg-type]
