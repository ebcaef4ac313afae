"""The inception module is torchvision's where that has its slip, and the paper's formula."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from handbook_src.errors import ConfigError
from handbook_src.layers.cnn.inception_module import InceptionModule
from handbook_src.layers.normalisation.norm import BatchNorm2d
from handbook_src.testing import assert_parity, oracle, refuses


@pytest.mark.outside("inception-module")
@pytest.mark.parity("inception-module")
@pytest.mark.parametrize("shape", [(2, 6, 7, 5), (1, 6, 2, 3)])
@pytest.mark.parametrize("sizes", [(4, (3, 5), (2, 3), 2), (1, (1, 1), (1, 1), 1)])
@pytest.mark.parametrize("training", [True, False])
def test_it_is_torchvisions(shape, sizes, training, same_block):
    published = oracle.load("torchvision.models.googlenet")
    mine = InceptionModule(6, *sizes, kernel_size=3, norm_layer=partial(BatchNorm2d, eps=1e-3))
    one, (r3, three), (r5, five), pool = sizes
    theirs = published.Inception(6, one, r3, three, r5, five, pool)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    same_block(mine, theirs, shape, training=training)


@pytest.mark.parity("inception-module")
@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7])
def test_it_is_the_papers_formula(kernel_size, images, stir):
    block = stir(InceptionModule(3, 4, (3, 5), (2, 3), 2, kernel_size=kernel_size, dtype=torch.float64))

    def through(x, stage):
        weight, side = stage.conv.weight, stage.conv.kernel_size[0]
        y = weight.flatten(1) @ F.unfold(x, side, padding=side // 2) + stage.conv.bias[:, None]
        return y.clamp(min=0).unflatten(2, x.shape[2:])

    def written_out(x):
        neighbours = F.unfold(F.pad(x, (1, 1, 1, 1), value=-torch.inf), 3).unflatten(1, (3, 9))
        pooled = neighbours.amax(2).unflatten(2, x.shape[2:])
        three = through(through(x, block.branch2[0]), block.branch2[1])
        five = through(through(x, block.branch3[0]), block.branch3[1])
        return torch.cat([through(x, block.branch1), three, five, through(pooled, block.branch4[1])], 1)

    assert_parity(block, written_out, [images(2, 3, 6, 5)])


@pytest.mark.law("inception-module")
def test_branches_stand_in_order_and_reach_1_3_5_and_3_pixels(images):
    block = InceptionModule(4, 2, (3, 4), (3, 5), 1, norm_layer=nn.Identity, dtype=torch.float64)
    for conv in (m for m in block.modules() if isinstance(m, nn.Conv2d)):
        conv.weight.data.abs_()
        nn.init.constant_(conv.bias, 10.0)  # every ReLU is open
    x = images(1, 4, 9, 9).requires_grad_()
    y = block(x)
    assert y.shape[1] == 12
    for part, reach in zip(y[0, :, 4, 4].split([2, 4, 5, 1]), (1, 9, 25), strict=False):
        (g,) = torch.autograd.grad(part.sum(), x, retain_graph=True)
        assert (g.abs().sum(1) > 0).sum() == reach
    (g,) = torch.autograd.grad(y[0, 11, 4, 4], x)
    assert (g != 0).sum() == 4  # one largest neighbour a channel
    assert not g[..., :3, :].any()


@pytest.mark.law("inception-module")
def test_its_weights_are_those_of_googlenets_table():
    """3a: 159k parameters in table 1 of the paper, rounded there; the count of weights is exact here."""
    block = InceptionModule(192, 64, (96, 128), (16, 32), 32)
    weights = 192 * (64 + 96 + 16 + 32) + 9 * 96 * 128 + 25 * 16 * 32
    assert sum(p.numel() for p in block.parameters() if p.ndim == 4) == weights


@pytest.mark.law("inception-module")
def test_reset_draws_anew():
    block = InceptionModule(3, 2, (2, 2), (2, 2), 2, norm_layer=BatchNorm2d)
    before = block.branch1.conv.weight.clone()
    block.branch1.bn.weight.data.fill_(3.0)
    block.reset_parameters()
    assert (block.branch1.bn.weight == 1).all()
    assert not torch.equal(before, block.branch1.conv.weight)


@pytest.mark.refusal("inception-module")
def test_it_refuses():
    good = {"in_channels": 4, "ch1x1": 2, "ch3x3": (2, 3), "ch5x5": (2, 3), "pool_proj": 2}
    for name, value in [("in_channels", 0), ("ch1x1", -1), ("pool_proj", 1.5), ("ch3x3", (2, 0)), ("ch5x5", (1, 2, 3))]:
        with refuses(ConfigError, "InceptionModule", name):
            InceptionModule(**{**good, name: value})
    with refuses(ConfigError, "kernel_size", 4):
        InceptionModule(**good, kernel_size=4)
