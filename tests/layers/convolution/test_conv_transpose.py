"""The transposed layers drop in for torch's: arguments, initial values, outputs, gradients, state dict."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch import Tensor, nn

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.layers.convolution import conv_transpose as ours
from handbook_src.layers.convolution.conv import Conv2d
from handbook_src.testing import assert_parity, refuses

ID = "transposed-conv"
SHAPES = {"ConvTranspose1d": (2, 4, 5), "ConvTranspose2d": (2, 4, 4, 3), "ConvTranspose3d": (2, 4, 2, 3, 2)}
NAMES = pytest.mark.parametrize("name", SHAPES)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(name: str, *args: object, backend: str = "auto", **options: object) -> tuple[nn.Module, nn.Module]:
    """Our layer and torch's, in float64, with the same parameters."""
    mine, theirs = getattr(ours, name)(*args, backend=backend, **options), getattr(nn, name)(*args, **options)
    mine.load_state_dict(theirs.state_dict())
    return mine.double(), theirs.double()


@pytest.mark.parity(ID)
@NAMES
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False, "groups": 2},
        {"stride": 2, "padding": 1, "output_padding": 1},
        {"stride": (3,), "dilation": 2, "padding": 2, "output_padding": 2},
        {"groups": 4, "stride": 2},
    ],
)
def test_layers_are_torchs(name, options, backend):
    mine, theirs = pair(name, 4, 8, 3, backend=backend, **options)
    parameters = list(zip(mine.parameters(), theirs.parameters(), strict=True))
    x = draw(*SHAPES[name])
    assert_parity(mine, theirs, [x], parameters=parameters)
    assert_parity(mine, theirs, [x[0]], parameters=parameters)


@pytest.mark.parity(ID)
@NAMES
def test_output_size_chooses_among_the_sizes_of_a_stride(name):
    mine, theirs = pair(name, 4, 2, 3, stride=3, padding=1)
    x = draw(*SHAPES[name])
    smallest = theirs(x).shape[2:]
    for extra in range(3):
        size = [n + extra for n in smallest]
        torch.testing.assert_close(mine(x, size), theirs(x, size))
        torch.testing.assert_close(mine(x, [2, 2, *size]), theirs(x, [2, 2, *size]))


@pytest.mark.law(ID)
@pytest.mark.parametrize("n", [5, 6, 7, 8])
def test_it_gives_a_convolutions_input_size_back(n):
    down, up = (
        Conv2d(3, 6, 3, stride=2, padding=1).double(),
        ours.ConvTranspose2d(6, 3, 3, stride=2, padding=1).double(),
    )
    x = draw(2, 3, n, n + 1)
    y = up(down(x), output_size=x.shape)
    assert y.shape == x.shape
    up.load_state_dict({"weight": down.weight, "bias": torch.zeros(3)})
    z = draw(*down(x).shape, seed=1)
    without = down(x) - down.bias[:, None, None]
    torch.testing.assert_close((without * z).sum(), (x * up(z, output_size=x.shape)).sum())


@pytest.mark.registration(ID)
@NAMES
def test_signature_initial_values_and_text_are_torchs(name):
    mine, theirs = getattr(ours, name), getattr(nn, name)
    got, want = inspect.signature(mine).parameters, inspect.signature(theirs).parameters
    assert list(got)[:-1] == list(want)
    assert [p.default for p in got.values()][:-1] == [p.default for p in want.values()]
    for options in ({}, {"groups": 2, "dilation": 2, "padding": 1, "stride": 2, "output_padding": 1}, {"bias": False}):
        torch.manual_seed(3)
        a = mine(4, 6, 3, **options)
        torch.manual_seed(3)
        b = theirs(4, 6, 3, **options)
        torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=0)
        assert repr(a) == repr(b)


@pytest.mark.registration(ID)
@NAMES
def test_they_copy_pickle_move_and_compile(name, unchecked):
    layer, x = getattr(ours, name)(4, 6, 3, stride=2), draw(*SHAPES[name]).float()
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), y)
    for dtype in (torch.bfloat16, torch.float16):
        half = copy.deepcopy(layer).to(dtype)(x.to(dtype))
        assert half.dtype == dtype
        torch.testing.assert_close(half.float(), y, rtol=0.05, atol=0.05)
    meta = getattr(ours, name)(4, 6, 3, stride=2, device="meta", dtype=torch.float64)
    assert meta(draw(*SHAPES[name]).to("meta")).shape == y.shape
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), y)


@pytest.mark.refusal(ID)
@NAMES
@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({"in_channels": 0}, "0"),
        ({"out_channels": 2.5}, "2.5"),
        ({"kernel_size": 0}, "0"),
        ({"kernel_size": (3,) * 5}, "(3, 3, 3, 3, 3)"),
        ({"stride": -1}, "-1"),
        ({"padding": "same"}, "'same'"),
        ({"padding": -1}, "-1"),
        ({"dilation": True}, "True"),
        ({"groups": 3}, "in_channels=4"),
        ({"out_channels": 5, "groups": 2}, "out_channels=5"),
        ({"output_padding": 2, "stride": 2}, "2 with stride 2"),
        ({"output_padding": 1}, "1 with stride 1"),
        ({"padding_mode": "reflect"}, "'reflect'"),
    ],
)
def test_settings_that_cannot_work_are_refused(name, options, value):
    with refuses(ConfigError, name, value):
        getattr(ours, name)(**{"in_channels": 4, "out_channels": 6, "kernel_size": 3, **options})


@pytest.mark.refusal(ID)
@NAMES
def test_inputs_that_do_not_fit_are_refused(name):
    layer, x = getattr(ours, name)(4, 6, 3, stride=2), draw(*SHAPES[name]).float()
    with refuses(ShapeError, "3 channels", "4 channels"):
        layer(x[:, :3])
    for bad in (x[0, 0], x[None]):
        with refuses(ShapeError, tuple(bad.shape)):
            layer(bad)
        with refuses(ShapeError, tuple(bad.shape)):
            layer(bad, output_size=[9] * (x.ndim - 2))
    with refuses(ShapeError, torch.int64):
        layer(x.long())
    with refuses(ShapeError, torch.float64, torch.float32):
        layer(x.double())
    with refuses(ShapeError, 0):
        layer(x[..., :0])
    assert layer(x[:0]).shape[0] == 0


@pytest.mark.refusal(ID)
@NAMES
def test_output_sizes_out_of_reach_are_refused(name):
    layer, x = getattr(ours, name)(4, 6, 3, stride=2), draw(*SHAPES[name]).float()
    good = list(layer(x).shape[2:])
    for size in ([n - 1 for n in good], [n + 2 for n in good], good[:-1], [6, *good]):
        with refuses(ShapeError, tuple(size), "output_size"):
            layer(x, size)


@pytest.mark.refusal(ID)
def test_a_small_kernel_under_a_large_cut_is_no_wrong_setting():
    layer = ours.ConvTranspose1d(1, 1, 1, padding=3)
    assert layer(torch.ones(1, 1, 7)).shape == (1, 1, 1)
    with refuses(ShapeError, 6):
        layer(torch.ones(1, 1, 6))
