"""Squeeze-and-excitation is torchvision's and timm's, and a gate."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from handbook_src.errors import ConfigError
from handbook_src.layers.cnn.se_block import SEBlock
from handbook_src.testing import assert_batch_independent, assert_parity, oracle, refuses


@pytest.mark.outside("se-block")
@pytest.mark.parity("se-block")
@pytest.mark.parametrize("shape", [(2, 8, 5, 7), (1, 8, 1, 1), (3, 8, 4, 4)])
@pytest.mark.parametrize("squeeze", [1, 3, 8])
@pytest.mark.parametrize(("act", "gate"), [(nn.ReLU, nn.Sigmoid), (nn.SiLU, nn.Hardsigmoid)])
@pytest.mark.parametrize("training", [True, False])
def test_it_is_torchvisions(shape, squeeze, act, gate, training, same_block):
    published = oracle.load("torchvision.ops.misc")
    mine = SEBlock(8, squeeze_channels=squeeze, act_layer=act, gate_layer=gate)
    theirs = published.SqueezeExcitation(8, squeeze, act, gate)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    same_block(mine, theirs, shape, training=training)


@pytest.mark.outside("se-block")
@pytest.mark.parametrize("reduction", [1, 4, 8])
def test_it_is_timms(reduction, same_block):
    published = oracle.load("timm.layers.squeeze_excite")
    mine, theirs = SEBlock(16, reduction), published.SEModule(16, rd_ratio=1 / reduction, rd_divisor=1)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    same_block(mine, theirs, (2, 16, 3, 5), training=True)


@pytest.mark.parity("se-block")
@pytest.mark.parametrize(("channels", "reduction"), [(8, 2), (9, 4), (1, 1)])
def test_it_is_its_formula(channels, reduction, images, stir):
    block = stir(SEBlock(channels, reduction, dtype=torch.float64))
    assert block.fc1.out_channels == channels // reduction
    w1, w2 = block.fc1.weight[:, :, 0, 0], block.fc2.weight[:, :, 0, 0]

    def written_out(x):
        z = x.sum((2, 3)) / (x.shape[2] * x.shape[3])
        s = 1 / (1 + torch.exp(-((z @ w1.T + block.fc1.bias).clamp(min=0) @ w2.T + block.fc2.bias)))
        return s[:, :, None, None] * x

    assert_parity(block, written_out, [images(3, channels, 5, 2)])


@pytest.mark.law("se-block")
def test_a_wide_open_gate_is_the_identity_and_a_shut_one_silence(images):
    block, x = SEBlock(8, 2), images(2, 8, 5, 5, dtype=torch.float32)
    for bias, wanted in ((40.0, x), (-200.0, 0 * x)):
        nn.init.constant_(block.fc2.bias, bias)
        torch.testing.assert_close(block(x), wanted, rtol=1e-6, atol=1e-12)


@pytest.mark.law("se-block")
def test_it_knows_channels_but_no_places(images):
    """One factor per channel: pixels may be shuffled before or after, and samples don't mix."""
    block, x = SEBlock(6, 2, dtype=torch.float64), images(3, 6, 4, 5)
    order = torch.randperm(20)

    def shuffled(x):
        return x.flatten(2)[..., order].view_as(x)

    torch.testing.assert_close(block(shuffled(x)), shuffled(block(x)))
    ratio = block(x) / x
    torch.testing.assert_close(ratio, ratio[:, :, :1, :1].expand_as(x))
    assert ((ratio > 0) & (ratio < 1)).all()
    assert_batch_independent(block, x)


@pytest.mark.law("se-block")
def test_its_parameters_are_their_closed_form():
    found = sum(p.numel() for p in SEBlock(64, 16).parameters())
    assert found == 2 * 64 * 4 + 4 + 64


@pytest.mark.refusal("se-block")
def test_it_refuses():
    with refuses(ConfigError, "reduction", "16 of 8 channels", "squeeze_channels"):
        SEBlock(8)
    for reduction in (0, -2, 2.0, True):
        with refuses(ConfigError, "reduction", reduction):
            SEBlock(8, reduction)
    with refuses(ConfigError, "squeeze_channels", 0):
        SEBlock(8, squeeze_channels=0)
    with refuses(ConfigError, "act_layer", "Sigmoid()"):
        SEBlock(8, 2, gate_layer=nn.Sigmoid())
