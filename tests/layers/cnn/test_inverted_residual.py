"""The inverted residual is torchvision's, without and with squeeze-and-excitation, and its formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from handbook_src.errors import ConfigError
from handbook_src.layers.cnn.inverted_residual import InvertedResidual
from handbook_src.testing import assert_parity, oracle, refuses


@pytest.mark.outside("inverted-residual")
@pytest.mark.parity("inverted-residual")
@pytest.mark.parametrize("shape", [(2, 6, 7, 5), (1, 6, 4, 3)])
@pytest.mark.parametrize(("outputs", "stride"), [(6, 1), (6, 2), (4, 1), (9, 2)])
@pytest.mark.parametrize("ratio", [1, 2, 1.5, 6])
@pytest.mark.parametrize("training", [True, False])
def test_it_is_torchvisions(shape, outputs, stride, ratio, training, same_block):
    published = oracle.load("torchvision.models.mobilenetv2")
    mine, theirs = InvertedResidual(6, outputs, stride, ratio), published.InvertedResidual(6, outputs, stride, ratio)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    same_block(mine, theirs, shape, training=training)


@pytest.mark.outside("inverted-residual")
@pytest.mark.parametrize(("outputs", "stride"), [(8, 1), (16, 2)])
@pytest.mark.parametrize("ratio", [1, 4])
@pytest.mark.parametrize("training", [True, False])
def test_with_a_gate_it_is_efficientnets(outputs, stride, ratio, training, same_block):
    published = oracle.load("torchvision.models.efficientnet")
    theirs = published.MBConv(published.MBConvConfig(ratio, 3, stride, 8, outputs, 1), 0.0, nn.BatchNorm2d)
    mine = InvertedResidual(8, outputs, stride, ratio, squeeze_channels=2, act_layer=nn.SiLU)
    same_block(mine, theirs, (2, 8, 7, 5), training=training)


@pytest.mark.parity("inverted-residual")
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_it_is_its_formula(stride, images, stir):
    block = stir(InvertedResidual(3, 3, stride, 2, norm_layer=nn.Identity, dtype=torch.float64))
    expand, depthwise, project = block.conv[0][0], block.conv[1][0], block.conv[2]

    def written_out(x):
        def pointwise(x, conv):
            return torch.einsum("bchw,oc->bohw", x, conv.weight[:, :, 0, 0]) + conv.bias[:, None, None]

        h = pointwise(x, expand).clamp(0, 6)
        padded = F.pad(h, (1, 1, 1, 1))
        rows, columns = h.shape[2:]
        h = sum(
            padded[:, :, i : i + rows, j : j + columns] * depthwise.weight[:, 0, i, j, None, None]
            for i in range(3)
            for j in range(3)
        )
        h = (h + depthwise.bias[:, None, None])[:, :, ::stride, ::stride].clamp(0, 6)
        y = pointwise(h, project)
        return x + y if stride == 1 else y

    assert_parity(block, written_out, [images(2, 3, 5, 4)])


@pytest.mark.law("inverted-residual")
def test_the_last_layer_is_linear(images):
    """Negative numbers leave the block: there is no activation after the projection."""
    block = InvertedResidual(4, 8, norm_layer=nn.Identity)
    y = block(images(2, 4, 5, 5, dtype=torch.float32))
    assert (y < 0).any()
    nn.init.zeros_(block.conv[-2].weight)
    nn.init.zeros_(block.conv[-2].bias)
    assert not block(images(2, 4, 5, 5, dtype=torch.float32)).any()


@pytest.mark.law("inverted-residual")
def test_a_silent_branch_leaves_the_identity_and_only_at_one_shape(images):
    block = InvertedResidual(4, 4)
    nn.init.zeros_(block.conv[-1].weight)
    x = images(2, 4, 5, 5, dtype=torch.float32)
    assert torch.equal(block(x), x)
    assert [InvertedResidual(4, o, s).residual for o, s in ((4, 1), (5, 1), (4, 2))] == [True, False, False]


@pytest.mark.law("inverted-residual")
@pytest.mark.parametrize("gate", [None, 3])
@pytest.mark.parametrize(("inputs", "outputs", "ratio"), [(8, 12, 6), (5, 5, 2)])
def test_its_weights_are_their_closed_form(inputs, outputs, ratio, gate):
    hidden = inputs * ratio
    weights = inputs * hidden + 9 * hidden + hidden * outputs + (2 * hidden * gate if gate else 0)
    block = InvertedResidual(inputs, outputs, 1, ratio, squeeze_channels=gate)
    assert sum(p.numel() for p in block.parameters() if p.ndim == 4) == weights


@pytest.mark.law("inverted-residual")
def test_reset_draws_anew(images):
    block = InvertedResidual(4, 4, squeeze_channels=2)
    before = [p.clone() for p in block.parameters()]
    block.conv[-1].weight.data.fill_(3.0)
    block.reset_parameters()
    assert (block.conv[-1].weight == 1).all()
    assert not torch.equal(before[0], next(block.parameters()))


@pytest.mark.refusal("inverted-residual")
def test_it_refuses():
    for ratio in (0, -1, float("nan"), float("inf"), True, "6"):
        with refuses(ConfigError, "expand_ratio", ratio):
            InvertedResidual(4, 4, 1, ratio)
    with refuses(ConfigError, "hidden channels", 0):
        InvertedResidual(4, 4, 1, 0.1)
    with refuses(ConfigError, "squeeze_channels", 0):
        InvertedResidual(4, 4, squeeze_channels=0)
