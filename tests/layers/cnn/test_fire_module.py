"""The fire module is torchvision's, and its formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from handbook_src.errors import ConfigError
from handbook_src.layers.cnn.fire_module import FireModule
from handbook_src.testing import assert_parity, oracle, refuses


@pytest.mark.outside("fire-module")
@pytest.mark.parity("fire-module")
@pytest.mark.parametrize("shape", [(2, 6, 7, 5), (1, 6, 1, 1)])
@pytest.mark.parametrize("sizes", [(2, 4, 4), (1, 3, 5), (8, 1, 2)])
@pytest.mark.parametrize("training", [True, False])
def test_it_is_torchvisions(shape, sizes, training, same_block):
    published = oracle.load("torchvision.models.squeezenet")
    mine, theirs = FireModule(6, *sizes), published.Fire(6, *sizes)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    same_block(mine, theirs, shape, training=training)


@pytest.mark.parity("fire-module")
@pytest.mark.parametrize("bypass", [False, True])
@pytest.mark.parametrize("act_layer", [nn.ReLU, nn.Tanh])
def test_it_is_its_formula(bypass, act_layer, images, stir):
    fire, act = stir(FireModule(7, 2, 3, 4, bypass=bypass, act_layer=act_layer, dtype=torch.float64)), act_layer()

    def written_out(x):
        def pointwise(x, conv):
            return act(torch.einsum("bchw,oc->bohw", x, conv.weight[:, :, 0, 0]) + conv.bias[:, None, None])

        s = pointwise(x, fire.squeeze)
        patches = F.unfold(s, 3, padding=1)  # b (channels 9) positions
        wide = fire.expand3x3.weight.flatten(1) @ patches + fire.expand3x3.bias[:, None]
        y = torch.cat([pointwise(s, fire.expand1x1), act(wide).unflatten(2, x.shape[2:])], 1)
        return x + y if bypass else y

    assert_parity(fire, written_out, [images(2, 7, 5, 4)])


@pytest.mark.law("fire-module")
def test_half_of_the_channels_see_one_pixel_only(images):
    fire = FireModule(4, 2, 3, 5, act_layer=nn.Softplus, dtype=torch.float64)
    x = images(1, 4, 5, 5).requires_grad_()
    y = fire(x)
    for channels, reach in ((y[:, :3], 1), (y[:, 3:], 9)):
        (g,) = torch.autograd.grad(channels[0, :, 2, 2].sum(), x, retain_graph=True)
        assert (g.abs().sum(1) > 0).sum() == reach


@pytest.mark.law("fire-module")
@pytest.mark.parametrize(("c", "s", "one", "three"), [(96, 16, 64, 64), (5, 2, 3, 1)])
def test_its_parameters_are_their_closed_form(c, s, one, three):
    found = sum(p.numel() for p in FireModule(c, s, one, three).parameters())
    assert found == c * s + s + s * one + one + 9 * s * three + three


@pytest.mark.law("fire-module")
def test_a_silent_module_with_bypass_is_the_identity(images):
    fire, x = FireModule(6, 2, 3, 3, bypass=True), images(2, 6, 4, 4, dtype=torch.float32)
    for conv in (fire.expand1x1, fire.expand3x3):
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)
    assert torch.equal(fire(x), x)
    fire.reset_parameters()
    assert not torch.equal(fire(x), x)


@pytest.mark.refusal("fire-module")
def test_it_refuses():
    with refuses(ConfigError, "bypass", "6 channels in, 8 out"):
        FireModule(6, 2, 4, 4, bypass=True)
    for i, name in enumerate(("in_channels", "squeeze_channels", "expand1x1_channels", "expand3x3_channels")):
        sizes = [4, 4, 4, 4]
        sizes[i] = 0
        with refuses(ConfigError, name, 0):
            FireModule(*sizes)
