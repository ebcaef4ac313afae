"""The layers drop in for torchvision's, and the one that predicts its offsets starts as a convolution."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.layers.convolution.deformable_conv import DeformableConv2d, DeformConv2d
from handbook_src.testing import assert_parity, refuses


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def theirs(*args, **options):
    from torchvision.ops import DeformConv2d as Torchvisions

    return Torchvisions(*args, **options)


def moved(layer: DeformableConv2d, seed: int = 5) -> DeformableConv2d:
    """With a predictor that says something."""
    with torch.no_grad():
        layer.predictor_weight.copy_(draw(*layer.predictor_weight.shape, seed=seed))
        layer.predictor_bias.copy_(draw(*layer.predictor_bias.shape, seed=seed + 1))
    return layer.double()


@pytest.mark.parity("deformable-conv")
@pytest.mark.outside("deformable-conv")
@pytest.mark.parametrize(
    "options", [{}, {"padding": 1, "bias": False}, {"stride": (2, 1), "dilation": 2, "padding": (2, 0), "groups": 2}]
)
@pytest.mark.parametrize("masked", [True, False])
def test_the_layer_is_torchvisions(options, masked):
    oracle, mine = theirs(4, 6, 3, **options).double(), DeformConv2d(4, 6, 3, **options).double()
    mine.load_state_dict(oracle.state_dict())
    plain = torch.nn.Conv2d(4, 6, 3, **options)(torch.zeros(2, 4, 7, 8))
    offset, mask = draw(2, 18, *plain.shape[2:], seed=1), draw(2, 9, *plain.shape[2:], seed=2) if masked else None
    pairs = list(zip(mine.parameters(), oracle.parameters(), strict=True))
    assert_parity(mine, oracle, [draw(2, 4, 7, 8), offset, mask], parameters=pairs)


@pytest.mark.parity("deformable-conv")
@pytest.mark.parametrize("offset_groups", [1, 2])
@pytest.mark.parametrize("modulated", [True, False])
def test_the_predictor_is_a_convolution_in_front_of_torchvisions(offset_groups, modulated):
    layer = moved(DeformableConv2d(DeformConv2d(4, 6, 3, 2, 1), offset_groups=offset_groups, modulated=modulated))
    oracle = theirs(4, 6, 3, 2, 1).double()
    oracle.load_state_dict(layer.conv.state_dict())

    def composed(x):
        said = F.conv2d(x, layer.predictor_weight, layer.predictor_bias, 2, 1)
        offset, z = said.tensor_split([18 * offset_groups], 1)
        return oracle(x, offset, z.sigmoid() if modulated else None)

    pairs = list(zip(layer.conv.parameters(), oracle.parameters(), strict=True))
    assert_parity(layer, composed, [draw(2, 4, 7, 5)], parameters=pairs)


@pytest.mark.law("deformable-conv")
@pytest.mark.parametrize("groups", [1, 2])
def test_a_fresh_layer_is_a_convolution(groups):
    torch.manual_seed(0)
    conv = DeformConv2d(4, 6, 3, padding=1, groups=groups).double()
    x = draw(2, 4, 7, 5)
    plain = F.conv2d(x, conv.weight, conv.bias, padding=1, groups=groups)
    torch.testing.assert_close(DeformableConv2d(conv, modulated=False)(x), plain)
    half = DeformableConv2d(conv)(x)  # version 2 starts every tap at one half
    torch.testing.assert_close(half, F.conv2d(x, conv.weight / 2, conv.bias, padding=1, groups=groups))


@pytest.mark.law("deformable-conv")
def test_the_predictor_learns_from_the_first_step():
    layer = DeformableConv2d(DeformConv2d(2, 3, 3, padding=1)).double()
    layer(draw(2, 2, 6, 6)).square().sum().backward()
    grad = layer.predictor_weight.grad
    assert (grad[:18].abs().amax((1, 2, 3)) > 0).all()
    assert (grad[18:].abs().amax((1, 2, 3)) > 0).all()


@pytest.mark.law("deformable-conv")
def test_reset_silences_the_predictor_and_draws_as_torch_does():
    layer = moved(DeformableConv2d(DeformConv2d(8, 32, 3)))
    torch.manual_seed(3)
    layer.reset_parameters()
    assert not layer.predictor_weight.any()
    assert not layer.predictor_bias.any()
    torch.manual_seed(3)
    plain = torch.nn.Conv2d(8, 32, 3, dtype=torch.float64)
    torch.testing.assert_close(layer.conv.state_dict(), plain.state_dict())


@pytest.mark.registration("deformable-conv")
def test_arguments_and_keys_are_torchvisions():
    from torchvision.ops import DeformConv2d as Torchvisions

    mine, oracle = (inspect.signature(c).parameters for c in (DeformConv2d, Torchvisions))
    assert list(oracle) == [n for n, p in mine.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert {n: p.default for n, p in oracle.items()} == {n: mine[n].default for n in oracle}
    theirs(4, 6, 3).load_state_dict(DeformConv2d(4, 6, 3).state_dict())


@pytest.mark.registration("deformable-conv")
@pytest.mark.parametrize("modulated", [True, False])
def test_copies_pickles_compiles_and_halves(modulated, unchecked):
    layer = moved(DeformableConv2d(DeformConv2d(4, 6, 3, padding=1), modulated=modulated)).float()
    x = draw(2, 4, 7, 5).float()
    y = layer(x)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(again(x), y)
    fresh = DeformableConv2d(DeformConv2d(4, 6, 3, padding=1), modulated=modulated)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), y)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), y)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).isfinite().all()
    for dtype in (torch.bfloat16, torch.float16):
        small = DeformableConv2d(DeformConv2d(4, 6, 3, padding=1), modulated=modulated).to(dtype)
        assert small(x.to(dtype)).dtype == dtype
    with torch.device("meta"):
        ghost = DeformableConv2d(DeformConv2d(4, 6, 3, padding=1), modulated=modulated)
    assert ghost(x.to("meta")).shape == y.shape
    assert "kernel_size=(3, 3)" in repr(layer)
    assert "modulated" in repr(layer)


@pytest.mark.refusal("deformable-conv")
def test_refuses_sizes_and_groups():
    for name, args in (("in_channels", (0, 4, 3)), ("out_channels", (4, -1, 3)), ("kernel_size", (4, 4, 0))):
        with refuses(ConfigError, name):
            DeformConv2d(*args)
    for options in ({"stride": 0}, {"padding": -1}, {"dilation": 0}, {"groups": 0}, {"groups": 1.5}, {"groups": True}):
        with refuses(ConfigError, *options):
            DeformConv2d(4, 4, 3, **options)
    with refuses(ShapeError, "in_channels", "5 in 2 groups"):
        DeformConv2d(5, 4, 3, groups=2)
    with refuses(ShapeError, "out_channels", "5 in 2 groups"):
        DeformConv2d(4, 5, 3, groups=2)
    for groups in (0, 1.5, True):
        with refuses(ConfigError, "offset_groups", groups):
            DeformableConv2d(DeformConv2d(4, 4, 3), offset_groups=groups)
    with refuses(ShapeError, "3 for 4 channels"):
        DeformableConv2d(DeformConv2d(4, 4, 3), offset_groups=3)


@pytest.mark.refusal("deformable-conv")
def test_refuses_inputs_that_do_not_fit():
    layer = DeformableConv2d(DeformConv2d(4, 6, 3))
    for bad, error_says in (
        (torch.ones(4, 7, 7), "3 axes"),
        (torch.ones(2, 3, 7, 7), "3 channels"),
        (torch.ones(2, 4, 2, 7), (2, 7)),
        (torch.ones(2, 4, 7, 7, dtype=torch.long), "torch.int64"),
        (torch.ones(2, 4, 7, 7, dtype=torch.float64), "torch.float64"),
    ):
        with refuses(ShapeError, error_says):
            layer(bad)
