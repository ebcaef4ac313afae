"""The softmax layers drop in for torch's, and carry a temperature."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.layers.activations import softmax as ours
from handbook_src.testing import assert_parity, refuses

NAMES = pytest.mark.parametrize("name", ["Softmax", "LogSoftmax"])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


@pytest.mark.parity("softmax")
@NAMES
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dim", [-1, 0, 1])
def test_is_torchs(name, dim, backend):
    assert_parity(getattr(ours, name)(dim, backend=backend), getattr(nn, name)(dim), [draw(3, 4, 5)])


@pytest.mark.law("softmax")
@NAMES
def test_temperature_divides_the_scores(name):
    x = draw(3, 4)
    torch.testing.assert_close(getattr(ours, name)(-1, temperature=2.5)(x), getattr(nn, name)(-1)(x / 2.5))


@pytest.mark.registration("softmax")
@NAMES
def test_copies_pickles_prints_and_has_no_state(name):
    layer, x = getattr(ours, name)(dim=-1, temperature=0.5), draw(3, 4)
    assert layer.state_dict() == {}
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(other(x), layer(x))
    assert repr(layer) == f"{name}(dim=-1, temperature=0.5)"
    assert repr(getattr(ours, name)(1)) == f"{name}(dim=1)"


@pytest.mark.registration("softmax")
@NAMES
def test_compiles_to_one_graph(name, unchecked):
    layer, x = getattr(ours, name)(-1), draw(3, 4)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@pytest.mark.registration("softmax")
def test_autocast_and_meta():
    with torch.autocast("cpu", torch.bfloat16):
        assert ours.Softmax(-1)(torch.ones(2, 3).bfloat16()).dtype in (torch.bfloat16, torch.float32)
    assert ours.Softmax(-1)(torch.ones(2, 3, device="meta")).shape == (2, 3)


@pytest.mark.refusal("softmax")
@NAMES
def test_refuses_no_axis_and_bad_temperatures(name):
    build = getattr(ours, name)
    for dim in (None, 1.0, True):
        with refuses(ConfigError, f"{name} dim", dim):
            build(dim)
    for temperature in (0.0, -1.0, math.nan, math.inf, True):
        with refuses(ConfigError, f"{name} temperature", temperature):
            build(-1, temperature=temperature)
    with refuses(ConfigError, "dim", 2, (2, 3)):
        build(2)(torch.ones(2, 3))
    with refuses(ShapeError, "torch.int64"):
        build(-1)(torch.ones(3, dtype=torch.int64))
