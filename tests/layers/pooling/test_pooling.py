"""Pooling layers beside torch's: same arguments in the same places, same outputs."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.layers.pooling import pooling as layers
from handbook_src.testing import assert_parity, refuses

TORCHS = [
    ("max-pool", "MaxPool1d", (3, 2, 1, 1)),
    ("max-pool", "MaxPool2d", ((3, 2), 2, (1, 0), 1)),
    ("max-pool", "MaxPool3d", (2,)),
    ("max-pool", "MaxPool2d", (2, None, 0, 2, False, True)),
    ("avg-pool", "AvgPool1d", (3, 2, 1, True, False)),
    ("avg-pool", "AvgPool2d", (3, 2, 1, True, False, 4)),
    ("avg-pool", "AvgPool3d", (2, 1)),
    ("adaptive-pool", "AdaptiveAvgPool1d", (3,)),
    ("adaptive-pool", "AdaptiveAvgPool2d", ((None, 3),)),
    ("adaptive-pool", "AdaptiveAvgPool3d", (2,)),
    ("adaptive-pool", "AdaptiveMaxPool1d", (3,)),
    ("adaptive-pool", "AdaptiveMaxPool2d", ((2, 3),)),
    ("adaptive-pool", "AdaptiveMaxPool3d", (2,)),
]


@pytest.mark.parity("max-pool", "avg-pool", "adaptive-pool")
@pytest.mark.parametrize(("_id", "name", "args"), TORCHS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_layer_is_torchs(_id, name, args, backend):
    mine, torchs = getattr(layers, name)(*args, backend=backend), getattr(nn, name)(*args)
    x = torch.randn(2, 3, *[8] * int(name[-2]), dtype=torch.float64)
    assert_parity(mine, torchs, [x])
    assert list(mine.state_dict()) == list(torchs.state_dict())


@pytest.mark.parity("max-pool", "adaptive-pool")
def test_indices_are_returned_where_asked():
    x = torch.randn(2, 3, 8, 8)
    for mine, torchs in (
        (layers.MaxPool2d(2, return_indices=True), nn.MaxPool2d(2, return_indices=True)),
        (layers.AdaptiveMaxPool2d(3, return_indices=True), nn.AdaptiveMaxPool2d(3, return_indices=True)),
    ):
        for a, b in zip(mine(x), torchs(x), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parity("global-pool")
@pytest.mark.parametrize("keepdim", [False, True])
def test_global_pools(keepdim):
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    assert_parity(layers.GlobalPool("mean", keepdim), lambda x: x.mean((2, 3), keepdim), [x])
    assert_parity(layers.GlobalPool("max", keepdim), lambda x: x.amax((2, 3), keepdim), [x])


@pytest.mark.parity("fractional-max-pool")
@pytest.mark.parametrize("how", [{"output_size": 5}, {"output_ratio": 0.7}])
def test_fractional_layer_is_torchs(how):
    x, u = torch.randn(2, 3, 9, 9, dtype=torch.float64), torch.rand(2, 3, 2, dtype=torch.float64)
    mine = layers.FractionalMaxPool2d(2, **how, _random_samples=u)
    assert_parity(mine, nn.FractionalMaxPool2d(2, **how, _random_samples=u), [x])
    assert layers.FractionalMaxPool2d(2, **how)(x).shape == mine(x).shape


@pytest.mark.law("stochastic-pool")
def test_evaluation_mode_is_the_expectation_of_training_mode(generator):
    pool = layers.StochasticPool2d(2, generator=generator)
    x = torch.rand(1, 2, 4, 4, dtype=torch.float64)
    mean = torch.stack([pool(x) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, pool.eval()(x), rtol=0, atol=0.03)
    assert torch.equal(pool(x), pool(x))


@pytest.mark.registration("max-pool", "avg-pool", "adaptive-pool", "global-pool", "fractional-max-pool")
def test_layers_copy_pickle_and_say_what_they_are():
    made = [getattr(layers, name)(*args) for _, name, args in TORCHS]
    made += [layers.GlobalPool(), layers.StochasticPool2d(2), layers.FractionalMaxPool2d(2, output_ratio=0.7)]
    for layer in made:
        x = torch.rand(2, 3, *[8] * getattr(layer, "axes", 2))
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert repr(twin) == repr(layer)
            if not isinstance(layer, layers.StochasticPool2d | layers.FractionalMaxPool2d):
                torch.testing.assert_close(twin(x), layer(x), rtol=0, atol=0)
            assert type(twin(x)) is type(layer(x))
    assert repr(layers.MaxPool2d(3, 2)) == "MaxPool2d(kernel_size=3, stride=2, padding=0, dilation=1, ceil_mode=False)"
    assert repr(layers.GlobalPool("max")) == "GlobalPool('max', keepdim=False)"
    assert repr(made[-1]) == "FractionalMaxPool2d(kernel_size=2, output_ratio=0.7)"


@pytest.mark.refusal("max-pool", "avg-pool", "stochastic-pool")
@pytest.mark.parametrize("name", ["MaxPool1d", "MaxPool2d", "MaxPool3d", "AvgPool1d", "AvgPool2d", "StochasticPool2d"])
def test_a_layer_refuses_when_it_is_built(name):
    build = getattr(layers, name)
    for value in (0, -1, 1.5, True, (1, 2, 3, 4)):
        with refuses(ConfigError, f"{name} kernel_size"):
            build(value)
    with refuses(ConfigError, f"{name} stride", "0"):
        build(2, 0)
    with refuses(ConfigError, f"{name} padding", "-1"):
        build(2, 1, -1)


@pytest.mark.refusal("adaptive-pool", "global-pool", "fractional-max-pool")
def test_other_bad_choices():
    for size in (0, -1, 2.5, (1, 2, 3), True):
        for name in ("AdaptiveAvgPool2d", "AdaptiveMaxPool2d"):
            with refuses(ConfigError, f"{name} output_size"):
                getattr(layers, name)(size)
    with refuses(ConfigError, "'sum'"):
        layers.GlobalPool("sum")
    with refuses(ConfigError, "exactly one"):
        layers.FractionalMaxPool2d(2)
    with refuses(ConfigError, "kernel_size"):
        layers.FractionalMaxPool2d(0, output_size=2)
    for ratio in (2.0, 0.0, (0.5, None, 0.7)):
        with refuses(ConfigError, "FractionalMaxPool2d output_ratio", repr(ratio)):
            layers.FractionalMaxPool2d(2, output_ratio=ratio)
    with refuses(ConfigError, "FractionalMaxPool2d output_size", -1):
        layers.FractionalMaxPool2d(2, output_size=-1)
    for kernel, padding in ((2, 5), (2, 2), (5, 3)):
        with refuses(ConfigError, "StochasticPool2d padding", padding):
            layers.StochasticPool2d(kernel, padding=padding)
        layers.StochasticPool2d(kernel, padding=kernel // 2)
    with refuses(ShapeError, "(4, 4)"):
        layers.GlobalPool()(torch.rand(4, 4))
