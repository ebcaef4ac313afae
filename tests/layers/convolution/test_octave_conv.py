"""The layer holds one weight, that of a plain convolution, and says what it misses."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.convolution.octave_conv import halve, octave_conv2d
from handbook_src.layers.convolution.octave_conv import OctaveConv2d
from handbook_src.testing import assert_parity, refuses


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parity("octave-conv")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("alpha", [0.5, (0.25, 0.5), (0.5, 0.0)])
def test_the_layer_is_its_function(alpha, groups, bias):
    layer = OctaveConv2d(8, 12, 3, alpha, 2, 1, groups=groups, bias=bias).double()
    high, low = draw(2, layer.in_split[0], 7, 6), draw(2, layer.in_split[1], 4, 3)
    twin = copy.deepcopy(layer)

    def function(high, low):
        pair = octave_conv2d(high, low, twin.weight, twin.bias, layer.alpha_out, 2, 1, 1, groups)
        return tuple(y for y in pair if y is not None)

    def mine(high, low):
        return tuple(y for y in layer(high, low) if y is not None)

    pairs = list(zip(layer.parameters(), twin.parameters(), strict=True))
    assert_parity(mine, function, [high, low], parameters=pairs)


@pytest.mark.parity("octave-conv")
@pytest.mark.law("octave-conv")
@pytest.mark.parametrize("options", [{}, {"padding": 1, "bias": False}, {"stride": 2, "dilation": 2, "groups": 4}])
def test_with_alpha_zero_it_is_torchs_convolution(options):
    oracle, mine = nn.Conv2d(4, 8, 3, **options).double(), OctaveConv2d(4, 8, 3, 0.0, **options).double()
    mine.load_state_dict(oracle.state_dict())
    pairs = list(zip(mine.parameters(), oracle.parameters(), strict=True))
    assert_parity(lambda x: mine(x)[0], oracle, [draw(2, 4, 7, 6)], parameters=pairs)


@pytest.mark.law("octave-conv")
@pytest.mark.parametrize("alpha", [0.0, 0.125, 0.5, 1.0])
def test_the_share_costs_no_parameter(alpha):
    count = sum(p.numel() for p in OctaveConv2d(8, 16, 3, alpha).parameters())
    assert count == sum(p.numel() for p in nn.Conv2d(8, 16, 3).parameters())


@pytest.mark.law("octave-conv")
def test_it_draws_as_torch_does():
    torch.manual_seed(3)
    mine = OctaveConv2d(8, 16, 3, 0.5)
    torch.manual_seed(3)
    torch.testing.assert_close(mine.state_dict(), nn.Conv2d(8, 16, 3).state_dict())


@pytest.mark.law("octave-conv")
def test_layers_chain_from_one_image_to_one_image():
    first, middle = OctaveConv2d(3, 8, 3, (0.0, 0.5), padding=1), OctaveConv2d(8, 8, 3, 0.5, 2, 1)
    last = OctaveConv2d(8, 5, 1, (0.5, 0.0))
    y, none = last(*middle(*first(draw(2, 3, 11, 7).float())))
    assert none is None
    assert y.shape == (2, 5, 6, 4)


@pytest.mark.registration("octave-conv")
def test_copies_pickles_compiles_and_halves(unchecked):
    layer = OctaveConv2d(4, 6, 3, 0.5, padding=1)
    high, low = draw(2, 2, 7, 5).float(), draw(2, 2, 4, 3).float()
    y = layer(high, low)
    again = OctaveConv2d(4, 6, 3, 0.5, padding=1)
    again.load_state_dict(layer.state_dict())
    for twin in (again, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(twin(high, low), y, rtol=0, atol=0)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(high, low), y)
    for dtype in (torch.bfloat16, torch.float16):
        assert copy.deepcopy(layer).to(dtype)(high.to(dtype), low.to(dtype))[1].dtype == dtype
    with torch.device("meta"):
        assert OctaveConv2d(4, 6, 3, 0.5, padding=1)(high.to("meta"), low.to("meta"))[0].shape == y[0].shape
    assert "alpha=(0.5, 0.5)" in repr(layer)


@pytest.mark.refusal("octave-conv")
def test_refuses_settings():
    for options, named in (
        ({"alpha": 1.5}, 1.5),
        ({"alpha": (0.5, -1.0)}, -1.0),
        ({"alpha": 0.1}, "less than one"),
        ({"in_channels": 0}, "channels"),
        ({"out_channels": 2.5}, 2.5),
        ({"kernel_size": 0}, "kernel_size"),
        ({"stride": True}, "stride"),
        ({"padding": -1}, -1),
        ({"dilation": 0}, "dilation"),
        ({"groups": 0}, "groups"),
    ):
        with refuses(ConfigError, named):
            OctaveConv2d(**{"in_channels": 4, "out_channels": 4, "kernel_size": 3, **options})
    with refuses(ShapeError, "groups", (2, 2)):
        OctaveConv2d(4, 4, 3, groups=4)


@pytest.mark.refusal("octave-conv")
def test_refuses_octaves_that_are_missing_or_too_many():
    layer, x = OctaveConv2d(4, 4, 3, 0.5, padding=1), torch.ones(2, 2, 6, 6)
    with refuses(ShapeError, "low", "0 channels", "alpha_in=0.5"):
        layer(x)
    with refuses(ShapeError, "high", "4 channels"):
        layer(torch.ones(2, 4, 6, 6))
    with refuses(ShapeError, "low", "2 channels"):
        OctaveConv2d(2, 4, 3, (0.0, 0.5), padding=1)(x, halve(x))
    with refuses(ShapeError, "3 axes"):
        layer(x[0], halve(x))
    with refuses(ShapeError, "odd kernel"):
        OctaveConv2d(4, 4, 2, 0.5, padding=1)(x, halve(x))


@pytest.mark.refusal("octave-conv")
def test_shares_that_are_none_are_refused() -> None:
    for bad in (None, "0.5", (0.5, 0.25, 0.1), [0.5], (None, 0.5)):
        with refuses(ConfigError, "alpha", repr(bad)):
            OctaveConv2d(8, 8, 3, bad)  # type: ignore[arg-type]
    assert OctaveConv2d(8, 8, 3, [0.5, 0.25]).in_split == OctaveConv2d(8, 8, 3, (0.5, 0.25)).in_split
